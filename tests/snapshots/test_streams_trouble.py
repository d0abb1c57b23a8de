"""Imports that do not come to their end: whatever ends them, the volume is what it was, and nothing else is there."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blockvirt.errors import (
    BlockvirtError,
    Exists,
    InUse,
    InvalidSize,
    PoolFull,
    StreamDamaged,
)
from blockvirt.limits import STREAM_MAX_DATA_BYTES
from blockvirt.meta.records import SnapshotRecord
from blockvirt.snapshots import importing
from blockvirt.snapshots.stream_format import StreamBase
from blockvirt.snapshots.stream_reader import StreamData, StreamEvent
from blockvirt.volumes.requests import VolumeChange
from tests.snapshots.stream_pools import CHUNK, MIB, SIZE, Chain, StreamPool, chain, names, pieces, pool_in
from tests.snapshots.streams import header_for, stream_of
from tests.volumes.conftest import abandon, findings, read, until, until_punched, write


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[StreamPool]:
    pool = await pool_in(tmp_path / "here")
    yield pool
    await pool.close()


class Receiver:
    """A pool into which volume 'web' comes; it can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool: StreamPool

    async def start(self) -> StreamPool:
        self.pool = await StreamPool(self.folder).start()
        return self.pool


@pytest.fixture
async def receiver(tmp_path: Path) -> AsyncIterator[Receiver]:
    """Afterwards its metadata and files are sound, without a leak."""
    made = Receiver(tmp_path / "there")
    made.folder.mkdir()
    await made.start()
    yield made
    await until_done(made.pool)
    assert findings(made.pool, leaks=True) == []
    await made.pool.close()


async def until_done(pool: StreamPool) -> None:
    """Return when no job is left to do, and all freed space is given back."""
    board = pool.engine.jobs
    await until(lambda: not board.list(state="running") and not board.list(state="queued"))
    await until_punched(pool)


async def check_untouched(pool: StreamPool, chain: Chain, *, base: bool) -> None:
    """The receiver holds 's0' and nothing else; without a base nothing at all."""
    assert pool.catalogue.count() == base
    assert not pool.imports.running
    assert pool.catalogue.promised_bytes == (SIZE if base else 0)
    if base:
        assert names(each for each in [pool.snapshots.find("web@s0")]) == ["s0"]
        assert len((await pool.snapshots.list("web")).snapshots) == 1
        assert await pool.head("web") == chain.contents[0]


def places(stream: bytes) -> Iterator[int]:
    """Where to cut: within the first bytes, within the last, and all over."""
    yield from (0, 1, 7, 16, 20, 25)
    yield from range(100, len(stream), len(stream) // 12)
    yield from (len(stream) - 70, len(stream) - 33, len(stream) - 1)


@pytest.mark.parametrize("base", [False, True], ids=["new", "base"])
async def test_a_cut_stream_leaves_nothing(here: StreamPool, receiver: Receiver, base: bool) -> None:
    sent, there = await chain(here), receiver.pool
    if base:
        await there.take_in("web", sent.first)
    stream = sent.second if base else sent.first
    for place in places(stream):
        with pytest.raises(StreamDamaged):
            await there.take_in("web", stream[:place], piece_bytes=10_000)
        await check_untouched(there, sent, base=base)
    await there.take_in("web", stream)
    assert await there.head("web") == sent.contents[base]


@pytest.mark.parametrize("base", [False, True], ids=["new", "base"])
async def test_an_altered_stream_leaves_nothing(here: StreamPool, receiver: Receiver, base: bool) -> None:
    sent, there = await chain(here), receiver.pool
    if base:
        await there.take_in("web", sent.first)
    stream = sent.second if base else sent.first
    for place in places(stream):
        altered = bytearray(stream)
        altered[place] ^= 0x40
        with pytest.raises(BlockvirtError):
            await there.take_in("web", bytes(altered), piece_bytes=10_000)
        await check_untouched(there, sent, base=base)


async def test_what_was_whole_stays(here: StreamPool, receiver: Receiver) -> None:
    sent, there = await chain(here), receiver.pool
    with pytest.raises(StreamDamaged) as refusal:
        await there.take_in("web", sent.first + sent.second[:-1])
    assert refusal.value.details["imported"] == ["s0"]
    await check_untouched(there, sent, base=True)
    with pytest.raises(StreamDamaged, match="no snapshot stream begins there"):
        await there.take_in("web", sent.second + b"garbage")
    assert await there.content("web@s1") == sent.contents[1]


class Gate:
    """A stream that stops half way until it is let through."""

    def __init__(self, stream: bytes, place: int) -> None:
        self._stream = stream
        self._place = place
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def pieces(self) -> AsyncIterator[bytes]:
        async for piece in pieces(self._stream[: self._place], 10_000):
            yield piece
        self.reached.set()
        await self.open.wait()
        yield self._stream[self._place :]


@asynccontextmanager
async def resting(pool: StreamPool, stream: bytes) -> AsyncIterator[tuple[Gate, "asyncio.Task[list[SnapshotRecord]]"]]:
    """An import of which half has come; it does not outlive the context."""
    gate = Gate(stream, len(stream) // 2)
    running = asyncio.create_task(pool.imports.run("web", gate.pieces()))
    await gate.reached.wait()
    try:
        yield gate, running
    finally:
        running.cancel()
        await asyncio.wait({running})


async def test_nobody_else_may_use_the_volume_meanwhile(here: StreamPool, receiver: Receiver) -> None:
    sent, there = await chain(here), receiver.pool
    await there.take_in("web", sent.first)
    volume = there.catalogue.get("web").id
    async with resting(there, sent.second) as (gate, running):
        with pytest.raises(InUse, match="being imported"):
            await there.open(volume)
        with pytest.raises(InUse, match="being imported"):
            await there.take_in("web", sent.second)
        with pytest.raises(InUse, match="being imported"):
            await there.snapshots.create({volume: "half"})
        with pytest.raises(InUse, match="being imported"):
            await there.snapshots.delete(["web@s0"], force=True)
        with pytest.raises(InUse, match="being imported"):
            await there.reverts.revert("web@s0")
        with pytest.raises(InUse, match="being imported"):
            await there.catalogue.delete("web", force=True, purge=True)
        with pytest.raises(InUse, match="being imported"):
            await there.catalogue.change("web", VolumeChange(size_bytes=2 * SIZE))
        assert await there.content("web@s0") == sent.contents[0]
        gate.open.set()
        assert names(await running) == ["s1"]
        assert await there.head("web") == sent.contents[1]


async def test_two_that_make_one_volume(here: StreamPool, receiver: Receiver) -> None:
    sent, there = await chain(here), receiver.pool
    async with resting(there, sent.first) as (gate, running):
        with pytest.raises(Exists):
            await there.take_in("web", sent.first)
        gate.open.set()
        assert names(await running) == ["s0"]
        assert await there.head("web") == sent.contents[0]


async def test_a_volume_in_use_is_left_alone(here: StreamPool, receiver: Receiver) -> None:
    sent, there = await chain(here), receiver.pool
    await there.take_in("web", sent.first)
    handle = await there.open(there.catalogue.get("web").id)
    with pytest.raises(InUse, match="1 sessions"):
        await there.take_in("web", sent.second)
    await write(handle, 0, b"still mine")
    assert await read(handle, 0, 10) == b"still mine"
    await handle.close()


@pytest.mark.parametrize("base", [False, True], ids=["new", "base"])
async def test_a_caller_that_is_cancelled_leaves_nothing(here: StreamPool, receiver: Receiver, base: bool) -> None:
    sent, there = await chain(here), receiver.pool
    if base:
        await there.take_in("web", sent.first)
    stream = sent.second if base else sent.first
    gate = Gate(stream, len(stream) - 1)
    running = asyncio.create_task(there.imports.run("web", gate.pieces()))
    await gate.reached.wait()
    assert there.imports.running
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await check_untouched(there, sent, base=base)


@pytest.mark.parametrize("power_cut", [False, True], ids=["kill", "power cut"])
@pytest.mark.parametrize("base", [False, True], ids=["new", "base"])
async def test_a_daemon_that_dies_leaves_nothing(
    here: StreamPool, receiver: Receiver, base: bool, power_cut: bool
) -> None:
    sent = await chain(here)
    stream = sent.second if base else sent.first
    for place in (400, len(stream) // 2, len(stream) - 1):
        there = receiver.pool
        if base and not there.catalogue.count():
            await there.take_in("web", sent.first)
        gate = Gate(stream, place)
        running = asyncio.create_task(there.imports.run("web", gate.pieces()))
        await gate.reached.wait()
        assert there.imports.running
        (volume_id,) = there.imports.running
        there.engine.registry._slots[volume_id].unpinned.set()  # the import rests: nothing of it is at work
        await there.readers.close()
        await abandon(there, power_cut=power_cut)
        running.cancel()
        await asyncio.wait({running})
        await receiver.start()
        await check_untouched(receiver.pool, sent, base=base)
    await receiver.pool.take_in("web", stream)
    assert await receiver.pool.head("web") == sent.contents[base]


@pytest.mark.parametrize("base", [False, True], ids=["new", "base"])
async def test_a_pool_that_gets_full_has_its_space_back(here: StreamPool, receiver: Receiver, base: bool) -> None:
    there = receiver.pool
    (disk,) = there.engine.storage.list()
    volume = await here.volume(64 * MIB, "web")
    await here.snapshots.create({volume: "s0"})
    handle = await here.open(volume)
    for at in range(0, 40 * MIB, MIB):
        await write(handle, at, os.urandom(MIB))
    await handle.close()
    await here.snapshots.create({volume: "s1"})
    small = receiver.folder / "small"
    await there.engine.storage.add(str(small), "small", 24 * MIB, 0, {}, create=True)
    await there.engine.storage.remove(disk.name)
    if base:
        await there.take_in("web", await here.export("web@s0"))
    before = there.engine.storage.status().used_bytes
    with pytest.raises(PoolFull):
        await there.take_in("web", await here.export("web@s1", "web@s0" if base else None))
    await until_done(there)
    assert there.engine.storage.status().used_bytes == before
    assert there.catalogue.count() == base
    if base:
        assert await there.head("web") == bytes(64 * MIB)
    await there.volume(MIB, "room")


async def test_a_snapshot_smaller_than_its_base_is_refused(here: StreamPool, receiver: Receiver) -> None:
    sent, there = await chain(here), receiver.pool
    (record,) = await there.take_in("web", sent.first)
    header = header_for([], base=StreamBase(record.source_id, "s0"), size_bytes=SIZE - CHUNK)
    with pytest.raises(InvalidSize, match="smaller than its base"):
        await there.take_in("web", stream_of(header, []))
    await check_untouched(there, sent, base=True)


async def test_a_snapshot_larger_than_this_pools_chunks_can_number_is_refused(
    here: StreamPool, receiver: Receiver
) -> None:
    sent, there = await chain(here), receiver.pool
    (record,) = await there.take_in("web", sent.first)
    await there.catalogue.set_policy(overcommit_ratio=1e6)
    header = header_for([], base=StreamBase(record.source_id, "s0"), size_bytes=(CHUNK << 32) + 512)
    with pytest.raises(InvalidSize, match="cannot have"):
        await there.take_in("web", stream_of(header, []))
    await check_untouched(there, sent, base=True)


async def test_growth_is_promised_only_if_it_comes(here: StreamPool, receiver: Receiver) -> None:
    sent, there = await chain(here), receiver.pool
    (record,) = await there.take_in("web", sent.first)
    data = [StreamData(SIZE, b"beyond" * 1000)]
    grown = stream_of(header_for(data, base=StreamBase(record.source_id, "s0"), size_bytes=2 * SIZE), data)
    with pytest.raises(StreamDamaged):
        await there.take_in("web", grown[:-1])
    await check_untouched(there, sent, base=True)
    assert there.catalogue.get("web").size_bytes == SIZE
    await there.take_in("web", grown)
    assert there.catalogue.get("web").size_bytes == there.catalogue.promised_bytes == 2 * SIZE
    assert (await there.head("web"))[SIZE : SIZE + 6] == b"beyond"


async def test_a_volume_that_was_grown_here_keeps_its_size(here: StreamPool, receiver: Receiver) -> None:
    sent, there = await chain(here), receiver.pool
    await there.take_in("web", sent.first)
    await there.catalogue.change("web", VolumeChange(size_bytes=SIZE + MIB))
    with pytest.raises(StreamDamaged):
        await there.take_in("web", sent.second[:-1])
    assert await there.head("web") == sent.contents[0] + bytes(MIB)
    assert there.catalogue.promised_bytes == SIZE + MIB
    await there.take_in("web", sent.second)
    assert await there.content("web@s1") == sent.contents[1]
    assert await there.head("web") == sent.contents[1] + bytes(MIB)


async def test_an_import_holds_little_of_what_a_piece_stands_for(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [StreamData(at, b"a" * MIB) for at in range(0, 64 * MIB, MIB)]
    stream = stream_of(header_for(data, base=None, size_bytes=64 * MIB), data)
    assert len(stream) < 64 * 1024, "all of it arrives in one piece"
    held: list[int] = []
    batch = importing._batch

    def counted(events: Iterator[StreamEvent]) -> list[StreamEvent]:
        found = batch(events)
        held.append(sum(len(each.content) for each in found if isinstance(each, StreamData)))
        return found

    monkeypatch.setattr(importing, "_batch", counted)
    await receiver.pool.take_in("web", stream)
    assert sum(held) == 64 * MIB
    assert max(held) <= 2 * STREAM_MAX_DATA_BYTES


async def test_a_reopen_does_not_wait_for_an_import(receiver: Receiver, here: StreamPool) -> None:
    sent, pool = await chain(here), receiver.pool
    await pool.take_in("web", sent.first)
    going, begun = asyncio.Event(), asyncio.Event()

    async def held() -> AsyncIterator[bytes]:
        yield sent.second[:-1]
        begun.set()
        await going.wait()
        yield sent.second[-1:]

    importing = asyncio.create_task(pool.imports.run("web", held()))
    await begun.wait()
    await until(lambda: bool(pool.engine.registry.opened()))
    base = pool.snapshots.find("web@s0")
    reopening = asyncio.create_task(pool.catalogue.reopen("web"))
    await until(lambda: reopening.done())
    with pytest.raises(InUse, match=f"imported into volume 'web', which goes on from snapshot {base.id}") as caught:
        await reopening
    assert "wait for the import" in caught.value.correction
    going.set()
    assert names(await importing) == ["s1"]
