"""The trash: deleted volumes, whole with their snapshots, until a deadline. Their names are free, their bytes not."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from uuid import UUID

from blockvirt.errors import BlockvirtError, Exists, NotFound
from blockvirt.ids import check_name, is_id
from blockvirt.limits import MAX_VOLUMES, TRASH_LOOK_S
from blockvirt.meta.keys import Table, split_deadline
from blockvirt.meta.records import VolumeRecord
from blockvirt.meta.store import Reader, Store, Writer
from blockvirt.volumes.deletion import queue_purge, trashed_volumes
from blockvirt.volumes.ports import OpenVolumes
from blockvirt.volumes.promises import Promises
from blockvirt.volumes.transactions import snapshots_held
from blockvirt.volumes.views import READ_BATCH

log = logging.getLogger("blockvirt.trash")


@dataclass(frozen=True, slots=True)
class Trashed:
    """A volume in the trash."""

    id: str
    name: str
    """Its name when it was deleted; several in the trash may have had the same."""
    size_bytes: int
    trashed_s: float
    purge_at_s: float
    snapshots: int


@dataclass(frozen=True, slots=True)
class TrashPage:
    """Some volumes in the trash, those that go first first."""

    volumes: tuple[Trashed, ...]
    next_after: tuple[float, str] | None
    """The place to go on after: when the last of them goes, and its id. None: that was all."""


class Trash:
    """What was deleted and can be had back. One per process."""

    def __init__(
        self, store: Store, open_volumes: OpenVolumes, promises: Promises, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._open = open_volumes
        self._promises = promises
        self._clock = clock
        self._changed = asyncio.Event()
        self._look_at_s = inf
        """When the worker looks again, by the clock."""

    def list(self) -> tuple[Trashed, ...]:
        """Return the volumes in the trash, those that go first first. Reads them all: for a thread."""
        return self.page(limit=MAX_VOLUMES).volumes

    def page(self, *, after: tuple[float, str] | None = None, limit: int = 100) -> TrashPage:
        """Return up to ``limit`` volumes in the trash behind the place ``after``, those that go first first.

        Costs a row for each volume in the trash, and a record for each on the page. For a thread.
        """
        found: list[Trashed] = []
        with self._store.read() as reader:
            for place in _places(reader):
                if after is not None and place <= after:
                    continue
                if len(found) == limit:
                    return TrashPage(tuple(found), after)
                after = place
                record = _record(reader, place[1].encode())
                if record is not None:
                    found.append(_trashed(reader, record))
        return TrashPage(tuple(found), None)

    async def get(self, name_or_id: str) -> Trashed:
        """Return a volume in the trash, by id, or by name if just one was called so; raises NotFound, Exists."""
        return await asyncio.to_thread(self._get, name_or_id)

    def _get(self, name_or_id: str) -> Trashed:
        if is_id(name_or_id):
            volume_id = str(UUID(name_or_id))
            with self._store.read() as reader:
                record = reader.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
                if record is not None and record.trashed_s and not record.deleting:
                    return _trashed(reader, record)
            matching = []
        else:
            matching = [each for each in self.list() if each.name == name_or_id]
        if not matching:
            raise NotFound(
                f"there is no volume {name_or_id!r} in the trash", correction="'blockvirt trash list' shows what is"
            )
        if len(matching) > 1:
            raise Exists(
                f"{len(matching)} volumes in the trash were called {name_or_id!r}",
                correction="name one by its id: " + ", ".join(each.id for each in matching[:5]),
            )
        return matching[0]

    async def restore(self, name_or_id: str, name: str | None = None) -> str:
        """Take a volume out of the trash, under another ``name`` if one is given; returns its id.

        Raises NotFound, Exists (the name is in use by now: give another), InvalidName.
        """
        found = await self.get(name_or_id)
        new_name = check_name(name, what="volume") if name is not None else found.name
        await self._store.commit(partial(_restore, found.id, new_name))
        log.info("volume %s (%s) is restored from the trash as %s", found.name, found.id, new_name)
        return found.id

    async def purge(self, name_or_id: str) -> str:
        """Delete a volume in the trash for good; returns the job's id. Raises NotFound, Exists, InUse (a hold)."""
        return await self._purge((await self.get(name_or_id)).id)

    async def _purge(self, volume_id: str) -> str:
        job_id, size_bytes = await self._store.commit(partial(_purge, volume_id))
        self._promises.release(size_bytes)
        self._open.wake_jobs(job_id)
        return job_id

    def wake(self, purge_at_s: float) -> None:
        """Say that a volume was put into the trash, until then."""
        if purge_at_s < self._look_at_s:
            self._changed.set()

    async def run(self) -> None:
        """Purge what is due, until cancelled."""
        while True:
            self._changed.clear()
            self._look_at_s = inf
            due, next_s = await self._due()
            for record in due:
                try:
                    await self._purge(record.id)
                except BlockvirtError as error:
                    log.error("volume %s is not purged from the trash: %s", record.name, error)
            # The clock may be set meanwhile: look again after a while, however far the next deadline is.
            now_s = self._clock()
            wait_s = TRASH_LOOK_S if next_s is None else min(TRASH_LOOK_S, max(0.0, next_s - now_s))
            self._look_at_s = now_s + wait_s
            try:
                await asyncio.wait_for(self._changed.wait(), wait_s)
            except TimeoutError:
                continue

    async def _due(self) -> tuple[Sequence[VolumeRecord], float | None]:
        """Return what is due, and when the next one is (None: none is); others run between batches."""
        due: list[VolumeRecord] = []
        deadlines: list[float] = []
        start = b""
        while True:
            with self._store.read() as reader:
                found, start = trashed_volumes(reader, start, READ_BATCH)
            now_s = self._clock()
            due += [record for record in found if record.purge_at_s <= now_s]
            deadlines += [record.purge_at_s for record in found if record.purge_at_s > now_s]
            if not start:
                return due, min(deadlines, default=None)
            await asyncio.sleep(0)


def _places(reader: Reader) -> list[tuple[float, str]]:
    """Return (when it goes, its id) of each volume in the trash, in that order; damaged ones without a place go."""
    found = []
    for key, stored in reader.scan(Table.TRASH):
        purge_at_s = split_deadline(stored)
        if purge_at_s is None and (record := _record(reader, key)) is not None:
            purge_at_s = record.purge_at_s
        if purge_at_s is not None:
            found.append((purge_at_s, key.decode(errors="replace")))
    return sorted(found)


def _record(reader: Reader, key: bytes) -> VolumeRecord | None:
    """Return the record of a volume in the trash; None where it is damaged, which the log says, or gone."""
    try:
        record = reader.record(VolumeRecord, Table.VOLUMES, key)
    except BlockvirtError as error:
        log.error("volume %s in the trash: %s", key.decode(errors="replace"), error)
        return None
    return record if record is not None and not record.deleting else None


def _trashed(reader: Reader, record: VolumeRecord) -> Trashed:
    snapshots = sum(1 for _ in reader.scan(Table.SNAPSHOT_NAMES, prefix=f"{record.id}/".encode()))
    return Trashed(record.id, record.name, record.size_bytes, record.trashed_s, record.purge_at_s, snapshots)


def _in_trash(writer: Writer, volume_id: str) -> VolumeRecord:
    record = writer.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
    if record is None or record.deleting or not record.trashed_s:
        raise NotFound(f"volume {volume_id} is not in the trash any more")
    return record


def _restore(volume_id: str, name: str, writer: Writer) -> None:
    record = _in_trash(writer, volume_id)
    if writer.get(Table.VOLUME_NAMES, name.encode()) is not None:
        raise Exists(f"there is a volume {name!r} by now", correction="restore it under another name (--name)")
    restored = replace(record, name=name, trashed_s=0.0, purge_at_s=0.0, revision=record.revision + 1)
    writer.delete(Table.TRASH, volume_id.encode())
    writer.put_record(Table.VOLUMES, volume_id.encode(), restored)
    writer.put(Table.VOLUME_NAMES, name.encode(), volume_id.encode())


def _purge(volume_id: str, writer: Writer) -> tuple[str, int]:
    record = _in_trash(writer, volume_id)
    snapshots_held(writer, record, force=True)  # whoever deleted the volume was told of what is damaged
    return queue_purge(writer, record), record.size_bytes
