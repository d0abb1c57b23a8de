"""Snapshots: taking, listing, holding and deleting them. Constant time, whatever the size of the volume.

A snapshot is a checkpoint of its volumes with an epoch step, and one record. Several volumes are frozen in one piece
of the event loop: one instant. What only a deleted snapshot saw is freed by a reclaim job.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from blockvirt.errors import BlockvirtError, DamagedRecord, InUse, InvalidRequest, NotFound, PoolFull
from blockvirt.ids import canonical_id, check_name, is_id, new_id
from blockvirt.limits import MAX_GROUP_VOLUMES
from blockvirt.meta.keys import Table, snapshot_name_key
from blockvirt.meta.records import SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Reader
from blockvirt.snapshots import transactions
from blockvirt.snapshots.freed import branches_judged, freed_by
from blockvirt.snapshots.listing import Page, page
from blockvirt.snapshots.readers import SnapshotReaders, find_snapshot
from blockvirt.snapshots.transactions import Wanted
from blockvirt.snapshots.views import Snapshot, new_view, parent_of, view
from blockvirt.tasks import TaskSet
from blockvirt.volumes.checkpoint import checkpoint_and_step
from blockvirt.volumes.deletion import stand_in
from blockvirt.volumes.engine import Engine
from blockvirt.volumes.gaps import MAX_EPOCH
from blockvirt.volumes.requests import check_labels
from blockvirt.volumes.transactions import locate

log = logging.getLogger("blockvirt.snapshots")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Deletion:
    """What deleting snapshots frees, or would free."""

    snapshots: tuple[Snapshot, ...]
    freed_bytes: int
    """By all of them together: more than the sum of what each alone would free."""
    deleted: bool
    obstacles: tuple[str, ...] = ()
    """Why it would be refused."""
    job_ids: tuple[str, ...] = ()
    """The reclaim jobs that give the space back."""


class Snapshots:
    """All snapshots of the pool. One per process; call it on the event loop."""

    def __init__(self, engine: Engine, readers: SnapshotReaders, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._store = engine.store
        self._readers = readers
        self._clock = clock
        self._chunk_bytes = 1 << engine.context.chunk_shift
        self._tasks = TaskSet("snapshots")

    # --- taking ----------------------------------------------------------------------------------------------------

    async def create(
        self,
        names: Mapping[str, str],
        *,
        labels: Mapping[str, str] | None = None,
        schedule_id: str = "",
        also: transactions.Also | None = None,
    ) -> list[SnapshotRecord]:
        """Take one snapshot of each volume, all of one instant, or none. ``names``: volume (name or id) -> its name.

        ``also`` runs in their transaction, with the new records; what it refuses undoes them.
        Raises InvalidName, NotFound, Exists, LimitReached, PoolFull (at the level 'stop'), VolumeStopped.
        """
        if not 0 < len(names) <= MAX_GROUP_VOLUMES:
            raise InvalidRequest(
                f"a group of {len(names)} volumes is not possible", correction=f"name 1 to {MAX_GROUP_VOLUMES}"
            )
        for name in names.values():
            check_name(name, what="snapshot")
        check_labels(labels or {})
        self.check_space("no snapshot is taken")
        with self._store.read() as reader:
            by_id = {locate(reader, volume)[0]: name for volume, name in names.items()}
            if len(by_id) < len(names):
                raise InvalidRequest("one volume is named twice", correction="name each once, by name or by id")
            for volume_id, name in by_id.items():
                volume = _volume(reader, volume_id)
                if refusal := transactions.check_new(reader, volume, name):
                    raise refusal
        wanted = Wanted(
            names=by_id,
            labels=dict(labels or {}),
            created_s=self._clock(),
            group_id=new_id() if len(by_id) > 1 else "",
            schedule_id=schedule_id,
            also=also,
        )
        records = await self._whole(self._take(wanted), "take")
        for record in records:
            log.info("snapshot %s of volume %s taken", record.name, record.volume_id)
        return records

    def check_space(self, refused: str) -> None:
        """Return unless the pool is at the level 'stop'; raises PoolFull."""
        if self._engine.storage.status().level == "stop":
            raise PoolFull(
                f"{refused} while the pool is full",
                cause="after it even overwrites would need new space",
                correction="delete snapshots or volumes, or add a device ('blockvirt device add DIR')",
            )

    async def _take(self, wanted: Wanted) -> list[SnapshotRecord]:
        async with AsyncExitStack() as pins:
            parts = []
            for volume_id in sorted(wanted.names):  # one order: two groups do not wait for each other
                opened = await pins.enter_async_context(self._engine.registry.pinned(volume_id, reverted=True))
                parts.append(opened.checkpointer)
            outcome = await checkpoint_and_step(
                parts, lambda writer, changes: transactions.insert(writer, wanted, changes)
            )
        if isinstance(outcome, BlockvirtError):
            raise outcome
        self._engine.sealing.set()
        return outcome

    async def _whole(self, work: Coroutine[Any, Any, T], name: str) -> T:
        """Run something to its end even if who asked for it is cancelled: it must not be left half done."""
        result: T = await asyncio.shield(self._tasks.start(work, name, awaited=True))
        return result

    # --- reading ---------------------------------------------------------------------------------------------------

    def find(self, name_or_id: str) -> SnapshotRecord:
        """Return the record of 'VOLUME@NAME', or of an id; raises NotFound, DamagedRecord."""
        with self._store.read() as reader:
            return find(reader, name_or_id)

    async def get(self, name_or_id: str) -> Snapshot:
        """Return a snapshot; raises NotFound, DamagedRecord."""
        return await self._engine.context.threads.run(partial(self._get, name_or_id))

    def _get(self, name_or_id: str) -> Snapshot:
        with self._store.read() as reader:
            record = find(reader, name_or_id)
            parent_id = parent_of(reader, record.branch, record.epoch)
            return view(reader, record, parent_id, self._chunk_bytes, self._readers.sessions_of(record.id))

    def as_new(self, reader: Reader, records: Sequence[SnapshotRecord]) -> tuple[Snapshot, ...]:
        """Return the views of snapshots that ``create`` returned, or has just handed to its ``also``."""
        return tuple(new_view(reader, record, self._chunk_bytes) for record in records)

    async def list(
        self,
        volume: str | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        after: str = "",
        limit: int = 100,
    ) -> Page:
        """Return up to ``limit`` snapshots behind the place ``after``, of one volume (name or id) or of all.

        Volumes in the order of their ids, within a volume oldest first; only those that carry all of ``labels``. A page
        may have fewer and still be followed by another. Raises NotFound, InvalidRequest (``after`` is no place).
        """
        return await self._engine.context.threads.run(partial(self._list, volume, labels or {}, after, limit))

    def _list(self, volume: str | None, labels: Mapping[str, str], after: str, limit: int) -> Page:
        with self._store.read() as reader:

            def shown(record: SnapshotRecord, parent_id: str) -> Snapshot:
                return view(reader, record, parent_id, self._chunk_bytes, self._readers.sessions_of(record.id))

            volume_id = locate(reader, volume)[0] if volume is not None else None
            return page(reader, volume_id, labels, after, limit, shown)

    def head_parent(self, volume: str) -> str:
        """Return the id of the snapshot that a volume's head went on from; empty: none. Raises NotFound."""
        with self._store.read() as reader:
            record = _volume(reader, locate(reader, volume)[0])
            return parent_of(reader, record.branch, MAX_EPOCH)

    # --- holding and deleting --------------------------------------------------------------------------------------

    async def hold(self, name_or_id: str, tag: str = "manual") -> SnapshotRecord:
        """Keep a snapshot from being deleted until ``tag`` is released; raises NotFound, InvalidName, LimitReached."""
        check_name(tag, what="hold")
        return await self._set_hold(name_or_id, tag, hold=True)

    async def release(self, name_or_id: str, tag: str = "manual") -> SnapshotRecord:
        """Take a hold away; one that is not there is no error. Raises NotFound."""
        return await self._set_hold(name_or_id, tag, hold=False)

    async def _set_hold(self, name_or_id: str, tag: str, *, hold: bool) -> SnapshotRecord:
        record = self.find(name_or_id)
        return await self._store.commit(lambda writer: transactions.set_hold(writer, record.id, tag, hold=hold))

    async def delete(
        self,
        names_or_ids: Sequence[str],
        *,
        force: bool = False,
        dry_run: bool = False,
        expected_revision: int | None = None,
    ) -> Deletion:
        """Delete snapshots, all or none, or with ``dry_run`` say what that would free.

        Refused with InUse while one is held, and while sessions read one unless ``force`` drops them. Clones and
        younger snapshots are no obstacle. One whose record is damaged might be held: it goes by ``force`` only, and by
        its name. Raises NotFound, PreconditionFailed, DamagedRecord.
        """
        records, damaged = await self._engine.context.threads.run(
            partial(self._to_delete, names_or_ids, force or dry_run)
        )
        await self._bring_in(records)
        views, freed_bytes = await self._engine.context.threads.run(partial(self._would_free, records, damaged))
        obstacles = tuple(_obstacles(views, () if force else damaged))
        if dry_run:
            return Deletion(views, freed_bytes, deleted=False, obstacles=obstacles)
        for record, shown in zip(records, views, strict=True):
            transactions.check_revision(record, expected_revision)
            if record.holds:
                raise transactions.held(f"{shown.volume}@{shown.name}", record)
            if shown.sessions and not force:
                raise InUse(
                    f"snapshot {shown.volume}@{shown.name} is being read by {shown.sessions} sessions",
                    correction="end them ('blockvirt session list'), or use force",
                    sessions=shown.sessions,
                )
        jobs = await self._delete([record.id for record in records], expected_revision, damaged)
        for shown in views:
            log.info("snapshot %s@%s deleted", shown.volume, shown.name)
        return Deletion(views, freed_bytes, deleted=True, job_ids=jobs)

    def _to_delete(
        self, names_or_ids: Sequence[str], regardless: bool
    ) -> tuple[Sequence[SnapshotRecord], Mapping[str, SnapshotRecord]]:
        """Return the records; and by ids those among them that stand in for damaged ones, if that is ``regardless``.

        Raises NotFound, DamagedRecord.
        """
        records: dict[str, SnapshotRecord] = {}
        damaged: dict[str, SnapshotRecord] = {}
        with self._store.read() as reader:
            for name in names_or_ids:
                try:
                    record = find(reader, name)
                except DamagedRecord as error:
                    known = _known(reader, name) if regardless else None
                    if known is None:
                        error.correction = (
                            f"'blockvirt snapshot delete --force VOLUME@NAME' deletes it; {error.correction}"
                        )
                        raise
                    record = damaged[known.id] = known
                records[record.id] = record
        return list(records.values()), damaged

    def _would_free(
        self, records: Sequence[SnapshotRecord], damaged: Mapping[str, SnapshotRecord]
    ) -> tuple[tuple[Snapshot, ...], int]:
        """Return the views, and what becomes free: with damaged ones among them at least that.

        Raises NotFound where somebody else has deleted one meanwhile: its branch may be gone as well.
        """
        with self._store.read() as reader:
            if gone := [each for each in records if not _is_there(reader, each)]:
                raise NotFound(f"snapshot {gone[0].name} was deleted meanwhile", correction="leave it out")
            views = tuple(
                new_view(reader, each, self._chunk_bytes)
                if each.id in damaged
                else view(reader, each, "", self._chunk_bytes, self._readers.sessions_of(each.id))
                for each in records
            )
            intact = [each for each in records if each.id not in damaged]
            return views, freed_by(reader, intact) * self._chunk_bytes

    async def delete_ids(self, ids: Sequence[str]) -> tuple[str, ...]:
        """Delete snapshots by their ids, all or none, sessions or not; returns the reclaim jobs' ids.

        One that is gone is no error. Raises InUse where one is held, DamagedRecord.
        """
        await self._bring_in(await self._engine.context.threads.run(partial(self._still_there, ids)))
        return await self._delete(ids)

    async def _delete(
        self,
        ids: Sequence[str],
        expected_revision: int | None = None,
        damaged: Mapping[str, SnapshotRecord] = MappingProxyType({}),
    ) -> tuple[str, ...]:
        jobs = await self._store.commit(lambda writer: transactions.delete(writer, ids, expected_revision, damaged))
        for snapshot_id in ids:
            self._readers.drop(snapshot_id)
        self._engine.jobs.wake(*jobs)
        return tuple(jobs)

    def _still_there(self, ids: Sequence[str]) -> Sequence[SnapshotRecord]:
        with self._store.read() as reader:
            found = [reader.record(SnapshotRecord, Table.SNAPSHOTS, snapshot_id.encode()) for snapshot_id in ids]
        return [record for record in found if record is not None]

    async def _bring_in(self, records: Sequence[SnapshotRecord]) -> None:
        """Have the metadata know what guests overwrote up to now: until then what snapshots alone hold seems shared."""

        def judged() -> set[int]:
            with self._store.read() as reader:
                return branches_judged(reader, [each for each in records if _is_there(reader, each)])

        try:
            branches = await self._engine.context.threads.run(judged)
        except DamagedRecord as error:  # whether that is in the way is not for this to say
            log.warning("a deletion is judged as of the last checkpoint: %s", error)
            return
        await self._engine.registry.checkpoint_now(branches)

    async def close(self) -> None:
        """Wait for what is under way."""
        await self._tasks.wait()


def find(reader: Reader, name_or_id: str) -> SnapshotRecord:
    """Return the record of 'VOLUME@NAME', or of an id; raises NotFound, DamagedRecord."""
    volume, at, name = name_or_id.partition("@")
    if at:
        return find_snapshot(reader, locate(reader, volume)[0], name)
    if is_id(name_or_id):
        snapshot_id = canonical_id(name_or_id)
        record = reader.record(SnapshotRecord, Table.SNAPSHOTS, snapshot_id.encode())
        if record is not None:
            return record
    raise NotFound(f"there is no snapshot {name_or_id[:200]!r}", correction="name one as VOLUME@SNAPSHOT, or by its id")


def _is_there(reader: Reader, snapshot: SnapshotRecord) -> bool:
    return reader.get(Table.SNAPSHOTS, snapshot.id.encode()) is not None


def _volume(reader: Reader, volume_id: str) -> VolumeRecord:
    record = reader.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
    if record is None:
        raise DamagedRecord(f"volume {volume_id} has no record", correction="run 'blockvirt check'")
    return record


def _known(reader: Reader, name: str) -> SnapshotRecord | None:
    """Return what stands in for the damaged record of 'VOLUME@NAME'; None where that is no such name."""
    volume, at, snapshot = name.partition("@")
    volume_id = locate(reader, volume)[0] if at else ""
    snapshot_id = reader.get(Table.SNAPSHOT_NAMES, snapshot_name_key(volume_id, snapshot))
    return stand_in(reader, volume_id, snapshot, snapshot_id.decode()) if snapshot_id is not None else None


def _obstacles(views: Sequence[Snapshot], damaged: Collection[str]) -> list[str]:
    obstacles = [
        f"the record of {each.volume}@{each.name} is damaged, and may say that it is held"
        for each in views
        if each.id in damaged
    ]
    obstacles += [f"{each.volume}@{each.name} is held: {', '.join(each.holds)}" for each in views if each.holds]
    return obstacles + [f"{each.sessions} sessions read {each.volume}@{each.name}" for each in views if each.sessions]
