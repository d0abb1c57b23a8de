"""Revert: a volume goes back to one of its snapshots, in place, and keeps the younger ones.

The volume is closed, its head moves to a new branch that comes from the snapshot, and what it had last stays as an
automatic snapshot. All of it is one transaction, whatever the size.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from blockvirt.errors import InUse, InvalidRequest, NotFound
from blockvirt.ids import check_name
from blockvirt.meta.keys import Table
from blockvirt.meta.records import SnapshotRecord, VolumeRecord
from blockvirt.snapshots import transactions
from blockvirt.snapshots.catalogue import Snapshots
from blockvirt.snapshots.transactions import Safety
from blockvirt.tasks import TaskSet
from blockvirt.volumes.engine import Engine
from blockvirt.volumes.promises import Promises
from blockvirt.volumes.versions import branch_record

log = logging.getLogger("blockvirt.snapshots")


@dataclass(frozen=True, slots=True)
class Revert:
    """What a revert did, or would do."""

    volume_id: str
    snapshot: SnapshotRecord
    reverted: bool
    safety: SnapshotRecord | None
    """The snapshot of what the volume held before; None where none was wanted."""
    obstacles: tuple[str, ...] = ()
    """Why it would be refused without force."""
    needs_reopen: bool = False
    """NBD refuses the volume until an administrator reopens it: guests that had it open hold old caches."""


class Reverts:
    """Takes volumes back to their snapshots."""

    def __init__(
        self, engine: Engine, snapshots: Snapshots, promises: Promises, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._engine = engine
        self._snapshots = snapshots
        self._promises = promises
        self._clock = clock
        self._tasks = TaskSet("reverts")

    async def revert(
        self,
        name_or_id: str,
        *,
        force: bool = False,
        safety: bool = True,
        safety_name: str = "",
        dry_run: bool = False,
    ) -> Revert:
        """Take a volume back to the snapshot 'VOLUME@NAME' (or its id).

        Refused with InUse while a session has the volume open, unless ``force`` drops it: then the volume refuses NBD
        until it is reopened, because a guest that reconnects with old caches would corrupt it. ``safety`` keeps what
        the volume held as a snapshot, called ``safety_name`` or 'before-revert-' and the time. While it waits to be
        reopened it can be reverted again, and goes on waiting.

        Raises NotFound, Exists, InvalidName, VolumeStopped, OvercommitLimit (the snapshot is larger than the volume).
        """
        target = self._snapshots.find(name_or_id)
        volume = self._volume(target.volume_id)
        now_s = self._clock()
        if not safety and safety_name:
            raise InvalidRequest("a safety snapshot is named and not wanted", correction="leave out one of the two")
        if safety_name:
            check_name(safety_name, what="snapshot")
        automatic = time.strftime("before-revert-%Y%m%dt%H%M%Sz", time.gmtime(now_s))
        wanted = Safety(safety_name or automatic, not safety_name) if safety else None
        sessions = self._engine.registry.sessions_of(volume.id)
        in_the_way = f"{sessions} sessions have it open"
        obstacles = (in_the_way,) if sessions else ()
        if dry_run:
            return Revert(
                volume.id, target, False, None, obstacles, needs_reopen=sessions > 0 or self._awaits_guests(volume)
            )
        if sessions and not force:
            raise InUse(
                f"volume {volume.name!r} cannot be reverted: {in_the_way}",
                cause="its users' caches would not fit what it holds then",
                correction="end them ('blockvirt session list'); or use force, and then 'blockvirt volume reopen'",
                sessions=sessions,
            )
        self._snapshots.check_space("no volume is reverted")
        work = self._revert(volume, target, wanted, now_s, force=force)
        return await asyncio.shield(self._tasks.start(work, "revert", awaited=True))

    async def _revert(
        self, volume: VolumeRecord, target: SnapshotRecord, safety: Safety | None, now_s: float, *, force: bool
    ) -> Revert:
        registry = self._engine.registry
        async with registry.set_aside(volume.id, refuse_sessions=not force, reverted=True) as dropped:
            volume = self._volume(volume.id)
            with self._promises.grant(target.size_bytes - volume.size_bytes):
                done = await self._engine.store.commit(
                    lambda writer: transactions.revert(writer, volume, target, safety, now_s, dropped)
                )
        if done.job_id is not None:
            self._engine.jobs.wake(done.job_id)
        if done.safety is not None:
            self._engine.sealing.set()
        log.warning("volume %s is reverted to snapshot %s", volume.name, target.name)
        return Revert(volume.id, target, reverted=True, safety=done.safety, needs_reopen=done.needs_reopen)

    def _volume(self, volume_id: str) -> VolumeRecord:
        with self._engine.store.read() as reader:
            record = reader.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
        if record is None or record.deleting or record.trashed_s:
            raise NotFound(f"volume {volume_id} was deleted", correction="see 'blockvirt trash list'")
        return record

    def _awaits_guests(self, volume: VolumeRecord) -> bool:
        with self._engine.store.read() as reader:
            return branch_record(reader, volume.branch).awaits_guests

    async def close(self) -> None:
        """Wait for what is under way."""
        await self._tasks.wait()
