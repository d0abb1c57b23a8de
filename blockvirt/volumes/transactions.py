"""The catalogue's metadata transactions: each function runs inside one transaction, in the store's writer thread."""

import secrets
from collections.abc import Callable
from dataclasses import replace

from blockvirt.errors import DamagedRecord, Exists, InUse, LimitReached, MetadataFault, NotFound, PreconditionFailed
from blockvirt.ids import canonical_id, is_id
from blockvirt.limits import MAX_VOLUMES
from blockvirt.meta.keys import POOL_KEY, Table, child_point_key, deadline, number_key, unit_key, volume_branch_key
from blockvirt.meta.records import BranchRecord, PoolRecord, SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Reader, Writer
from blockvirt.volumes.deletion import queue_purge
from blockvirt.volumes.imports import check_not_importing


class Overtaken(Exception):
    """What a decision was based on changed before its transaction: decide again."""


def pool_record(reader: Reader) -> PoolRecord:
    """Return the record of the pool; raises MetadataFault where there is none, DamagedRecord where it is damaged."""
    pool = reader.record(PoolRecord, Table.POOL, POOL_KEY)
    if pool is None:
        raise MetadataFault(
            "the metadata store holds no pool",
            correction="start the daemon with a state directory that it created, or with an empty one",
        )
    return pool


def locate(reader: Reader, name_or_id: str) -> tuple[str, str]:
    """Return (id, name) of the volume that a user means; raises NotFound. The name of a damaged one is its id."""
    if is_id(name_or_id):
        volume_id = canonical_id(name_or_id)
        try:
            record = reader.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
        except DamagedRecord:
            return volume_id, volume_id
        if record is not None and not record.deleting and not record.trashed_s:
            return volume_id, record.name
    elif (stored := reader.get(Table.VOLUME_NAMES, name_or_id.encode())) is not None:
        return stored.decode(errors="replace"), name_or_id
    raise NotFound(f"there is no volume {name_or_id!r}", correction="'blockvirt volume list' shows what there is")


def check_revision(volume: VolumeRecord, expected: int | None) -> None:
    """Return if a volume has the expected revision (None: any); raises PreconditionFailed."""
    if expected is not None and volume.revision != expected:
        raise PreconditionFailed(
            f"volume {volume.name!r} is at revision {volume.revision}, not {expected}",
            cause="it was changed since you read it",
            correction="read it again and repeat the request with its new ETag",
            revision=volume.revision,
        )


def insert(
    writer: Writer,
    wanted: VolumeRecord,
    also: Callable[[Writer, VolumeRecord], None] | None = None,
    origin: SnapshotRecord | None = None,
) -> VolumeRecord:
    """Store a new volume with its first branch and return it as stored; raises Overtaken where its name is taken.

    With ``origin`` it is a clone of that snapshot; raises NotFound where that went meanwhile. The branch number and the
    epoch of its head come from the pool record, in this transaction; ``also`` joins in.
    """
    pool = pool_record(writer)
    if writer.count(Table.VOLUMES) >= MAX_VOLUMES:
        raise LimitReached(
            f"the pool has {MAX_VOLUMES} volumes, which is the most it may have",
            correction="delete volumes that nobody needs, or use a second pool",
        )
    name = wanted.name
    while not name:
        candidate = f"vol-{secrets.token_hex(4)}"
        name = "" if writer.get(Table.VOLUME_NAMES, candidate.encode()) else candidate
    if writer.get(Table.VOLUME_NAMES, name.encode()) is not None:
        raise Overtaken
    record = replace(wanted, name=name, branch=pool.next_branch)
    if origin is not None and writer.get(Table.SNAPSHOTS, origin.id.encode()) is None:
        raise NotFound(f"snapshot {origin.name!r} was deleted meanwhile")
    new_branch(writer, record.id, origin)
    writer.put_record(Table.VOLUMES, record.id.encode(), record)
    writer.put(Table.VOLUME_NAMES, name.encode(), record.id.encode())
    if also is not None:
        also(writer, record)
    return record


def new_branch(writer: Writer, volume_id: str, origin: SnapshotRecord | None = None) -> BranchRecord:
    """Store a new branch of a volume, with the pool's next number and epoch; it sees what ``origin`` sees.

    The caller has put that number into the volume's record.
    """
    pool = pool_record(writer)
    branch = BranchRecord(
        number=pool.next_branch,
        volume_id=volume_id,
        head_epoch=pool.epoch + 1,
        first_epoch=pool.epoch + 1,
        covered_sequence=(1 << 61) + secrets.randbits(61),  # of one length, and so is the record
        origin_branch=origin.branch if origin is not None else 0,
        origin_epoch=origin.epoch if origin is not None else 0,
        mapped_chunks=origin.mapped_chunks if origin is not None else 0,
        inherited_chunks=origin.mapped_chunks if origin is not None else 0,
    )
    writer.put_record(Table.POOL, POOL_KEY, replace(pool, next_branch=pool.next_branch + 1, epoch=pool.epoch + 1))
    writer.put_record(Table.BRANCHES, number_key(branch.number), branch)
    writer.put(Table.VOLUME_BRANCHES, volume_branch_key(volume_id, branch.number), b"")
    if origin is not None:
        writer.put(Table.POINTS, child_point_key(origin.branch, origin.epoch, branch.number), b"")
    return branch


def update(writer: Writer, before: VolumeRecord, after: VolumeRecord) -> VolumeRecord:
    """Store a change and return it with its new revision; raises Overtaken, or Exists where the new name is taken.

    Raises InUse for another size while a stream is imported: that decides on the size.
    """
    if writer.record(VolumeRecord, Table.VOLUMES, before.id.encode()) != before:
        raise Overtaken
    if after.size_bytes != before.size_bytes:
        check_not_importing(before)
    if after.name != before.name:
        if writer.get(Table.VOLUME_NAMES, after.name.encode()) is not None:
            raise Exists(f"there is a volume {after.name!r} already", correction="choose another name")
        writer.delete(Table.VOLUME_NAMES, before.name.encode())
        writer.put(Table.VOLUME_NAMES, after.name.encode(), before.id.encode())
    after = replace(after, revision=before.revision + 1)
    writer.put_record(Table.VOLUMES, after.id.encode(), after)
    return after


def retire(
    writer: Writer,
    volume_id: str,
    *,
    expected_revision: int | None,
    force: bool,
    now_s: float,
    purge_at_s: float,
) -> tuple[VolumeRecord, str]:
    """Put a volume into the trash until ``purge_at_s``, or delete it for good where that is 0.

    Frees its name and takes its units away; returns it as it was, and the id of the purge job (empty: it is in the
    trash). Raises NotFound, PreconditionFailed, and InUse where a snapshot is held or a stream is being imported, and
    unless it is by ``force`` where units are left or a snapshot's record is damaged.
    """
    record = writer.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
    if record is None or record.deleting or record.trashed_s:
        raise NotFound(f"there is no volume {volume_id!r} any more")
    check_revision(record, expected_revision)
    check_not_importing(record)
    snapshots_held(writer, record, force=force)
    units = [key for key, _ in writer.scan(Table.VOLUME_UNITS, prefix=f"{volume_id}/".encode())]
    if units and not force:
        raise InUse(
            f"volume {record.name!r} was mapped to a host meanwhile",
            correction="unmap it ('blockvirt lun unmap'), or use force",
        )
    for key in units:
        _, host_id, number = key.decode().split("/")
        writer.delete(Table.UNITS, unit_key(host_id, int(number)))
        writer.delete(Table.VOLUME_UNITS, key)
    # The name is free at once; the record keeps it for messages, without an entry in the index.
    writer.delete(Table.VOLUME_NAMES, record.name.encode())
    if not purge_at_s:
        return record, queue_purge(writer, record)
    trashed = replace(record, trashed_s=now_s, purge_at_s=purge_at_s, revision=record.revision + 1)
    writer.put_record(Table.VOLUMES, volume_id.encode(), trashed)
    writer.put(Table.TRASH, volume_id.encode(), deadline(purge_at_s))
    return record, ""


def snapshots_held(reader: Reader, volume: VolumeRecord, *, force: bool = False) -> None:
    """Return if no snapshot of a volume is held; raises InUse, also unless by ``force`` where that cannot be told."""
    for key, snapshot_id in reader.scan(Table.SNAPSHOT_NAMES, prefix=f"{volume.id}/".encode()):
        try:
            snapshot = reader.record(SnapshotRecord, Table.SNAPSHOTS, snapshot_id)
        except DamagedRecord as error:
            if force:
                continue
            raise InUse(
                f"volume {volume.name!r} cannot be deleted as it is: {_damaged(volume, key)}",
                cause=error.message,
                correction="use force, and it goes with its volume; 'blockvirt check --restore-metadata' brings back "
                "the newest intact copy instead",
            ) from error
        if snapshot is not None and snapshot.holds:
            raise InUse(
                f"snapshot {volume.name}@{snapshot.name} is held: {', '.join(snapshot.holds)}",
                cause="its volume cannot be deleted without it",
                correction=releasing(f"{volume.name}@{snapshot.name}", snapshot),
            )


def damaged_snapshots(reader: Reader, volume: VolumeRecord) -> list[str]:
    """Say of which snapshots of a volume the records are damaged. Reads them all: for a thread."""
    found = []
    for key, snapshot_id in reader.scan(Table.SNAPSHOT_NAMES, prefix=f"{volume.id}/".encode()):
        try:
            reader.record(SnapshotRecord, Table.SNAPSHOTS, snapshot_id)
        except DamagedRecord:
            found.append(_damaged(volume, key))
    return found


def _damaged(volume: VolumeRecord, name_key: bytes) -> str:
    name = name_key.decode(errors="replace").partition("/")[2]
    return f"the record of snapshot {volume.name}@{name} is damaged, and may say that it is held"


def releasing(name: str, snapshot: SnapshotRecord) -> str:
    """Say how all holds of a snapshot are taken away: each tag by a command of its own."""
    commands = (f"'blockvirt snapshot release {name} --tag {tag}'" for tag in snapshot.holds)
    return f"release it first ({', '.join(commands)})"
