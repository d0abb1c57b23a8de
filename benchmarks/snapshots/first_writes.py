"""The first 4 KiB random writes after a snapshot, where each copies a chunk (or a cluster) before it changes it."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from benchmarks.jobs import FILL, Cell, State, Unit
from benchmarks.measure import Sample
from benchmarks.servers import Volume
from benchmarks.snapshots.daemon import Daemon
from benchmarks.snapshots.fio import BLOCK_BYTES, disk_bytes_written
from benchmarks.snapshots.ground import CHUNK_BYTES, Ground, say
from benchmarks.snapshots.qcow2 import FILL_RUNTIME_S, Qcow2
from benchmarks.snapshots.tables import figure, median_or_none, table

WRITES_PER_CHUNK = 8  # so many chunks for one write: nearly every write is the first into its chunk
DEPTH = 32
DEADLINE_S = 120.0  # of one run


@dataclass(frozen=True, slots=True)
class Found:
    """One round of one server."""

    sample: Sample
    amplification: float | None
    """Bytes that the disk wrote for each that the client wrote."""


def report(ground: Ground) -> str:
    """Measure and return the table."""
    options, size_bytes = ground.options, ground.options.first_writes_bytes
    writes = size_bytes // CHUNK_BYTES // WRITES_PER_CHUNK
    daemon = Daemon(ground.directory / "first-writes")
    internal, overlaid = (Qcow2(ground.directory / name, size_bytes) for name in ("internal", "overlaid"))
    found: defaultdict[str, list[Found]] = defaultdict(list)
    daemon.start()
    try:
        daemon.create("v", size_bytes)
        measure.run(FILL, daemon.served("v"), size_bytes, FILL_RUNTIME_S)
        internal.fill()
        overlaid.fill()
        daemon.snapshot("v")
        daemon.settle()  # its data has checksums from now on, as after hours of service
        contenders: dict[str, Callable[[], AbstractContextManager[Volume]]] = {
            "blockvirt": lambda: _ours(daemon),
            "qcow2, internal snapshot": lambda: _internal(internal),
            "qcow2, new overlay": lambda: _overlaid(overlaid),
        }
        for number in range(options.rounds):
            turn = number % len(contenders)
            names = list(contenders)
            for name in names[turn:] + names[:turn]:
                with contenders[name]() as volume:
                    found[name].append(_measure(volume, writes, size_bytes, ground.directory))
                last = found[name][-1].sample
                say(f"round {number + 1} first writes {name:26} {last.rate:9,.0f} IOPS {last.cpu_us:6.1f} us")
    finally:
        daemon.stop()
        internal.remove()
        overlaid.remove()
    first = 100 * WRITES_PER_CHUNK * (1 - math.exp(-1 / WRITES_PER_CHUNK))
    heading = f"First 4 KiB random writes after a snapshot, QD{DEPTH} ({first:.0f} % of {writes:,} first in a chunk)"
    rows = [_row(name, found[name], found["blockvirt"]) for name in contenders]
    return table(heading, ["server", "IOPS", "blockvirt x", "CPU us/write", "p99 us", "write amplification"], rows)


def _row(name: str, found: list[Found], ours: list[Found]) -> list[str]:
    rate, our_rate = (statistics.median(each.sample.rate for each in some) for some in (found, ours))
    return [
        name,
        figure(rate, 0),
        figure(our_rate / rate, 2),
        figure(statistics.median(each.sample.cpu_us for each in found)),
        figure(statistics.median(each.sample.p99_us for each in found), 0),
        figure(median_or_none([each.amplification for each in found])),
    ]


def _measure(volume: Volume, writes: int, size_bytes: int, directory: Path) -> Found:
    options = ("--rw=randwrite", "--bs=4k", f"--iodepth={DEPTH}", f"--number_ios={writes}", "--randrepeat=0")
    cell = Cell("first-writes", "first writes", State.FRESH, Unit.IOPS, options)
    before = disk_bytes_written(directory)
    sample = measure.run(cell, volume, size_bytes, DEADLINE_S)
    after = disk_bytes_written(directory)
    if before is None or after is None:
        return Found(sample, None)
    return Found(sample, (after - before) / (sample.requests * BLOCK_BYTES))


@contextmanager
def _ours(daemon: Daemon) -> Iterator[Volume]:
    daemon.settle()
    daemon.snapshot("v")
    yield daemon.served("v")


@contextmanager
def _internal(image: Qcow2) -> Iterator[Volume]:
    image.snapshot()
    with image.served() as volume:
        yield volume


@contextmanager
def _overlaid(image: Qcow2) -> Iterator[Volume]:
    image.overlay()
    with image.served() as volume:
        yield volume
