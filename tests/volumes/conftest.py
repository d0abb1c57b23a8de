"""A running pool on real files for the data-plane tests."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from blockvirt.device import read_one
from blockvirt.meta.findings import Finding, Severity
from blockvirt.meta.keys import Table
from blockvirt.units import KIB, MIB
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.engine import Engine, EngineSettings
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.journal import BLOCK_BYTES, pack_header, unpack_header
from blockvirt.volumes.proof import MapProof
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


@contextmanager
def mounted(folder: Path, size_bytes: int, make: Sequence[str] = ("mkfs.ext4", "-q", "-m", "0")) -> Iterator[Path]:
    """Have a filesystem on a loop device at ``folder``. For tests that require root, loop and the program ``make``."""
    image = folder.with_name(f"{folder.name}.image")
    with image.open("wb") as file:
        file.truncate(size_bytes)
    subprocess.run([*make, image], check=True)
    folder.mkdir()
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def findings(pool: Pool, *, leaks: bool = False) -> list[Finding]:
    """Return what the offline proof of the map finds in a pool at rest; leaks only if asked for."""
    found = MapProof(pool.engine.context).run()
    return [finding for finding in found if leaks or finding.severity is Severity.CORRUPT]


async def until(condition: Callable[[], bool]) -> None:
    """Return when ``condition`` holds: for what a worker does in its own time."""
    while True:
        if condition():
            return
        await asyncio.sleep(0.005)


async def until_punched(pool: Pool) -> None:
    """Return when all freed space is given back, and counted as such."""

    def no_rows() -> bool:
        with pool.engine.store.read() as reader:
            return not reader.count(Table.PUNCH)

    await until(no_rows)
    async with pool.engine.storage.counting:  # the rows go a moment before the figures change
        return


async def write(handle: Handle, offset: int, data: bytes) -> None:
    """Write as a session does: at once where possible, else slowly."""
    if handle.write_now(offset, memoryview(data)):
        handle.settle()
    else:
        await handle.write(offset, memoryview(data))


async def read(handle: Handle, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    if not handle.read_now(offset, memoryview(buffer)):
        await read_one(handle, offset, memoryview(buffer))
    return bytes(buffer)


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    made = await Pool(tmp_path).start()
    yield made
    await made.close()


async def abandon(pool: Pool, *, power_cut: bool) -> None:
    """End the engine as SIGKILL would: nothing is synced, committed or given back. The page cache stays.

    With ``power_cut`` the journals then claim another page cache, as after a reboot: recovery must trust durable marks
    only. (What was not synced is still on disk here: losing it is the business of the crash harnesses.)
    """
    engine = pool.engine
    await engine.jobs._runs.close()
    for slot in engine.registry._slots.values():
        await slot.unpinned.wait()  # else what is at work in the background would go on with descriptors of others
    engine.store.close()  # before anything could commit
    for opened in engine.registry.opened():
        volume = opened.volume
        opened._watch.cancel()
        if volume.age_timer is not None:
            volume.age_timer.cancel()
        await opened._background_ended()
        for file in volume.files.open_files.values():
            file.close()
        volume.files.open_files.clear()
        if volume.journal is not None:
            for fd in volume.journal._fds:
                os.close(fd)
        volume.journal = None
    for slot in engine.registry._slots.values():
        slot.opened = None
    await engine.close()
    if power_cut:
        for path in (pool.device / "journal").iterdir():
            content = bytearray(path.read_bytes())
            header = unpack_header(bytes(content[:BLOCK_BYTES]))
            content[:BLOCK_BYTES] = pack_header(replace(header, identities=dict.fromkeys(header.identities, "other")))
            path.write_bytes(content)
