"""Doing things to a pool that may fail, and knowing what came of them: refused, stopped, and what a stop has kept."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

from blockvirt.device import read_one
from blockvirt.errors import BlockvirtError, MetadataFault, NotFound, VolumeStopped
from blockvirt.volumes.handle import Handle
from tests.attacks.faults_hangs import HANG_S, timed
from tests.attacks.faults_model import BLOCK_BYTES, Expected, differences, values
from tests.attacks.faults_pool import CHUNK_BYTES, AttackedPool
from tests.attacks.faulty_disk import FaultyDisk
from tests.volumes.conftest import write

T = TypeVar("T")

CHUNKS = 64
BLOCKS = CHUNKS * CHUNK_BYTES // BLOCK_BYTES
SIZE_BYTES = BLOCKS * BLOCK_BYTES


class Attempts:
    """What is tried on one pool, and the model of it."""

    def __init__(self, pool: AttackedPool, seed: int, expected: Expected, disk: FaultyDisk | None = None) -> None:
        self.pool = pool
        self.expected = expected
        self.dice = random.Random(seed)
        self.problems: list[str] = []
        self.last_error: Exception | None = None
        """Of the last step that was refused."""
        self.refused = 0
        """Steps that ended with an error."""
        self.stops = 0
        """Volumes that stopped, and pools."""
        self._disk = disk
        self._handles: dict[str, Handle] = {}
        self._pool_failed = False

    # --- the pool ------------------------------------------------------------------------------------------------

    async def start(self) -> bool:
        """Start the pool; at the second time of asking, if the disk fails once only."""
        for _ in range(2):
            with self._recovering():
                started, _ = await self._try("the start", self.pool.start)
            if started:
                return True
        return False

    def _recovering(self) -> AbstractContextManager[None]:
        return self._disk.recovering() if self._disk is not None else nullcontext()

    async def _start_again(self) -> None:
        """An administrator does so after the metadata failed."""
        self.stops += 1
        self._pool_failed = False
        self._handles.clear()
        self.expected.stopped |= set(self.expected.volumes)
        await self._try("the close of a failed pool", self.pool.close)
        if not await self.start():
            return
        for name in list(self.expected.volumes):
            await self._reopen(name)

    async def _try(self, what: str, call: Callable[[], Awaitable[T]]) -> tuple[bool, T | None]:
        """Do something; tell whether it went well. What is no clean error is a problem."""
        try:
            with timed(what, self.problems):
                return True, await asyncio.wait_for(call(), HANG_S)
        except VolumeStopped as error:
            self.last_error = error
            raise
        except TimeoutError:
            self.problems.append(f"{what} hung for {HANG_S:g} s")
        except MetadataFault as error:
            self.last_error = error
            self._pool_failed = self._pool_failed or "has failed and is stopped" in error.message
        except (BlockvirtError, OSError) as error:
            self.last_error = error
        except Exception as error:
            self.problems.append(f"{what} ended with {error!r}, which is no clean error")
        self.refused += 1
        return False, None

    async def _on_pool(self, what: str, call: Callable[[], Awaitable[T]]) -> tuple[bool, T | None]:
        """Do something that is not of one volume's handle; a volume may be found to have stopped."""
        try:
            return await self._try(what, call)
        except VolumeStopped:
            self.refused += 1
            for name in list(self.expected.volumes):
                if self.is_stopped(name):
                    await self._stopped(name)
            return False, None

    def is_stopped(self, name: str) -> bool:
        """Tell whether the engine shows a volume as stopped."""
        try:
            return self.pool.catalogue.get(name).state == "stopped"
        except BlockvirtError:
            return False

    # --- one volume ----------------------------------------------------------------------------------------------

    async def _handle(self, name: str) -> Handle | None:
        """Return an open handle; None where the volume cannot be had."""
        if name not in self.expected.volumes or not self.pool.is_up:
            return None
        if name in self.expected.stopped and not await self._reopen(name):
            return None
        if name not in self._handles:
            try:
                volume_id = self.pool.catalogue.get(name).id
                with self._recovering():
                    opened, handle = await self._try(f"opening {name}", lambda: self.pool.open(volume_id))
            except VolumeStopped:
                await self._stopped(name)
                return None
            except BlockvirtError:
                return None
            if not opened or handle is None:
                return None
            self._handles[name] = handle
        return self._handles[name]

    async def _on(self, name: str, what: str, call: Callable[[Handle], Awaitable[T]]) -> tuple[bool, T | None]:
        """Do something to a volume; what succeeds although a sync of it failed is a problem."""
        handle = await self._handle(name)
        if handle is None:
            return False, None
        try:
            done, result = await self._try(f"{what} of {name}", lambda: call(handle))
        except VolumeStopped:
            self.refused += 1
            await self._stopped(name)
            return False, None
        if done and (failed := self._failed_sync(name, handle)):
            self.problems.append(f"{what} of {name} was answered after the sync of {failed} had failed")
        return done, result

    def _failed_sync(self, name: str, handle: Handle) -> str:
        if self._disk is None:
            return ""
        volume = handle._opened.volume
        kinds = (
            ("files", "journal") if volume.journal is not None else ("files",)
        )  # one was being made: it held nothing
        mine = [
            Path(path) for path in self._disk.failed_syncs if Path(path).name.startswith(f"{volume.map.branch:08x}")
        ]
        return next((str(path) for path in mine if path.parent.name in kinds), "")

    async def _stopped(self, name: str) -> None:
        """A volume has stopped: it must refuse everything; then it is reopened."""
        if name in self.expected.stopped:
            return
        self.stops += 1
        self.expected.stopped.add(name)
        handle = self._handles.pop(name, None)
        if handle is not None:
            has_journal = handle._opened.volume.journal is not None
            for what, call in (
                ("a write", lambda: write(handle, 0, b"x" * 512)),
                ("a read", lambda: read_one(handle, 0, memoryview(bytearray(512)))),
                ("a flush", handle.flush),
                ("a trim", lambda: handle.zero(0, CHUNK_BYTES, punch=True)),
            ):
                await self._must_refuse(name, what, call)
            await self._try(f"closing stopped {name}", handle.close)
            if has_journal or self._failed_sync(name, handle):  # else a commit failed, and nothing was to be committed
                await self._must_stay_stopped(name)
        await self._reopen(name)

    async def _must_stay_stopped(self, name: str) -> None:
        """Its record or its journal must say so."""
        if self.is_stopped(name) or self.pool.engine.not_ready():
            return
        with self._recovering():
            try:
                volume_id = self.pool.catalogue.get(name).id
                opened, _ = await self._try(f"opening stopped {name}", lambda: self.pool.open(volume_id))
            except BlockvirtError:
                return
        if opened:
            self.problems.append(f"{name} has forgotten that it had stopped")

    async def _must_refuse(self, name: str, what: str, call: Callable[[], Awaitable[object]]) -> None:
        try:
            done, _ = await self._try(f"{what} to stopped {name}", call)
        except VolumeStopped:
            return
        if done:
            self.problems.append(f"{what} was answered by {name}, which has stopped")

    async def _reopen(self, name: str) -> bool:
        """Bring a stopped volume back as an administrator does, and see what it has kept."""
        with self._recovering():
            return await self._reopened(name)

    async def _reopened(self, name: str) -> bool:
        blocks = self.expected.volumes.get(name)
        if blocks is None:
            return False
        try:
            if self.is_stopped(name):
                done, _ = await self._try(f"reopening {name}", lambda: self.pool.catalogue.reopen(name))
                if not done:
                    return False
            volume_id = self.pool.catalogue.get(name).id
            opened, handle = await self._try(f"opening reopened {name}", lambda: self.pool.open(volume_id))
            if not opened or handle is None:
                return False
            found = await self._try(f"reading reopened {name}", lambda: read_all(handle))
        except NotFound:
            if name in self.expected.uncertain:
                del self.expected.volumes[name]
            return False
        except BlockvirtError:
            return False
        self._handles[name] = handle
        if found[1] is None:
            return False
        if wrong := differences(found[1], blocks.allowed_after_cut()):
            self.problems.append(f"{name}, reopened after it had stopped: {wrong}")
        blocks.settle(found[1])
        self.expected.stopped.discard(name)
        return True


async def read_all(handle: Handle) -> list[int]:
    """Read a whole volume: half as sessions look first, half as their threads do."""
    buffer = bytearray(SIZE_BYTES)
    half = memoryview(buffer)[: SIZE_BYTES // 2]
    if not handle.read_now(0, half):
        await read_one(handle, 0, half)
    await read_one(handle, SIZE_BYTES // 2, memoryview(buffer)[SIZE_BYTES // 2 :])
    return values(buffer)
