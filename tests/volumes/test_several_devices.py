"""A volume over several devices: it grows onto the next one, and the journal knows each before anything lies there."""

import asyncio
import errno
import os
import shutil
import threading
from pathlib import Path

import pytest

from blockvirt.errors import DeviceFault, PoolFull
from blockvirt.ids import new_id
from blockvirt.limits import MAX_DEVICES
from blockvirt.lun.address import CHUNK_MASK, chunk_of, file_of
from blockvirt.meta.keys import Table
from blockvirt.pool.backing import BackingFile
from blockvirt.units import KIB, MIB
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.engine import EngineSettings
from blockvirt.volumes.journal import Journal, JournalHeader, pack_header, unpack_header
from tests.volumes.conftest import Pool, abandon, findings, read, until, write

CHUNK = 64 * KIB
SETTINGS = EngineSettings(chunk_bytes=CHUNK, metadata_reserve_bytes=MIB, checkpoint_age_s=3600.0)


async def pool_of_one(tmp_path: Path, settings: EngineSettings = SETTINGS) -> Pool:
    """Return a pool whose only device, 'one', takes 4 MiB."""
    pool = await Pool(tmp_path, settings).start()
    await add(pool, tmp_path, "one")
    await pool.engine.storage.remove("disk1")
    pool.device = tmp_path / "one"
    return pool


async def add(pool: Pool, tmp_path: Path, name: str, limit_bytes: int | None = 4 * MIB) -> None:
    await pool.engine.storage.add(str(tmp_path / name), name, limit_bytes, 0, {}, create=True)


def content(chunk: int) -> bytes:
    return bytes([chunk % 251 + 1]) * CHUNK


async def test_a_volume_grows_onto_the_next_device(tmp_path: Path) -> None:
    pool = await pool_of_one(tmp_path)
    handle = await pool.open(volume_id := await pool.volume(16 * MIB))
    for chunk in range(50):
        await write(handle, chunk * CHUNK, content(chunk))
    await add(pool, tmp_path, "two")
    for chunk in range(50, 128):
        await write(handle, chunk * CHUNK, content(chunk))
    with pytest.raises(PoolFull):
        await write(handle, 128 * CHUNK, content(128))
    await handle.zero(0, 8 * CHUNK, punch=True)
    await handle.close()
    handle = await pool.open(volume_id)
    await until(lambda: pool.engine.storage.status().free_bytes >= 8 * CHUNK)  # what was trimmed is punched out
    for chunk in range(8):  # the first device has room again: its file is taken up where it was left
        await write(handle, chunk * CHUNK, content(chunk))
    for chunk in range(128):
        assert await read(handle, chunk * CHUNK, CHUNK) == content(chunk)
    await handle.close()
    with pool.engine.store.read() as reader:
        assert reader.count(Table.FILES) == 2
    assert not findings(pool, leaks=True)
    await pool.close()


async def test_a_kill_while_the_journal_learns_of_a_device_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = await pool_of_one(tmp_path)
    handle = await pool.open(volume_id := await pool.volume(16 * MIB))
    for chunk in range(64):
        await write(handle, chunk * CHUNK, content(chunk))
    await add(pool, tmp_path, "two")
    loop = asyncio.get_running_loop()
    reached, go_on = asyncio.Event(), threading.Event()

    def admit_never(_self: Journal, _device_id: str, _identity: str) -> None:
        loop.call_soon_threadsafe(reached.set)
        go_on.wait()

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "admit_device", admit_never)
        growing = asyncio.ensure_future(handle.write(64 * CHUNK, memoryview(content(64))))
        await reached.wait()
        took = handle.write_now(65 * CHUNK, memoryview(content(65)))
        if took:
            handle.settle()
        growing.cancel()
        go_on.set()
        await abandon(pool, power_cut=False)
    await pool.start()
    handle = await pool.open(volume_id)
    for chunk in range(64):
        assert await read(handle, chunk * CHUNK, CHUNK) == content(chunk), chunk
    assert not took or await read(handle, 65 * CHUNK, CHUNK) == content(65)
    await handle.close()
    await pool.close()


async def test_a_kill_after_growing_onto_a_device_loses_nothing(tmp_path: Path) -> None:
    pool = await pool_of_one(tmp_path)
    handle = await pool.open(volume_id := await pool.volume(16 * MIB))
    for chunk in range(64):
        await write(handle, chunk * CHUNK, content(chunk))
    await add(pool, tmp_path, "two")
    for chunk in range(64, 80):
        await write(handle, chunk * CHUNK, content(chunk))
    await abandon(pool, power_cut=False)
    await pool.start()
    handle = await pool.open(volume_id)
    for chunk in range(80):
        assert await read(handle, chunk * CHUNK, CHUNK) == content(chunk)
    await handle.close()
    assert not findings(pool, leaks=True)
    await pool.close()


@pytest.mark.parametrize("power_cut", [False, True])
async def test_used_bytes_are_right_after_a_recovery(tmp_path: Path, power_cut: bool) -> None:
    pool = await Pool(tmp_path, SETTINGS).start()
    handle = await pool.open(await pool.volume(16 * MIB))
    for chunk in range(16):
        await write(handle, chunk * CHUNK, content(chunk))
    await handle.flush()
    for chunk in range(16, 32):
        await write(handle, chunk * CHUNK, content(chunk))
    await handle.zero(0, 4 * CHUNK, punch=True)
    await abandon(pool, power_cut=power_cut)
    await pool.start()
    expected = (16 if power_cut else 28) * CHUNK
    await until(lambda: pool.engine.storage.status().used_bytes <= expected)  # the trimmed chunks are punched out
    assert pool.engine.storage.status().used_bytes == expected
    await pool.close()


async def test_a_file_that_cannot_be_made_leaves_one_record_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = await Pool(
        tmp_path,
        EngineSettings(chunk_bytes=CHUNK, metadata_reserve_bytes=MIB, backing_file_bytes=4 * CHUNK),
    ).start()
    handle = await pool.open(await pool.volume(16 * MIB))
    for chunk in range(4):
        await write(handle, chunk * CHUNK, content(chunk))

    def no_inode(_self: BackingFile, *, read_only: bool = False) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(BackingFile, "open", no_inode)
        for _ in range(3):
            with pytest.raises(OSError, match="space"):
                await write(handle, 4 * CHUNK, content(4))
    with pool.engine.store.read() as reader:
        assert reader.count(Table.FILES) == 2
    await write(handle, 4 * CHUNK, content(4))
    await handle.close()
    assert not findings(pool, leaks=True)
    await pool.close()


async def test_the_last_address_of_a_file_is_never_handed_out(pool: Pool) -> None:
    # It is one below the first of the next file's: a run over both would be read and written in one file.
    handle = await pool.open(await pool.volume(MIB))
    await write(handle, 0, b"a" * 4096)
    volume = handle._opened.volume
    file = volume.tail._file
    assert file is not None
    used, reserved = file.used_chunks, file.reserved_chunks
    file.used_chunks, file.reserved_chunks = CHUNK_MASK - 1, CHUNK_MASK + 1  # a full file of 4 KiB chunks
    await write(handle, 4096, b"b" * 4096)
    await write(handle, 8192, b"c" * 4096)
    last, first = volume.map.readable(1), volume.map.readable(2)
    assert chunk_of(last) == CHUNK_MASK - 1
    assert file_of(first) == file_of(last) + 1
    assert await read(handle, 0, 12288) == b"a" * 4096 + b"b" * 4096 + b"c" * 4096
    await handle.zero(4096, 4096, punch=True)
    file.used_chunks, file.reserved_chunks = used, reserved
    await handle.close()


async def test_a_journal_header_names_every_device_that_a_pool_may_have(pool: Pool) -> None:
    (device_id,) = pool.engine.storage.paths()
    identity = pool.engine.storage.identity_of(device_id)
    header = JournalHeader(new_id(), 2**31, {new_id(): identity for _ in range(MAX_DEVICES)})
    assert unpack_header(pack_header(header)) == header


async def test_a_disk_that_was_swapped_is_named_and_never_written_to(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    kept = await pool.volume(MIB, "kept")
    handle = await pool.open(kept)
    await write(handle, 0, b"a" * 4096)
    await handle.close()
    doomed = await pool.volume(MIB, "doomed")
    handle = await pool.open(doomed)
    await write(handle, 0, b"b" * 4096)
    await handle.close()
    fresh = await pool.open(await pool.volume(MIB, "fresh"))
    away = pool.device.with_name("away")
    pool.device.rename(away)
    for folder in ("files", "journal", "metadata"):
        (pool.device / folder).mkdir(parents=True)
    storage = pool.engine.storage
    (status,) = storage.list()
    assert (status.state, status.free_bytes) == ("moved", 0)
    assert f"{pool.device} now leads to another" in status.problem
    with pytest.raises(PoolFull) as caught:
        await write(fresh, 0, b"c" * 4096)
    assert f"disk1 cannot be used: device disk1: {pool.device} now leads to another" in caught.value.cause
    with pytest.raises(DeviceFault, match=r"disk1.* now leads to another"):
        await pool.open(kept)
    with pytest.raises(DeviceFault, match=r"disk1.* now leads to another"):
        storage.path_of(status.id)
    assert not storage.paths(), "no copy of the metadata goes there"
    await Catalogue(pool.engine.store, pool.engine.registry, storage).delete(doomed)
    await until(lambda: bool(pool.engine.jobs.list(state="failed")))
    (job,) = pool.engine.jobs.list(state="failed")
    assert "is missing" in job.error
    assert not [path for path in pool.device.rglob("*") if path.is_file()]
    await fresh.close()
    shutil.rmtree(pool.device)
    away.rename(pool.device)
    await pool.engine.jobs.resume(job.id)
    await until(lambda: len(list((pool.device / "files").iterdir())) == 1)  # the other's file was not forgotten
    handle = await pool.open(kept)
    assert await read(handle, 0, 4096) == b"a" * 4096
    await write(handle, 4096, b"d" * 4096)
    await handle.close()
    assert not findings(pool)
