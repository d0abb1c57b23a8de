"""The catalogue of volumes: create, list, change and delete, each one metadata transaction.

Deleting puts a volume into the trash and frees its name in one transaction; what is deleted for good goes in the
background, as a job. A damaged record quarantines its volume; the rest of the catalogue works on.
"""

import logging
import time
from asyncio import sleep
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from blockvirt.errors import DamagedRecord, Exists, InUse, InvalidSize, NotFound
from blockvirt.ids import check_name, new_id
from blockvirt.meta.keys import POOL_KEY, Table
from blockvirt.meta.records import PoolRecord, SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Store, Writer
from blockvirt.units import format_size
from blockvirt.volumes.allowance import Allowance
from blockvirt.volumes.ports import OpenVolumes, PoolSpace
from blockvirt.volumes.promises import Promises
from blockvirt.volumes.requests import NewVolume, VolumeChange, check_labels, check_placement, round_size
from blockvirt.volumes.transactions import (
    Overtaken,
    check_revision,
    damaged_snapshots,
    insert,
    locate,
    pool_record,
    retire,
    update,
)
from blockvirt.volumes.trash import Trash
from blockvirt.volumes.views import READ_BATCH, DeviceShare, Volume, carries_labels, read_shares, read_volume

log = logging.getLogger("blockvirt.catalogue")

# A change that met another change of the same volume starts over; more often than this is not met in practice.
MAX_ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class Created:
    """The answer to a create: ``created`` is False where the same volume was there already."""

    volume: Volume
    created: bool


@dataclass(frozen=True, slots=True)
class Page:
    """Some volumes in the order of their names, and the name to go on after (None: that was all)."""

    volumes: tuple[Volume, ...]
    next_after: str | None


@dataclass(frozen=True, slots=True)
class Deletion:
    """What a delete takes away, or would take away."""

    volume: Volume
    deleted: bool
    obstacles: tuple[str, ...] = ()
    """Why it would be refused without force."""
    shares: tuple[DeviceShare, ...] = field(default=())
    job_id: str = ""
    """The job that takes it apart; empty: it is in the trash."""
    purge_at_s: float = 0.0
    """When the trash lets go of it; 0: it is not there."""


class Catalogue:
    """All volumes of the pool. One per process; call it on the event loop."""

    def __init__(
        self,
        store: Store,
        open_volumes: OpenVolumes,
        space: PoolSpace,
        *,
        trash_s: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``trash_s``: how long deleted volumes stay in the trash; 0: they are deleted for good at once."""
        self._store = store
        self._open = open_volumes
        self._space = space
        self._clock = clock
        self._trash_s = trash_s
        self.promises = Promises(store, space)
        self.trash = Trash(store, open_volumes, self.promises, clock=clock)
        with store.read() as reader:
            self._chunk_bytes = pool_record(reader).chunk_bytes

    @property
    def promised_bytes(self) -> int:
        """The sum of the sizes of all volumes, in the trash too, grants on their way included."""
        return self.promises.promised_bytes

    def count(self) -> int:
        """Return how many volumes there are, without those being deleted."""
        with self._store.read() as reader:
            return reader.count(Table.VOLUME_NAMES)

    def allowance(self) -> Allowance:
        """Return the largest volume one could get now, and what limits it."""
        return self.promises.allowance()

    # --- reading ---------------------------------------------------------------------------------------------------

    def get(self, name_or_id: str) -> Volume:
        """Return a volume by name or id; raises NotFound. A damaged one is returned in the state 'damaged'."""
        with self._store.read() as reader:
            volume_id, name = locate(reader, name_or_id)
            return read_volume(reader, volume_id, name, self._chunk_bytes, self._open)

    def shares(self, volume_id: str) -> tuple[DeviceShare, ...]:
        """Return where a volume's data lies; empty for a damaged one."""
        with self._store.read() as reader:
            try:
                return read_shares(reader, volume_id, self._chunk_bytes)
            except DamagedRecord:
                return ()

    def names(self, limit: int) -> tuple[str, ...]:
        """Return the first ``limit`` names in their order, without looking at the volumes."""
        with self._store.read() as reader:
            rows = zip(reader.scan(Table.VOLUME_NAMES), range(limit), strict=False)
            return tuple(key.decode() for (key, _), _ in rows)

    async def list(self, *, labels: Mapping[str, str] | None = None, after: str = "", limit: int = 100) -> Page:
        """Return up to ``limit`` volumes named behind ``after`` that carry all of ``labels``, in the order of names.

        Volumes that are created or deleted meanwhile do not shift what follows: the place to go on is a name. Others
        run between batches.
        """
        found: list[Volume] = []
        while True:
            with self._store.read() as reader:
                # b"\0" behind a name is the smallest key above it.
                names = reader.scan(Table.VOLUME_NAMES, start=after.encode() + b"\0" if after else b"")
                batch = [
                    (key.decode(), value.decode()) for (key, value), _ in zip(names, range(READ_BATCH), strict=False)
                ]
                for name, volume_id in batch:
                    if len(found) == limit:
                        return Page(tuple(found), after)
                    after = name
                    if not labels or carries_labels(reader, volume_id, labels):
                        found.append(read_volume(reader, volume_id, name, self._chunk_bytes, self._open))
            if len(batch) < READ_BATCH:
                return Page(tuple(found), None)
            await sleep(0)

    # --- creating and changing -------------------------------------------------------------------------------------

    async def create(
        self,
        wanted: NewVolume,
        *,
        also: Callable[[Writer, VolumeRecord], None] | None = None,
        origin: SnapshotRecord | None = None,
    ) -> Created:
        """Create a volume; the same request under the same name again returns what is there.

        With ``origin`` it is a clone of that snapshot.
        ``also`` runs in the transaction that creates it, with the new record; what it raises undoes the create.
        Raises InvalidSize, InvalidName, InvalidRequest, Exists (the name belongs to another kind of volume),
        LimitReached, PoolFull and OvercommitLimit.
        """
        size_bytes = round_size(wanted.size_bytes, self._chunk_bytes)
        if wanted.name is not None:
            check_name(wanted.name, what="volume")
            existing = self._same(wanted.name, wanted, size_bytes)
            if existing is not None:
                return Created(existing, created=False)
        check_labels(wanted.labels)
        with self._store.read() as reader:
            check_placement(reader, wanted.placement_devices, wanted.placement_labels)
        record = VolumeRecord(
            id=new_id(),
            name=wanted.name or "",
            size_bytes=size_bytes,
            branch=0,
            created_s=self._clock(),
            labels=dict(wanted.labels),
            placement_devices=wanted.placement_devices,
            placement_labels=dict(wanted.placement_labels),
        )
        try:
            with self.promises.grant(size_bytes):
                record = await self._store.commit(lambda writer: insert(writer, record, also, origin))
        except Overtaken:
            assert wanted.name is not None, "only a given name can be taken"
            existing = self._same(wanted.name, wanted, size_bytes)
            if existing is None:
                raise InUse(
                    f"volume {wanted.name!r} was created and deleted meanwhile", correction="try again"
                ) from None
            return Created(existing, created=False)
        log.info("volume %s (%s) created, %d bytes", record.name, record.id, record.size_bytes)
        return Created(self.get(record.id), created=True)

    def _same(self, name: str, wanted: NewVolume, size_bytes: int) -> Volume | None:
        """Return the volume called ``name`` if it is what is wanted, None if there is none; raises Exists."""
        try:
            found = self.get(name)
        except NotFound:
            return None
        if found.state == "damaged":
            raise Exists(
                f"a volume {name!r} exists already and is damaged",
                cause=found.damage,
                correction="choose another name; 'blockvirt check' says more about the damage",
                volume_id=found.id,
            )
        differences = [
            what
            for what, same in (
                ("size", found.size_bytes == size_bytes),
                ("labels", found.labels == wanted.labels),
                ("placement devices", found.placement_devices == wanted.placement_devices),
                ("placement labels", found.placement_labels == wanted.placement_labels),
            )
            if not same
        ]
        if differences:
            raise Exists(
                f"a volume {name!r} exists already and differs in: {', '.join(differences)}",
                cause=f"it has {found.size_bytes} bytes ({format_size(found.size_bytes)})",
                correction="choose another name, or ask for the same size, labels and placement",
                volume_id=found.id,
            )
        return found

    async def change(self, name_or_id: str, change: VolumeChange, *, expected_revision: int | None = None) -> Volume:
        """Rename, relabel and grow a volume in one transaction; an open one has its new size at once.

        Raises NotFound, PreconditionFailed (another revision than expected), Exists (the new name is taken),
        InvalidSize (shrinking), and what a create raises about space.
        """
        if change.name is not None:
            check_name(change.name, what="volume")
        if change.labels is not None:
            check_labels(change.labels)
        size_bytes = None if change.size_bytes is None else round_size(change.size_bytes, self._chunk_bytes)
        for _ in range(MAX_ATTEMPTS):
            current = self._record(name_or_id)
            check_revision(current, expected_revision)
            wanted = replace(
                current,
                name=current.name if change.name is None else change.name,
                labels=current.labels if change.labels is None else dict(change.labels),
                size_bytes=current.size_bytes if size_bytes is None else size_bytes,
            )
            if wanted == current:
                return self.get(current.id)
            _check_growth(current, wanted.size_bytes)
            try:
                with self.promises.grant(wanted.size_bytes - current.size_bytes):
                    await self._store.commit(lambda writer, a=current, b=wanted: update(writer, a, b))  # type: ignore[misc]
            except Overtaken:
                continue
            if wanted.size_bytes != current.size_bytes:
                # Read again: of two growths the later one is durable, whichever gets here last.
                await self._open.resize(current.id, self._record(current.id).size_bytes)
            return self.get(current.id)
        raise InUse(f"volume {name_or_id!r} is being changed by others all the time", correction="try again")

    # --- deleting --------------------------------------------------------------------------------------------------

    async def delete(
        self,
        name_or_id: str,
        *,
        force: bool = False,
        dry_run: bool = False,
        purge: bool = False,
        expected_revision: int | None = None,
    ) -> Deletion:
        """Put a volume into the trash, or with ``purge`` delete it for good; with ``dry_run`` say what would go.

        Refused with InUse while a host has it mapped or a session is open, unless forced: then the mappings go in the
        same transaction and the sessions are dropped; where the record of a snapshot is damaged, unless forced: it
        might be held; and while a snapshot is held, forced or not. Raises NotFound, PreconditionFailed, DamagedRecord.
        """
        record = self._record(name_or_id)
        check_revision(record, expected_revision)
        found, shares = self.get(record.id), self.shares(record.id)
        obstacles = _obstacles(found)
        if dry_run:
            # In the writer's thread, as retire does: there may be thousands of snapshots.
            damaged = await self._store.commit(lambda writer: damaged_snapshots(writer, record))
            return Deletion(found, deleted=False, obstacles=(*obstacles, *damaged), shares=shares)
        if obstacles and not force:
            raise _refusal(found, obstacles)
        now_s = self._clock()
        purge_at_s = 0.0 if purge or not self._trash_s else now_s + self._trash_s
        record, job_id = await self._store.commit(
            lambda writer: retire(
                writer,
                found.id,
                expected_revision=expected_revision,
                force=force,
                now_s=now_s,
                purge_at_s=purge_at_s,
            )
        )
        if purge_at_s:
            log.info("volume %s (%s) is in the trash", record.name, record.id)
            await self._open.retire(record.id)
            self.trash.wake(purge_at_s)
        else:
            self.promises.release(record.size_bytes)
            log.info("volume %s (%s) is being deleted", record.name, record.id)
            await self._open.discard(record.id)
            self._open.wake_jobs(job_id)
        return Deletion(found, deleted=True, obstacles=obstacles, shares=shares, job_id=job_id, purge_at_s=purge_at_s)

    async def reopen(self, name_or_id: str) -> Volume:
        """Bring a volume that has stopped back as after a power cut: what was flushed is there.

        Raises NotFound, InUse (it has not stopped) and whatever keeps it from being recovered.
        """
        record = self._record(name_or_id)
        await self._open.reopen(record.id)
        log.warning("volume %s (%s) was reopened", record.name, record.id)
        return self.get(record.id)

    # --- policy ----------------------------------------------------------------------------------------------------

    async def set_policy(
        self,
        *,
        overcommit_ratio: float | None = None,
        near_ratio: float | None = None,
        brake_ratio: float | None = None,
    ) -> PoolRecord:
        """Set the pool's policy (the API has checked the ranges); what is promised already stays promised."""

        def apply(writer: Writer) -> PoolRecord:
            pool = pool_record(writer)
            pool = replace(
                pool,
                overcommit_ratio=pool.overcommit_ratio if overcommit_ratio is None else overcommit_ratio,
                near_ratio=pool.near_ratio if near_ratio is None else near_ratio,
                brake_ratio=pool.brake_ratio if brake_ratio is None else brake_ratio,
            )
            writer.put_record(Table.POOL, POOL_KEY, pool)
            return pool

        pool = await self._store.commit(apply)
        self._space.policy_changed()
        return pool

    def _record(self, name_or_id: str) -> VolumeRecord:
        with self._store.read() as reader:
            volume_id, name = locate(reader, name_or_id)
            record = reader.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
        if record is None:
            raise DamagedRecord(
                f"volume {name!r} has a name but no record",
                correction="run 'blockvirt check'; 'blockvirt check --restore-metadata' brings back an intact copy",
            )
        return record


def _check_growth(current: VolumeRecord, size_bytes: int) -> None:
    if size_bytes < current.size_bytes:
        raise InvalidSize(
            f"volume {current.name!r} cannot shrink from {current.size_bytes} to {size_bytes} bytes",
            cause="what lies beyond the new end would be lost",
            correction="create a smaller volume and copy what is needed",
            size_bytes=current.size_bytes,
        )


def _obstacles(volume: Volume) -> tuple[str, ...]:
    obstacles = [f"it is mapped as {unit}" for unit in volume.units]
    if volume.sessions:
        obstacles.append("1 session uses it" if volume.sessions == 1 else f"{volume.sessions} sessions use it")
    return tuple(obstacles)


def _refusal(volume: Volume, obstacles: tuple[str, ...]) -> InUse:
    return InUse(
        f"volume {volume.name!r} is in use: {'; '.join(obstacles[:5])}",
        cause="deleting it would pull it from under its users",
        correction="unmap it ('blockvirt lun unmap') and end its sessions ('blockvirt session drop'), or use force",
        units=list(volume.units),
        sessions=volume.sessions,
    )
