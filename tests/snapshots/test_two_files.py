"""A branch appends to two files in turns: what a snapshot syncs is not what the writes behind it go to."""

from pathlib import Path

import pytest

from blockvirt.errors import PoolFull
from blockvirt.lun.address import file_of
from blockvirt.pool.backing import BackingFile
from blockvirt.units import KIB
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.tail import Tail
from tests.snapshots.conftest import SnapshotPool
from tests.volumes.conftest import findings, read, write

CHUNK = 4 * KIB
SIZE = 64 * CHUNK


@pytest.fixture
async def handle(pool: SnapshotPool) -> Handle:
    opened = await pool.open(await pool.volume(SIZE, "v"))
    await write(opened, 0, b"0" * CHUNK)
    return opened


def files_under(handle: Handle, chunks: range) -> list[int]:
    return [file_of(handle._opened.volume.map.readable(chunk)) for chunk in chunks]


async def test_epochs_take_turns(pool: SnapshotPool, handle: Handle) -> None:
    for number in range(1, 7):
        await pool.snapshots.create({"v": f"s{number}"})
        await write(handle, number * CHUNK, b"%d" % number * CHUNK)
        await write(handle, (16 + number) * CHUNK, b"%d" % number * CHUNK)
    one, other = files_under(handle, range(2))
    assert one != other
    assert files_under(handle, range(7)) == [one, other, one, other, one, other, one]
    assert files_under(handle, range(17, 23)) == [other, one, other, one, other, one]
    await handle.close()
    again = await pool.open(handle.volume_id)
    assert [await read(again, number * CHUNK, 1) for number in range(7)] == [b"%d" % number for number in range(7)]
    await again.close()
    assert not findings(pool, leaks=True)


async def test_what_is_written_while_a_snapshot_syncs_goes_elsewhere(
    pool: SnapshotPool, handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first sync on, with which a snapshot begins: those before the freeze belong to it all the same."""
    await pool.snapshots.create({"v": "s1"})
    await write(handle, CHUNK, b"1" * CHUNK)
    await pool.snapshots.create({"v": "s2"})
    await write(handle, 2 * CHUNK, b"2" * CHUNK)
    active = handle._opened.volume.tail._file
    assert active is not None
    call = pool.engine.context.threads.call
    synced: list[BackingFile] = []

    def noted(self: BackingFile) -> None:
        synced.append(self)

    def called(work, then):  # type: ignore[no-untyped-def]
        if not synced:  # the loop hands over the first sync
            synced.append(active)
            assert handle.write_now(3 * CHUNK, memoryview(b"3" * CHUNK))
            handle.settle()
        call(work, then)

    monkeypatch.setattr(BackingFile, "sync", noted)
    monkeypatch.setattr(pool.engine.context.threads, "call", called)
    await pool.snapshots.create({"v": "s3"})
    monkeypatch.undo()
    before, during = files_under(handle, range(2, 4))
    assert before == active.number
    assert during != before
    assert synced[0] is active
    snapshot = pool.readers.open(pool.snapshots.find("v@s3"), "r")
    into = bytearray(CHUNK)
    assert snapshot.read_now(3 * CHUNK, memoryview(into))
    assert into == b"3" * CHUNK, "the freeze came after it"
    await snapshot.close()


async def test_in_a_full_pool_what_is_reserved_in_the_other_file_is_used(
    pool: SnapshotPool, handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> None:
        raise PoolFull("full")

    (file,) = handle._opened.volume.files.own()
    file.reserved_chunks = file.used_chunks + 5
    monkeypatch.setattr(Tail, "_extend", full)
    await pool.snapshots.create({"v": "s"})
    for chunk in range(5):
        await write(handle, chunk * CHUNK, b"1" * CHUNK)
    assert files_under(handle, range(5)) == [file.number] * 5
    with pytest.raises(PoolFull):
        await write(handle, 5 * CHUNK, b"1" * CHUNK)
    await pool.snapshots.create({"v": "t"})
    with pytest.raises(PoolFull):
        await write(handle, 0, b"2" * CHUNK)
    monkeypatch.undo()
    await write(handle, 0, b"2" * CHUNK)
    assert files_under(handle, range(2))[0] != file.number
    assert [await read(handle, chunk * CHUNK, 1) for chunk in range(6)] == [b"2", b"1", b"1", b"1", b"1", b"\0"]
    await handle.close()
    assert not findings(pool, leaks=True)


def devices_of(handle: Handle) -> list[str]:
    return [file.device_id for file in handle._opened.volume.files.own()]


async def test_both_are_on_one_device(pool: SnapshotPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other disk has more room all the time; only where the first has none, the volume goes on there."""
    storage = pool.engine.storage
    handle = await pool.open(await pool.volume(SIZE, "v"))
    await write(handle, 0, b"0" * CHUNK)
    (home,) = devices_of(handle)
    second = await storage.add(str(tmp_path / "second"), "second", None, 0, {}, create=True)
    monkeypatch.setattr(storage, "place", lambda *_: second.id)
    for number in range(1, 5):
        await pool.snapshots.create({"v": f"s{number}"})
        await write(handle, number * CHUNK, b"1" * CHUNK)
    assert devices_of(handle) == [home, home]
    admit = storage.admit

    def full_at_home(device_id: str, needed_bytes: int) -> None:
        if device_id == home:
            raise PoolFull("full")
        admit(device_id, needed_bytes)

    monkeypatch.setattr(storage, "admit", full_at_home)
    for file in handle._opened.volume.files.own():
        file.reserved_chunks = file.used_chunks + 1
    for number in range(5, 8):
        await pool.snapshots.create({"v": f"s{number}"})
        await write(handle, number * CHUNK, b"1" * CHUNK)
    assert files_under(handle, range(5, 7)) == files_under(handle, range(1, 3)), "what was reserved comes first"
    assert devices_of(handle) == [home, home, second.id]
    await handle.close()
    assert not findings(pool, leaks=True)
