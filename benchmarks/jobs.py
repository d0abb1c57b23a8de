"""What is measured: the cells of the report, each the same for every server.

Most are one fio job with the nbd engine. Those that allocate in bulk end after a share of the volume, not after a time:
the work is the same for all then, while a fast server given time would go on to blocks that are allocated already.
"""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How a cell finds its volume."""

    FRESH = "fresh"  # made for this one measurement, nothing of it allocated
    FILLED = "filled"  # the server's long-lived one, written once from end to end
    SNAPSHOT = "snapshot"  # made for this one, filled, and a snapshot taken
    COPIED = "copied"  # made for this one, the half-empty image copied into it


class Unit(StrEnum):
    """What a cell's rate is counted in."""

    IOPS = "IOPS"
    MBPS = "MB/s"


class Role(StrEnum):
    """Who is measured in a cell, and compared with."""

    OURS = "blockvirt"
    QCOW2 = "best qcow2"  # in each figure the better of its servers
    PLAIN = "nbdkit file"  # no copy-on-write, no map
    FLOOR = "C floor"  # no storage either
    FILE_FLOOR = "C over a file"  # the floor with a file under it, that a flush syncs
    PYTHON = "Python floor"  # the same in Python, on one thread but for the flush
    VOLUME = "volume floor"  # and with a map, on an event loop
    BARE = "bare file"  # no server either


PEERS = frozenset({Role.OURS, Role.QCOW2, Role.PLAIN, Role.PYTHON})
WITH_FLOOR = PEERS | {Role.FLOOR}
WITH_FLOORS = WITH_FLOOR | {Role.VOLUME}
HOLELESS = frozenset({Role.FLOOR, Role.PYTHON})
"""Who cannot tell a hole from data: they copy a volume of just the data."""
WITH_FILE_FLOOR = PEERS | {Role.FILE_FLOOR, Role.VOLUME}
WITH_BARE = PEERS | {Role.FILE_FLOOR, Role.BARE}
WITH_SNAPSHOTS = frozenset({Role.OURS, Role.QCOW2, Role.VOLUME})


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the report: a fio job. Without a `share` it runs for the time that was asked for."""

    name: str
    title: str
    state: State
    unit: Unit
    options: tuple[str, ...]
    share: float | None = None
    """Of the volume's bytes: when so many were transferred, the job ends."""
    roles: frozenset[Role] = PEERS

    @property
    def reads(self) -> bool:
        """Whether it reads, so that its volume has to be in the page cache."""
        return any(option.startswith("--rw=") and "write" not in option for option in self.options)

    def command(self, engine: tuple[str, ...], size_bytes: int, runtime_s: float, output: str) -> list[str]:
        """fio's command line for this cell against a volume that `engine` reaches."""
        if self.share is not None:
            bound = [f"--io_size={int(size_bytes * self.share)}"]
        else:
            # fio stops at whichever comes first; a fresh volume must not come round again, or it were fresh no more.
            bound = [f"--runtime={max(1, round(runtime_s * 1000))}ms"]
            if self.state is State.FILLED:
                bound.append("--time_based=1")
        common = [f"--size={size_bytes}", "--group_reporting=1", *self.options, *bound]
        # JSON goes to a file: on standard output fio's nbd engine says "connected to NBD server" in front of it.
        return ["fio", f"--name={self.name}", *common, *engine, "--output-format=json", f"--output={output}"]


@dataclass(frozen=True, slots=True)
class Copy:
    """One row of the report: nbdcopy with its defaults, a half-empty image into a new volume or a volume to null.

    For the floors its data alone is a volume.
    """

    name: str
    title: str
    state: State
    unit: Unit = Unit.MBPS
    """Of data; holes do not count."""
    roles: frozenset[Role] = WITH_FLOOR

    def command(self, uri: str, image: str) -> list[str]:
        """nbdcopy's command line against a volume."""
        return ["nbdcopy", image, uri] if self.state is State.FRESH else ["nbdcopy", uri, "null:"]


Measurable = Cell | Copy


def _cell(
    name: str,
    title: str,
    state: State,
    options: str,
    *,
    unit: Unit = Unit.IOPS,
    share: float | None = None,
    roles: frozenset[Role] = PEERS,
) -> Cell:
    return Cell(name, title, state, unit, tuple(f"--{option}" for option in options.split()), share, roles)


def _sequential(name: str, title: str, state: State, kind: str, share: float | None = None) -> Cell:
    options = f"rw={kind} bs=1M iodepth=8"
    return _cell(name, f"1 MiB sequential {title}, QD8", state, options, unit=Unit.MBPS, share=share, roles=WITH_FLOOR)


def _random(
    name: str,
    title: str,
    options: str,
    state: State = State.FILLED,
    *,
    share: float | None = None,
    roles: frozenset[Role] = PEERS,
) -> Cell:
    return _cell(name, f"4 KiB {title}", state, f"bs=4k {options}", share=share, roles=roles)


def _connections(name: str, number: int, depth: int) -> Cell:
    kind = name.partition("-")[0]
    options = f"rw=rand{kind} iodepth={depth} numjobs={number}"
    return _random(name, f"random {kind}, {number} connections, QD{depth} each", options, roles=WITH_FLOORS)


FRESH, FILLED = State.FRESH, State.FILLED

FILL = _sequential("fill", "write", FRESH, "write", 1.0)
WARM = _sequential("warm", "read", FILLED, "read", 1.0)

# 16 blocks of 4 KiB are a chunk, or a cluster: in a quarter of the volume nearly all are met, in a 16th two thirds.
QUARTER, SIXTEENTH = 1 / 4, 1 / 16
# fsync=1 is a FLUSH after every write and before the next; the nbd engine knows no fdatasync.
FLUSHED = "rw=randwrite iodepth=1 fsync=1"

CELLS: tuple[Measurable, ...] = (
    _random("read-32", "random read, QD32", "rw=randread iodepth=32", roles=WITH_FLOORS),
    _random("write-32", "random write, QD32", "rw=randwrite iodepth=32", roles=WITH_FLOORS),
    _random(
        "write-fresh-32",
        "random write, fresh, QD32",
        "rw=randwrite iodepth=32",
        FRESH,
        share=QUARTER,
        roles=PEERS | {Role.VOLUME},
    ),
    _random(
        "write-snapshot-32",
        "random write right after a snapshot, QD32",
        "rw=randwrite iodepth=32",
        State.SNAPSHOT,
        share=SIXTEENTH,
        roles=WITH_SNAPSHOTS,
    ),
    _random("read-1", "random read, QD1", "rw=randread iodepth=1", roles=WITH_FLOORS),
    _random("write-1", "random write, QD1", "rw=randwrite iodepth=1", roles=WITH_FLOORS),
    _sequential("seq-read", "read", FILLED, "read"),
    _sequential("seq-again", "write, again", FILLED, "write"),
    _sequential("seq-fresh", "write, fresh", FRESH, "write", 1.0),
    _cell(
        "mixed-16k", "16 KiB 70/30 mixed, QD16", FILLED, "rw=randrw rwmixread=70 bs=16k iodepth=16", roles=WITH_FLOORS
    ),
    _random("flush-1", "write + flush, QD1", FLUSHED, roles=WITH_BARE | {Role.VOLUME}),
    _random("flush-fresh-1", "write + flush, fresh, QD1", FLUSHED, FRESH, roles=WITH_BARE),
    _random("flush-16x1", "write + flush, 16 jobs", f"{FLUSHED} numjobs=16", roles=WITH_FILE_FLOOR),
    _connections("read-4x16", 4, 16),
    _connections("write-4x16", 4, 16),
    _connections("read-32x4", 32, 4),
    _connections("write-32x4", 32, 4),
    Copy("copy-out", "nbdcopy of a half-empty volume to null", State.COPIED),
    Copy("copy-in", "nbdcopy of a half-empty image into a fresh volume", FRESH),
)
