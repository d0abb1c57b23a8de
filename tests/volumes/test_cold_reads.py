"""Reads that the page cache cannot answer: few hand-overs to threads, each read its own outcome."""

import errno
from collections.abc import Callable
from typing import Any

import pytest

from blockvirt.device import Read
from blockvirt.errors import DeviceFault
from blockvirt.pool.backing import BackingFile
from blockvirt.units import KIB, MIB
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.io_threads import IoThreads, Then
from tests.volumes.conftest import Pool, write

CHUNK = 4 * KIB
COUNT = 16


@pytest.fixture
async def handle(pool: Pool) -> Handle:
    """A volume whose chunks hold their numbers."""
    opened = await pool.open(await pool.volume(MIB))
    for chunk in range(COUNT):
        await write(opened, chunk * CHUNK, bytes([chunk + 1]) * CHUNK)
    return opened


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was handed to threads."""
    seen: list[Any] = []
    call = IoThreads.call

    def noted(self: IoThreads, work: Callable[[], Any], then: Then) -> None:
        seen.append(work)
        call(self, work, then)

    monkeypatch.setattr(IoThreads, "call", noted)
    return seen


def reads() -> list[Read]:
    return [(chunk * CHUNK, memoryview(bytearray(CHUNK))) for chunk in range(COUNT)]


def contents(done: list[Read]) -> list[int]:
    """Return the number that each buffer is full of."""
    for _, into in done:
        assert bytes(into) == bytes([into[0]]) * CHUNK
    return [into[0] for _, into in done]


NUMBERS = list(range(1, COUNT + 1))


async def test_reads_of_one_turn_share_a_hand_over(handle: Handle, submitted: list[Any]) -> None:
    wanted = reads()
    assert list(await handle.read(wanted)) == [None] * COUNT
    assert contents(wanted) == NUMBERS
    assert len(submitted) == 1


async def test_what_stays_cold_is_read_by_threads(
    handle: Handle, submitted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filesystem that cannot tell what is in the page cache, or a kernel that does not begin to read."""
    monkeypatch.setattr(BackingFile, "read_cached", lambda *_: False)
    wanted = reads()
    assert list(await handle.read(wanted)) == [None] * COUNT
    assert contents(wanted) == NUMBERS
    assert len(submitted) < 5


@pytest.mark.parametrize("cold", [False, True], ids=["on the loop", "in a thread"])
@pytest.mark.parametrize("broken", [0, COUNT - 1])
async def test_a_read_that_fails_fails_alone(
    handle: Handle, monkeypatch: pytest.MonkeyPatch, broken: int, cold: bool
) -> None:
    wanted = reads()
    read, read_cached = BackingFile.read, BackingFile.read_cached

    def check(into: memoryview) -> None:
        if into.obj is wanted[broken][1].obj:
            raise OSError(errno.EIO, "broken")

    def failing(self: BackingFile, into: memoryview, position: int) -> None:
        check(into)
        read(self, into, position)

    def failing_cached(self: BackingFile, into: memoryview, position: int) -> bool:
        check(into)
        return not cold and read_cached(self, into, position)

    monkeypatch.setattr(BackingFile, "read", failing)
    monkeypatch.setattr(BackingFile, "read_cached", failing_cached)
    outcomes = list(await handle.read(wanted))
    error = outcomes.pop(broken)
    assert isinstance(error, OSError)
    assert error.errno == errno.EIO
    assert outcomes == [None] * (COUNT - 1)
    del wanted[broken]
    assert contents(wanted) == [number for number in NUMBERS if number != broken + 1]


async def test_a_file_that_cannot_be_opened_fails_its_reads_alone(
    handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = handle._opened.volume.pieces

    def missing(offset: int, into: memoryview) -> Any:
        if offset == 3 * CHUNK:
            raise DeviceFault("the disk is gone", correction="bring it back")
        return pieces(offset, into)

    monkeypatch.setattr(handle._opened.volume, "pieces", missing)
    wanted = reads()
    outcomes = list(await handle.read(wanted))
    assert isinstance(outcomes[3], DeviceFault)
    assert [outcome is None for outcome in outcomes] == [chunk != 3 for chunk in range(COUNT)]
