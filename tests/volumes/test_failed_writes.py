"""Writes that failed: what they have left behind shows nowhere."""

import asyncio
import errno
import os

import pytest

from blockvirt.errors import DeviceFault, VolumeStopped
from blockvirt.pool.backing import BackingFile
from blockvirt.volumes.checkpoint import Checkpointer
from tests.volumes.conftest import Pool, findings, read, write

CHUNK = 4096
SIZE = 64 * CHUNK


async def test_what_a_failed_write_took_is_not_handed_out_again_after_a_close(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write failed behind the freeze of the checkpoint that the close joins (I2, I8)."""
    volume_id = await pool.volume(SIZE)
    handle = await pool.open(volume_id)
    await write(handle, 0, b"a" * CHUNK)
    (opened,) = pool.engine.registry.opened()
    frozen, going, joined = asyncio.Event(), asyncio.Event(), asyncio.Event()
    commit, run = pool.engine.store.commit, Checkpointer.run

    async def held_commit(change):  # type: ignore[no-untyped-def]
        frozen.set()
        await going.wait()
        return await commit(change)

    def noted_run(self: Checkpointer):  # type: ignore[no-untyped-def]
        joined.set()
        return run(self)

    def failing_write(self: BackingFile, data: memoryview, position: int) -> None:
        os.pwrite(self.fd, data, position)
        self.unsynced_bytes += len(data)
        raise OSError(errno.EIO, "the disk took a part of it")

    with monkeypatch.context() as patched:
        patched.setattr(pool.engine.store, "commit", held_commit)
        checkpoint = asyncio.create_task(opened.checkpointer.run())
        await frozen.wait()
        with patched.context() as broken:
            broken.setattr(BackingFile, "write", failing_write)
            with pytest.raises(OSError, match="took a part"):
                await write(handle, CHUNK, b"secret" * 600)
        patched.setattr(Checkpointer, "run", noted_run)
        closing = asyncio.create_task(handle.close())
        await joined.wait()
        going.set()
        await closing
        await checkpoint
    handle = await pool.open(volume_id)
    await write(handle, 2 * CHUNK, b"b")
    assert await read(handle, 2 * CHUNK, CHUNK) == b"b" + bytes(CHUNK - 1)
    await handle.close()
    assert not findings(pool)


async def test_the_steps_before_the_one_that_failed_are_journalled(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in the map, and nobody settles after an error: the loop would run other things meanwhile."""
    handle = await pool.open(await pool.volume(SIZE))
    await write(handle, 2 * CHUNK, b"a" * CHUNK)
    volume = handle._opened.volume
    journalled, backing_write = volume.stats.journal_appends, BackingFile.write
    calls = iter((True, False))

    def second_fails(self: BackingFile, data: memoryview, position: int) -> None:
        if not next(calls):
            raise OSError(errno.EIO, "broken")
        backing_write(self, data, position)

    with monkeypatch.context() as patched:
        patched.setattr(BackingFile, "write", second_fails)
        with pytest.raises(OSError, match="broken"):
            handle.write_now(CHUNK, memoryview(b"b" * 3 * CHUNK))
    assert not volume.unsettled()
    assert volume.stats.journal_appends == journalled + 1
    assert await read(handle, CHUNK, CHUNK) == b"b" * CHUNK
    await handle.close()


async def test_a_trim_that_is_refused_has_changed_nothing(pool: Pool) -> None:
    """The file of what it would free is not there: a disk came back without it."""
    volume_id = await pool.volume(SIZE)
    handle = await pool.open(volume_id)
    await write(handle, 0, b"a" * 8 * CHUNK)
    await handle.close()
    await pool.close()
    (path,) = (pool.device / "files").iterdir()
    path.rename(path.with_name("hidden"))
    await pool.start()
    handle = await pool.open(volume_id)
    for _ in range(2):
        with pytest.raises(DeviceFault):
            await handle.zero(0, 4 * CHUNK, punch=True)
    await handle.close()
    await pool.close()
    path.with_name("hidden").rename(path)
    await pool.start()
    assert not findings(pool, leaks=True)
    handle = await pool.open(volume_id)
    assert await read(handle, 0, 8 * CHUNK) == b"a" * 8 * CHUNK
    await handle.close()


async def test_a_frame_that_cannot_be_made_stops_the_volume(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may stay staged: who comes next would journal it, or fail as well."""
    handle = await pool.open(await pool.volume(SIZE))
    await write(handle, 0, b"a")
    volume = handle._opened.volume
    volume.stage(1 << 32, 1, volume.map.readable(0))
    with pytest.raises(VolumeStopped):
        volume.settle()
    assert not volume.unsettled()
    await handle.close()
