"""What is told of snapshots: frozen views, read from several records at once. Sizes are bytes, times seconds."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from blockvirt.errors import DamagedRecord, InvalidRequest
from blockvirt.meta.keys import Table, number_key, pair_key, split_point, split_volume_branch
from blockvirt.meta.records import BranchRecord, SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Reader
from blockvirt.snapshots.freed import freed_by
from blockvirt.snapshots.lineage import Tree, tree

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


@dataclass(frozen=True, slots=True)
class Page:
    """Some snapshots in order of creation within their volume, and the key to go on after (empty: that was all)."""

    snapshots: tuple[Snapshot, ...]
    next_after: str


def page_key(snapshot: Snapshot) -> str:
    """Return the key to go on after, which leads behind the snapshot even when that is gone."""
    return f"{snapshot.volume_id}/{snapshot.id}/{snapshot.created_s!r}"


def behind(records: list[SnapshotRecord], key: str) -> list[SnapshotRecord]:
    """Return those of a volume's snapshots, oldest first, that come after the ``page_key`` of one of them.

    Raises InvalidRequest where it is none.
    """
    try:
        _, snapshot_id, created = key.split("/")
        created_s = float(created)
    except ValueError:
        raise InvalidRequest("the place to go on after is none", correction="begin with the first page") from None
    for place, record in enumerate(records):
        if record.id == snapshot_id:
            return records[place + 1 :]
    return [record for record in records if record.created_s > created_s]


def volume_snapshots(reader: Reader, volume_id: str, *, skip_damaged: bool = False) -> list[SnapshotRecord]:
    """Return all snapshots of a volume, oldest first; raises DamagedRecord unless those are only logged."""
    found = []
    for _, snapshot_id in reader.scan(Table.SNAPSHOT_NAMES, prefix=f"{volume_id}/".encode()):
        try:
            record = reader.record(SnapshotRecord, Table.SNAPSHOTS, snapshot_id)
        except DamagedRecord as error:
            if not skip_damaged:
                raise
            log.error("a snapshot of volume %s is left out: %s", volume_id, error.message)
            continue
        if record is not None:
            found.append(record)
    return sorted(found, key=lambda each: (each.created_s, each.branch, each.epoch, each.id))


def volume_tree(reader: Reader, volume: VolumeRecord, snapshots: list[SnapshotRecord]) -> Tree:
    """Return how the snapshots of a volume came from each other, and where its head stands."""
    branches = {}
    for key, _ in reader.scan(Table.VOLUME_BRANCHES, prefix=f"{volume.id}/".encode()):
        number = split_volume_branch(key)[1]
        branch = reader.record(BranchRecord, Table.BRANCHES, number_key(number))
        if branch is not None:
            branches[number] = branch
    return tree(snapshots, branches, volume.branch)


def view(
    reader: Reader, record: SnapshotRecord, parents: Mapping[str, str], chunk_bytes: int, sessions: int
) -> Snapshot:
    """Return the view of a snapshot; raises DamagedRecord."""
    return replace(
        _plain_view(reader, record, chunk_bytes, parents.get(record.id, "")),
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

    What ``lineage.tree`` says for one point, without a look at all snapshots.
    """
    volume_id = None
    while (record := reader.record(BranchRecord, Table.BRANCHES, number_key(branch))) is not None:
        if volume_id not in (None, record.volume_id):
            break  # a clone's origin is no part of its own history
        volume_id = record.volume_id
        key = pair_key(branch, epoch)
        while (found := reader.floor(Table.POINTS, key, prefix=number_key(branch))) is not None:
            who = split_point(found[0])[2]
            if isinstance(who, str):
                return who
            key = found[0][:16]  # a child: at its epoch only children sort before it
        if not record.origin_branch:
            break
        branch, epoch = record.origin_branch, record.origin_epoch + 1
    return ""


def clones_of(reader: Reader, record: SnapshotRecord) -> tuple[str, ...]:
    """Return the volumes, other than its own, whose branches come from a snapshot."""
    names = set()
    for key, _ in reader.scan(Table.POINTS, prefix=pair_key(record.branch, record.epoch) + b"c"):
        child = reader.record(BranchRecord, Table.BRANCHES, number_key(int(split_point(key)[2])))
        if child is not None and child.volume_id != record.volume_id:
            volume = reader.record(VolumeRecord, Table.VOLUMES, child.volume_id.encode())
            names.add(volume.name if volume is not None else child.volume_id)
    return tuple(sorted(names))
