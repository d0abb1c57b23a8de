"""Taking snapshots: one instant, exactly what was replied to, and refusals that leave nothing behind (I5)."""

import asyncio
import threading

import pytest

from blockvirt.device import read_one
from blockvirt.errors import (
    Exists,
    InUse,
    InvalidName,
    InvalidRequest,
    NotFound,
    PoolFull,
    VolumeStopped,
)
from blockvirt.lun.address import FRESH
from blockvirt.lun.leaf import decode
from blockvirt.meta.keys import Table
from blockvirt.meta.records import VolumeRecord
from blockvirt.meta.store import Writer
from blockvirt.meta.verify import verify_records
from blockvirt.pool.backing import BackingFile
from blockvirt.snapshots.import_transactions import mark
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.requests import NewVolume, VolumeChange
from tests.snapshots.conftest import SnapshotPool
from tests.volumes.conftest import findings, read, until, write

CHUNK = 4096
SIZE = 64 * CHUNK


async def content_of(pool: SnapshotPool, name: str) -> bytes:
    handle = pool.readers.open(pool.snapshots.find(name), f"read {name}")
    into = bytearray(handle.size_bytes)
    await read_one(handle, 0, memoryview(into))
    await handle.close()
    return bytes(into)


class SlowWrites:
    """Holds writes of one byte value back in their thread until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.going = threading.Event()
        self.held = 0
        original = BackingFile.write

        def held_write(file: BackingFile, data: memoryview, position: int) -> None:
            if bytes(data[:1]) == b"h":
                self.held += 1
                assert self.going.wait(30)
            original(file, data, position)

        monkeypatch.setattr(BackingFile, "write", held_write)


def pressed(handle: Handle, *, on: bool) -> None:
    """Have overwrites go to threads, as when too much is dirty."""
    handle._opened.volume.context.pressure.high = on


async def test_a_snapshot_waits_for_overwrites_in_threads_and_keeps_new_ones_out(
    pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await pool.open(await pool.volume(SIZE, "v"))
    await write(handle, 0, b"a" * SIZE)
    slow = SlowWrites(monkeypatch)
    pressed(handle, on=True)
    first = asyncio.create_task(handle.write(0, memoryview(b"h" * CHUNK)))
    await until(lambda: slow.held == 1)
    snapshot = asyncio.create_task(pool.snapshots.create({"v": "s"}))
    await until(lambda: not handle._opened.volume.in_place.open)
    late = asyncio.create_task(handle.write(CHUNK, memoryview(b"l" * CHUNK)))
    await until(lambda: len(handle._opened.volume.busy.holds) == 2)
    pressed(handle, on=False)
    assert handle.write_now(2 * CHUNK, memoryview(b"i" * CHUNK)), "the event loop's own overwrites go on"
    handle.settle()
    assert not snapshot.done()
    assert not late.done()
    slow.going.set()
    await asyncio.gather(first, snapshot, late)
    assert await content_of(pool, "v@s") == b"h" * CHUNK + b"a" * CHUNK + b"i" * CHUNK + b"a" * (SIZE - 3 * CHUNK)
    assert await read(handle, 0, 3 * CHUNK) == b"h" * CHUNK + b"l" * CHUNK + b"i" * CHUNK
    await handle.close()
    assert not findings(pool, leaks=True)


async def test_a_copy_in_a_thread_across_the_freeze_belongs_to_the_new_epoch(
    pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await pool.open(await pool.volume(SIZE, "v"))
    await write(handle, 0, b"a" * SIZE)
    await pool.snapshots.create({"v": "s"})
    volume = handle._opened.volume
    monkeypatch.setattr(volume, "_fill_old", lambda entry, content: False)  # cold: the copy goes through a thread
    slow = SlowWrites(monkeypatch)
    copying = asyncio.create_task(handle.write(0, memoryview(b"h" * 100)))
    await until(lambda: slow.held == 1)
    await pool.snapshots.create({"v": "t"})  # a copy is no overwrite: it is not waited for
    slow.going.set()
    await copying
    assert await content_of(pool, "v@t") == b"a" * SIZE
    assert volume.map.writable(0) >= FRESH
    assert await read(handle, 0, CHUNK) == b"h" * 100 + b"a" * (CHUNK - 100)
    await write(handle, 0, b"j" * CHUNK)
    assert await content_of(pool, "v@s") == await content_of(pool, "v@t") == b"a" * SIZE
    await handle.close()
    assert not findings(pool, leaks=True)


async def test_a_group_is_of_one_instant(pool: SnapshotPool) -> None:
    """Two volumes written in turns: no snapshot of a group may show the second write without the first."""
    first, second = [await pool.open(await pool.volume(SIZE, name)) for name in ("a", "b")]
    going = True

    async def writer() -> int:
        count = 0
        while going:
            count += 1
            await write(first, 0, count.to_bytes(8, "big"))
            await write(second, 0, count.to_bytes(8, "big"))
            await asyncio.sleep(0)
        return count

    task = asyncio.create_task(writer())
    for number in range(20):
        records = await pool.snapshots.create({"a": f"g{number}", "b": f"g{number}"})
        assert len({record.group_id for record in records}) == 1
    going = False
    assert await task > 20
    for number in range(20):
        ahead, behind = [
            int.from_bytes((await content_of(pool, f"{name}@g{number}"))[:8], "big") for name in ("a", "b")
        ]
        assert ahead - behind in (0, 1)
    await first.close()
    await second.close()
    assert not findings(pool, leaks=True)


async def test_a_group_is_taken_as_a_whole_or_not_at_all(pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = [await pool.open(await pool.volume(SIZE, name)) for name in ("a", "b")]
    await write(first, 0, b"x" * CHUNK)
    await write(second, 0, b"y" * CHUNK)
    await pool.snapshots.create({"b": "taken"})
    with pytest.raises(Exists, match="b@taken"):
        await pool.snapshots.create({"a": "taken", "b": "taken"})
    # One of the two fails in the middle: the other goes on, and has no snapshot.
    await write(first, CHUNK, b"x" * CHUNK)
    await write(second, CHUNK, b"y" * CHUNK)
    broken = second._opened.volume.files.unsynced()[0]

    def sync(file: BackingFile) -> None:
        if file is broken:
            raise OSError(5, "planted")

    monkeypatch.setattr(BackingFile, "sync", sync)
    with pytest.raises(VolumeStopped):
        await pool.snapshots.create({"a": "t", "b": "t"})
    monkeypatch.undo()
    assert not (await pool.snapshots.list("a")).snapshots
    await write(first, 2 * CHUNK, b"x" * CHUNK)
    await first.flush()
    await pool.snapshots.create({"a": "alone"})
    assert (await content_of(pool, "a@alone"))[: 3 * CHUNK] == b"x" * 3 * CHUNK
    await first.close()
    await second.close()
    assert not findings(pool)


@pytest.mark.parametrize("name", ["", "a@b", "a/b", "a\0b", "x" * 300, "Caps", "-dash", "ünicode"])
async def test_names_that_no_snapshot_can_have(pool: SnapshotPool, name: str) -> None:
    await pool.volume(SIZE, "v")
    with pytest.raises(InvalidName):
        await pool.snapshots.create({"v": name})


async def test_what_cannot_be_snapshotted(pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch) -> None:
    volume_id = await pool.volume(SIZE, "v")
    with pytest.raises(NotFound, match="nosuch"):
        await pool.snapshots.create({"nosuch": "s"})
    with pytest.raises(InvalidRequest, match="twice"):
        await pool.snapshots.create({"v": "s", volume_id: "s"})
    with pytest.raises(InvalidRequest, match="group of 0"):
        await pool.snapshots.create({})
    await pool.snapshots.create({"v": "s"})
    with pytest.raises(Exists, match="v@s already"):
        await pool.snapshots.create({"v": "s"})
    with pytest.raises(NotFound, match="no snapshot 't'"):
        pool.snapshots.find("v@t")
    with monkeypatch.context() as patched:
        patched.setattr(type(pool.engine.store), "reserve_ok", property(lambda _: False))
        with pytest.raises(PoolFull, match="no snapshot is taken"):
            await pool.snapshots.create({"v": "full"})
        with pytest.raises(PoolFull, match="no volume is reverted"):
            await pool.reverts.revert("v@s")
    await pool.catalogue.delete("v")
    with pytest.raises(NotFound, match="there is no volume"):
        await pool.snapshots.create({volume_id: "gone"})


async def test_a_held_snapshot_stays(pool: SnapshotPool) -> None:
    await pool.volume(SIZE, "v")
    (record,) = await pool.snapshots.create({"v": "s"})
    await pool.snapshots.hold("v@s", "legal")
    await pool.snapshots.hold("v@s", "legal")
    await pool.snapshots.hold("v@s", "audit")
    dry = await pool.snapshots.delete(["v@s"], dry_run=True)
    assert (dry.deleted, dry.obstacles) == (False, ("v@s is held: legal, audit",))
    command = "'blockvirt snapshot release v@s --tag"
    how = f"release it first ({command} legal', {command} audit')"
    for force in (False, True):
        with pytest.raises(InUse, match="is held: legal, audit") as raised:
            await pool.snapshots.delete(["v@s"], force=force)
        assert raised.value.correction == how
    with pytest.raises(InUse, match="v@s is held") as raised:
        await pool.catalogue.delete("v", force=True)
    assert raised.value.correction == how
    await pool.snapshots.release("v@s", "legal")
    with pytest.raises(InUse, match="is held: audit"):
        await pool.snapshots.delete([record.id])
    await pool.snapshots.release("v@s", "audit")
    await pool.snapshots.release("v@s", "audit")
    assert (await pool.snapshots.delete([record.id])).deleted


async def test_two_reverts_at_once_come_one_after_the_other(pool: SnapshotPool) -> None:
    handle = await pool.open(await pool.volume(SIZE, "v"))
    for name in ("a", "b"):
        await write(handle, 0, name.encode() * CHUNK)
        await pool.snapshots.create({"v": name})
    with pytest.raises(InUse, match="1 sessions have it open"):
        await pool.reverts.revert("v@a")
    await handle.close()
    done = await asyncio.gather(pool.reverts.revert("v@a"), pool.reverts.revert("v@b"))
    assert [each.reverted for each in done] == [True, True]
    handle = await pool.open(pool.snapshots.find("v@a").volume_id)
    assert await read(handle, 0, CHUNK) == b"b" * CHUNK
    await handle.close()
    with pool.engine.store.read() as reader:
        assert reader.count(Table.SNAPSHOTS) == 4, "and both kept what was there"
    assert not findings(pool)


async def test_a_forced_revert_keeps_guests_out_until_the_volume_is_reopened(pool: SnapshotPool) -> None:
    volume_id = await pool.volume(SIZE, "v")
    handle = await pool.open(volume_id)
    await write(handle, 0, b"a" * CHUNK)
    await pool.snapshots.create({"v": "a"})
    await write(handle, 0, b"b" * CHUNK)
    done = await pool.reverts.revert("v@a", force=True)
    assert done.needs_reopen
    assert handle.lost.done()
    with pytest.raises(VolumeStopped) as caught:
        await pool.open(volume_id)
    assert "reverted to snapshot a" in caught.value.cause
    assert "blockvirt volume reopen v" in caught.value.correction
    assert "power off" in caught.value.correction
    assert pool.catalogue.get("v").state == "stopped"
    await pool.catalogue.reopen("v")
    handle = await pool.open(volume_id)
    assert await read(handle, 0, CHUNK) == b"a" * CHUNK
    assert done.safety is not None
    assert (await content_of(pool, f"v@{done.safety.name}"))[:CHUNK] == b"b" * CHUNK
    await handle.close()
    assert not findings(pool)


async def test_a_snapshot_that_is_refused_at_its_commit_leaves_the_epochs_in_order(pool: SnapshotPool) -> None:
    """Its epoch is closed by then: the pool's counter goes along, and 'check' finds nothing."""
    await pool.volume(SIZE, "v")
    outcomes = await asyncio.gather(*(pool.snapshots.create({"v": "same"}) for _ in range(4)), return_exceptions=True)
    assert sum(isinstance(outcome, Exists) for outcome in outcomes) == 3
    with pool.engine.store.read() as reader:
        assert not list(verify_records(reader, decode))


async def test_a_revert_beside_a_growth_promises_what_the_volume_has(pool: SnapshotPool) -> None:
    """The growth is on its way to the writer when the revert looks at the size."""
    catalogue = pool.catalogue
    await catalogue.create(NewVolume(size_bytes=SIZE, name="v"))
    await pool.snapshots.create({"v": "a"})

    def sealed() -> bool:
        with pool.engine.store.read() as reader:
            return not reader.count(Table.SEALS)

    await until(sealed)  # else that would commit, too
    held, let_go = threading.Event(), threading.Event()

    def hold(_: Writer) -> bool:
        held.set()
        return let_go.wait(10)

    holding = asyncio.create_task(pool.engine.store.commit(hold))
    await until(held.is_set)
    growth = asyncio.create_task(catalogue.change("v", VolumeChange(size_bytes=2 * SIZE)))
    await asyncio.sleep(0)
    revert = asyncio.create_task(pool.reverts.revert("v@a"))
    await until(lambda: catalogue.promised_bytes == 2 * SIZE and pool.engine.store._writer._waiting.qsize() == 2)
    let_go.set()
    await holding
    assert (await growth).size_bytes == 2 * SIZE
    with pytest.raises(InUse, match="grown"):
        await revert
    assert catalogue.promised_bytes == 2 * SIZE
    await pool.reverts.revert("v@a")
    assert catalogue.promised_bytes == SIZE


async def test_an_import_beside_a_growth_is_refused(pool: SnapshotPool) -> None:
    """What it had promised was the difference to the size from before."""
    await pool.catalogue.create(NewVolume(size_bytes=SIZE, name="v"))
    (base,) = await pool.snapshots.create({"v": "a"})
    with pool.engine.store.read() as reader:
        looked_at = reader.record(VolumeRecord, Table.VOLUMES, base.volume_id.encode())
    assert looked_at is not None
    await pool.catalogue.change("v", VolumeChange(size_bytes=2 * SIZE))
    with pytest.raises(InUse, match="grown"):
        await pool.engine.store.commit(lambda writer: mark(writer, looked_at, base))
