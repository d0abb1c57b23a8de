"""What one turn of the event loop copies on write: one call for all of it, and nothing of it half done."""

import errno
import os
import random
from typing import Any

import pytest

from blockvirt.errors import VolumeStopped
from blockvirt.limits import TURN_COPY_BYTES
from blockvirt.lun.address import FRESH, chunk_of
from blockvirt.pool.backing import BackingFile
from blockvirt.volumes.handle import Handle
from tests.snapshots.conftest import SnapshotPool
from tests.volumes.conftest import findings, read, until_punched, write

CHUNK = 4096
CHUNKS = 2 * TURN_COPY_BYTES // CHUNK
SIZE = CHUNKS * CHUNK


async def snapshotted(pool: SnapshotPool, name: str = "v") -> Handle:
    """A volume of "a" of which a snapshot was taken; with a journal, and room for what the tests write."""
    handle = await pool.open(await pool.volume(SIZE, name))
    await write(handle, 0, b"a" * SIZE)
    await pool.snapshots.create({name: "s"})
    await handle.write(SIZE - CHUNK, memoryview(b"a" * CHUNK))
    return handle


class Calls:
    """Notes how much each call writes, and has one fail if asked to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: int | None = None) -> None:
        self.sizes_bytes: list[int] = []
        original = BackingFile.write

        def noted_write(file: BackingFile, data: memoryview, position: int) -> None:
            self.sizes_bytes.append(len(data))
            if len(self.sizes_bytes) - 1 == failing:
                os.pwrite(file.fd, b"half", position)
                raise OSError(errno.EIO, "broken")
            original(file, data, position)

        monkeypatch.setattr(BackingFile, "write", noted_write)


def at_once(handle: Handle, offset: int, data: bytes) -> None:
    assert handle.write_now(offset, memoryview(data))


async def test_the_copies_of_a_turn_are_written_in_one_call(
    pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await snapshotted(pool)
    volume = handle._opened.volume
    journalled, calls = volume.stats.journal_appends, Calls(monkeypatch)
    for chunk in (7, 3, 4):
        at_once(handle, chunk * CHUNK + 100, b"b" * 50)
    assert volume.unsettled()
    assert not calls.sizes_bytes
    handle.settle()
    assert not volume.unsettled()
    assert calls.sizes_bytes == [3 * CHUNK]
    assert volume.stats.journal_appends == journalled + 1
    entries = [volume.map.readable(chunk) for chunk in (7, 3, 4)]
    assert all(entry >= FRESH for entry in entries)
    assert [chunk_of(entry) - chunk_of(entries[0]) for entry in entries] == [0, 1, 2]
    for chunk in (7, 3, 4):
        assert await read(handle, chunk * CHUNK, CHUNK) == b"a" * 100 + b"b" * 50 + b"a" * (CHUNK - 150)
    await handle.close()
    assert not findings(pool, leaks=True)


async def test_more_than_one_call_takes(pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = await snapshotted(pool)
    calls = Calls(monkeypatch)
    for chunk in range(TURN_COPY_BYTES // CHUNK + 1):
        at_once(handle, chunk * CHUNK, b"b")
    handle.settle()
    assert calls.sizes_bytes == [TURN_COPY_BYTES, CHUNK]
    assert await read(handle, 0, TURN_COPY_BYTES + CHUNK) == (b"b" + b"a" * (CHUNK - 1)) * (
        TURN_COPY_BYTES // CHUNK + 1
    )
    await handle.close()


async def test_a_turn_sees_its_own_writes(pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, in one chunk and over several, and whatever else is written between them."""
    handle = await snapshotted(pool)
    model = bytearray(await read(handle, 0, SIZE))
    for seed in range(40):
        dice = random.Random(seed)
        for _ in range(dice.randrange(1, 12)):
            offset = dice.randrange(8 * CHUNK)
            length = dice.choice((1, 100, CHUNK, 2 * CHUNK))
            if dice.random() < 0.5:
                offset = offset // CHUNK * CHUNK
            if dice.random() < 0.2:
                assert await read(handle, offset, length) == model[offset : offset + length], f"seed {seed}"
                continue
            data = dice.randbytes(length)
            at_once(handle, offset, data)
            model[offset : offset + length] = data
        handle.settle()
        assert await read(handle, 0, SIZE) == model, f"seed {seed}"
        await pool.snapshots.create({"v": f"s{seed}"})
        at_once(handle, 20 * CHUNK, b"b" * CHUNK)  # the journal's first change, and room
        handle.settle()
        model[20 * CHUNK : 21 * CHUNK] = b"b" * CHUNK
    await handle.close()
    assert not findings(pool, leaks=True)


@pytest.mark.parametrize("behind", ["nothing", "a read", "a write of several chunks", "more copies"])
async def test_copies_that_fail_are_acknowledged_to_nobody(
    pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch, behind: str
) -> None:
    handle = await snapshotted(pool)
    volume = handle._opened.volume
    expected = bytearray(b"a" * SIZE)
    with monkeypatch.context() as patched:
        Calls(patched, failing=0)
        for chunk in (7, 3):
            at_once(handle, chunk * CHUNK, b"b")
        if behind == "a read":
            assert await read(handle, 7 * CHUNK, CHUNK) == b"a" * CHUNK
        elif behind == "a write of several chunks":
            at_once(handle, 10 * CHUNK, b"c" * 2 * CHUNK)
            expected[10 * CHUNK : 12 * CHUNK] = b"c" * 2 * CHUNK
        elif behind == "more copies":
            assert await read(handle, 7 * CHUNK, 1) == b"a"
            at_once(handle, 12 * CHUNK, b"d")
            expected[12 * CHUNK : 12 * CHUNK + 1] = b"d"
        with pytest.raises(OSError, match="broken"):
            handle.settle()
    assert not volume.unsettled()
    handle.settle()
    assert await read(handle, 0, SIZE) == expected
    for chunk in (7, 3):
        await write(handle, chunk * CHUNK, b"e")
        expected[chunk * CHUNK : chunk * CHUNK + 1] = b"e"
    assert await read(handle, 0, SIZE) == expected
    await handle.close()
    assert not findings(pool, leaks=True)


async def test_a_failure_of_copies_outlives_that_of_a_later_write(
    pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a write of several chunks staged before it failed is journalled: that must not take the word away."""
    handle = await snapshotted(pool)
    at_once(handle, 9 * CHUNK, b"b" * CHUNK)  # so that the write of several chunks takes several calls
    handle.settle()
    original, calls = BackingFile.write, 0

    def failing_write(file: BackingFile, data: memoryview, position: int) -> None:
        nonlocal calls
        calls += 1
        if calls != 2:
            raise OSError(errno.EIO, f"broken {calls}")
        original(file, data, position)

    with monkeypatch.context() as patched:
        patched.setattr(BackingFile, "write", failing_write)
        at_once(handle, 3 * CHUNK, b"b")
        with pytest.raises(OSError, match="broken 3"):
            handle.write_now(8 * CHUNK, memoryview(b"c" * 3 * CHUNK))
        with pytest.raises(OSError, match="broken 1"):
            handle.settle()
    assert await read(handle, 8 * CHUNK, CHUNK) == b"c" * CHUNK
    await handle.close()


async def test_what_waits_counts_as_taken(pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the journal's room, and of reserved space."""
    handle = await snapshotted(pool)
    volume = handle._opened.volume
    assert volume.journal is not None
    at_once(handle, 0, b"b")
    at_once(handle, CHUNK, b"b")
    with monkeypatch.context() as patched:
        patched.setattr(volume.journal, "room", lambda: 2)
        assert not handle.write_now(2 * CHUNK, memoryview(b"b")), "the journal has room for the two that wait"
    file, kept = volume.tail._file, 0
    assert file is not None
    file.reserved_chunks, kept = file.used_chunks + 2, file.reserved_chunks
    assert not handle.write_now(2 * CHUNK, memoryview(b"b")), "there is room for the two that wait"
    assert handle.write_now(0, memoryview(b"c")), "it waits already"
    file.reserved_chunks = kept
    handle.settle()
    assert await read(handle, 0, 1) == b"c"
    await handle.close()
    assert not findings(pool, leaks=True)


async def test_a_volume_that_stopped_acknowledges_no_copies(pool: SnapshotPool) -> None:
    handle = await snapshotted(pool)
    volume = handle._opened.volume
    at_once(handle, 0, b"b")
    volume.stop("its disk is gone", OSError(errno.EIO, "gone"))
    with pytest.raises(VolumeStopped):
        handle.settle()
    assert not volume.unsettled()
    await handle.close()


async def test_nobody_may_leave_a_turn_unsettled(pool: SnapshotPool) -> None:
    """All volumes copy through one buffer."""
    first, second = await snapshotted(pool, "v"), await snapshotted(pool, "w")
    at_once(first, 0, b"b")
    with pytest.raises(AssertionError, match="did not settle"):
        second.write_now(0, memoryview(b"c"))
    first.settle()
    at_once(second, 0, b"c")
    second.settle()
    assert await read(first, 0, 2) == b"ba"
    assert await read(second, 0, 2) == b"ca"
    await first.close()
    await second.close()


@pytest.mark.parametrize("what", ["an address", "memory"])
async def test_a_mistake_leaves_nothing_held_and_costs_other_volumes_nothing(
    pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    handle, other = await snapshotted(pool), await snapshotted(pool, "w")

    original = BackingFile.write

    def fail(*arguments: Any) -> None:
        if what == "memory":
            original(*arguments)
        raise MemoryError

    at_once(handle, 0, b"b")
    at_once(handle, CHUNK, b"b")
    with monkeypatch.context() as patched:
        if what == "an address":
            patched.setattr(handle._opened.volume.tail, "take", fail)
        else:
            patched.setattr(BackingFile, "write", fail)
        with pytest.raises(MemoryError):
            handle.settle()
    assert not handle._opened.volume.unsettled()
    at_once(other, 0, b"b")
    other.settle()
    assert await read(handle, 0, 1) == b"a"
    await handle.close()
    await other.close()
    await until_punched(pool)
    assert not findings(pool, leaks=True)
