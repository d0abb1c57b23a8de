"""Which volumes are open: opened for the first session, shared by all, closed after the last.

A volume that nobody uses holds no memory, no descriptor and no journal.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Container
from contextlib import asynccontextmanager

from blockvirt.errors import BeingDeleted, BlockvirtError, InUse, NotFound, ShuttingDown, VolumeStopped
from blockvirt.meta.keys import Table
from blockvirt.meta.records import VolumeRecord
from blockvirt.tasks import TaskSet
from blockvirt.volumes.context import VolumeContext
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.imports import check_not_importing
from blockvirt.volumes.leftovers import Leftovers
from blockvirt.volumes.opened import OpenVolume, check_stopped, opening
from blockvirt.volumes.versions import branch_record

log = logging.getLogger("blockvirt.volumes")


class _Slot:
    """One volume's place: who holds it, and a lock under which it opens and closes."""

    __slots__ = ("closing", "handles", "lock", "opened", "pins", "unpinned")

    def __init__(self) -> None:
        self.opened: OpenVolume | None = None
        self.closing: OpenVolume | None = None
        """Out of ``opened``, and not closed yet."""
        self.handles: set[Handle] = set()
        self.lock = asyncio.Lock()
        self.pins = 0
        """Who works on the volume without a session: it stays open, and nobody takes it away meanwhile."""
        self.unpinned = asyncio.Event()
        self.unpinned.set()

    def pin(self) -> None:
        self.pins += 1
        self.unpinned.clear()

    def unpin(self) -> None:
        self.pins -= 1
        if not self.pins:
            self.unpinned.set()


class VolumeRegistry:
    """The open volumes of the pool."""

    def __init__(self, context: VolumeContext, leftovers: Leftovers, wake_jobs: Callable[..., None]) -> None:
        self._context = context
        self._leftovers = leftovers
        self._wake_jobs = wake_jobs
        self._slots: dict[str, _Slot] = {}
        self._volume_of: dict[str, str] = {}
        self._on_discard: list[Callable[[str], None]] = []
        self._closing = False
        self._tasks = TaskSet("registry")

    # --- sessions ------------------------------------------------------------------------------------------------

    async def open(self, volume_id: str, session_id: str) -> Handle:
        """Open a volume for a session.

        Raises NotFound, BeingDeleted, InUse (it is being imported), VolumeStopped, DeviceFault, ShuttingDown.
        """
        self._record(volume_id)
        slot = self._slots.setdefault(volume_id, _Slot())
        async with slot.lock:
            handle = Handle(await self._opened(slot, volume_id), session_id, self._close)
            slot.handles.add(handle)
            self._volume_of[session_id] = volume_id
            return handle

    async def _opened(
        self, slot: _Slot, volume_id: str, *, importing: bool = False, reverted: bool = False
    ) -> OpenVolume:
        """Return the open volume, opened now if it was not. Under the slot's lock."""
        if self._closing:
            raise ShuttingDown("the daemon is stopping", correction="connect again when it has started")
        record = self._record(volume_id, importing=importing)
        if slot.opened is None:
            await self._settle(record, reverted=reverted)
            record = self._record(volume_id, importing=importing)  # it may have grown, or have been deleted, meanwhile
            slot.opened = opening(self._context, record, reverted=reverted)
        else:  # by somebody who may work on a volume that guests may not have
            check_stopped(record, slot.opened.volume.branch_record, reverted=reverted)
        return slot.opened

    async def _settle(self, record: VolumeRecord, *, reverted: bool) -> None:
        """Recover what a dead daemon left; with ``reverted`` also where guests must stay away from the volume."""
        with self._context.store.read() as reader:
            branch = branch_record(reader, record.branch)
        if not (reverted and branch.awaits_guests):
            await self._leftovers.settle(record)

    @asynccontextmanager
    async def pinned(
        self, volume_id: str, *, importing: bool = False, reverted: bool = False
    ) -> AsyncIterator[OpenVolume]:
        """Have a volume open without a session: for a snapshot, for background work. Not for long: others wait.

        Raises as ``open``. Who may be cancelled inside must shield what is not to be left half done. ``importing`` is
        for the import that the volume is marked for: it keeps all others out, and may take long. ``reverted`` is for
        who changes nothing that a guest sees: after a revert under its guests too, while sessions are refused.
        """
        self._record(volume_id, importing=importing)
        slot = self._slots.setdefault(volume_id, _Slot())
        async with slot.lock:
            opened = await self._opened(slot, volume_id, importing=importing, reverted=reverted)
            slot.pin()
        try:
            yield opened
        finally:
            slot.unpin()
            await asyncio.shield(self._tasks.start(self._close_unused(slot), "unpin", awaited=True))

    def _record(self, volume_id: str, *, importing: bool = False) -> VolumeRecord:
        record = self._stored(volume_id)
        if not importing:
            check_not_importing(record)
        if record.deleting:
            raise BeingDeleted(f"volume {volume_id} is being deleted", correction="use another volume")
        if record.trashed_s:
            raise BeingDeleted(
                f"volume {record.name} was deleted, and is in the trash",
                correction=f"'blockvirt trash restore {volume_id}' brings it back",
            )
        return record

    async def _close(self, handle: Handle) -> None:
        # In a task of its own: the session that closes may be cancelled, the checkpoint must not be.
        await asyncio.shield(self._tasks.start(self._let_go(handle), "close", awaited=True))

    async def _let_go(self, handle: Handle) -> None:
        volume_id = handle.volume_id
        self._volume_of.pop(handle.session_id, None)
        slot = self._slots.get(volume_id)
        if slot is None:  # the volume was deleted under its session
            return
        slot.handles.discard(handle)
        await self._close_unused(slot)

    async def _close_unused(self, slot: _Slot) -> None:
        async with slot.lock:
            if slot.handles or slot.pins or slot.opened is None:
                return
            slot.closing, slot.opened = slot.opened, None
            try:
                await slot.closing.close()
            finally:
                slot.closing = None

    # --- what the control plane asks (volumes.ports.OpenVolumes) ---------------------------------------------------

    def is_open(self, volume_id: str) -> bool:
        """See OpenVolumes."""
        slot = self._slots.get(volume_id)
        return slot is not None and slot.opened is not None

    def sessions_of(self, volume_id: str) -> int:
        """See OpenVolumes."""
        slot = self._slots.get(volume_id)
        return len(slot.handles) if slot is not None else 0

    def mapped_chunks(self, volume_id: str) -> int | None:
        """See OpenVolumes."""
        slot = self._slots.get(volume_id)
        return slot.opened.volume.tail.mapped_chunks if slot is not None and slot.opened is not None else None

    def stopped_reason(self, volume_id: str) -> str:
        """See OpenVolumes."""
        slot = self._slots.get(volume_id)
        live = None if slot is None else slot.opened or slot.closing
        if live is None:
            return ""
        failure = live.volume.failure
        return failure.cause if isinstance(failure, VolumeStopped) else live.volume.branch_record.stopped

    async def resize(self, volume_id: str, size_bytes: int) -> None:
        """See OpenVolumes."""
        slot = self._slots.get(volume_id)
        if slot is not None and slot.opened is not None:
            assert size_bytes >= slot.opened.volume.size_bytes
            slot.opened.volume.size_bytes = size_bytes

    def on_discard(self, drop: Callable[[str], None]) -> None:
        """Have ``drop`` called with the id of each volume that is discarded: for what else has its chunks open."""
        self._on_discard.append(drop)

    async def discard(self, volume_id: str) -> None:
        """See OpenVolumes."""
        for drop in self._on_discard:
            drop(volume_id)
        slot = self._slots.get(volume_id)
        if slot is None:
            return
        for handle in list(slot.handles):
            handle.lose()
        async with slot.lock:
            await slot.unpinned.wait()
            opened, slot.opened = slot.opened, None
            if opened is not None:
                opened.volume.failure = BeingDeleted(f"volume {opened.volume.record.name} is being deleted")
                await opened.abandon(keep_journal=True)
            slot.handles.clear()

    @asynccontextmanager
    async def set_aside(
        self, volume_id: str, *, refuse_sessions: bool = False, importing: bool = False, reverted: bool = False
    ) -> AsyncIterator[int]:
        """Drop a volume's sessions, close it with a checkpoint, and keep it closed as long as the context is held.

        Gives the number of sessions that were dropped; with ``refuse_sessions`` raises InUse instead. What was left by
        a dead daemon is recovered first. Raises VolumeStopped where the volume has stopped (with ``reverted`` not where
        that was a revert under its guests), DeviceFault, DamagedRecord, and InUse while a stream is imported into it,
        unless ``importing``: for the one that takes it back.
        """
        slot = self._slots.setdefault(volume_id, _Slot())
        if not refuse_sessions:
            for handle in list(slot.handles):
                handle.lose()
        async with slot.lock:
            if not importing:
                check_not_importing(self._stored(volume_id))
            await slot.unpinned.wait()
            if refuse_sessions and slot.handles:
                raise InUse(f"volume {volume_id} was opened meanwhile", correction="end its sessions, or use force")
            dropped = len(slot.handles)
            for handle in list(slot.handles):
                handle.lose()
            opened, slot.opened = slot.opened, None
            slot.handles.clear()
            if opened is not None:
                await opened.close()
                opened.volume.check()
            else:
                await self._settle(self._stored(volume_id), reverted=reverted)
            yield dropped

    def _stored(self, volume_id: str) -> VolumeRecord:
        with self._context.store.read() as reader:
            record = reader.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
        if record is None:
            raise NotFound(f"there is no volume {volume_id}", correction="see 'blockvirt volume list'")
        return record

    async def retire(self, volume_id: str) -> None:
        """See OpenVolumes."""
        try:
            async with self.set_aside(volume_id, reverted=True):
                pass
        except BlockvirtError as error:  # it is in the trash all the same; whoever restores it meets this again
            log.error("%s: %s", error.message, error.cause)

    def wake_jobs(self, *ids: str) -> None:
        """See OpenVolumes."""
        self._wake_jobs(*ids)

    def volume_of(self, session_id: str) -> str | None:
        """Return the id of the volume that a session has open."""
        return self._volume_of.get(session_id)

    # --- administration ------------------------------------------------------------------------------------------

    def opened(self) -> list[OpenVolume]:
        """Return the volumes that are open now."""
        return [slot.opened for slot in self._slots.values() if slot.opened is not None]

    async def checkpoint_now(self, branches: Container[int]) -> None:
        """Bring what the open volumes with these heads hold now into the metadata, one after the other.

        Those that are just closing too. One that cannot be is passed over: a volume that has stopped says so itself.
        """
        for slot in list(self._slots.values()):
            live = slot.opened or slot.closing
            if live is None or live.volume.map.branch not in branches:
                continue
            try:
                await live.checkpointer.run_now()
            except BlockvirtError as error:
                log.warning("what volume %s holds is not judged as of now: %s", live.volume.record.name, error)

    async def reopen(self, volume_id: str) -> None:
        """Bring a volume that has stopped (I7) back as after a power cut. Its sessions are dropped first.

        Raises InUse while an import is at work on it, and where it has not stopped.
        """
        self._record(volume_id, importing=True)
        slot = self._slots.setdefault(volume_id, _Slot())
        async with slot.lock:
            if slot.pins:  # those of an import last as long as its stream; one that has ended left its mark only
                self._record(volume_id)
            await slot.unpinned.wait()
            record = self._record(volume_id, importing=True)
            opened = slot.opened
            if opened is not None:
                if opened.volume.failure is None and not opened.volume.branch_record.stopped:
                    raise InUse(f"volume {record.name} has not stopped", correction="nothing is to be done")
                slot.opened = None
                for handle in list(slot.handles):
                    handle.lose()
                await (opened.abandon(keep_journal=True) if opened.volume.failure is not None else opened.close())
            await self._leftovers.settle(record, reopen=True)

    def forget(self, volume_id: str) -> None:
        """Drop what is kept of a volume that is deleted for good."""
        self._slots.pop(volume_id, None)

    def stop_all(self, error: BaseException) -> None:
        """The metadata store failed: nothing more of any volume is acknowledged (I7)."""
        for opened in self.opened():
            opened.volume.stop("the metadata store has failed", error)

    async def close(self) -> None:
        """Close every volume: sessions must be gone or are dropped."""
        self._closing = True
        for slot in list(self._slots.values()):
            for handle in list(slot.handles):
                handle.lose()
            async with slot.lock:
                await slot.unpinned.wait()
                opened, slot.opened = slot.opened, None
                if opened is not None:
                    try:
                        await opened.close()
                    except Exception:  # a mistake of ours with one volume must not keep the others from closing
                        log.exception("closing volume %s failed", opened.volume.record.name)
        await self._tasks.wait()
