"""What is told of snapshots: frozen views, read from several records at once. Sizes are bytes, times seconds."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from blockvirt.errors import DamagedRecord
from blockvirt.meta.keys import Table, number_key, pair_key, split_point
from blockvirt.meta.records import BranchRecord, SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Reader
from blockvirt.snapshots.freed import freed_by

log = logging.getLogger("blockvirt.snapshots")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot as users see it."""

    id: str
    volume_id: str
    volume: str
    """Name of its volume."""
    name: str
    created_s: float
    size_bytes: int
    mapped_bytes: int
    exclusive_bytes: int
    """What deleting it, and nothing else, would free."""
    revision: int
    parent_id: str = ""
    """The snapshot that its history went on from; empty: none of this volume."""
    labels: Mapping[str, str] = field(default_factory=dict)
    holds: tuple[str, ...] = ()
    clones: tuple[str, ...] = ()
    """Names of the volumes that were cloned from it and still need it, ids where they were deleted."""
    sessions: int = 0
    group_id: str = ""
    schedule_id: str = ""


def volume_snapshots(reader: Reader, volume_id: str) -> list[SnapshotRecord]:
    """Return all snapshots of a volume, oldest first; damaged ones are left out and logged."""
    found = []
    for _, snapshot_id in reader.scan(Table.SNAPSHOT_NAMES, prefix=f"{volume_id}/".encode()):
        try:
            record = reader.record(SnapshotRecord, Table.SNAPSHOTS, snapshot_id)
        except DamagedRecord as error:
            log.error("a snapshot of volume %s is left out: %s", volume_id, error.message)
            continue
        if record is not None:
            found.append(record)
    return sorted(found, key=lambda each: (each.created_s, each.branch, each.epoch, each.id))


def view(reader: Reader, record: SnapshotRecord, parent_id: str, chunk_bytes: int, sessions: int) -> Snapshot:
    """Return the view of a snapshot; raises DamagedRecord."""
    return replace(
        _plain_view(reader, record, chunk_bytes, parent_id),
        exclusive_bytes=freed_by(reader, [record]) * chunk_bytes,
        clones=clones_of(reader, record),
        sessions=sessions,
    )


def new_view(reader: Reader, record: SnapshotRecord, chunk_bytes: int) -> Snapshot:
    """Return the view of a snapshot as it is when it is taken: nothing but the head has gone on from it."""
    return _plain_view(reader, record, chunk_bytes, parent_of(reader, record.branch, record.epoch))


def _plain_view(reader: Reader, record: SnapshotRecord, chunk_bytes: int, parent_id: str) -> Snapshot:
    """Return what its own record tells of a snapshot, as if nobody used it and nothing were its alone."""
    volume = reader.record(VolumeRecord, Table.VOLUMES, record.volume_id.encode())
    return Snapshot(
        id=record.id,
        volume_id=record.volume_id,
        volume=volume.name if volume is not None else record.volume_id,
        name=record.name,
        created_s=record.created_s,
        size_bytes=record.size_bytes,
        mapped_bytes=min(record.mapped_chunks * chunk_bytes, record.size_bytes),
        exclusive_bytes=0,
        revision=record.revision,
        parent_id=parent_id,
        labels=record.labels,
        holds=record.holds,
        group_id=record.group_id,
        schedule_id=record.schedule_id,
    )


def parent_of(reader: Reader, branch: int, epoch: int) -> str:
    """Return the id of the snapshot, of the branch's volume, that a point at ``epoch`` went on from; empty: none.

    The nearest one that is there and can be shown: whether it was the very next one once, nobody knows any more.
    """
    volume_id = None
    while (record := reader.record(BranchRecord, Table.BRANCHES, number_key(branch))) is not None:
        if volume_id not in (None, record.volume_id):
            break  # a clone's origin is no part of its own history
        volume_id = record.volume_id
        key = pair_key(branch, epoch)
        while (found := reader.floor(Table.POINTS, key, prefix=number_key(branch))) is not None:
            who = split_point(found[0])[2]
            if isinstance(who, str) and _is_intact(reader, who):
                return who
            key = found[0][:16]  # before all of that epoch: a child, behind children only, or a damaged snapshot
        if not record.origin_branch:
            break
        branch, epoch = record.origin_branch, record.origin_epoch + 1
    return ""


def _is_intact(reader: Reader, snapshot_id: str) -> bool:
    try:
        return reader.record(SnapshotRecord, Table.SNAPSHOTS, snapshot_id.encode()) is not None
    except DamagedRecord:
        return False


def clones_of(reader: Reader, record: SnapshotRecord) -> tuple[str, ...]:
    """Return the volumes, other than its own, whose branches come from a snapshot."""
    names = set()
    for key, _ in reader.scan(Table.POINTS, prefix=pair_key(record.branch, record.epoch) + b"c"):
        child = reader.record(BranchRecord, Table.BRANCHES, number_key(int(split_point(key)[2])))
        if child is not None and child.volume_id != record.volume_id:
            volume = reader.record(VolumeRecord, Table.VOLUMES, child.volume_id.encode())
            names.add(volume.name if volume is not None else child.volume_id)
    return tuple(sorted(names))
