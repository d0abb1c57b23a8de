"""Purging volumes: what is deleted for good is taken apart in the background, as a job.

The transaction that flags a volume ``deleting`` queues its job; from then on it cannot be opened. Every step is
idempotent, a crash only repeats one: sessions and snapshots go, the volume's record with its heads, and then each
branch is reclaimed. A branch that clones of other volumes come from stays as far as they see it.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

from blockvirt.errors import BlockvirtError, DamagedRecord
from blockvirt.ids import new_id
from blockvirt.limits import PURGE_BATCH_SNAPSHOTS
from blockvirt.meta.keys import (
    Table,
    number_key,
    pair_key,
    snapshot_name_key,
    snapshot_point_key,
    split_pair,
    split_point,
    split_volume_branch,
)
from blockvirt.meta.records import BranchRecord, JobRecord, SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Reader, Store, Writer
from blockvirt.volumes.jobs import Running, queue_job
from blockvirt.volumes.reclaim import PURGE, Reclaimer

log = logging.getLogger("blockvirt.deletion")


def queue_purge(writer: Writer, volume: VolumeRecord) -> str:
    """Flag a volume, whose name and units are gone already, and queue its purge; returns the job's id."""
    writer.delete(Table.TRASH, volume.id.encode())
    flagged = replace(volume, deleting=True, revision=volume.revision + 1)
    writer.put_record(Table.VOLUMES, volume.id.encode(), flagged)
    job = JobRecord(
        id=new_id(), kind=PURGE, state="queued", subject=volume.name, created_s=time.time(), volume_id=volume.id
    )
    queue_job(writer, job)
    return job.id


class Purger:
    """The worker of purge jobs. One per pool."""

    def __init__(
        self,
        store: Store,
        reclaimer: Reclaimer,
        discard: Callable[[str], Awaitable[None]],
        gone: Callable[[str], None],
    ) -> None:
        """``discard(volume id)`` drops its sessions and closes it; ``gone(volume id)`` hears of the end."""
        self._store = store
        self._reclaimer = reclaimer
        self._discard = discard
        self._gone = gone

    async def work(self, job: Running) -> None:
        """Do a purge job: of the volume in ``volume_id``. Raises BlockvirtError, OSError; it is tried again then."""
        volume_id = job.record.volume_id
        await self._discard(volume_id)
        while await self._store.commit(partial(_remove_snapshots, volume_id)):
            job.checkpoint()
        branches = await self._store.commit(partial(_remove_volume, volume_id))
        for done, branch in enumerate(branches):
            job.checkpoint()
            await job.advance(done, len(branches), 0)
            for epoch in self._points_gone(branch):
                await self._reclaimer.free(job, branch, epoch)
        self._gone(volume_id)
        await self._reclaimer.give_back(job, branches)  # what clones see is left of some
        log.info("volume %s (%s) is deleted", job.record.subject, volume_id)

    def _points_gone(self, branch: int) -> list[int]:
        with self._store.read() as reader:
            return [split_pair(key)[1] for key, _ in reader.scan(Table.RECLAIM, prefix=number_key(branch))]


def _remove_snapshots(volume_id: str, writer: Writer) -> int:
    """Remove some of a volume's snapshots; returns how many."""
    names = writer.scan(Table.SNAPSHOT_NAMES, prefix=f"{volume_id}/".encode())
    rows = [row for row, _ in zip(names, range(PURGE_BATCH_SNAPSHOTS), strict=False)]
    for name_key, snapshot_id in rows:
        try:
            snapshot = writer.record(SnapshotRecord, Table.SNAPSHOTS, snapshot_id)
        except DamagedRecord as error:
            log.warning("snapshot %s is deleted by what else is known of it: %s", name_key.decode(), error.message)
            snapshot = None
        if snapshot is None:
            snapshot = stand_in(writer, volume_id, name_key.decode().partition("/")[2], snapshot_id.decode())
        remove_snapshot(writer, snapshot)
        if snapshot.branch:
            writer.put(Table.RECLAIM, pair_key(snapshot.branch, snapshot.epoch), b"")
    return len(rows)


def stand_in(reader: Reader, volume_id: str, name: str, snapshot_id: str) -> SnapshotRecord:
    """Return what is known of a snapshot without its record: which point it is, if it is one, says that one's row."""
    known = SnapshotRecord(snapshot_id, volume_id, name, branch=0, epoch=0, size_bytes=0, created_s=0.0)
    for number in branches_of(reader, volume_id):
        for key, _ in reader.scan(Table.POINTS, prefix=number_key(number)):
            branch, epoch, who = split_point(key)
            if who == snapshot_id:
                return replace(known, branch=branch, epoch=epoch)
    return known


def remove_snapshot(writer: Writer, snapshot: SnapshotRecord) -> None:
    """Remove a snapshot's rows. What it alone saw is another matter: see ``reclaim``."""
    writer.delete(Table.SNAPSHOTS, snapshot.id.encode())
    writer.delete(Table.SNAPSHOT_NAMES, snapshot_name_key(snapshot.volume_id, snapshot.name))
    writer.delete(Table.POINTS, snapshot_point_key(snapshot.branch, snapshot.epoch, snapshot.id))
    writer.delete(Table.SEALS, pair_key(snapshot.branch, snapshot.epoch))


def _remove_volume(volume_id: str, writer: Writer) -> list[int]:
    """Remove a volume's record and the heads of its branches; returns those."""
    branches = branches_of(writer, volume_id)
    for number in branches:
        branch = writer.record(BranchRecord, Table.BRANCHES, number_key(number))
        if branch is not None and branch.head_epoch:
            writer.put(Table.RECLAIM, pair_key(number, branch.head_epoch), b"")
            writer.put_record(Table.BRANCHES, number_key(number), replace(branch, head_epoch=0))
    writer.delete(Table.VOLUMES, volume_id.encode())
    return branches


def branches_of(reader: Reader, volume_id: str) -> list[int]:
    """Return a volume's branches, oldest first: more than one where it was reverted."""
    rows = reader.scan(Table.VOLUME_BRANCHES, prefix=f"{volume_id}/".encode())
    return [split_volume_branch(key)[1] for key, _ in rows]


def trashed_volumes(reader: Reader, start: bytes, limit: int) -> tuple[list[VolumeRecord], bytes]:
    """Return volumes in the trash from the key ``start`` on, and the key to go on at (empty: that was all)."""
    found: list[VolumeRecord] = []
    for count, (key, _) in enumerate(reader.scan(Table.TRASH, start=start)):
        if count == limit:
            return found, key
        try:
            record = reader.record(VolumeRecord, Table.VOLUMES, key)
        except BlockvirtError as error:
            log.error("volume %s in the trash: %s", key.decode(), error)
            continue
        if record is not None and not record.deleting:
            found.append(record)
    return found, b""
