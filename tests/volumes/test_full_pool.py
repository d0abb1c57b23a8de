"""A full pool (I10): only writes that need a new chunk fail; everything else works, and space comes back."""

import asyncio
import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from blockvirt.errors import PoolFull
from blockvirt.meta.copies import find_copies, remembered_folders
from blockvirt.meta.keys import Table
from blockvirt.meta.store import Writer
from blockvirt.units import KIB, MIB
from blockvirt.volumes.engine import EngineSettings
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.metadata_copies import MetadataCopies
from tests.volumes.conftest import Pool, abandon, findings, mounted, read, until, until_punched, write

SETTINGS = EngineSettings(chunk_bytes=64 * KIB, metadata_reserve_bytes=MIB, checkpoint_age_s=3600.0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real filesystem of 64 MiB (ext4 on a loop device)."""
    with mounted(tmp_path / "small", 64 * MIB) as folder:
        yield folder


async def fill(handle: Handle) -> int:
    """Write chunk after chunk until the pool refuses; returns how many went in."""
    for chunk in range(handle.size_bytes // (64 * KIB)):
        try:
            await write(handle, chunk * 64 * KIB, bytes([chunk % 251 + 1]) * (64 * KIB))
        except PoolFull:
            return chunk
    raise AssertionError("the pool never got full")


def fill_disk(folder: Path) -> Path:
    """Take all space of a filesystem with a file; returns it."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return filler


@pytest.mark.requires("root", "loop", "mkfs.ext4")
async def test_a_full_disk_stops_new_chunks_only(tmp_path: Path, small_disk: Path) -> None:
    pool = Pool(tmp_path, SETTINGS)
    pool.device = small_disk / "device"
    await pool.start()
    handle = await pool.open(volume_id := await pool.volume(256 * MIB))
    count = await fill(handle)
    assert count > 300
    for chunk in (0, count // 2, count - 1):
        assert await read(handle, chunk * 64 * KIB, 4096) == bytes([chunk % 251 + 1]) * 4096
    await write(handle, 5 * 64 * KIB + 512, b"overwritten" * 100)
    await handle.flush()
    await handle._opened.checkpointer.run()
    await handle.zero(10 * 64 * KIB + 100, 20 * 64 * KIB, punch=True)
    await handle.flush()
    with pytest.raises(PoolFull, match="disk1"):
        await handle.zero(count * 64 * KIB, 64 * KIB, punch=False)
    await handle.close()  # checkpoints; then opens again on the full disk
    handle = await pool.open(volume_id)
    await until_punched(pool)
    await write(handle, 5 * 64 * KIB, b"again")
    for chunk in range(11, 25):  # space came back
        await write(handle, chunk * 64 * KIB, bytes(65536))
    assert await read(handle, 5 * 64 * KIB, 5) == b"again"
    assert not findings(pool)
    await handle.close()
    await pool.close()


@pytest.mark.requires("root", "loop", "mkfs.ext4")
async def test_room_for_the_metadata_is_noticed_though_nothing_commits(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockvirt.volumes.engine.METADATA_RESERVE_RETRY_S", 0.01)
    pool = Pool(tmp_path, SETTINGS)
    pool.state_dir = small_disk / "state"
    await pool.start()
    store, storage = pool.engine.store, pool.engine.storage
    handle = await pool.open(await pool.volume(MIB))
    filler = fill_disk(small_disk)
    number = 0
    while store.reserve_ok:  # what was allocated ahead of the reserve goes first
        number += 1
        await store.commit(partial(Writer.put, table=Table.HOSTS, key=b"row-%d" % number, value=bytes(100_000)))
    assert storage.status().level == "stop"
    with pytest.raises(PoolFull, match="reserve is not whole"):
        await write(handle, 0, b"a" * 4096)
    filler.unlink()
    await until(lambda: storage.status().level == "ok")
    await write(handle, 0, b"a" * 4096)
    await handle.close()
    await pool.close()


async def test_a_device_limit_is_kept_and_explained(tmp_path: Path) -> None:
    pool = await Pool(tmp_path, SETTINGS).start()
    limited = tmp_path / "limited"
    status = await pool.engine.storage.add(str(limited), "limited", 8 * MIB, 0, {}, create=True)
    assert status.capacity_bytes == 8 * MIB
    await pool.engine.storage.remove("disk1")
    handle = await pool.open(await pool.volume(64 * MIB))
    assert await fill(handle) == 8 * MIB // (64 * KIB)
    await handle.zero(0, MIB, punch=True)
    await handle._opened.checkpointer.run()
    await until_punched(pool)
    await write(handle, 32 * MIB, b"x")
    assert await fill(handle) == 15  # of the 16 chunks that were trimmed one is taken
    await handle.close()
    await pool.close()


async def test_an_overwrite_in_a_thread_needs_no_journal(pool: Pool) -> None:
    """A full disk may have no room for one (I10)."""
    handle = await pool.open(volume_id := await pool.volume(MIB))
    await write(handle, 0, b"a" * 4096)
    await handle.close()
    handle = await pool.open(volume_id)
    pool.engine.context.pressure.high = True
    assert not handle.write_now(0, memoryview(b"b"))
    await handle.write(0, memoryview(b"b" * 4096))
    assert await read(handle, 0, 4096) == b"b" * 4096
    assert not list((pool.device / "journal").iterdir())
    await handle.close()


@pytest.mark.requires("root", "loop", "mkfs.ext4")
async def test_every_volume_can_trim_on_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    """Each needs a journal for that, and the reserve must suffice for all of them."""
    pool = Pool(tmp_path, SETTINGS)
    pool.device = small_disk / "device"
    await pool.start()
    volumes = [await pool.volume(4 * MIB) for _ in range(20)]
    for volume_id in volumes:
        handle = await pool.open(volume_id)
        await write(handle, 0, b"x" * MIB)
        await handle.close()
    filler = await pool.open(await pool.volume(256 * MIB))
    await fill(filler)
    handles = [await pool.open(volume_id) for volume_id in volumes]
    for handle in handles:
        await handle.zero(0, MIB // 2, punch=True)
        await handle.flush()
    assert (pool.device / "journal").exists()
    await abandon(pool, power_cut=False)
    await pool.start()
    for volume_id in volumes:
        handle = await pool.open(volume_id)
        assert await read(handle, 0, MIB) == bytes(MIB // 2) + b"x" * (MIB // 2)
        await handle.close()
    assert not findings(pool)
    await pool.close()


@pytest.mark.requires("root", "loop", "mkfs.ext4")
async def test_a_disk_without_room_for_a_copy_of_the_metadata_has_a_problem(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockvirt.volumes.metadata_copies.METADATA_COPY_RETRY_S", 0.01)
    pool = Pool(tmp_path, SETTINGS)
    await pool.start()
    storage = pool.engine.storage
    await storage.add(str(small_disk / "device"), "small", None, 0, {}, create=True)
    filler = fill_disk(small_disk)
    copies = MetadataCopies(pool.engine.store, storage, pool.engine.context.threads, pool.state_dir)
    working = asyncio.create_task(copies.run())

    def problems() -> dict[str, str]:
        return {status.name: status.problem for status in storage.list() if status.problem}

    await until(lambda: bool(problems()))
    folder = small_disk / "device" / "metadata"
    assert set(problems()) == {"small"}
    assert problems()["small"].startswith(f"the metadata cannot be copied to {folder}: No space left on device; check")
    assert len(list((pool.device / "metadata").iterdir())) <= 1, "where it worked it is not done again"
    filler.unlink()
    await until(lambda: not problems())
    assert len(find_copies([folder])) == len(find_copies([pool.device / "metadata"])) == 1
    await until(lambda: bool(remembered_folders(pool.state_dir)))
    assert set(remembered_folders(pool.state_dir)) == {folder, pool.device / "metadata"}
    working.cancel()
    await asyncio.wait([working])
    await pool.close()
