"""Many writes that wait for space or for the journal: one makes it for all, and they go on together."""

import asyncio
from collections.abc import Callable

import pytest

from blockvirt.errors import PoolFull
from blockvirt.pool.backing import BackingFile
from blockvirt.volumes import slow_path
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.journal_opening import open_journal
from blockvirt.volumes.tail import Tail
from blockvirt.volumes.volume import Volume
from tests.volumes.conftest import Pool, findings, read, until

CHUNK = 4096
SIZE = 64 * CHUNK
MANY = 32


class Held:
    """Keeps what makes room from its end until it is let go, counts it, and has it fail if told to."""

    def __init__(self) -> None:
        self.going = asyncio.Event()
        self.began = 0
        self.failure: Exception | None = None

    def tail(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = Tail._go_on

        async def held(tail: Tail, count: int, admit_device: Callable[..., object]) -> None:
            await self._hold()
            await original(tail, count, admit_device)  # type: ignore[arg-type]

        monkeypatch.setattr(Tail, "_go_on", held)

    def journal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = open_journal

        async def held(volume: Volume) -> None:
            await self._hold()
            await original(volume)

        monkeypatch.setattr(slow_path, "open_journal", held)

    async def _hold(self) -> None:
        self.began += 1
        await self.going.wait()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure


async def asked(handle: Handle, counts: list[int]) -> list["asyncio.Task[None]"]:
    """Ask for room for so many chunks each, in this order."""
    opened = handle._opened
    tasks = [asyncio.create_task(opened.volume.tail.make_room(each, opened.slow._admit_device)) for each in counts]
    await asyncio.sleep(0)  # all have begun
    return tasks


async def test_all_go_on_in_the_same_pass(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock would let one on in each pass of the loop, and between two passes others serve whole batches."""
    handle = await pool.open(await pool.volume(SIZE))
    held = Held()
    held.tail(monkeypatch)
    tasks = await asked(handle, [1] * MANY)
    held.going.set()
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert all(task.done() for task in tasks)
    assert held.began == 1
    for task in tasks:
        task.result()
    await handle.close()


async def test_first_writes_make_one_journal_and_one_file(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = await pool.open(await pool.volume(SIZE))
    held = Held()
    held.journal(monkeypatch)
    writes = [asyncio.create_task(handle.write(n * CHUNK, memoryview(bytes([n]) * CHUNK))) for n in range(MANY)]
    await until(lambda: held.began > 0)
    held.going.set()
    await asyncio.gather(*writes)
    assert held.began == 1
    assert len(handle._opened.volume.files.open_files) == 1
    assert await read(handle, 0, MANY * CHUNK) == b"".join(bytes([n]) * CHUNK for n in range(MANY))
    await handle.close()
    assert not findings(pool, leaks=True)


async def test_a_failure_is_that_of_all_who_asked_for_as_much(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a thousand that wait in a full pool would try one after the other, and wake all others each time."""
    handle = await pool.open(await pool.volume(SIZE))
    held = Held()
    held.tail(monkeypatch)
    held.failure = PoolFull("no room for 4")
    tasks = await asked(handle, [4, 4, 5, 1, 3])
    held.going.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(each) if each else "" for each in results] == ["no room for 4"] * 3 + [""] * 2
    assert held.began == 2, "who asked for less tries by themselves, together"
    await handle.close()


@pytest.mark.parametrize("failing", [False, True])
async def test_a_journal_that_fails_is_made_anew_by_who_comes_next(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    handle = await pool.open(await pool.volume(SIZE))
    held = Held()
    held.journal(monkeypatch)
    held.failure = PoolFull("no room for a journal") if failing else None
    writes = [asyncio.create_task(handle.write(n * CHUNK, memoryview(b"a"))) for n in range(MANY)]
    await until(lambda: held.began > 0)
    held.going.set()
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert [isinstance(each, PoolFull) for each in results] == [failing] * MANY
    await handle.write(0, memoryview(b"b"))
    assert held.began == 1 + failing
    assert await read(handle, 0, 1) == b"b"
    await handle.close()


async def test_who_is_cancelled_takes_nobody_along(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the one whose asking began it."""
    handle = await pool.open(await pool.volume(SIZE))
    held = Held()
    held.tail(monkeypatch)
    first, second = await asked(handle, [1, 1])
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    held.going.set()
    await second
    assert handle._opened.volume.tail.room() >= 1
    await handle.close()


async def test_space_reserved_ahead_is_waited_for(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that extend one file at a time would count one piece twice."""
    handle = await pool.open(await pool.volume(SIZE))
    await handle.write(0, memoryview(b"a"))
    tail = handle._opened.volume.tail
    file, reserve, sizes = tail._file, BackingFile.reserve, []
    assert file is not None

    def noted(file: BackingFile, chunks: int) -> None:
        sizes.append((file.reserved_chunks, chunks))
        reserve(file, chunks)

    monkeypatch.setattr(BackingFile, "reserve", noted)
    tail.take(tail.room())  # looks ahead
    assert tail._extending is not None
    await tail.make_room(1, handle._opened.slow._admit_device)
    assert len(sizes) == 1
    assert file.reserved_chunks == sum(sizes[0])
    await handle.close()


async def test_nobody_waits_for_one_who_was_cancelled_before_the_first_step(pool: Pool) -> None:
    handle = await pool.open(await pool.volume(SIZE))
    opened = handle._opened
    (asking,) = await asked(handle, [1])
    assert opened.volume.tail._extending is not None
    opened.volume.tail._extending.cancel()
    await asyncio.wait([asking])
    opening = asyncio.create_task(opened.slow._make_journal_room(1))
    await asyncio.sleep(0)
    assert opened.slow._opening_journal is not None
    opened.slow._opening_journal.cancel()
    await asyncio.wait([opening])
    async with asyncio.timeout(20):
        await handle.write(0, memoryview(b"w" * CHUNK))
    assert await read(handle, 0, CHUNK) == b"w" * CHUNK


async def test_only_what_is_not_reserved_already_must_be_had(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = await pool.open(await pool.volume(4096 * CHUNK))
    await handle.write(0, memoryview(b"a"))
    room, free_chunks = handle._opened.volume.tail.room(), 44
    assert room

    def admit(_: str, needed_bytes: int) -> None:
        if needed_bytes > free_chunks * CHUNK:
            raise PoolFull("no more is free")

    monkeypatch.setattr(pool.engine.storage, "admit", admit)
    with pytest.raises(PoolFull):
        await handle.write(1000 * CHUNK, memoryview(bytes((room + free_chunks + 1) * CHUNK)))
    await handle.write(1000 * CHUNK, memoryview(bytes((room + free_chunks) * CHUNK)))
    await handle.close()
    assert not findings(pool, leaks=True)
