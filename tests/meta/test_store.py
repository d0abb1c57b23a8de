"""The store: what a change puts is there for readers, alone or with others; failures keep to themselves."""

import asyncio
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from blockvirt.errors import MetadataFault, ShuttingDown
from blockvirt.meta.datafile import read_facts
from blockvirt.meta.keys import Table
from blockvirt.meta.records import HostRecord
from blockvirt.meta.store import Store, Writer
from blockvirt.meta.verify import verify_pages

HOST = HostRecord("1", "web1", 0.0, labels={"a": "b"})


def put(table: Table, rows: Iterable[tuple[bytes, bytes]]) -> Callable[[Writer], None]:
    """A change that puts rows."""

    def change(writer: Writer) -> None:
        for key, value in rows:
            writer.put(table, key, value)

    return change


def numbered(count: int, size_bytes: int = 0) -> list[tuple[bytes, bytes]]:
    """That many rows of that size."""
    return [(b"%08d" % number, bytes(size_bytes)) for number in range(count)]


async def test_a_commit_returns_its_changes_value_and_survives_reopening(tmp_path: Path) -> None:
    path = tmp_path / "metadata"
    store = Store.open(path, create=True)

    def change(writer: Writer) -> str:
        writer.put_record(Table.HOSTS, b"1", HOST)
        assert writer.record(HostRecord, Table.HOSTS, b"1") == HOST, "a writer sees what it wrote"
        return "done"

    assert await store.commit(change) == "done"
    store.close()
    again = Store.open(path)
    with again.read() as reader:
        assert reader.record(HostRecord, Table.HOSTS, b"1") == HOST
        assert reader.record(HostRecord, Table.HOSTS, b"2") is None
    assert again.commit_now(lambda writer: (writer.delete(Table.HOSTS, b"1"), writer.delete(Table.HOSTS, b"1"))) == (
        True,
        False,
    )
    again.close()
    again.close()


def test_its_directory_is_synced_though_an_earlier_start_failed_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut would take the file with all that was committed."""
    path = tmp_path / "metadata"
    synced: list[str] = []
    fails = True

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        if fails:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(MetadataFault, match="cannot be opened"):
        Store.open(path, create=True)
    fails = False
    synced.clear()
    Store.open(path, create=True).close()
    assert synced == [str(path), str(tmp_path)]


async def test_changes_that_wait_together_share_a_transaction(store: Store) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(writer: Writer) -> None:
        begun.set()
        assert go_on.wait(30)

    first = asyncio.ensure_future(store.commit(slow))
    await asyncio.to_thread(begun.wait, 30)
    commits = store.commits
    others = [asyncio.ensure_future(store.commit(put(Table.FILES, [(b"%d" % i, b"")]))) for i in range(50)]
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(first, *others)
    assert store.stats().commits == commits + 2
    assert store.stats().entries["files"] == 50


async def test_a_change_that_raises_is_undone_alone(store: Store) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(writer: Writer) -> None:
        begun.set()
        assert go_on.wait(30)

    def bad(writer: Writer) -> None:
        writer.put(Table.FILES, b"bad", b"")
        writer.delete(Table.FILES, b"good-1")
        raise KeyError("mine")

    def stop(writer: Writer) -> None:
        writer.put(Table.FILES, b"bad", b"")
        next(iter(()))

    first = asyncio.ensure_future(store.commit(slow))
    await asyncio.to_thread(begun.wait, 30)
    changes = [put(Table.FILES, [(b"good-1", b"")]), bad, stop, put(Table.FILES, [(b"good-2", b"")])]
    group = [asyncio.ensure_future(store.commit(change)) for change in changes]
    await asyncio.sleep(0)
    go_on.set()
    results = await asyncio.gather(*group, return_exceptions=True)
    await first
    assert [type(result) for result in results] == [type(None), KeyError, RuntimeError, type(None)]
    with store.read() as reader:
        assert [key for key, _ in reader.scan(Table.FILES)] == [b"good-1", b"good-2"]
    with pytest.raises(KeyError, match="mine"):
        await store.commit(bad)
    with store.read() as reader:
        assert reader.count(Table.FILES) == 2


async def test_a_reader_keeps_its_snapshot(store: Store) -> None:
    await store.commit(put(Table.FILES, [(b"k", b"old")]))
    with store.read() as reader:
        thread = threading.Thread(target=store.commit_now, args=(put(Table.FILES, [(b"k", b"new")]),))
        thread.start()
        thread.join()
        assert reader.get(Table.FILES, b"k") == b"old"
        with store.read() as later:
            assert later.get(Table.FILES, b"k") == b"new"


async def test_cancelling_the_wait_does_not_withdraw_the_change(store: Store) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(writer: Writer) -> None:
        begun.set()
        assert go_on.wait(30)
        writer.put(Table.FILES, b"k", b"")

    task = asyncio.ensure_future(store.commit(slow))
    await asyncio.to_thread(begun.wait, 30)
    task.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await store.commit(lambda writer: None)
    with store.read() as reader:
        assert reader.get(Table.FILES, b"k") == b""


async def test_close_finishes_what_waits_and_refuses_the_rest(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "metadata", create=True)
    waiting = [asyncio.ensure_future(store.commit(put(Table.FILES, [(b"%d" % i, b"")]))) for i in range(9)]
    await asyncio.sleep(0)
    store.close()
    assert await asyncio.gather(*waiting) == [None] * 9
    for refused in (store.commit(lambda writer: None),):
        with pytest.raises(ShuttingDown, match="closed"):
            await refused
    with pytest.raises(ShuttingDown, match="closed"):
        store.commit_now(lambda writer: None)
    with pytest.raises(ShuttingDown), store.read():
        pass
    again = Store.open(tmp_path / "metadata")
    assert again.stats().entries["files"] == 9
    again.close()


async def test_the_map_grows_before_it_is_half_full_and_under_a_change_that_needs_more(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "metadata", create=True, map_bytes=256 << 10)
    runs = []

    def large(writer: Writer) -> None:
        runs.append(1)
        for number in range(3000):
            writer.put(Table.FILES, b"%08d" % number, bytes(1000))

    await store.commit(large)
    assert len(runs) > 1, "it filled the map and ran again"
    figures = store.stats()
    assert figures.entries["files"] == 3000
    assert figures.used_ratio <= 0.5
    for number in range(20):
        await store.commit(put(Table.BORN, [(b"%d-%d" % (number, i), bytes(1000)) for i in range(500)]))
        assert store.stats().used_ratio <= 0.5
    store.close()
    again = Store.open(tmp_path / "metadata", map_bytes=256 << 10)
    assert again.stats().entries["born"] == 10_000
    assert again.stats().used_ratio <= 0.5
    again.close()


async def test_the_map_does_not_grow_under_a_reader(tmp_path: Path) -> None:
    """py-lmdb would cut the reader's transaction off, and LMDB itself would leave it a stale mapping."""
    store = Store.open(tmp_path / "metadata", create=True, map_bytes=256 << 10)
    store.commit_now(put(Table.HOSTS, [(b"k", b"v")]))

    def rows(writer: Writer) -> None:
        for number in range(160):
            writer.put(Table.FILES, b"%08d" % number, bytes(1000))

    with store.read() as reader:
        await store.commit(rows)  # beyond half of the map, and still inside it
        assert reader.get(Table.HOSTS, b"k") == b"v"
        assert store._map_and_used()[0] == 256 << 10
    await store.commit(lambda writer: None)
    assert store.stats().map_bytes == 512 << 10
    store.close()


def test_a_missing_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(MetadataFault, match=str(tmp_path)) as caught:
        Store.open(tmp_path / "metadata")
    assert "mounted" in caught.value.correction


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_store_is_refused_before_it_is_mapped(tmp_path: Path, keep: float) -> None:
    store = Store.open(tmp_path / "metadata", create=True)
    store.commit_now(put(Table.FILES, numbered(500, 1000)))
    store.close()
    data_file = tmp_path / "metadata" / "data.mdb"
    with data_file.open("r+b") as file:
        file.truncate(int(read_facts(data_file).used_bytes * keep))
    with pytest.raises(MetadataFault, match=r"data\.mdb is damaged") as caught:
        Store.open(tmp_path / "metadata")
    assert "--restore-metadata" in caught.value.correction


def test_a_missing_free_page_at_the_end_is_no_damage(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "metadata", create=True)
    store.commit_now(put(Table.HOSTS, [(b"k", b"v")]))
    store.commit_now(put(Table.FILES, numbered(200, 3000)))
    store.commit_now(lambda w: [w.delete(Table.FILES, b"%08d" % number) for number in range(200)])
    for number in range(8):
        store.commit_now(put(Table.HOSTS, [(b"k", b"%d" % number)]))
    store.close()
    data_file = tmp_path / "metadata" / "data.mdb"
    used_bytes = read_facts(data_file).used_bytes
    with data_file.open("r+b") as file:
        file.truncate(used_bytes - 4096)
    again = Store.open(tmp_path / "metadata")
    with again.read() as reader:
        assert reader.get(Table.HOSTS, b"k") == b"7"
    assert data_file.stat().st_size >= used_bytes
    again.close()


@pytest.mark.parametrize(("at", "value", "says"), [(16, b"\0", "does not begin"), (20, b"\3", "LMDB format 3")])
def test_what_is_no_store_of_ours_is_refused(tmp_path: Path, at: int, value: bytes, says: str) -> None:
    Store.open(tmp_path / "metadata", create=True).close()
    with (tmp_path / "metadata" / "data.mdb").open("r+b") as file:
        file.seek(at)
        file.write(value)
    with pytest.raises(MetadataFault) as caught:
        Store.open(tmp_path / "metadata")
    assert says in caught.value.message + caught.value.cause


@pytest.mark.parametrize("sizes", [(9_000, 9), (9_000, 5_000), (3_000, 9_000, 2_500)])
@pytest.mark.parametrize("together", [True, False])
async def test_a_large_value_that_shrinks_in_its_transaction_leaves_sound_pages(
    store: Store, sizes: tuple[int, ...], together: bool
) -> None:
    """LMDB would leave it on the pages that it has, more than the value needs: `blockvirt check` calls that damage."""

    def putting(size: int) -> Callable[[Writer], None]:
        return lambda writer: writer.put(Table.VOLUMES, b"v", bytes(size))

    if together:
        store.commit_now(lambda writer: [putting(size)(writer) for size in sizes])
    else:  # they come while the thread is busy: one group
        is_busy, may_go_on = threading.Event(), threading.Event()

        def keep_busy(_: Writer) -> None:
            is_busy.set()
            may_go_on.wait(10)

        busy = asyncio.ensure_future(store.commit(keep_busy))
        await asyncio.to_thread(is_busy.wait, 10)
        commits = store.commits
        waiting = [asyncio.ensure_future(store.commit(putting(size))) for size in sizes]
        await asyncio.sleep(0)
        may_go_on.set()
        await asyncio.gather(busy, *waiting)
        assert store.commits == commits + 2, "what waited shared a transaction"
    with store.read() as reader:
        assert reader.get(Table.VOLUMES, b"v") == bytes(sizes[-1])
    assert list(verify_pages(store.path)) == []
