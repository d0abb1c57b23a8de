"""Opening, closing, stopping, growing and deleting while others are in the middle of something."""

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from blockvirt.errors import DamagedRecord, DeviceFault, InUse, VolumeStopped
from blockvirt.meta.keys import Table, pair_key
from blockvirt.meta.records import VolumeRecord
from blockvirt.meta.store import Store
from blockvirt.pool import backing
from blockvirt.pool.backing import BackingFile
from blockvirt.units import MIB
from blockvirt.volumes import job_queues, leftovers, punch, reclaim
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.leftovers import Leftovers
from blockvirt.volumes.punch import Puncher
from blockvirt.volumes.requests import VolumeChange
from tests.volumes.conftest import Pool, abandon, findings, read, until, write

SIZE = 64 * 4096


def catalogue_of(pool: Pool) -> Catalogue:
    return Catalogue(pool.engine.store, pool.engine.registry, pool.engine.storage)


def open_files(folder: Path) -> list[str]:
    """Return the files in ``folder`` that this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith(f"{folder}/"):
            found.append(target)
    return found


async def test_reopening_a_volume_that_works_drops_nobody(pool: Pool) -> None:
    handle = await pool.open(volume_id := await pool.volume(SIZE))
    with pytest.raises(InUse):
        await pool.engine.registry.reopen(volume_id)
    assert not handle.lost.done()
    await handle.close()


async def test_a_volume_that_grows_while_it_opens_has_its_new_size(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    volume_id = await pool.volume(SIZE)
    settling, go_on = asyncio.Event(), asyncio.Event()
    settle = Leftovers.settle

    async def slow_settle(self: Leftovers, record: VolumeRecord, *, reopen: bool = False) -> None:
        await settle(self, record, reopen=reopen)
        settling.set()
        await go_on.wait()

    monkeypatch.setattr(Leftovers, "settle", slow_settle)
    opening = asyncio.ensure_future(pool.open(volume_id))
    await settling.wait()
    await catalogue_of(pool).change(volume_id, VolumeChange(size_bytes=2 * SIZE))
    go_on.set()
    handle = await opening
    assert handle.size_bytes == 2 * SIZE
    await handle.close()


async def test_a_session_may_end_after_its_volume_is_gone(pool: Pool) -> None:
    handle = await pool.open(volume_id := await pool.volume(SIZE))
    await write(handle, 0, b"a" * 4096)
    await catalogue_of(pool).delete(volume_id, force=True)
    await until(lambda: volume_id not in pool.engine.registry._slots)
    await handle.close()
    assert pool.engine.registry.volume_of("test") is None


@pytest.mark.parametrize("what", ["cut", "close"])
async def test_closing_meets_a_broken_disk(pool: Pool, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    first = await pool.open(first_id := await pool.volume(SIZE))
    second = await pool.open(second_id := await pool.volume(SIZE))
    for handle in (first, second):
        await write(handle, 0, b"a" * 4096)
    real = os.close

    def broken(fd: int) -> None:
        real(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        if what == "close":
            patched.setattr(os, "close", broken)
        else:
            patched.setattr(BackingFile, "cut", lambda self: broken(os.dup(self.fd)))
        await first.close()
        await pool.engine.registry.close()  # one volume's trouble does not keep the next from closing
    assert not open_files(pool.device / "files")
    assert not open_files(pool.device / "journal")
    pool.engine.registry._closing = False
    for volume_id in (first_id, second_id):
        handle = await pool.open(volume_id)
        assert await read(handle, 0, 8192) == b"a" * 4096 + bytes(4096)
        await handle.close()
    assert not findings(pool)


async def test_closing_waits_for_a_write_that_was_given_up(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = await pool.open(volume_id := await pool.volume(SIZE))
    await write(handle, 0, b"a" * 4096)
    loop = asyncio.get_running_loop()
    reached, go_on = asyncio.Event(), threading.Event()
    real = BackingFile.write

    def slow_write(self: BackingFile, data: memoryview, position: int) -> None:
        loop.call_soon_threadsafe(reached.set)
        go_on.wait()
        real(self, data, position)

    pool.engine.context.pressure.high = True  # writes go to threads
    with monkeypatch.context() as patched:
        patched.setattr(BackingFile, "write", slow_write)
        given_up = asyncio.ensure_future(handle.write(0, memoryview(b"b" * 4096)))
        await reached.wait()
        given_up.cancel()
        closing = asyncio.ensure_future(handle.close())
        await asyncio.wait({closing}, timeout=0.2)
        assert not closing.done()
        go_on.set()
        await closing
    pool.engine.context.pressure.look()
    assert not open_files(pool.device / "files")
    handle = await pool.open(volume_id)
    assert await read(handle, 0, 4096) == b"b" * 4096
    await handle.close()


async def test_what_waited_while_the_volume_was_reopened_touches_nothing(pool: Pool) -> None:
    volume_id = await pool.volume(SIZE)
    handle = await pool.open(volume_id)
    await write(handle, 0, b"a" * 8192)
    await handle.flush()
    volume = handle._opened.volume
    async with volume.busy.hold(0, 0):
        waiting = [
            asyncio.ensure_future(handle.zero(0, SIZE, punch=True)),
            asyncio.ensure_future(handle.zero(0, 8192, punch=False)),
        ]
        await asyncio.sleep(0)
        volume.stop("for this test", RuntimeError("planted"))
        reopening = asyncio.ensure_future(pool.engine.registry.reopen(volume_id))
        await asyncio.wait({reopening}, timeout=0.5)
    for each in waiting:
        with pytest.raises(VolumeStopped):
            await each
    await reopening
    await handle.close()
    assert not open_files(pool.device / "files")
    handle = await pool.open(volume_id)
    assert await read(handle, 0, 8192) == b"a" * 8192
    await handle.close()
    assert not findings(pool)


async def test_a_volume_that_stops_without_a_journal_stays_stopped_after_a_kill(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await pool.open(volume_id := await pool.volume(SIZE))
    await write(handle, 0, b"a" * 4096)
    await handle.close()
    handle = await pool.open(volume_id)
    await write(handle, 0, b"b" * 4096)  # in place: no journal is opened for it
    assert handle._opened.volume.journal is None

    def fdatasync(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fdatasync)
        with pytest.raises(VolumeStopped):
            await handle.flush()
    await abandon(pool, power_cut=False)
    await pool.start()
    with pytest.raises(VolumeStopped):
        await pool.open(volume_id)
    await pool.engine.registry.reopen(volume_id)
    handle = await pool.open(volume_id)
    await write(handle, 0, b"c" * 4096)
    await handle.flush()
    await handle.close()


async def test_zeros_that_were_allocated_are_synced_by_a_flush(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = await pool.open(await pool.volume(SIZE))
    await write(handle, 0, b"a" * 4096)
    await handle.flush()
    order: list[str] = []
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{fd}")).parent.name)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    await handle.zero(8 * 4096, 8 * 4096, punch=False)
    await handle.flush()
    assert order == ["files", "journal"]  # the file's size and the space in it are part of what the map names
    await handle.close()


async def test_a_damaged_punch_row_does_not_keep_the_pool_from_starting(pool: Pool) -> None:
    volume_id = await pool.volume(SIZE)
    await pool.close()
    store = Store.open(pool.state_dir / "metadata", reserve_bytes=MIB)
    store.commit_now(lambda writer: writer.put(Table.PUNCH, pair_key(1, 0), b"no such row"))
    store.commit_now(lambda writer: writer.put(Table.PUNCH, pair_key(1, 1), b"x"))
    store.close()
    await pool.start()
    handle = await pool.open(volume_id)
    await write(handle, 0, b"a" * 4096)
    assert await read(handle, 0, 4096) == b"a" * 4096
    await handle.close()
    findings(pool)


async def test_a_journal_that_names_an_unknown_file_costs_one_volume(pool: Pool) -> None:
    bad = await pool.open(bad_id := await pool.volume(SIZE))
    await write(bad, 0, b"a" * 4096)
    good = await pool.open(good_id := await pool.volume(SIZE))
    await write(good, 0, b"g" * 4096)
    number = next(iter(bad._opened.volume.files.records))
    branch = bad._opened.volume.map.branch
    await abandon(pool, power_cut=False)
    store = Store.open(pool.state_dir / "metadata", reserve_bytes=MIB)
    store.commit_now(lambda writer: writer.delete(Table.BRANCH_FILES, pair_key(branch, number)))
    store.close()
    await pool.start()
    with pytest.raises(DamagedRecord):
        await pool.open(bad_id)
    handle = await pool.open(good_id)
    assert await read(handle, 0, 4096) == b"g" * 4096
    await handle.close()
    findings(pool)


async def test_a_punch_that_meets_a_deletion_is_not_counted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def idle(_self: Puncher) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Puncher, "run", idle)
    pool = await Pool(tmp_path).start()
    handle = await pool.open(volume_id := await pool.volume(SIZE))
    await write(handle, 0, b"a" * SIZE)
    await handle.zero(0, SIZE, punch=True)
    await handle.close()
    batch, _ = pool.engine.puncher._batch(b"")
    assert batch
    await catalogue_of(pool).delete(volume_id)
    await until(lambda: volume_id not in pool.engine.registry._slots)
    await pool.engine.puncher._punch(batch)
    assert pool.engine.storage.status().used_bytes == 0
    await pool.close()


@pytest.mark.parametrize("power_cut", [False, True])
@pytest.mark.parametrize("damage", ["one is missing", "one is short"])
async def test_half_a_journal_with_changes_in_it_is_not_thrown_away(pool: Pool, damage: str, power_cut: bool) -> None:
    handle = await pool.open(volume_id := await pool.volume(SIZE))
    await write(handle, 0, b"a" * 4096)
    await handle.flush()
    await abandon(pool, power_cut=power_cut)
    first, second = sorted((pool.device / "journal").iterdir())
    kept = first.read_bytes(), second.read_bytes()
    # The changes are in the second. Where that one is missing, nothing tells it from a pair that was being made.
    for path in (first,) if damage == "one is missing" else (first, second):
        if damage == "one is missing":
            path.unlink()
        else:
            os.truncate(path, 65536)
        await pool.start()
        with pytest.raises(DamagedRecord, match="journal"):
            await pool.open(volume_id)
        await pool.close()
        first.write_bytes(kept[0])
        second.write_bytes(kept[1])
    await pool.start()
    handle = await pool.open(volume_id)
    assert await read(handle, 0, 4096) == b"a" * 4096
    await handle.close()


async def test_a_deletion_that_fails_is_tried_again(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await pool.volume(SIZE)
    handle = await pool.open(first)
    await write(handle, 0, b"a" * SIZE)
    await handle.close()
    tries = []

    def unlink_files(paths: list[Path]) -> None:
        tries.append(paths)
        if len(tries) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if len(tries) == 2:
            raise ZeroDivisionError("planted: a mistake of ours")
        backing.unlink_files(paths)

    monkeypatch.setattr(reclaim, "unlink_files", unlink_files)
    monkeypatch.setattr(job_queues, "JOB_RETRY_S", 0.01)
    await catalogue_of(pool).delete(first)
    await until(lambda: first not in pool.engine.registry._slots)
    assert len(tries) == 3
    assert not list((pool.device / "files").iterdir())
    assert not findings(pool, leaks=True)


async def test_a_disk_that_fails_under_a_left_journal_costs_one_volume(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_id, good_id = await pool.volume(SIZE), await pool.volume(SIZE)
    await pool.close()
    (pool.device / "journal" / "00000001.0").touch()  # a daemon died while it made one

    def read_only(_paths: list[Path]) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(leftovers, "unlink_files", read_only)
        await pool.start()
        with pytest.raises(DeviceFault, match="journal"):
            await pool.open(bad_id)
        await (await pool.open(good_id)).close()
    await (await pool.open(bad_id)).close()


async def test_a_mistake_of_ours_does_not_end_the_puncher(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = await pool.open(await pool.volume(SIZE))
    await write(handle, 0, b"a" * SIZE)
    tried = asyncio.Event()
    loop = asyncio.get_running_loop()

    def planted(*_arguments: object) -> None:
        loop.call_soon_threadsafe(tried.set)
        raise ZeroDivisionError("planted")

    with monkeypatch.context() as patched:
        patched.setattr(punch, "punch_hole", planted)
        await handle.zero(0, SIZE // 2, punch=True)
        await handle._opened.checkpointer.run()
        await tried.wait()
        await asyncio.sleep(0)
    await handle.zero(SIZE // 2, SIZE // 2, punch=True)
    await handle.close()
    await asyncio.wait_for(until(lambda: pool.engine.storage.status().used_bytes == 0), 10)
