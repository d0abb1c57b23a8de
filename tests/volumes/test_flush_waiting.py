"""Who waits for a flush: several share a round, and whatever becomes of it or of one of them, nobody waits for ever."""

import asyncio
from collections.abc import Iterator

import pytest

from blockvirt.volumes.flush import Sync
from tests.volumes.conftest import Pool, until, write
from tests.volumes.test_flush import CHUNK, FIRST, Syncs, opened


async def test_who_gives_up_takes_nothing_from_others(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = Syncs(monkeypatch)
    _, handle = await opened(pool)
    await write(handle, CHUNK, FIRST)
    syncs.taken()
    flushes = [handle.flush() for _ in range(3)]
    flushes[1].cancel()
    await flushes[0]
    await flushes[2]
    assert len(syncs.taken()) == 1, "they share a round"
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


async def test_a_surprise_in_a_round_is_told_to_all_who_wait(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    _, handle = await opened(pool)
    with monkeypatch.context() as patched:

        def surprise() -> Iterator[Sync]:
            raise ZeroDivisionError
            yield

        patched.setattr(handle._opened.flusher, "_syncs", surprise)
        flushes = [handle.flush(), handle.flush()]
        for flush in flushes:
            with pytest.raises(ZeroDivisionError):
                await flush
    await handle.flush()
    await handle.close()
