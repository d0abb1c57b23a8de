"""What the metadata transactions of an import do, and what is looked at before: nothing here waits."""

from dataclasses import replace

from blockvirt.errors import BlockvirtError, InUse, NotFound, WrongBase
from blockvirt.ids import new_id
from blockvirt.meta.keys import Table
from blockvirt.meta.records import SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Reader, Writer
from blockvirt.snapshots import transactions
from blockvirt.snapshots.changes import Point, chain_of, changes
from blockvirt.snapshots.stream_format import StreamBase, StreamHeader
from blockvirt.snapshots.views import volume_snapshots
from blockvirt.volumes.commit import MapChange
from blockvirt.volumes.imports import NEW, check_not_importing
from blockvirt.volumes.transactions import retire
from blockvirt.volumes.versions import branch_record


def find_base(reader: Reader, volume: VolumeRecord, base: StreamBase) -> SnapshotRecord:
    """Return the snapshot of a volume that a stream's base is, or is a copy of; raises WrongBase.

    It must be what the volume holds now, byte for byte: what its closed head has differs from it in no chunk.
    """
    records = volume_snapshots(reader, volume.id)
    found = [each for each in records if base.id in (each.id, each.source_id)]
    if not found:
        newest = f"its newest snapshot is {records[-1].name!r}" if records else "it has no snapshots"
        raise WrongBase(
            f"volume {volume.name!r} does not have the snapshot {base.name!r} ({base.id}) that the stream goes on from",
            cause=newest,
            correction="export since a snapshot that both sides have; or whole, and import it as a new volume",
            base_id=base.id,
        )
    head = chain_of(reader, Point(volume.branch, branch_record(reader, volume.branch).head_epoch))
    for record in found:
        old = chain_of(reader, Point(record.branch, record.epoch))
        if next(changes(reader, old, head), None) is None:
            return record
    name = found[0].name
    raise WrongBase(
        f"volume {volume.name!r} does not hold what snapshot {name!r} does, and the stream goes on from that",
        cause="it was written to since, or newer snapshots came in",
        correction=f"if that may be lost, 'blockvirt snapshot revert {volume.name}@{name}' takes it back first; "
        "otherwise export since a newer snapshot",
        base_id=base.id,
    )


def mark(writer: Writer, volume: VolumeRecord, base: SnapshotRecord) -> None:
    """Mark a volume as one that takes in a stream; raises NotFound, InUse."""
    record = writer.record(VolumeRecord, Table.VOLUMES, volume.id.encode())
    if record is None or record.deleting or record.trashed_s or record.branch != volume.branch:
        raise NotFound(f"volume {volume.name!r} was deleted or reverted meanwhile", correction="try again")
    if record.size_bytes != volume.size_bytes:  # what was promised for the rest does not fit any more
        raise InUse(f"volume {volume.name!r} has grown meanwhile", correction="try again")
    check_not_importing(record)
    if writer.get(Table.SNAPSHOTS, base.id.encode()) is None:
        raise NotFound(f"snapshot {base.name!r} was deleted meanwhile", correction="try again")
    writer.put_record(Table.VOLUMES, record.id.encode(), replace(record, importing=base.id))


def mark_new(writer: Writer, record: VolumeRecord) -> None:
    """Mark a volume in the transaction that creates it."""
    writer.put_record(Table.VOLUMES, record.id.encode(), replace(record, importing=NEW))


def finish(writer: Writer, header: StreamHeader, change: MapChange, volume_id: str) -> SnapshotRecord | BlockvirtError:
    """Record the snapshot that a whole stream has brought, and take the mark off; a refusal is returned."""
    volume = writer.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
    if volume is None or not volume.importing or volume.branch != change.branch:
        return NotFound(f"volume {volume_id} was deleted meanwhile")
    stream = header.snapshot
    if refusal := transactions.check_new(writer, volume, stream.name):
        return refusal
    record = SnapshotRecord(
        id=new_id(),
        volume_id=volume.id,
        name=stream.name,
        branch=change.branch,
        epoch=change.epoch,
        size_bytes=stream.size_bytes,
        created_s=stream.created_s,
        mapped_chunks=change.mapped_chunks,
        labels=dict(stream.labels),
        source_id=stream.id,
    )
    transactions.put_new(writer, record)
    size_bytes = max(volume.size_bytes, stream.size_bytes)
    grown = size_bytes != volume.size_bytes
    whole = replace(volume, importing="", size_bytes=size_bytes, revision=volume.revision + grown)
    writer.put_record(Table.VOLUMES, volume.id.encode(), whole)
    return record


def take_back(writer: Writer, volume_id: str, now_s: float) -> tuple[VolumeRecord | None, str | None]:
    """Undo an import that has not finished: a new volume is purged, another goes back to its base.

    Returns (the volume if it is purged, the id of the job that frees the rest). The volume is closed, or about to be
    discarded. Done already, there is nothing to do. Raises NotFound where the base is gone.
    """
    volume = writer.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
    if volume is None or volume.deleting or not volume.importing:
        return None, None
    plain = replace(volume, importing="")
    writer.put_record(Table.VOLUMES, volume.id.encode(), plain)
    if volume.importing == NEW:
        return retire(writer, volume.id, expected_revision=None, force=True, now_s=now_s, purge_at_s=0.0)
    base = writer.record(SnapshotRecord, Table.SNAPSHOTS, volume.importing.encode())
    if base is None:
        raise NotFound(f"snapshot {volume.importing}, which volume {volume.name!r} is to go back to, is gone")
    done = transactions.revert(writer, plain, base, None, now_s, 0)
    # The size is not the stream's yet; that of the base may be smaller than the volume was before.
    writer.put_record(Table.VOLUMES, volume.id.encode(), replace(done.volume, size_bytes=volume.size_bytes))
    return None, done.job_id
