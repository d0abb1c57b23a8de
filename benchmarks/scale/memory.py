"""Memory of a daemon that serves a volume whose map is larger than the budget for maps.

The map is written as records over a sparse file. What the daemon takes at the same load on the volume's first GiB is
the base: whatever comes to it when the load goes over the whole range is map, and that has a budget.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure as fio
from benchmarks.jobs import Cell, Ground, Unit
from benchmarks.scale.figures import Figure, at_most
from benchmarks.servers import Volume
from benchmarks.snapshots.fio import random_cell
from benchmarks.snapshots.ground import LEAF_BYTES, MIB, VOLUME, MappedPool, say, size_of
from blockvirt.limits import LEAF_CACHE_BYTES

NARROW_BYTES = 1 << 30
LOOK_S = 0.05
ANYWHERE = "--norandommap=1"  # fio's map of what it has read takes memory, and nothing here comes round again
KINDS = ("VmRSS", "RssAnon", "RssFile")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of it."""

    volume_bytes: int
    seconds: float
    first_writes: int
    """Into a volume that is empty; each takes a chunk."""


FULL, QUICK = Sizes(1 << 40, 15.0, 30_000), Sizes(64 << 30, 2.0, 2_000)


def measure(directory: Path, quick: bool) -> list[Figure]:
    """Read and write narrowly, then all over it, then all over an empty volume."""
    sizes = QUICK if quick else FULL
    say(f"writing the records of a volume of {size_of(sizes.volume_bytes)}")
    pool = MappedPool(directory, sizes.volume_bytes)
    first_writes = Cell(
        "first",
        "first writes",
        Ground.FRESH,
        Unit.IOPS,
        ("--rw=randwrite", "--bs=4k", "--iodepth=32", f"--number_ios={sizes.first_writes}", ANYWHERE),
    )
    peaks = []
    with pool.running() as daemon:
        idle = resident(daemon.pid)
        daemon.create("empty", sizes.volume_bytes)
        mapped, empty = daemon.served(VOLUME), daemon.served("empty")
        reads, writes = random_cell("read", 32, ANYWHERE), random_cell("write", 32, ANYWHERE)
        with peak(daemon.pid) as base:
            for cell in (reads, writes):
                fio.run(cell, mapped, NARROW_BYTES, 2.0)
        for title, cell, volume in (
            ("reads of", reads, mapped),
            ("writes over", writes, mapped),
            ("first writes into an empty volume of", first_writes, empty),
        ):
            peaks.append((title, *_run(daemon.pid, cell, volume, sizes)))
        rest = resident(daemon.pid)
    limit_mib = (base["VmRSS"] + LEAF_CACHE_BYTES) / MIB
    figures = []
    for title, most, rate in peaks:
        split = ", ".join(f"{kind} {most[kind] / MIB:.1f}" for kind in KINDS[1:])
        note = f"{split}; {rate:,.0f} IOPS"
        what = f"resident at most during random {title} {size_of(sizes.volume_bytes)}"
        figures.append(Figure(what, most["VmRSS"] / MIB, "MiB", at_most(round(limit_mib, 1)), note))
    base_note = f"idle {idle['VmRSS'] / MIB:.1f}; at the end {rest['VmRSS'] / MIB:.1f}; the budget for maps is "
    base_note += f"{LEAF_CACHE_BYTES / MIB:.0f}; {sizes.volume_bytes // LEAF_BYTES:,} leaves"
    figures.append(Figure("the same load on 1 GiB of it (the base)", base["VmRSS"] / MIB, "MiB", note=base_note))
    return figures


def _run(pid: int, cell: Cell, volume: Volume, sizes: Sizes) -> tuple[dict[str, int], float]:
    with peak(pid) as most:
        sample = fio.run(cell, volume, sizes.volume_bytes, sizes.seconds)
    say(f"{cell.name} {sample.rate:,.0f} IOPS, at most {most['VmRSS'] / MIB:.1f} MiB")
    return most, sample.rate


@contextmanager
def peak(pid: int) -> Iterator[dict[str, int]]:
    """The most resident bytes of a process by kind, looked at again and again inside the block."""
    most = resident(pid)
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_S):
            for kind, value in resident(pid).items():
                most[kind] = max(most[kind], value)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        yield most
    finally:
        over.set()
        looker.join()


def resident(pid: int) -> dict[str, int]:
    """Resident bytes of a process by kind: all of them, its own, those of files that it has mapped."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        kind, _, value = line.partition(":")
        if kind in KINDS:
            found[kind] = int(value.split()[0]) * 1024
    return found
