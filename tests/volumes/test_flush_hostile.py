"""What a hostile order of events makes of flushes whose data lies in the journal."""

import asyncio
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockvirt.check import CLEAN
from blockvirt.check import run as run_check
from blockvirt.errors import DeviceFault, MetadataFault, VolumeStopped
from blockvirt.limits import FLUSH_EMBED_BYTES, JOURNAL_FILE_BYTES
from blockvirt.units import KIB, MIB
from blockvirt.volumes import recovery
from blockvirt.volumes.engine import EngineSettings
from blockvirt.volumes.handle import Handle
from tests.volumes.conftest import Pool, abandon, findings, mounted, read, until, until_punched, write
from tests.volumes.test_flush import CHUNK, FIRST, SECOND, Syncs, again, lose_at_home, opened
from tests.volumes.test_full_pool import fill_disk


@contextmanager
def slow_read(handle: Handle) -> Iterator[None]:
    """Have a read under way meanwhile: punches wait for it."""
    inflight = handle._opened.volume.inflight
    number = inflight.enter()
    try:
        yield
    finally:
        inflight.leave(number)


async def reopened(pool: Pool, volume_id: str, handle: Handle) -> Handle:
    """Close a volume that has stopped, and have it back as an administrator would."""
    await handle.close()
    await pool.engine.registry.reopen(volume_id)
    return await pool.open(volume_id)


async def test_a_checkpoint_names_no_address_behind_the_durable_size(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write in a thread has taken an address in space that was just reserved, and written nothing yet."""
    syncs = Syncs(monkeypatch)
    _, handle = await opened(pool)
    opened_volume = handle._opened
    volume = opened_volume.volume
    (file,) = volume.files.own()
    await volume.context.threads.run(lambda: file.reserve(100))
    volume.tail.take(file.reserved_chunks - 50 - file.used_chunks)
    await opened_volume.checkpointer.run()
    assert syncs.sizes_bytes[file.path] >= volume.files.records[file.number].used_chunks * CHUNK
    await handle.close()


async def test_data_of_a_chunk_that_was_given_back_does_not_take_space_again(pool: Pool) -> None:
    volume_id, handle = await opened(pool)
    volume = handle._opened.volume
    await write(handle, CHUNK, FIRST)
    await handle.zero(CHUNK, CHUNK, punch=True)
    with slow_read(handle):
        await handle._opened.checkpointer.run()
        await write(handle, 2 * CHUNK, FIRST)
        await handle.flush()
    assert volume.stats.embedded_flushes
    await until_punched(pool)
    handle = await again(pool, volume_id, power_cut=True)
    await until_punched(pool)
    assert await read(handle, CHUNK, CHUNK) == bytes(CHUNK)
    await handle.close()
    assert not findings(pool, leaks=True)


async def test_what_was_cut_off_from_outside_is_not_zeros(pool: Pool) -> None:
    volume_id, handle = await opened(pool)
    volume = handle._opened.volume
    for chunk in range(1, 6):
        await write(handle, chunk * CHUNK, FIRST)
    await handle.flush()
    assert volume.stats.embedded_flushes == 1
    await handle._opened.checkpointer.run()
    await write(handle, 6 * CHUNK, FIRST)
    await handle.flush()
    path = volume.files.own()[0].path
    await abandon(pool, power_cut=True)
    os.truncate(path, CHUNK)
    await pool.start()
    handle = await pool.open(volume_id)
    with pytest.raises(DeviceFault):
        await read(handle, CHUNK, CHUNK)
    await handle.close()


async def test_a_flush_after_a_flush_costs_nothing(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = Syncs(monkeypatch)
    _, handle = await opened(pool)
    await write(handle, CHUNK, FIRST)
    await handle.flush()
    syncs.taken()
    await handle.flush()
    assert syncs.taken() == []
    await handle.close()


async def test_a_recovery_that_dies_before_its_commit_is_repeated(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    volume_id, handle = await opened(pool)
    await write(handle, CHUNK, FIRST)
    await handle.flush()
    await write(handle, CHUNK, SECOND)
    lose_at_home(handle, 1, bytes(CHUNK))
    await abandon(pool, power_cut=True)
    with monkeypatch.context() as patched:

        def dies(*_: object) -> None:
            raise DeviceFault("dead")

        patched.setattr(recovery, "_commit", dies)
        await pool.start()
        with pytest.raises(DeviceFault):
            await pool.open(volume_id)
    await pool.close()
    await pool.start()
    handle = await pool.open(volume_id)
    assert await read(handle, CHUNK, CHUNK) == FIRST
    await handle.close()
    assert not findings(pool)


async def test_a_power_cut_in_the_recovery_after_a_kill_keeps_what_was_flushed(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume_id, handle = await opened(pool)
    await write(handle, CHUNK, FIRST)
    await handle.flush()
    await write(handle, CHUNK, SECOND)
    await write(handle, 2 * CHUNK, SECOND)
    await abandon(pool, power_cut=False)
    with monkeypatch.context() as patched:

        def dies(*_: object) -> None:
            raise DeviceFault("dead")

        patched.setattr(recovery, "_commit", dies)
        await pool.start()
        with pytest.raises(DeviceFault):
            await pool.open(volume_id)
    await abandon(pool, power_cut=True)
    await pool.start()
    handle = await pool.open(volume_id)
    assert await read(handle, CHUNK, CHUNK) in (FIRST, SECOND)
    assert await read(handle, 2 * CHUNK, CHUNK) in (bytes(CHUNK), SECOND)
    await handle.close()
    assert not findings(pool)


async def test_a_stopped_volume_comes_back_with_the_data_of_its_journal(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume_id, handle = await opened(pool)
    await write(handle, CHUNK, FIRST)
    await handle.flush()
    await write(handle, CHUNK, SECOND)
    with monkeypatch.context() as patched:
        real = os.fdatasync

        def fails(fd: int) -> None:
            if Path(os.readlink(f"/proc/self/fd/{fd}")).parent.name == "files":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(fd)

        patched.setattr(os, "fdatasync", fails)
        await write(handle, 10 * CHUNK, bytes(FLUSH_EMBED_BYTES + 1))
        with pytest.raises(VolumeStopped):
            await handle.flush()
    lose_at_home(handle, 1, b"z" * CHUNK)
    handle = await reopened(pool, volume_id, handle)
    assert await read(handle, CHUNK, CHUNK) == FIRST
    await handle.close()
    assert not findings(pool)


async def test_the_check_before_a_recovery_finds_nothing(pool: Pool) -> None:
    volume_id, handle = await opened(pool)
    for chunk in range(1, 6):
        await write(handle, chunk * CHUNK, FIRST)
    await handle.zero(2 * CHUNK, CHUNK, punch=True)
    await handle.flush()
    for chunk in range(3, 6):
        lose_at_home(handle, chunk, bytes(CHUNK))
    await abandon(pool, power_cut=True)
    assert run_check(pool.state_dir, repair=True, restore_metadata=False, data=True).exit_code == CLEAN
    await pool.start()
    handle = await pool.open(volume_id)
    assert await read(handle, CHUNK, 5 * CHUNK) == FIRST + bytes(CHUNK) + FIRST * 3
    await handle.close()
    assert not findings(pool)


@pytest.mark.requires("root", "loop", "mkfs.ext4")
async def test_a_full_disk_does_not_keep_a_volume_from_recovery(tmp_path: Path) -> None:
    """Data of chunks that were given back needs space again, and there is none."""
    with mounted(tmp_path / "small", 64 * MIB) as small:
        pool = Pool(tmp_path, EngineSettings(chunk_bytes=64 * KIB, metadata_reserve_bytes=MIB, checkpoint_age_s=3600.0))
        pool.device = small / "device"
        await pool.start()
        volume_id = await pool.volume(64 * MIB)
        handle = await pool.open(volume_id)
        await write(handle, 0, FIRST)
        await handle.flush()
        volume = handle._opened.volume
        for chunk in range(1, 5):
            await write(handle, chunk * 64 * KIB, FIRST)
        await handle.zero(64 * KIB, 4 * 64 * KIB, punch=True)
        with slow_read(handle):
            await handle._opened.checkpointer.run()
            await write(handle, 10 * 64 * KIB, FIRST)
            await handle.flush()
        assert volume.stats.embedded_flushes
        await until_punched(pool)
        fill_disk(small)
        await abandon(pool, power_cut=True)
        await pool.start()
        handle = await pool.open(volume_id)
        assert await read(handle, 10 * 64 * KIB, CHUNK) == FIRST
        await handle.close()
        await pool.close()


async def test_data_goes_home_to_each_of_two_files(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot's turn: overwrites of one file and new chunks of another in one flush."""
    syncs = Syncs(monkeypatch)
    volume_id, handle = await opened(pool)
    opened_volume = handle._opened
    volume = opened_volume.volume
    await opened_volume.checkpointer.run()
    volume.tail.turn()
    await write(handle, CHUNK, FIRST)
    await handle.flush()
    assert len(volume.files.own()) == 2
    syncs.taken()
    await write(handle, 0, SECOND)
    await write(handle, 2 * CHUNK, SECOND)
    await handle.flush()
    assert syncs.taken() == ["journal"]
    for chunk in (0, 2):
        for _ in range(FLUSH_EMBED_BYTES // CHUNK):
            await write(handle, chunk * CHUNK, SECOND)
    await handle.flush()
    assert syncs.taken() == ["files", "files", "journal"]  # of each file not too much, but of both
    for chunk in (0, 2):
        await write(handle, chunk * CHUNK, FIRST)
    await write(handle, 3 * CHUNK, FIRST)
    await handle.flush()
    assert syncs.taken() == ["journal"]
    for chunk in (0, 2):
        lose_at_home(handle, chunk, bytes(CHUNK))
    handle = await again(pool, volume_id, power_cut=True)
    assert await read(handle, 0, 4 * CHUNK) == FIRST * 4
    await handle.close()
    assert not findings(pool)


async def test_a_file_that_is_only_opened_is_synced_before_a_flush_speaks_for_it(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a dead daemon, or a close, made of its size may not be durable."""
    volume_id, handle = await opened(pool)
    await handle.close()
    handle = await pool.open(volume_id)
    syncs = Syncs(monkeypatch)
    assert await read(handle, 0, CHUNK) == FIRST
    await handle.zero(0, CHUNK, punch=True)
    await handle.flush()
    assert syncs.taken()[-2:] == ["files", "journal"]
    await handle.close()


async def test_the_data_of_every_flush_goes_home(pool: Pool) -> None:
    volume_id, handle = await opened(pool)
    for chunk in (1, 2, 3):
        await write(handle, chunk * CHUNK, FIRST)
        await handle.flush()
    assert handle._opened.volume.stats.embedded_flushes == 3
    for chunk in (1, 2, 3):
        lose_at_home(handle, chunk, bytes(CHUNK))
    handle = await again(pool, volume_id, power_cut=True)
    assert await read(handle, CHUNK, 3 * CHUNK) == FIRST * 3
    await handle.close()


async def test_zeros_that_were_allocated_are_synced_at_home(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = Syncs(monkeypatch)
    _, handle = await opened(pool)
    syncs.taken()
    await handle.zero(CHUNK, CHUNK, punch=False)
    await handle.flush()
    assert syncs.taken() == ["files", "journal"]
    await handle.close()


async def test_a_flush_between_a_checkpoints_sync_and_its_freeze_speaks_for_what_was_synced(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older data lies in the journal until the commit, and this one fails."""
    volume_id, handle = await opened(pool)
    await write(handle, CHUNK, FIRST)
    await handle.flush()
    await write(handle, CHUNK, SECOND)
    flusher = handle._opened.flusher
    with monkeypatch.context() as patched:

        async def fails(_: object) -> None:
            raise MetadataFault("the disk of the metadata is full")

        patched.setattr(pool.engine.store, "commit", fails)
        async with flusher.syncing:  # first in the queue: the checkpoint's first sync, the flush behind it
            checkpoint = asyncio.create_task(handle._opened.checkpointer.run())
            await until(lambda: len(flusher.syncing._waiters or ()) == 1)
            flush = handle.flush()
            await until(lambda: len(flusher.syncing._waiters or ()) == 2)
        await flush
        with pytest.raises(VolumeStopped):
            await checkpoint
    handle = await reopened(pool, volume_id, handle)
    assert await read(handle, CHUNK, CHUNK) == SECOND
    await handle.close()
    assert not findings(pool)


async def test_overwrites_alone_do_not_fill_the_journal_for_good(pool: Pool) -> None:
    """The checkpoint that makes room is asked for by whoever fills it, and that may be flushes alone."""
    _, handle = await opened(pool)
    journal = handle._opened.volume.journal
    assert journal is not None
    generation = journal.generation
    await write(handle, CHUNK, FIRST)
    for _ in range(2 * JOURNAL_FILE_BYTES // FLUSH_EMBED_BYTES):
        await handle.flush()
        await write(handle, CHUNK, bytes(FLUSH_EMBED_BYTES))
    assert journal.generation > generation
    await handle.close()


async def test_a_flush_says_nothing_of_a_volume_that_stopped_meanwhile(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, handle = await opened(pool)
    volume = handle._opened.volume
    await write(handle, CHUNK, bytes(FLUSH_EMBED_BYTES + CHUNK))
    loop, sync = asyncio.get_running_loop(), os.fdatasync

    def stop(fd: int) -> None:
        sync(fd)
        loop.call_soon_threadsafe(volume.stop, "its disk was pulled", OSError(errno.EIO, "gone"))

    monkeypatch.setattr(os, "fdatasync", stop)
    with pytest.raises(VolumeStopped):
        await handle.flush()
    await handle.close()
