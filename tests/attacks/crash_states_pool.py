"""A pool in this process, driven as sessions and the API would; ``power_cuts_load.Pool``."""

import asyncio
import ctypes
from pathlib import Path

from blockvirt.device import Readable, read_one
from blockvirt.meta.datafile import DATA_FILE
from blockvirt.snapshots.catalogue import Snapshots
from blockvirt.snapshots.cloning import Cloning, NewClone
from blockvirt.snapshots.reader import SnapshotHandle
from blockvirt.snapshots.readers import SnapshotReaders
from blockvirt.snapshots.sealing import Sealer
from blockvirt.units import KIB, MIB
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.engine import Engine, EngineSettings
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.requests import NewVolume
from tests.attacks.power_cuts_load import Kind, Request, Volume
from tests.attacks.power_cuts_model import SECTOR_BYTES

_libc = ctypes.CDLL(None, use_errno=True)
SETTINGS = EngineSettings(chunk_bytes=4 * KIB, metadata_reserve_bytes=MIB)


class EnginePool:
    """One engine over the pool whose state and device are directories on the same filesystem."""

    def __init__(self, mountpoint: Path, lock_file: Path) -> None:
        self._lock_file = lock_file
        self.state_dir = mountpoint / "state"
        self.device = mountpoint / "device"
        self.engine: Engine
        self._sealer: asyncio.Task[None] | None = None
        self._sessions = 0
        self._runs = False

    async def start(self, *, sealing: bool = False) -> None:
        """Start the engine: recover, then serve; with ``sealing`` snapshots get their checksums."""
        self._lock_elsewhere()
        self.engine = engine = await Engine.start(self.state_dir, [self.device], SETTINGS)
        self._readers = SnapshotReaders(engine.context)
        engine.registry.on_discard(self._readers.drop_volume)
        self._catalogue = Catalogue(engine.store, engine.registry, engine.storage, trash_s=0)
        self._snapshots = Snapshots(engine, self._readers)
        self._cloning = Cloning(engine.store, self._catalogue, self._snapshots)
        self._runs = True
        if sealing:
            self._sealer = asyncio.create_task(Sealer(engine).run())

    async def close(self) -> None:
        """Stop the engine, if it runs."""
        if not self._runs:
            return
        self._runs = False
        if self._sealer is not None:
            self._sealer.cancel()
            await asyncio.wait([self._sealer])
            self._sealer = None
        await self._readers.close()
        await self._snapshots.close()
        await self.engine.close()

    def _lock_elsewhere(self) -> None:
        """Have LMDB's table of readers in memory: the first write to a clean page of it on a dead XFS is a SIGBUS."""
        lock = self.state_dir / "metadata" / "lock.mdb"
        lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not lock.is_symlink():
            lock.unlink(missing_ok=True)
            lock.symlink_to(self._lock_file)

    def hold_metadata(self) -> None:
        """Keep the pages of LMDB's map in memory, before the filesystem dies under this process.

        What the kernel has dropped by then cannot be read again: a SIGBUS. A daemon of its own may end so, but this
        process has the model.
        """
        path = self.engine.store.path / DATA_FILE
        (line, *_) = [each for each in Path("/proc/self/maps").read_text().splitlines() if each.endswith(f" {path}")]
        start = int(line.partition("-")[0], 16)
        if _libc.mlock(ctypes.c_void_p(start), ctypes.c_size_t(path.stat().st_size)) != 0:
            raise OSError(ctypes.get_errno(), f"{path} cannot be held in memory")

    async def create(self, volume: str, size_bytes: int) -> None:
        """See Pool."""
        await self._catalogue.create(NewVolume(size_bytes=size_bytes, name=volume))

    async def clone(self, snapshot: str, volume: str) -> None:
        """See Pool."""
        await self._cloning.clone(snapshot, NewClone(name=volume))

    async def delete(self, volume: str) -> None:
        """See Pool."""
        await self._catalogue.delete(volume, force=True, purge=True)

    async def snapshot(self, volume: str, name: str) -> None:
        """See Pool."""
        await self._snapshots.create({volume: name})

    async def delete_snapshot(self, snapshot: str) -> None:
        """See Pool."""
        await self._snapshots.delete([snapshot], force=True)

    async def open(self, volume: str) -> Volume:
        """See Pool."""
        return EngineVolume(await self._open(volume))

    async def _open(self, volume: str) -> Handle:
        self._sessions += 1
        return await self.engine.registry.open(self._catalogue.get(volume).id, f"session {self._sessions}")

    async def read(self, export: str) -> bytes:
        """See Pool."""
        handle: Handle | SnapshotHandle
        if "@" in export:
            self._sessions += 1
            handle = self._readers.open(self._snapshots.find(export), f"session {self._sessions}")
        else:
            handle = await self._open(export)
        try:
            return await _read(handle, handle.size_bytes)
        finally:
            await handle.close()

    async def names(self) -> tuple[list[str], list[str]]:
        """See Pool."""
        page = await self._snapshots.list(limit=1000)
        return list(self._catalogue.names(1000)), [f"{each.volume}@{each.name}" for each in page.snapshots]


async def _read(handle: Readable, size_bytes: int) -> bytes:
    data = bytearray(size_bytes)
    await read_one(handle, 0, memoryview(data))
    return bytes(data)


class EngineVolume:
    """A session of a volume; ``power_cuts_load.Volume``."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def send(self, request: Request, data: bytes) -> None:
        """See Volume: as the NBD server would."""
        handle = self._handle
        offset, length = request.first * SECTOR_BYTES, request.count * SECTOR_BYTES
        match request.kind:
            case Kind.WRITE if not request.fua and handle.write_now(offset, memoryview(data)):
                handle.settle()
            case Kind.WRITE:
                await handle.write(offset, memoryview(data), fua=request.fua)
            case Kind.FLUSH:
                await handle.flush()
            case Kind.CHECKPOINT:
                await handle._opened.checkpointer.run()
            case _:
                await handle.zero(offset, length, punch=request.kind is not Kind.ALLOCATE, fua=request.fua)

    async def close(self) -> None:
        """See Volume."""
        await self._handle.close()
