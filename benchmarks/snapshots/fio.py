"""fio runs beside whose figures stand the system calls of the server and the bytes that its disk wrote."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from benchmarks.jobs import Cell, State, Unit
from benchmarks.measure import Sample
from benchmarks.servers import Volume

SECTOR_BYTES = 512  # of the block layer's statistics, whatever the disk has
BLOCK_BYTES = 4 << 10


def random_cell(kind: str, depth: int, *more: str) -> Cell:
    """4 KiB random reads ('read') or writes ('write') on a volume that holds data."""
    options = (f"--rw=rand{kind}", "--bs=4k", f"--iodepth={depth}", *more)
    return Cell(f"{kind}-{depth}", f"4 KiB random {kind}, QD{depth}", State.FILLED, Unit.IOPS, options)


@dataclass(frozen=True, slots=True)
class CountedCell(Cell):
    """A cell during which perf counts the system calls that a process enters."""

    pid: int | None = None
    counts: str = ""
    """Where perf writes them."""

    def command(self, engine: tuple[str, ...], size_bytes: int, runtime_s: float, output: str) -> list[str]:
        fio = Cell.command(self, engine, size_bytes, runtime_s, output)
        perf = ["perf", "stat", "-x,", "-e", "raw_syscalls:sys_enter", "-p", str(self.pid), "-o", self.counts]
        return [*perf, "--", *fio]


def run_counted(cell: Cell, volume: Volume, size_bytes: int, runtime_s: float) -> tuple[Sample, float | None]:
    """Measure a cell, and the system calls per request (None: this machine cannot count them)."""
    if not can_count():
        return measure.run(cell, volume, size_bytes, runtime_s), None
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        counts = Path(scratch) / "perf"
        counted = CountedCell(
            cell.name, cell.title, cell.state, cell.unit, cell.options, cell.share, pid=volume.pid, counts=str(counts)
        )
        sample = measure.run(counted, volume, size_bytes, runtime_s)
        return sample, calls_in(counts.read_text()) / sample.requests


def calls_in(text: str) -> int:
    """The count in what `perf stat -x,` wrote: the first field of its one line without a '#'."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    (line,) = lines
    return int(line.split(",")[0])


def can_count() -> bool:
    """Whether perf may trace system calls here: it is installed, and we are root."""
    return os.geteuid() == 0 and shutil.which("perf") is not None


def disk_bytes_written(directory: Path) -> int | None:
    """What the block device under a directory has written so far, everything synced; None: it has no such figure."""
    os.sync()
    device = directory.stat().st_dev
    statistics = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    try:
        return int(statistics.read_text().split()[6]) * SECTOR_BYTES
    except FileNotFoundError:
        return None
