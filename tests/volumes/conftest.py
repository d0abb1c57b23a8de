"""A running pool on real files for the data-plane tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blockvirt.units import KIB, MIB
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.engine import Engine, EngineSettings
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.requests import NewVolume

SETTINGS = EngineSettings(chunk_bytes=4 * KIB, metadata_reserve_bytes=MIB, checkpoint_age_s=3600.0)


class Pool:
    """An engine that can be stopped, or abandoned as if it had been killed, and started again on the same files."""

    def __init__(self, folder: Path, settings: EngineSettings = SETTINGS) -> None:
        self.state_dir = folder / "state"
        self.device = folder / "disk"
        self.settings = settings
        self.engine: Engine

    async def start(self) -> "Pool":
        self.engine = await Engine.start(self.state_dir, [self.device], self.settings)
        return self

    async def volume(self, size_bytes: int, name: str | None = None) -> str:
        catalogue = Catalogue(self.engine.store, self.engine.registry, self.engine.storage)
        return (await catalogue.create(NewVolume(size_bytes=size_bytes, name=name))).volume.id

    async def open(self, volume_id: str) -> Handle:
        return await self.engine.registry.open(volume_id, "test")

    async def close(self) -> None:
        await self.engine.close()


async def write(handle: Handle, offset: int, data: bytes) -> None:
    """Write as a session does: at once where possible, else slowly."""
    if handle.write_now(offset, memoryview(data)):
        handle.settle()
    else:
        await handle.write(offset, memoryview(data))


async def read(handle: Handle, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    if not handle.read_now(offset, memoryview(buffer)):
        await handle.read(offset, memoryview(buffer))
    return bytes(buffer)


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    made = await Pool(tmp_path).start()
    yield made
    await made.close()
