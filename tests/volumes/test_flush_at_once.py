"""A flush of what was written in place begins in the call, where nobody else asks, and promises what any flush does."""

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from blockvirt.errors import VolumeStopped
from blockvirt.limits import FLUSH_EMBED_RANGES
from blockvirt.volumes.handle import Handle
from tests.volumes.conftest import Pool, until, write
from tests.volumes.test_flush import CHUNK, FIRST, SECOND, Syncs, opened

PATIENCE_S = 20.0


class Gate:
    """Syncs wait in here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.let_go = threading.Semaphore(0), threading.Semaphore(0)
        self.failure: OSError | None = None
        self._real = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self._fdatasync)

    def _fdatasync(self, fd: int) -> None:
        self.entered.release()
        self.let_go.acquire()
        if self.failure is not None:
            raise self.failure
        self._real(fd)

    async def reached(self) -> None:
        """Return when a sync waits here."""
        assert await asyncio.to_thread(self.entered.acquire, timeout=PATIENCE_S)

    async def flush_of(self, handle: Handle) -> "asyncio.Future[None]":
        """Return the flush of a write to the first chunk, when its sync waits here."""
        await write(handle, 0, FIRST)
        flush = handle.flush()
        await self.reached()
        return flush


async def many_turns() -> None:
    """Let threads and the loop go on for much longer than closing a volume takes when there is nothing to wait for."""
    for _ in range(50):
        await asyncio.to_thread(int)


@pytest.fixture
async def in_place(pool: Pool) -> AsyncIterator[Handle]:
    """A volume whose map a checkpoint has committed: overwrites need no mark."""
    _, handle = await opened(pool)
    await handle._opened.checkpointer.run()
    yield handle
    await handle.close()


class Tasks:
    """Notes which rounds are tasks."""

    def __init__(self, handle: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
        self._names: list[str] = []
        self._real = handle._opened.volume.tasks.start
        monkeypatch.setattr(handle._opened.volume.tasks, "start", self._start)

    def _start(self, work: Any, name: str, **options: Any) -> Any:
        self._names.append(name)
        return self._real(work, name, **options)

    def taken(self) -> int:
        """Return how many began since the last call."""
        count = self._names.count("flush")
        self._names.clear()
        return count


async def test_one_who_asks_alone_needs_no_task(in_place: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs, tasks, stats = Syncs(monkeypatch), Tasks(in_place, monkeypatch), in_place._opened.volume.stats
    for round_ in range(1, 4):
        flushes, synced = stats.flushes, stats.syncs
        await write(in_place, 0, bytes([round_]) * CHUNK)
        await in_place.flush()
        assert not tasks.taken()
        assert syncs.taken() == ["files"]
        assert (stats.flushes, stats.syncs) == (flushes + 1, synced + 1)


async def test_what_is_written_while_it_runs_takes_another(in_place: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        gate = Gate(patched)
        first = await gate.flush_of(in_place)
        await write(in_place, 0, SECOND)
        second = in_place.flush()
        gate.let_go.release()
        await first
        assert not second.done(), "it may speak for nothing that was replied to after the first sync had begun"
        await gate.reached()
        gate.let_go.release()
        await second


async def test_where_several_ask_they_share_a_round(in_place: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, stats = Tasks(in_place, monkeypatch), in_place._opened.volume.stats
    for expected in (2, 1):  # the first begins alone and finds out that he is not; then they wait for one another
        flushes = stats.flushes
        await write(in_place, 0, SECOND)
        await asyncio.gather(*[in_place.flush() for _ in range(3)])
        assert (stats.flushes - flushes, tasks.taken()) == (expected, 1)
    for expected in (1, 0):  # one round with one who asked, and nobody waits for others any more
        await write(in_place, 0, FIRST)
        await in_place.flush()
        assert tasks.taken() == expected


async def test_it_waits_for_a_checkpoint(in_place: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    syncing, tasks = in_place._opened.flusher.syncing, Tasks(in_place, monkeypatch)
    await write(in_place, 0, FIRST)
    async with syncing:
        assert not syncing.take()
        flush = in_place.flush()
        assert tasks.taken() == 1
        await until(lambda: len(syncing._waiters or ()) == 1)
    assert not syncing.locked()
    assert not syncing.take(), "who waits comes first"
    await flush
    assert syncing.take()
    syncing.release()


async def test_its_failure_stops_the_volume(in_place: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    gate.failure = OSError(errno.EIO, os.strerror(errno.EIO))
    await write(in_place, 0, FIRST)
    flush = in_place.flush()
    gate.let_go.release()
    with pytest.raises(VolumeStopped) as stopped:
        await flush
    assert stopped.value.__cause__ is gate.failure
    with pytest.raises(VolumeStopped):
        in_place.flush()
    assert in_place._opened.flusher.syncing.take()
    in_place._opened.flusher.syncing.release()


@pytest.mark.parametrize("alone", [True, False])
async def test_a_sync_that_no_thread_takes_stops_the_volume(
    in_place: Handle, monkeypatch: pytest.MonkeyPatch, *, alone: bool
) -> None:
    """What was noted as synced never was: the next flush would find nothing to do."""

    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    opened_volume = in_place._opened
    opened_volume.flusher._alone = alone
    await write(in_place, 0, FIRST)
    with monkeypatch.context() as patched:
        patched.setattr(type(opened_volume.volume.context.threads), "call", fail)
        with pytest.raises(VolumeStopped) as stopped:
            await in_place.flush()
    assert isinstance(stopped.value.__cause__, RuntimeError)
    with pytest.raises(VolumeStopped):
        in_place.flush()


async def test_who_gives_up_leaves_the_round_to_its_end(in_place: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        gate = Gate(patched)
        flush = await gate.flush_of(in_place)
        flush.cancel()
        closing = asyncio.create_task(in_place._opened.abandon(keep_journal=True))
        files = list(in_place._opened.volume.files.open_files.values())
        await many_turns()
        assert all(file.fd >= 0 for file in files)
        gate.let_go.release()
        await closing
        assert all(file.fd < 0 for file in files)


async def test_what_it_spoke_for_is_in_no_later_flush(in_place: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(FLUSH_EMBED_RANGES + 1):
        await write(in_place, 0, FIRST)
        await in_place.flush()
    syncs = Syncs(monkeypatch)
    await write(in_place, CHUNK, FIRST)
    await in_place.flush()
    assert syncs.taken() == ["journal"], "only the last write is in it"


@pytest.mark.parametrize("written", [True, False])
async def test_who_asked_is_told_behind_his_call(in_place: Handle, *, written: bool) -> None:
    """Also where there is nothing to do: whoever asks is in the middle of something."""
    told: list[BaseException | None] = []
    await in_place.flush()
    if written:
        await write(in_place, 0, FIRST)
    in_place.start_flush(told.append)
    assert not told
    async with asyncio.timeout(PATIENCE_S):
        await until(lambda: told == [None])


async def test_one_who_fails_when_he_is_told_costs_nobody_his_answer(in_place: Handle) -> None:
    mistakes: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: mistakes.append(context["exception"]))
    mistake = ZeroDivisionError()

    def fail(_: BaseException | None) -> None:
        raise mistake

    in_place._opened.flusher._alone = False
    await write(in_place, 0, FIRST)
    in_place.start_flush(fail)
    async with asyncio.timeout(PATIENCE_S):
        await in_place.flush()
    assert mistakes == [mistake]
    await in_place.flush()
