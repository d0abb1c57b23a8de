"""What is measured: each cell is one fio job with the nbd engine, the same for every server."""

from dataclasses import dataclass
from enum import StrEnum


class Ground(StrEnum):
    """What a cell runs on."""

    FRESH = "fresh"  # a volume made for this one measurement, nothing of it allocated
    FILLED = "filled"  # the server's long-lived volume, written once from end to end


class Unit(StrEnum):
    """What a cell's rate is counted in."""

    IOPS = "IOPS"
    MBPS = "MB/s"


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the report. `whole` cells write the volume once, the others run for the time that was asked for."""

    name: str
    title: str
    ground: Ground
    unit: Unit
    options: tuple[str, ...]
    whole: bool = False

    def command(self, uri: str, size_bytes: int, runtime_s: float, output: str) -> list[str]:
        """fio's command line for this cell against a volume."""
        # fio stops at whichever comes first; a fresh volume must not come round again, or it were fresh no more.
        bound = [f"--runtime={max(1, round(runtime_s * 1000))}ms"]
        if self.whole:
            bound = []
        elif self.ground is Ground.FILLED:
            bound.append("--time_based=1")
        common = [f"--uri={uri}", f"--size={size_bytes}", "--group_reporting=1"]
        # JSON goes to a file: on standard output fio's nbd engine says "connected to NBD server" in front of it.
        written = ["--output-format=json", f"--output={output}"]
        return ["fio", f"--name={self.name}", "--ioengine=nbd", *common, *self.options, *bound, *written]


def _cell(name: str, title: str, ground: Ground, unit: Unit, *options: str, whole: bool = False) -> Cell:
    return Cell(name, title, ground, unit, tuple(f"--{option}" for option in options), whole)


FRESH, FILLED, IOPS, MBPS = Ground.FRESH, Ground.FILLED, Unit.IOPS, Unit.MBPS

CELLS = (
    _cell("seq-fresh", "1 MiB sequential write, fresh, QD8", FRESH, MBPS, "rw=write", "bs=1M", "iodepth=8", whole=True),
    _cell("seq-again", "1 MiB sequential write, again, QD8", FILLED, MBPS, "rw=write", "bs=1M", "iodepth=8"),
    _cell("seq-read", "1 MiB sequential read, QD8", FILLED, MBPS, "rw=read", "bs=1M", "iodepth=8"),
    _cell("read-32", "4 KiB random read, QD32", FILLED, IOPS, "rw=randread", "bs=4k", "iodepth=32"),
    _cell("write-32", "4 KiB random write, QD32", FILLED, IOPS, "rw=randwrite", "bs=4k", "iodepth=32"),
    _cell("read-1", "4 KiB random read, QD1", FILLED, IOPS, "rw=randread", "bs=4k", "iodepth=1"),
    _cell("write-1", "4 KiB random write, QD1", FILLED, IOPS, "rw=randwrite", "bs=4k", "iodepth=1"),
    _cell("write-fresh-32", "4 KiB random write, fresh, QD32", FRESH, IOPS, "rw=randwrite", "bs=4k", "iodepth=32"),
    _cell("mixed-16k", "16 KiB 70/30 mixed, QD16", FILLED, IOPS, "rw=randrw", "rwmixread=70", "bs=16k", "iodepth=16"),
    # fsync=1 is a FLUSH after every write and before the next; the engine knows no fdatasync.
    _cell("flush-1", "4 KiB write + flush, QD1", FILLED, IOPS, "rw=randwrite", "bs=4k", "iodepth=1", "fsync=1"),
    _cell(
        "flush-fresh-1", "4 KiB write + flush, fresh, QD1", FRESH, IOPS, "rw=randwrite", "bs=4k", "iodepth=1", "fsync=1"
    ),
    _cell(
        "read-4x16",
        "4 KiB random read, 4 connections, QD16 each",
        FILLED,
        IOPS,
        "rw=randread",
        "bs=4k",
        "iodepth=16",
        "numjobs=4",
    ),
    _cell(
        "write-4x16",
        "4 KiB random write, 4 connections, QD16 each",
        FILLED,
        IOPS,
        "rw=randwrite",
        "bs=4k",
        "iodepth=16",
        "numjobs=4",
    ),
)
