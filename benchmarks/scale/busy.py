"""Many volumes that are read and written at once: does each get its share, and does the API still answer?"""

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import cpu_seconds
from benchmarks.scale import load
from benchmarks.scale.asking import Askers, askers
from benchmarks.scale.figures import Figure, at_most, below
from benchmarks.scale.load import Window
from benchmarks.scale.metrics import by_volume
from benchmarks.snapshots.daemon import Daemon
from benchmarks.snapshots.ground import MIB, say
from benchmarks.snapshots.tables import percentile
from blockvirt.nbd import constants as c
from blockvirt.nbd.messages import REQUEST, SIMPLE_REPLY

FAIR_RATIO = 2
API_LIMIT_MS = 50
DEPTH = 4
START_S = 2.0  # until all connections are there and busy


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of it."""

    volumes: int
    volume_bytes: int
    seconds: float


FULL, QUICK = Sizes(256, 4 * MIB, 10.0), Sizes(32, 4 * MIB, 2.0)


def measure(directory: Path, quick: bool) -> list[Figure]:
    """Fill the volumes, ask the API while nothing else runs, then while all volumes are busy."""
    sizes = QUICK if quick else FULL
    daemon = Daemon(directory)
    exports = [f"v{number}" for number in range(sizes.volumes)]
    with ExitStack() as stack:
        daemon.start()
        stack.callback(daemon.stop)
        path = str(daemon.state / "nbd.sock")
        say(f"filling {sizes.volumes} volumes")
        for export in exports:
            daemon.create(export, sizes.volume_bytes)
            _transfer(path, export, c.CMD_WRITE)
        both = stack.enter_context(askers())
        quiet = _ask(both, daemon, exports[0], Window(now := time.monotonic(), now + min(2.0, sizes.seconds)))
        for export in exports:
            stack.enter_context(load.connect(path, export)[0])  # a volume that nobody has open is not counted
            _transfer(path, export, c.CMD_READ)  # rests may have left the page cache by now
        slow = _slow_requests(daemon)
        began_s = time.monotonic() + START_S
        window = Window(began_s, began_s + sizes.seconds)
        asked = both.begin(daemon.state, exports[0], window)
        before_s = cpu_seconds(daemon.pid)
        done = load.run(path, exports, DEPTH, window)
        daemon_ratio = (cpu_seconds(daemon.pid) - before_s) / (time.monotonic() - began_s + START_S)
        beside = [result.get() for result in asked]
        slow = _slow_requests(daemon) - slow
    rates = [count / sizes.seconds for count in done.requests]
    slowest = statistics.median(rates) / max(min(rates), 1e-9)
    spread = (
        f"{min(rates):,.0f} to {max(rates):,.0f} IOPS, median {statistics.median(rates):,.0f}; "
        f"{sum(rates):,.0f} in all, {slow:,.0f} requests waited for the disk; "
        f"client {done.busy_ratio:.0%} and daemon {daemon_ratio:.0%} of a processor"
    )
    title = f"{sizes.volumes} busy volumes, QD{DEPTH}: median rate over the slowest"
    return [
        Figure(title, slowest, "x", at_most(FAIR_RATIO), spread, 2),
        _api_figure("`GET` of a volume beside them, p99", beside[0], quiet[0]),
        _api_figure("`POST` and `DELETE` of a host beside them, p99", beside[1], quiet[1]),
    ]


def _ask(both: Askers, daemon: Daemon, volume: str, window: Window) -> list[list[float]]:
    return [result.get() for result in both.begin(daemon.state, volume, window)]


def _api_figure(title: str, seconds: Sequence[float], quiet: Sequence[float]) -> Figure:
    p50_ms, p99_ms, most_ms = (percentile(seconds, percent) * 1e3 for percent in (50, 99, 100))
    note = f"p50 {p50_ms:.1f}, longest {most_ms:.1f}, of {len(seconds):,}; p99 alone {percentile(quiet, 99) * 1e3:.1f}"
    return Figure(title, p99_ms, "ms", below(API_LIMIT_MS), note)


def _slow_requests(daemon: Daemon) -> float:
    """How many reads and writes did not find what they needed in memory."""
    names = ("blockvirt_volume_slow_reads_total", "blockvirt_volume_slow_writes_total")
    return sum(sum(by_volume(daemon.state, name).values()) for name in names)


def _transfer(path: str, export: str, command: int) -> None:
    """Write all of an export, or read it, a MiB at a time."""
    sock, size_bytes = load.connect(path, export)
    payload, reply_bytes = (b"\1" * MIB, 0) if command == c.CMD_WRITE else (b"", MIB)
    with sock, sock.makefile("rb") as stream:
        for offset in range(0, size_bytes, MIB):
            sock.sendall(REQUEST.pack(c.REQUEST_MAGIC, 0, command, 1, offset, MIB) + payload)
            load.count_replies(stream.read(SIMPLE_REPLY.size))
            stream.read(reply_bytes)
