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
from benchmarks.jobs import Cell, State, Unit
from benchmarks.scale.figures import Figure, at_most
from benchmarks.snapshots.fio import random_cell
from benchmarks.snapshots.ground import LEAF_BYTES, MIB, VOLUME, MappedPool, say, size_of
from blockvirt.limits import LEAF_CACHE_BYTES

NARROW_BYTES = 1 << 30
LOOK_S = 0.05
ANYWHERE = "--norandommap=1"  # fio's map of what it has read takes memory, and nothing here comes round again
KINDS = ("VmRSS", "RssAnon")


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
        State.FRESH,
        Unit.IOPS,
        ("--rw=randwrite", "--bs=4k", "--iodepth=32", f"--number_ios={sizes.first_writes}", ANYWHERE),
    )
    peaks: dict[str, dict[str, int]] = {}
    with pool.running() as daemon:
        daemon.create("empty", sizes.volume_bytes)
        mapped, empty = daemon.served(VOLUME), daemon.served("empty")
        reads, writes = random_cell("read", 32, ANYWHERE), random_cell("write", 32, ANYWHERE)
        with peak(daemon.pid) as base:
            for cell in (reads, writes):
                fio.run(cell, mapped, NARROW_BYTES, 2.0)
        for title, cell, volume in (
            ("reads", reads, mapped),
            ("writes", writes, mapped),
            ("first writes into an empty one", first_writes, empty),
        ):
            with peak(daemon.pid) as peaks[title]:
                sample = fio.run(cell, volume, sizes.volume_bytes, sizes.seconds)
            say(f"{title}: {sample.rate:,.0f} IOPS, at most {_mib(peaks[title]['RssAnon'])} MiB of its own")
    what = (
        f"resident at most, random I/O over {size_of(sizes.volume_bytes)} ({sizes.volume_bytes // LEAF_BYTES:,} leaves)"
    )
    return [
        _figure(f"{what}: its own memory", "RssAnon", base, peaks),
        _figure(f"{what}: with files that are mapped, metadata above all", "VmRSS", base, peaks),
    ]


def _figure(what: str, kind: str, base: dict[str, int], peaks: dict[str, dict[str, int]]) -> Figure:
    limit_mib = round((base[kind] + LEAF_CACHE_BYTES) / MIB, 1)
    each = ", ".join(f"{title} {_mib(most[kind])}" for title, most in peaks.items())
    note = f"{each}; on 1 GiB of it {_mib(base[kind])}, and the budget for maps is {_mib(LEAF_CACHE_BYTES)}"
    return Figure(what, max(most[kind] for most in peaks.values()) / MIB, "MiB", at_most(limit_mib), note)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.1f}"


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
    """Resident bytes of a process by kind: all of them, and those that are of no file, which the kernel cannot drop."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        kind, _, value = line.partition(":")
        if kind in KINDS:
            found[kind] = int(value.split()[0]) * 1024
    return found
