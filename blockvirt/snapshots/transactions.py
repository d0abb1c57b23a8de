"""What the snapshots' metadata transactions do: each function runs inside one, in the store's writer thread."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from types import MappingProxyType

from blockvirt.errors import BlockvirtError, DamagedRecord, Exists, InUse, LimitReached, NotFound, PreconditionFailed
from blockvirt.ids import new_id
from blockvirt.limits import MAX_HOLDS, MAX_SNAPSHOTS
from blockvirt.meta.keys import (
    POOL_KEY,
    Table,
    number_key,
    pair_key,
    snapshot_name_key,
    snapshot_point_key,
)
from blockvirt.meta.records import REVERTED, BranchRecord, SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Reader, Writer
from blockvirt.volumes.commit import MapChange
from blockvirt.volumes.deletion import remove_snapshot
from blockvirt.volumes.imports import check_not_importing
from blockvirt.volumes.reclaim import queue_reclaim
from blockvirt.volumes.transactions import new_branch, pool_record, releasing

Also = Callable[[Writer, Sequence[SnapshotRecord]], None]
"""Joins the transaction that stores new snapshots, before they are stored; a BlockvirtError from it undoes them."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a new snapshot, or a group of them, is to be called and to carry."""

    names: dict[str, str]
    """Volume id -> name of its snapshot."""
    labels: dict[str, str]
    created_s: float
    group_id: str = ""
    schedule_id: str = ""
    also: Also | None = None


def insert(writer: Writer, wanted: Wanted, changes: Sequence[MapChange]) -> list[SnapshotRecord] | BlockvirtError:
    """Record one snapshot for each frozen branch, or none: then the refusal is returned (the maps are committed)."""
    records: list[SnapshotRecord] = []
    for change in changes:
        branch = writer.record(BranchRecord, Table.BRANCHES, number_key(change.branch))
        assert branch is not None
        volume = writer.record(VolumeRecord, Table.VOLUMES, branch.volume_id.encode())
        if volume is None or volume.deleting or volume.trashed_s or volume.branch != change.branch:
            return NotFound(f"volume {branch.volume_id} was deleted or reverted meanwhile", correction="try again")
        name = wanted.names[volume.id]
        if refusal := check_new(writer, volume, name, len(records)):
            return refusal
        records.append(
            SnapshotRecord(
                id=new_id(),
                volume_id=volume.id,
                name=name,
                branch=change.branch,
                epoch=change.epoch,
                size_bytes=volume.size_bytes,
                created_s=wanted.created_s,
                mapped_chunks=change.mapped_chunks,
                labels=dict(wanted.labels),
                group_id=wanted.group_id,
                schedule_id=wanted.schedule_id,
            )
        )
    if wanted.also is not None:
        try:
            wanted.also(writer, records)
        except BlockvirtError as refusal:
            return refusal
    for record in records:
        put_new(writer, record)
    return records


def check_new(reader: Reader, volume: VolumeRecord, name: str, more: int = 0) -> BlockvirtError | None:
    """Return why a volume cannot get a snapshot of that name; None: it can."""
    if reader.get(Table.SNAPSHOT_NAMES, snapshot_name_key(volume.id, name)) is not None:
        return Exists(f"there is a snapshot {volume.name}@{name} already", correction="choose another name")
    if reader.count(Table.SNAPSHOTS) + more >= MAX_SNAPSHOTS:
        return LimitReached(
            f"the pool has {MAX_SNAPSHOTS} snapshots, which is the most it may have",
            correction="delete snapshots that nobody needs, or let a schedule prune them",
        )
    return None


def put_new(writer: Writer, record: SnapshotRecord) -> None:
    """Store a snapshot with everything that keeps and finds it; the pool's last epoch is beyond its own."""
    writer.put_record(Table.SNAPSHOTS, record.id.encode(), record)
    writer.put(Table.SNAPSHOT_NAMES, snapshot_name_key(record.volume_id, record.name), record.id.encode())
    writer.put(Table.POINTS, snapshot_point_key(record.branch, record.epoch, record.id), b"")
    writer.put(Table.SEALS, pair_key(record.branch, record.epoch), b"")
    pool = pool_record(writer)
    if pool.epoch <= record.epoch:
        writer.put_record(Table.POOL, POOL_KEY, replace(pool, epoch=record.epoch + 1))


def delete(
    writer: Writer,
    ids: Sequence[str],
    expected_revision: int | None = None,
    damaged: Mapping[str, SnapshotRecord] = MappingProxyType({}),
) -> list[str]:
    """Delete snapshots, all or none, and queue what that frees; returns the jobs' ids. Those gone already are no error.

    ``damaged`` are those that go without a look at their records, by ids: what stands in for these. Raises InUse where
    one is held, or a stream is being imported that goes on from it; PreconditionFailed, DamagedRecord.
    """
    jobs = []
    for snapshot_id in ids:
        try:
            record = writer.record(SnapshotRecord, Table.SNAPSHOTS, snapshot_id.encode())
        except DamagedRecord:
            if snapshot_id not in damaged:
                raise
            record = damaged[snapshot_id]
        if record is None:
            continue
        check_revision(record, expected_revision)
        volume = writer.record(VolumeRecord, Table.VOLUMES, record.volume_id.encode())
        name = f"{volume.name if volume is not None else record.volume_id}@{record.name}"
        if record.holds:
            raise held(name, record)
        if volume is not None and volume.importing == record.id:
            check_not_importing(volume)
        remove_snapshot(writer, record)
        if not record.branch:  # it stood in, and is no point: nothing is kept for it
            continue
        job_id = queue_reclaim(writer, record.branch, record.epoch, subject=name, volume_id=record.volume_id)
        if job_id is not None:
            jobs.append(job_id)
    return jobs


def held(name: str, record: SnapshotRecord) -> InUse:
    """Return the refusal to delete a snapshot that is held."""
    return InUse(
        f"snapshot {name} is held: {', '.join(record.holds)}",
        cause="somebody asked for it to stay",
        correction=releasing(name, record),
        holds=list(record.holds),
    )


def check_revision(record: SnapshotRecord, expected: int | None) -> None:
    """Return if a snapshot has the expected revision (None: any); raises PreconditionFailed."""
    if expected is not None and record.revision != expected:
        raise PreconditionFailed(
            f"snapshot {record.name!r} is at revision {record.revision}, not {expected}",
            cause="it was changed since you read it",
            correction="read it again and repeat the request with its new ETag",
            revision=record.revision,
        )


def set_hold(writer: Writer, snapshot_id: str, tag: str, *, hold: bool) -> SnapshotRecord:
    """Add or take away a hold; raises NotFound, LimitReached. Twice is the same as once."""
    record = writer.record(SnapshotRecord, Table.SNAPSHOTS, snapshot_id.encode())
    if record is None:
        raise NotFound(f"snapshot {snapshot_id} was deleted meanwhile")
    if (tag in record.holds) is hold:
        return record
    holds = (*record.holds, tag) if hold else tuple(each for each in record.holds if each != tag)
    if len(holds) > MAX_HOLDS:
        raise LimitReached(f"a snapshot has at most {MAX_HOLDS} holds", correction="release one of them")
    changed = replace(record, holds=holds, revision=record.revision + 1)
    writer.put_record(Table.SNAPSHOTS, snapshot_id.encode(), changed)
    return changed


@dataclass(frozen=True, slots=True)
class Safety:
    """The snapshot that a revert makes of what the volume held."""

    name: str
    automatic: bool
    """Nobody asked for this very name: where it is taken, one like it is."""


@dataclass(frozen=True, slots=True)
class Reverted:
    """What a revert did."""

    volume: VolumeRecord
    safety: SnapshotRecord | None
    job_id: str | None
    """Of the reclaim of what the old head alone had; None where the safety snapshot keeps it."""
    needs_reopen: bool
    """NBD refuses the volume until then."""


def revert(
    writer: Writer, before: VolumeRecord, target: SnapshotRecord, safety: Safety | None, now_s: float, dropped: int
) -> Reverted:
    """Move a closed volume's head to a new branch that comes from ``target``; younger snapshots stay where they are.

    With ``safety`` the old head becomes a snapshot. NBD must refuse the volume until it is reopened where ``dropped``
    sessions had it open, and where it had to before. Raises NotFound, Exists, LimitReached, InUse (the volume changed).
    """
    volume = writer.record(VolumeRecord, Table.VOLUMES, before.id.encode())
    if volume is None or volume.branch != before.branch or volume.trashed_s or volume.deleting:
        raise InUse(f"volume {before.name!r} was reverted or deleted meanwhile", correction="look at it and try again")
    if volume.size_bytes != before.size_bytes:  # what is promised for the difference is not the caller's to tell then
        raise InUse(f"volume {before.name!r} has grown meanwhile", correction="try again")
    check_not_importing(volume)
    if writer.get(Table.SNAPSHOTS, target.id.encode()) is None:
        raise NotFound(f"snapshot {before.name}@{target.name} was deleted meanwhile")
    old = writer.record(BranchRecord, Table.BRANCHES, number_key(volume.branch))
    assert old is not None
    kept = None
    if safety is not None:
        name = _free_name(writer, volume.id, safety.name) if safety.automatic else safety.name
        if refusal := check_new(writer, volume, name):
            raise refusal
        kept = SnapshotRecord(
            id=new_id(),
            volume_id=volume.id,
            name=name,
            branch=old.number,
            epoch=old.head_epoch,
            size_bytes=volume.size_bytes,
            created_s=now_s,
            mapped_chunks=old.mapped_chunks,
        )
        put_new(writer, kept)
    head = new_branch(writer, volume.id, target)
    stopped = _stopped(target, dropped, old)
    if stopped:
        writer.put_record(Table.BRANCHES, number_key(head.number), replace(head, stopped=stopped))
    writer.put_record(Table.BRANCHES, number_key(old.number), replace(old, head_epoch=0, stopped=""))
    changed = replace(volume, branch=head.number, size_bytes=target.size_bytes, revision=volume.revision + 1)
    writer.put_record(Table.VOLUMES, volume.id.encode(), changed)
    subject = f"{volume.name} before its revert to {target.name}"
    job_id = queue_reclaim(writer, old.number, old.head_epoch, subject=subject, volume_id=volume.id)
    return Reverted(changed, kept, job_id, bool(stopped))


def _stopped(target: SnapshotRecord, dropped: int, old: BranchRecord) -> str:
    """Return why NBD must refuse a reverted volume; empty: it need not."""
    if dropped:
        return f"{REVERTED}{target.name} under {dropped} sessions"
    if old.awaits_guests:
        return f"{REVERTED}{target.name}, and under its sessions to another one before"
    return ""


def _free_name(reader: Reader, volume_id: str, name: str) -> str:
    """Return ``name``, or it with the first number behind it that makes it a free one."""
    candidates = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(
        each for each in candidates if reader.get(Table.SNAPSHOT_NAMES, snapshot_name_key(volume_id, each)) is None
    )
