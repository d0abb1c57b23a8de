"""Random reads of what is not in the page cache, beside qemu-nbd; and a warm volume of the same daemon meanwhile."""

import statistics
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure as fio
from benchmarks.jobs import FILL, WARM, Cell, State, Unit
from benchmarks.measure import Sample
from benchmarks.scale.beside import run_beside
from benchmarks.scale.figures import Figure, at_least, at_most
from benchmarks.scale.page_cache import evict
from benchmarks.servers import QemuNbd, ServerUnavailable, Volume
from benchmarks.snapshots.daemon import Daemon
from benchmarks.snapshots.fio import random_cell
from benchmarks.snapshots.ground import MIB, say
from benchmarks.snapshots.qcow2 import FILL_RUNTIME_S

RATIO = 0.9
STALL_LIMIT_MS = 10
OURS = "blockvirt"
PROBE = random_cell("read", 1)
# Fresh to fio: it ends when every block was read once, for a second time they would be warm.
COLD = Cell("cold-32", "cold", State.FRESH, Unit.IOPS, ("--rw=randread", "--bs=4k", "--iodepth=32"))


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of it."""

    cold_bytes: int
    warm_bytes: int
    rounds: int
    runtime_s: float


FULL, QUICK = Sizes(2048 * MIB, 256 * MIB, 5, 3.0), Sizes(256 * MIB, 32 * MIB, 1, 1.0)


def measure(directory: Path, quick: bool) -> list[Figure]:
    """Alternate between the servers, then read warm data beside the cold."""
    sizes = QUICK if quick else FULL
    directory.mkdir()
    daemon = Daemon(directory / "ours")
    with ExitStack() as stack:
        daemon.start()
        stack.callback(daemon.stop)
        daemon.create("cold", sizes.cold_bytes)
        daemon.create("warm", sizes.warm_bytes)
        volumes = {OURS: daemon.served("cold")} | _qemu(directory, sizes, stack)
        warm = daemon.served("warm")
        for volume in volumes.values():
            fio.run(FILL, volume, sizes.cold_bytes, FILL_RUNTIME_S)
        fio.run(FILL, warm, sizes.warm_bytes, FILL_RUNTIME_S)
        files = [*(daemon.device / "files").iterdir(), *directory.glob("*/bench0")]  # ours, and qemu-nbd's images
        rates = _rates(files, volumes, sizes)
        alone, beside = _stalls(files, volumes[OURS], warm, sizes)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    others = {name: rate for name, rate in medians.items() if name != OURS}
    title = "cold 4 KiB random read, QD32, over the better qemu-nbd"
    told = ", ".join(f"{name} {rate:,.0f}" for name, rate in medians.items())
    if others:
        ratio = Figure(title, medians[OURS] / max(others.values()), "x", at_least(RATIO), f"{told} IOPS", 2)
    else:
        ratio = Figure(title, None, "x", at_least(RATIO), f"there is no qemu-nbd; {told} IOPS")
    longest_ms = max(sample.longest_us for sample in beside) / 1e3
    note = (
        f"longest of each round {_longest(beside)}; p99 {max(each.p99_us for each in beside) / 1e3:.2f}; "
        f"{statistics.median(each.rate for each in beside):,.0f} IOPS; "
        f"with nothing beside it, longest {_longest(alone)}, {statistics.median(each.rate for each in alone):,.0f} IOPS"
    )
    return [ratio, Figure("longest warm read, QD1, beside it", longest_ms, "ms", at_most(STALL_LIMIT_MS), note)]


def _qemu(directory: Path, sizes: Sizes, stack: ExitStack) -> dict[str, Volume]:
    """A qcow2 volume for each way that qemu-nbd has to its file, of those that work here."""
    volumes = {}
    for aio in ("io_uring", "threads"):
        server = QemuNbd(directory / aio, aio)
        try:
            server.start()
            volumes[f"qemu-nbd {aio}"] = stack.enter_context(server.volume(sizes.cold_bytes))
        except ServerUnavailable as error:
            say(str(error))
    return volumes


def _rates(files: list[Path], volumes: dict[str, Volume], sizes: Sizes) -> dict[str, list[float]]:
    rates: defaultdict[str, list[float]] = defaultdict(list)
    names = list(volumes)
    for number in range(sizes.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            evict(files)
            sample = fio.run(COLD, volumes[name], sizes.cold_bytes, sizes.runtime_s)
            rates[name].append(sample.rate)
            say(f"round {number + 1} cold {name:18} {sample.rate:9,.0f} IOPS {sample.cpu_us:6.1f} us CPU")
    return dict(rates)


def _stalls(files: list[Path], cold: Volume, warm: Volume, sizes: Sizes) -> tuple[list[Sample], list[Sample]]:
    """The warm reads without and with cold ones beside them."""
    alone, beside = [], []
    for number in range(sizes.rounds):
        evict(files)
        fio.run(WARM, warm, sizes.warm_bytes, FILL_RUNTIME_S)
        alone.append(fio.run(PROBE, warm, sizes.warm_bytes, sizes.runtime_s))
        fio.run(WARM, warm, sizes.warm_bytes, FILL_RUNTIME_S)
        _, probe = run_beside(COLD, cold, sizes.cold_bytes, sizes.runtime_s, PROBE, warm, sizes.warm_bytes)
        beside.append(probe)
        longest_ms = probe.longest_us / 1e3
        say(f"round {number + 1} warm {probe.rate:9,.0f} IOPS, longest {longest_ms:.1f} ms beside cold reads")
    return alone, beside


def _longest(samples: list[Sample]) -> str:
    return "/".join(f"{sample.longest_us / 1e3:.1f}" for sample in samples)
