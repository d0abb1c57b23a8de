"""Flatten, one case at a time: what shared chunks with an origin must still be there when the origin is gone."""

import asyncio
import os
import threading
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockvirt.device import read_one
from blockvirt.errors import InvalidRequest
from blockvirt.limits import COPY_BATCH_BYTES, RESERVE_STEP_MIN_BYTES
from blockvirt.lun.address import ADDRESS_MASK
from blockvirt.lun.leaf import decode
from blockvirt.meta.keys import Table, number_key
from blockvirt.meta.records import BranchRecord, JobRecord, SnapshotRecord
from blockvirt.meta.store import Reader, Writer
from blockvirt.meta.verify import verify_records
from blockvirt.snapshots import flatten
from blockvirt.snapshots.reader import SnapshotHandle
from blockvirt.snapshots.sealing import Sealer
from blockvirt.volumes.checksums import find_checksum
from blockvirt.volumes.job_states import Action
from blockvirt.volumes.opened import OpenVolume
from blockvirt.volumes.requests import NewVolume
from blockvirt.volumes.transactions import locate
from tests.snapshots.conftest import SnapshotPool
from tests.snapshots.test_histories import settled
from tests.volumes.conftest import findings, read, until, write

CHUNK = 4096
SIZE = 600 * CHUNK  # two leaves


class Family:
    """A golden volume with a snapshot, and what comes from it."""

    def __init__(self, pool: SnapshotPool) -> None:
        self.pool = pool
        self.content = os.urandom(SIZE)
        self.golden: SnapshotRecord

    async def begin(self) -> None:
        handle = await self.pool.open(await self.pool.volume(SIZE, "golden"))
        await write(handle, 0, self.content)
        self.golden = await self.snapshot("golden", "g")
        await handle.close()

    async def clone(self, origin: SnapshotRecord, name: str) -> str:
        return (await self.pool.catalogue.create(NewVolume(size_bytes=SIZE, name=name), origin=origin)).volume.id

    async def snapshot(self, volume: str, name: str) -> SnapshotRecord:
        (record,) = await self.pool.snapshots.create({volume: name})
        return record

    async def flatten(self, volume: str) -> None:
        job = await self.pool.engine.jobs.finished(await self.pool.flattening.start(volume))
        assert (job.state, job.percent) == ("done", 100), job

    async def write(self, volume_id: str, chunk: int, data: bytes) -> None:
        handle = await self.pool.open(volume_id)
        await write(handle, chunk * CHUNK, data)
        await handle.close()

    async def lose_golden(self) -> None:
        """Delete the origin for good, and wait until its space is given back."""
        await self.pool.catalogue.delete("golden", purge=True)
        await settled(self.pool)

    async def read(self, volume_id: str) -> bytes:
        handle = await self.pool.open(volume_id)
        content = await read(handle, 0, SIZE)
        await handle.close()
        return content


async def read_snapshot(handle: SnapshotHandle) -> bytes:
    into = bytearray(SIZE)
    await read_one(handle, 0, memoryview(into))
    return bytes(into)


@pytest.fixture
async def family(pool: SnapshotPool) -> Family:
    made = Family(pool)
    await made.begin()
    return made


def branches(pool: SnapshotPool) -> list[BranchRecord]:
    with pool.engine.store.read() as reader:
        found = [reader.record(BranchRecord, Table.BRANCHES, key) for key, _ in reader.scan(Table.BRANCHES)]
    return [branch for branch in found if branch is not None]


async def test_a_flattened_clone_stands_alone(family: Family) -> None:
    clone = await family.clone(family.golden, "clone")
    await family.write(clone, 3, b"x" * CHUNK)
    await family.flatten("clone")
    await family.lose_golden()
    assert len(branches(family.pool)) == 1
    assert await family.read(clone) == family.content[: 3 * CHUNK] + b"x" * CHUNK + family.content[4 * CHUNK :]
    assert family.pool.engine.storage.status().used_bytes == SIZE
    with pytest.raises(InvalidRequest, match="no clone"):
        await family.pool.flattening.start("clone")
    assert not findings(family.pool, leaks=True)


async def test_copies_find_room_where_a_write_took_what_was_made_for_them(family: Family) -> None:
    clone = await family.clone(family.golden, "clone")
    handle = await family.pool.open(clone)
    async with family.pool.engine.registry.pinned(clone) as opened:
        sources = [entry & ADDRESS_MASK for entry in opened.volume.map.leaf(0).entries[: COPY_BATCH_BYTES // CHUNK]]
        # The write makes room first, and the copies wait behind it for the first journal.
        whole_step = RESERVE_STEP_MIN_BYTES // CHUNK
        written = bytes(CHUNK) * (whole_step - COPY_BATCH_BYTES // CHUNK // 2)
        writing = asyncio.create_task(write(handle, CHUNK, written))
        copies = await asyncio.create_task(opened.slow.copy_chunks(sources))
        await writing
        assert len(set(copies)) == len(sources)
        opened.volume.give_up(copies)
        opened.slow.copies_counted(copies)
    await handle.close()
    assert not findings(family.pool, leaks=True)


async def test_snapshots_of_the_clone_are_flattened_with_it(family: Family) -> None:
    clone = await family.clone(family.golden, "clone")
    untouched = await family.snapshot("clone", "untouched")  # sees nothing but its origin
    await family.write(clone, 3, b"x" * CHUNK)
    touched = await family.snapshot("clone", "touched")  # its own version of the first leaf, the origin's of the second
    await family.write(clone, 4, b"y" * CHUNK)
    await family.flatten("clone")
    await family.lose_golden()
    assert len(branches(family.pool)) == 1
    changed = family.content[: 3 * CHUNK] + b"x" * CHUNK + family.content[4 * CHUNK :]
    for record, content in ((untouched, family.content), (touched, changed)):
        handle = family.pool.readers.open(record, record.name)
        assert await read_snapshot(handle) == content, record.name
        await handle.close()
    # Everything once, and the two chunks that were overwritten: nothing is copied for each snapshot.
    assert family.pool.engine.storage.status().used_bytes == SIZE + 2 * CHUNK
    assert not findings(family.pool, leaks=True)


async def test_a_clone_of_the_clone_keeps_what_it_copied_from_its_versions(family: Family) -> None:
    clone = await family.clone(family.golden, "clone")
    await family.write(clone, 3, b"x" * CHUNK)
    middle = await family.snapshot("clone", "middle")
    grandchild = await family.clone(middle, "grandchild")
    await family.write(grandchild, 5, b"z" * CHUNK)  # its version of the leaf now names the golden volume's chunks
    await family.flatten("clone")
    await family.lose_golden()
    expected = bytearray(family.content)
    expected[3 * CHUNK : 4 * CHUNK] = b"x" * CHUNK
    expected[5 * CHUNK : 6 * CHUNK] = b"z" * CHUNK
    assert await family.read(grandchild) == bytes(expected)
    assert not findings(family.pool, leaks=True)
    await family.flatten("grandchild")
    await settled(family.pool)
    assert await family.read(grandchild) == bytes(expected)
    assert {branch.pins for branch in branches(family.pool)} == {()}
    assert not findings(family.pool, leaks=True)
    assert len(branches(family.pool)) == 2, "what the golden volume left is gone with the last pin"


async def test_a_reader_with_the_old_addresses_in_memory_looks_again(family: Family) -> None:
    clone = await family.clone(family.golden, "clone")
    reader = family.pool.readers.open(await family.snapshot("clone", "a"), "reader")
    assert await read_snapshot(reader) == family.content
    await family.flatten("clone")
    with family.pool.engine.store.read() as store_reader:
        golden, _ = locate(store_reader, "golden")
    await family.write(golden, 0, b"n" * SIZE)
    await family.pool.snapshots.delete(["golden@g"])
    await settled(family.pool)  # its chunks are punched out of a file that the reader has open
    assert await read_snapshot(reader) == family.content
    await reader.close()
    assert await family.read(clone) == family.content


async def test_a_snapshot_taken_in_the_middle_is_flattened_too(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at a leaf and its commit a snapshot may come, which then sees the origin."""
    clone = await family.clone(family.golden, "clone")
    handle = await family.pool.open(clone)
    await write(handle, 3 * CHUNK, b"x" * CHUNK)
    opened = handle._opened
    flush, taken = opened.flusher.flush, list[SnapshotRecord]()

    async def snapshot_first() -> None:
        if not taken:
            taken.append(await family.snapshot("clone", "middle"))
        await flush()

    monkeypatch.setattr(opened.flusher, "flush", snapshot_first)
    await family.flatten("clone")
    await handle.close()
    await write(again := await family.pool.open(clone), 0, b"later" * CHUNK)
    await again.close()
    await family.lose_golden()
    reader = family.pool.readers.open(taken[0], "reader")
    assert await read_snapshot(reader) == family.content[: 3 * CHUNK] + b"x" * CHUNK + family.content[4 * CHUNK :]
    await reader.close()
    assert not findings(family.pool, leaks=True)


async def test_copies_that_nobody_needs_after_all_are_given_back(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = await family.clone(family.golden, "clone")
    handle = await family.pool.open(clone)
    opened = handle._opened
    flush = opened.flusher.flush

    async def write_first() -> None:
        await write(handle, 7 * CHUNK, b"w" * CHUNK)
        await flush()

    monkeypatch.setattr(opened.flusher, "flush", write_first)
    await family.flatten("clone")
    monkeypatch.setattr(opened.flusher, "flush", flush)
    await handle.close()
    await family.lose_golden()
    assert await family.read(clone) == family.content[: 7 * CHUNK] + b"w" * CHUNK + family.content[8 * CHUNK :]
    assert family.pool.engine.storage.status().used_bytes == SIZE
    assert not findings(family.pool, leaks=True)


@pytest.mark.parametrize("action", [Action.PAUSE, Action.CANCEL])
async def test_a_flatten_stops_between_two_leaves(
    family: Family, monkeypatch: pytest.MonkeyPatch, action: Action
) -> None:
    clone = await family.clone(family.golden, "clone")
    jobs, leaf = family.pool.engine.jobs, family.pool.flattening._leaf

    async def leaf_and_ask(opened: OpenVolume, number: int) -> bool:
        done = await leaf(opened, number)
        run = jobs._queues.entries[job_id].run
        assert run is not None
        run.ask(action)
        return done

    monkeypatch.setattr(family.pool.flattening, "_leaf", leaf_and_ask)
    job_id = await family.pool.flattening.start("clone")
    await until(lambda: jobs.get(job_id).state in ("paused", "cancelled"))
    assert jobs.get(job_id).percent == 50
    assert await family.read(clone) == family.content
    monkeypatch.setattr(family.pool.flattening, "_leaf", leaf)
    if action is Action.PAUSE:
        await jobs.resume(job_id)
        assert (await jobs.finished(job_id)).state == "done"
        assert (await family.pool.snapshots.get("golden@g")).clones == ()
    else:
        assert (await family.pool.snapshots.get("golden@g")).clones == ("clone",)
        await family.flatten("clone")
    assert await family.read(clone) == family.content
    assert not findings(family.pool)


async def test_a_flatten_that_was_cancelled_keeps_what_it_copied(family: Family) -> None:
    clone = await family.clone(family.golden, "clone")
    job_id = await family.pool.flattening.start("clone")
    assert await family.pool.flattening.start("clone") == job_id, "one at a time"
    await family.pool.engine.jobs.cancel(job_id)
    assert await family.read(clone) == family.content
    await family.flatten("clone")
    await family.lose_golden()
    assert await family.read(clone) == family.content
    assert not findings(family.pool, leaks=True)


async def test_a_branch_knows_its_first_epoch(family: Family) -> None:
    with family.pool.engine.store.read() as reader:
        branch = reader.record(BranchRecord, Table.BRANCHES, number_key(family.golden.branch))
    assert branch is not None
    assert branch.first_epoch <= family.golden.epoch < branch.head_epoch


async def test_a_flatten_whose_end_was_not_recorded_ends_again(family: Family) -> None:
    """It was killed behind the commit that lets the origin go: done anew, it leaves those that come from it alone."""
    await family.clone(family.golden, "clone")
    await family.clone(await family.snapshot("clone", "middle"), "grandchild")
    await family.flatten("clone")
    pool = family.pool
    (done,) = pool.engine.jobs.list(kind="flatten")
    key = done.id.encode()

    def run_again(writer: Writer) -> None:
        job = writer.record(JobRecord, Table.JOBS, key)
        assert job is not None
        writer.put_record(Table.JOBS, key, replace(job, state="running"))

    await pool.engine.store.commit(run_again)
    await pool.close()
    await pool.start()
    assert (await pool.engine.jobs.finished(done.id)).state == "done"
    assert {branch.pins for branch in branches(pool)} == {(), ((family.golden.branch, family.golden.epoch),)}
    await settled(pool)
    with pool.engine.store.read() as reader:
        assert not list(verify_records(reader, decode))


async def test_files_of_an_origin_that_goes_are_kept_open_by_nobody(family: Family) -> None:
    """Who had read from them while the clone was flattened may be at it for months: their space would stay taken."""
    clone = await family.clone(family.golden, "clone")
    handle = await family.pool.open(clone)
    reader = family.pool.readers.open(await family.snapshot("clone", "a"), "reader")
    assert await read(handle, 0, SIZE) == await read_snapshot(reader) == family.content
    await family.flatten("clone")
    await family.lose_golden()
    folder = Path("/proc/self/fd")
    targets = [os.readlink(each) for each in folder.iterdir() if each.is_symlink()]
    mine = [target for target in targets if target.startswith(str(family.pool.device))]
    assert mine
    assert not [target for target in mine if target.endswith("(deleted)")]
    assert await read(handle, 0, SIZE) == await read_snapshot(reader) == family.content
    await reader.close()
    await handle.close()


async def test_older_versions_are_looked_through_off_the_event_loop(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leaf has as many as there are snapshots that changed it: 10,000 of them would take a second."""
    clone = await family.clone(family.golden, "clone")
    await family.write(clone, 3, b"x" * CHUNK)
    await family.snapshot("clone", "a")
    loop_thread, threads, stored = threading.get_ident(), set[int](), flatten._stored_versions

    def noted(reader: Reader, branch: BranchRecord, leaf: int) -> "Iterator[tuple[int, array[int]]]":
        threads.add(threading.get_ident())
        return stored(reader, branch, leaf)

    monkeypatch.setattr(flatten, "_stored_versions", noted)
    await family.flatten("clone")
    assert threads
    assert loop_thread not in threads


@pytest.mark.parametrize("is_at_work", [True, False])
async def test_copies_that_snapshots_see_get_checksums_too(
    family: Family, monkeypatch: pytest.MonkeyPatch, is_at_work: bool
) -> None:
    """Also where the sealer is at work on that very snapshot, and has looked already at what there is to be sealed."""
    has_looked, may_go_on, leaves = threading.Event(), threading.Event(), Sealer._leaves

    def slowly(self: Sealer, branch: int, epoch: int) -> Any:
        found = leaves(self, branch, epoch)
        if is_at_work and branch != family.golden.branch:
            has_looked.set()
            may_go_on.wait(10)
        return found

    await family.clone(family.golden, "clone")
    monkeypatch.setattr(Sealer, "_leaves", slowly)
    await family.snapshot("clone", "a")
    if is_at_work:
        await asyncio.to_thread(has_looked.wait, 10)
    await family.flatten("clone")
    may_go_on.set()

    def sealed() -> bool:
        with family.pool.engine.store.read() as reader:
            return not reader.count(Table.SEALS)

    await until(sealed)
    handle = family.pool.readers.open(family.pool.snapshots.find("clone@a"), "reader")
    with family.pool.engine.store.read() as reader:
        assert None not in {find_checksum(reader, handle.opened.map.readable(chunk)) for chunk in range(SIZE // CHUNK)}
    await handle.close()


async def test_a_flatten_leaves_guests_the_room_below_the_brake(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    await family.clone(family.golden, "clone")
    jobs, status = family.pool.engine.jobs, family.pool.engine.storage.status
    monkeypatch.setattr(family.pool.engine.storage, "status", lambda: replace(status(), free_bytes=SIZE - 1))
    job_id = await family.pool.flattening.start("clone")
    job = await jobs.finished(job_id)
    assert (job.state, "last of the pool" in job.error, job.done_units) == ("failed", True, 0)
    monkeypatch.setattr(family.pool.engine.storage, "status", lambda: replace(status(), free_bytes=SIZE))
    await jobs.resume(job_id)
    await until(lambda: jobs.get(job_id).state == "done")
