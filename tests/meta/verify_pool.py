"""A small sound pool for the tests of its proof, and changes to plant in it."""

from collections.abc import Callable
from dataclasses import replace

from blockvirt.errors import DamagedRecord
from blockvirt.meta.keys import (
    POOL_KEY,
    Table,
    born_key,
    child_point_key,
    leaf_key,
    number_key,
    pair_key,
    snapshot_name_key,
    snapshot_point_key,
    unit_key,
    volume_branch_key,
    volume_unit_key,
)
from blockvirt.meta.records import (
    BranchRecord,
    DeviceRecord,
    FileRecord,
    HostRecord,
    IdempotencyRecord,
    JobRecord,
    PoolRecord,
    Record,
    ScheduleRecord,
    ScrubFinding,
    ScrubRecord,
    SnapshotRecord,
    UnitRecord,
    VolumeRecord,
    encode,
    seal,
)
from blockvirt.meta.store import Writer

VOLUME = VolumeRecord("v1", "web", 1 << 30, 1, 1.0)
GOING = VolumeRecord("v2", "web", 1 << 30, 2, 1.0, deleting=True)  # its name was given to another volume already
TRASHED = VolumeRecord("v3", "web", 1 << 30, 3, 1.0, trashed_s=2.0, purge_at_s=3.0)
CLONE = VolumeRecord("v4", "copy", 1 << 30, 4, 1.0)
BRANCH = BranchRecord(1, "v1", 5, first_epoch=1)
CLONED = BranchRecord(4, "v4", 6, first_epoch=5, origin_branch=1, origin_epoch=4, pins=((2, 3),))
LEFT = BranchRecord(5, "v1", 0, first_epoch=1)  # what a revert left behind: a snapshot keeps it
DYING = BranchRecord(6, "v9", 0, first_epoch=1)  # its volume is gone, its rows are going
FILE = FileRecord(1, 1, "d1", used_chunks=10, live_chunks=4)
HOST = HostRecord("h1", "web1", 1.0)
UNIT = UnitRecord("u1", "h1", 0, "v1", 1.0)
POOL = PoolRecord("p", 1, 65536, 1.0, epoch=6, next_branch=7, next_file=7)
SNAPSHOT = SnapshotRecord("s1", "v1", "monday", 1, 4, 1 << 30, 1.0, mapped_chunks=3, holds=("backup",))
OLD_SNAPSHOT = SnapshotRecord("s2", "v1", "sunday", 5, 2, 1 << 30, 1.0)
SCHEDULE = ScheduleRecord("c1", "daily", "0 3 * * *", 1.0, volume_id="v1")
PURGE = JobRecord("j1", "purge", "running", "web", 1.0, volume_id="v2")
SCRUB = ScrubRecord("j9", 1.0, ended_s=2.0, damaged=1, findings=(ScrubFinding("chunk", "damaged", ("web", "copy")),))
LEAF = leaf_key(1, 7, 4)
PUNCH = pair_key(1, 3)
POINT, CHILD = snapshot_point_key(1, 4, "s1"), child_point_key(1, 4, 4)


def decode_leaf(payload: bytes) -> None:
    """Stands for the map's decoder."""
    if payload != b"leaf":
        raise DamagedRecord("no leaf")


def fill(writer: Writer) -> None:
    """A small sound pool: snapshots, a clone, a volume in the trash, one being purged, a branch being reclaimed."""
    writer.put_record(Table.POOL, POOL_KEY, POOL)
    writer.put_record(Table.DEVICES, b"d1", DeviceRecord("d1", "disk1", "/d", 1.0))
    for volume in (VOLUME, GOING, TRASHED, CLONE):
        writer.put_record(Table.VOLUMES, volume.id.encode(), volume)
    branches = (BRANCH, BranchRecord(2, "v2", 6, first_epoch=1), BranchRecord(3, "v3", 6), CLONED, LEFT, DYING)
    for branch in branches:
        writer.put_record(Table.BRANCHES, number_key(branch.number), branch)
        writer.put(Table.VOLUME_BRANCHES, volume_branch_key(branch.volume_id, branch.number), b"")
        file = replace(FILE, number=branch.number, branch=branch.number)
        writer.put_record(Table.FILES, number_key(file.number), file)
        writer.put(Table.BRANCH_FILES, pair_key(file.branch, file.number), b"")
    writer.put(Table.VOLUME_NAMES, b"web", b"v1")
    writer.put(Table.VOLUME_NAMES, b"copy", b"v4")
    writer.put(Table.TRASH, b"v3", b"")
    writer.put(Table.LEAVES, LEAF, seal(LEAF, b"leaf"))
    writer.put(Table.BORN, born_key(1, 4, 7), b"")
    writer.put(Table.BORN, born_key(6, 4, 7), b"")  # the leaf of the dying branch is gone already
    writer.put(Table.PUNCH, PUNCH, seal(PUNCH, (2).to_bytes(8, "little")))
    for snapshot in (SNAPSHOT, OLD_SNAPSHOT):
        writer.put_record(Table.SNAPSHOTS, snapshot.id.encode(), snapshot)
        writer.put(Table.SNAPSHOT_NAMES, snapshot_name_key("v1", snapshot.name), snapshot.id.encode())
        writer.put(Table.POINTS, snapshot_point_key(snapshot.branch, snapshot.epoch, snapshot.id), b"")
    writer.put(Table.POINTS, CHILD, b"")
    writer.put(Table.POINTS, child_point_key(2, 3, 4), b"")
    writer.put(Table.SEALS, pair_key(1, 4), b"")
    writer.put(Table.RECLAIM, pair_key(6, 4), b"")
    writer.put_record(Table.HOSTS, b"h1", HOST)
    writer.put(Table.HOST_NAMES, b"web1", b"h1")
    writer.put_record(Table.UNITS, unit_key("h1", 0), UNIT)
    writer.put(Table.VOLUME_UNITS, volume_unit_key("v1", "h1", 0), b"")
    writer.put_record(Table.IDEMPOTENCY, b"k", IdempotencyRecord("k", "00", 201, "{}", "/", 1.0))
    writer.put_record(Table.SCHEDULES, b"c1", SCHEDULE)
    writer.put(Table.SCHEDULE_NAMES, b"daily", b"c1")
    writer.put_record(Table.JOBS, b"j1", PURGE)
    writer.put_record(Table.SCRUBS, b"j9", SCRUB)


Change = Callable[[Writer], None]


def puts(table: Table, key: bytes, value: bytes) -> Change:
    """A change that stores one row."""
    return lambda writer: writer.put(table, key, value)


def puts_record(table: Table, key: bytes, record: Record) -> Change:
    """A change that stores one record."""
    return puts(table, key, encode(key, record))


def drops(table: Table, key: bytes) -> Change:
    """A change that removes one row."""

    def change(writer: Writer) -> None:
        assert writer.delete(table, key)

    return change


def branch(record: BranchRecord = BRANCH, **changes: object) -> Change:
    """A change of a branch, the volume's if no other is given."""
    return puts_record(Table.BRANCHES, number_key(record.number), replace(record, **changes))  # type: ignore[arg-type]


def file(**changes: int | str) -> Change:
    """A change of its file."""
    return puts_record(Table.FILES, number_key(1), replace(FILE, **changes))  # type: ignore[arg-type]


def counters(**changes: int) -> Change:
    """A change of the pool record."""
    return puts_record(Table.POOL, POOL_KEY, replace(POOL, **changes))  # type: ignore[arg-type]


def volume(record: VolumeRecord = VOLUME, **changes: object) -> Change:
    """A change of a volume's record."""
    return puts_record(Table.VOLUMES, record.id.encode(), replace(record, **changes))  # type: ignore[arg-type]


def snapshot(**changes: object) -> Change:
    """A change of a snapshot's record."""
    return puts_record(Table.SNAPSHOTS, b"s1", replace(SNAPSHOT, **changes))  # type: ignore[arg-type]


def schedule(**changes: object) -> Change:
    """A change of the schedule's record."""
    return puts_record(Table.SCHEDULES, b"c1", replace(SCHEDULE, **changes))  # type: ignore[arg-type]


def job(**changes: object) -> Change:
    """A change of the job's record."""
    return puts_record(Table.JOBS, b"j1", replace(PURGE, **changes))  # type: ignore[arg-type]
