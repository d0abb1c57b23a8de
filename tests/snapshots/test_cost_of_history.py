"""What a request costs does not grow with the history: counted, not timed, so that any machine says the same."""

import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from benchmarks.snapshots.history import History, write_checksums, write_histories
from blockvirt.limits import DEFAULT_CHUNK_BYTES, LEAF_CHUNKS
from blockvirt.snapshots.views import volume_snapshots
from blockvirt.testing.fixtures import write_mapped_pool
from blockvirt.units import KIB
from blockvirt.volumes.engine import Engine
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.transactions import locate
from tests.volumes.conftest import read, write

CHUNK = DEFAULT_CHUNK_BYTES
BLOCK = 4 * KIB
LEAVES = 3
SNAPSHOTS = (0, 1, 1_000)
NAMES = {count: f"v{number:05d}" for number, count in enumerate(SNAPSHOTS)}
# Here and there in every leaf: of the chunks near its beginning most were changed by one of the snapshots.
CHUNKS = [leaf * LEAF_CHUNKS + slot for leaf in range(LEAVES) for slot in (0, 1, 7, 100, 200, 300, 400, 511)]
OFFSETS = [chunk * CHUNK + 3 * BLOCK for chunk in CHUNKS]


@pytest.fixture
async def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Engine]:
    """A pool with a volume for each length of history, each mapped from end to end."""
    # Not every filesystem can say what it has in the page cache; here all of it is.
    monkeypatch.setattr("blockvirt.pool.backing.READ_CACHED", 0)
    monkeypatch.setattr("blockvirt.volumes.volume.READ_CACHED", 0)
    state = tmp_path / "state"
    await write_mapped_pool(state, tmp_path / "disk", len(SNAPSHOTS), len(SNAPSHOTS) * LEAVES * LEAF_CHUNKS)
    once = [History(NAMES[count], 1, 0, "first") for count in SNAPSHOTS if count]
    more = [History(NAMES[count], count - 1) for count in SNAPSHOTS if count > 1]
    await write_histories(state, [*once, *more])
    for count in SNAPSHOTS[1:]:  # else what is copied is compared in the longer history only
        await write_checksums(state, NAMES[count], LEAVES * LEAF_CHUNKS)
    engine = await Engine.start(state, [])
    with engine.store.read() as reader:
        assert tuple(len(volume_snapshots(reader, locate(reader, name)[0])) for name in NAMES.values()) == SNAPSHOTS
    yield engine
    await engine.close()


async def opened(engine: Engine, snapshots: int) -> Handle:
    """Return the volume with so many snapshots, as a session has it."""
    with engine.store.read() as reader:
        volume_id, _ = locate(reader, NAMES[snapshots])
    return await engine.registry.open(volume_id, "test")


def cost(request: Callable[[int], bool], offsets: Sequence[int] = OFFSETS) -> "Counter[str]":
    """Do requests that need not wait; returns the system calls, by name, and all calls in the interpreter."""
    counted: Counter[str] = Counter()

    def note(frame: FrameType, event: str, called: Any) -> None:
        if event in ("call", "c_call"):
            counted["calls"] += 1
        if event == "c_call" and called.__module__ == "posix":
            counted[called.__name__] += 1

    for offset in offsets:
        sys.setprofile(note)
        try:
            done = request(offset)
        finally:
            sys.setprofile(None)
        assert done, offset
    return counted


def reader_of(handle: Handle) -> Callable[[int], bool]:
    into = memoryview(bytearray(BLOCK))
    return lambda offset: handle.read_now(offset, into)


def writer_of(handle: Handle) -> Callable[[int], bool]:
    data = memoryview(b"x" * BLOCK)

    def write_and_settle(offset: int) -> bool:
        done = handle.write_now(offset, data)
        handle.settle()
        return done

    return write_and_settle


async def test_reads_and_overwrites_cost_the_same_after_a_thousand_snapshots(engine: Engine) -> None:
    found: dict[int, tuple[Counter[str], Counter[str]]] = {}
    first: dict[int, Counter[str]] = {}
    for count in SNAPSHOTS:
        handle = await opened(engine, count)
        for offset in OFFSETS:  # into the page cache
            await read(handle, offset, BLOCK)
        await handle.close()
        handle = await opened(engine, count)  # the map is not in memory any more
        first[count] = cost(reader_of(handle))
        reads = cost(reader_of(handle))
        for offset in OFFSETS:  # the first ones copy
            await write(handle, offset, b"x" * BLOCK)
        found[count] = reads, cost(writer_of(handle))
        await handle.close()
    reads, writes = found[0]
    assert (reads["preadv"], writes["pwrite"]) == (len(OFFSETS), len(OFFSETS))
    assert found == dict.fromkeys(SNAPSHOTS, (reads, writes))
    calls = [counted.pop("calls") for counted in first.values()]
    assert min(calls) > reads["calls"], "nothing was looked up"
    assert max(calls) <= 1.05 * min(calls)  # a seek ends on the version or behind it
    assert first == dict.fromkeys(SNAPSHOTS, first[0])


async def test_first_writes_cost_the_same_after_one_snapshot_and_after_a_thousand(engine: Engine) -> None:
    found: dict[int, Counter[str]] = {}
    for count in SNAPSHOTS[1:]:
        handle = await opened(engine, count)
        volume = handle._opened.volume
        for chunk in CHUNKS:  # what is to be copied must be in the page cache, its checksums too; and there must be ...
            await read(handle, chunk * CHUNK, CHUNK)
            assert volume.checksum_of(volume.map.writable(chunk)) is not None
        # ... a file to append to
        await write(handle, 50 * CHUNK, b"x" * BLOCK)
        found[count] = cost(writer_of(handle))
        await handle.close()
    assert found[1]["pwrite"] >= 2 * len(OFFSETS), "the chunk and the journal"
    assert found[1] == found[1_000]
