"""Who waits for a flush: several share a round, and whatever becomes of it or of one of them, nobody waits for ever."""

import asyncio
import errno
import os

import pytest

from blockvirt.errors import VolumeStopped
from blockvirt.volumes.flush import sync_data
from blockvirt.volumes.journal import Journal
from tests.volumes.conftest import Pool, until, write
from tests.volumes.test_flush import CHUNK, FIRST, SECOND, Syncs, opened
from tests.volumes.test_flush_at_once import Gate, many_turns


async def test_who_gives_up_takes_nothing_from_others(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = Syncs(monkeypatch)
    _, handle = await opened(pool)
    await write(handle, CHUNK, FIRST)
    syncs.taken()
    stats = handle._opened.volume.stats
    before = stats.flushes
    handle._opened.flusher._alone = False
    flushes = [handle.flush() for _ in range(3)]
    flushes[1].cancel()
    await flushes[0]
    await flushes[2]
    assert (len(syncs.taken()), stats.flushes - before) == (1, 1), "they share a round"
    await handle.close()


async def test_nobody_waits_for_a_round_that_was_cancelled_before_its_first_step(pool: Pool) -> None:
    _, handle = await opened(pool)
    await write(handle, CHUNK, FIRST)
    handle._opened.flusher._alone = False
    flush = handle.flush()
    await handle._opened.volume.tasks.close()
    async with asyncio.timeout(20):
        await until(flush.cancelled)
    await handle.flush()
    await handle.close()


async def test_a_surprise_in_a_round_is_told_to_all_who_wait_and_stops_the_volume(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the round had noted as synced is not: the next flush would look for it in vain."""
    _, handle = await opened(pool)
    await write(handle, CHUNK, FIRST)

    def surprise(*_: object) -> bool:
        raise ZeroDivisionError

    handle._opened.flusher._alone = False
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "embed", surprise)
        flushes = [handle.flush(), handle.flush()]
        for flush in flushes:
            with pytest.raises(VolumeStopped):
                await flush
    with pytest.raises(VolumeStopped):
        handle.flush()
    await handle.close()


async def test_a_volume_that_stops_while_the_last_sync_runs_acknowledges_nothing(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, handle = await opened(pool)
    volume = handle._opened.volume
    await handle._opened.checkpointer.run()
    with monkeypatch.context() as patched:
        gate = Gate(patched)
        flush = await gate.flush_of(handle)
        volume.stop("its metadata cannot be written", OSError(errno.EIO, "gone"))
        gate.let_go.release()
        with pytest.raises(VolumeStopped):
            await flush
    await handle.close()


async def test_files_are_closed_behind_the_flush_that_came_while_another_was_waited_for(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, handle = await opened(pool)
    flusher, volume = handle._opened.flusher, handle._opened.volume
    await handle._opened.checkpointer.run()
    with monkeypatch.context() as patched:
        gate = Gate(patched)
        first = await gate.flush_of(handle)
        closing = asyncio.create_task(handle._opened.abandon(keep_journal=True))
        await until(lambda: len(flusher.syncing._waiters or ()) == 1)
        await write(handle, 0, SECOND)
        second = handle.flush()
        await until(lambda: len(flusher.syncing._waiters or ()) == 2)
        gate.let_go.release()
        await first
        await gate.reached()
        files = list(volume.files.open_files.values())
        await many_turns()
        assert all(file.fd >= 0 for file in files)
        gate.let_go.release()
        await second
        await closing
        assert all(file.fd < 0 for file in files)
    await handle.close()


async def test_a_guarded_sync_whose_caller_is_cancelled_is_waited_for_and_heard(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, handle = await opened(pool)
    volume = handle._opened.volume
    with monkeypatch.context() as patched:
        gate = Gate(patched)
        gate.failure = OSError(errno.EIO, os.strerror(errno.EIO))
        await write(handle, 0, FIRST)
        syncing = asyncio.create_task(sync_data(volume, also_grown=True))
        await gate.reached()
        syncing.cancel()
        await many_turns()
        assert not syncing.done(), "a thread is at work on its descriptors"
        gate.let_go.release()
        with pytest.raises(asyncio.CancelledError):
            await syncing
    assert isinstance(volume.failure, VolumeStopped)
    await handle.close()
