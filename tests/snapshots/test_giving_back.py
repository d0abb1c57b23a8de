"""A job that frees space is done when the filesystem has it back: not before, and whatever comes in between."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest

from blockvirt.limits import RUNNING_JOBS_PER_KIND
from blockvirt.meta.keys import Table
from blockvirt.meta.records import JobRecord
from blockvirt.volumes import job_queues, punch, reclaim
from blockvirt.volumes.punch import Puncher
from blockvirt.volumes.requests import NewVolume
from tests.snapshots.conftest import SnapshotPool
from tests.volumes.conftest import abandon, findings, until, write

CHUNK = 4096
CHUNKS = 6
SIZE = 512 * CHUNK


class Gate:
    """Holds the puncher before each batch, until it is opened or lets one pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._opened = asyncio.Event()
        self._leave = asyncio.Semaphore(0)
        self.batches = 0
        """How many have come to it."""
        self.punch: Callable[[Puncher, Sequence[punch._Punch]], Awaitable[None]] = Puncher._punch
        gate = self

        async def held(puncher: Puncher, batch: Sequence[punch._Punch]) -> None:
            gate.batches += 1
            if not gate._opened.is_set():
                await gate._leave.acquire()
            await gate.punch(puncher, batch)

        monkeypatch.setattr(Puncher, "_punch", held)

    def open(self) -> None:
        self._opened.set()
        self._leave.release()

    def let_one_pass(self) -> None:
        self._leave.release()


@pytest.fixture
async def gate(monkeypatch: pytest.MonkeyPatch, pool: SnapshotPool) -> AsyncIterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open()


async def overwritten(pool: SnapshotPool, name: str = "v") -> str:
    """Make a volume whose snapshot ``s`` alone holds every second chunk, each one a run of its own; return its id."""
    handle = await pool.open(volume := await pool.volume(SIZE, name))
    await write(handle, 0, b"a" * 2 * CHUNKS * CHUNK)
    await pool.snapshots.create({volume: "s"})
    for chunk in range(CHUNKS):
        await write(handle, 2 * chunk * CHUNK, b"b" * CHUNK)
    await handle.close()
    return volume


def rows(pool: SnapshotPool, table: Table) -> int:
    with pool.engine.store.read() as reader:
        return reader.count(table)


def in_the_store(pool: SnapshotPool, job_id: str) -> JobRecord:
    with pool.engine.store.read() as reader:
        found = reader.record(JobRecord, Table.JOBS, job_id.encode())
    assert found is not None
    return found


async def freed(pool: SnapshotPool) -> None:
    """Return when the map holds nothing of it any more."""
    await until(lambda: rows(pool, Table.PUNCH) > 0 and not rows(pool, Table.RECLAIM))


async def done(pool: SnapshotPool, job_id: str) -> None:
    """Prove that a job ends well, and that everything is given back by then."""
    job = await pool.engine.jobs.finished(job_id)
    assert (job.state, job.error, job.detail, job.percent) == ("done", "", "", 100.0)
    assert not rows(pool, Table.PUNCH)
    assert pool.engine.storage.status().used_bytes == 2 * CHUNKS * CHUNK
    assert not findings(pool, leaks=True)


async def test_it_runs_until_the_filesystem_has_the_space_back(pool: SnapshotPool, gate: Gate) -> None:
    await overwritten(pool)
    (job_id,) = (await pool.snapshots.delete(["v@s"])).job_ids
    await freed(pool)
    await until(lambda: bool(pool.engine.jobs.get(job_id).detail))
    job = pool.engine.jobs.get(job_id)
    assert (job.state, job.done_units, job.total_units) == ("running", 0, CHUNKS)
    assert job.detail == "24KiB still to be given back to the filesystem"
    gate.open()
    await done(pool, job_id)


async def test_progress_is_in_chunks_that_are_back(
    pool: SnapshotPool, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(punch, "PUNCHES_PER_BATCH", 1)
    await overwritten(pool)
    (job_id,) = (await pool.snapshots.delete(["v@s"])).job_ids
    await until(lambda: bool(pool.engine.jobs.get(job_id).detail))
    seen = []
    real = gate.punch

    async def watched(puncher: Puncher, batch: Sequence[punch._Punch]) -> None:
        await real(puncher, batch)
        await asyncio.sleep(0)  # the job hears of it
        await asyncio.sleep(0)
        job = pool.engine.jobs.get(job_id)
        seen.append((job.done_units, job.total_units, job.detail.partition(" ")[0]))

    gate.punch = watched
    before = rows(pool, Table.PUNCH)
    gate.open()
    await done(pool, job_id)
    assert len(seen) == before
    assert seen[0][0] < CHUNKS
    assert (CHUNKS, CHUNKS, "0B") in seen
    assert sorted(seen) == seen


@pytest.mark.parametrize("counted", [1, 65_536])
async def test_of_a_large_backlog_the_total_is_not_known(
    pool: SnapshotPool, gate: Gate, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reclaim, "PUNCH_COUNT_ROWS", counted)
    await overwritten(pool)
    (job_id,) = (await pool.snapshots.delete(["v@s"])).job_ids
    await until(lambda: bool(pool.engine.jobs.get(job_id).detail))
    job = pool.engine.jobs.get(job_id)
    assert job.total_units == (CHUNKS if counted > 1 else None)
    assert job.detail.startswith("24KiB" if counted > 1 else "freed space")
    gate.open()
    await done(pool, job_id)


@pytest.mark.parametrize("power_cut", [False, True])
async def test_a_kill_lets_it_wait_on(
    pool: SnapshotPool, gate: Gate, power_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await overwritten(pool)
    (job_id,) = (await pool.snapshots.delete(["v@s"])).job_ids
    await freed(pool)
    await until(lambda: bool(pool.engine.jobs.get(job_id).detail))
    pool.sealer.cancel()
    await abandon(pool, power_cut=power_cut)
    monkeypatch.setattr(reclaim.Reclaimer, "_free_gap", None)  # nothing is left to be freed: it must not be tried
    await pool.start()
    assert in_the_store(pool, job_id).state == "running"
    await until(lambda: bool(pool.engine.jobs.get(job_id).detail))
    gate.open()
    await done(pool, job_id)


async def test_a_pause_takes_hold_at_once_and_what_is_freed_goes_back_anyhow(pool: SnapshotPool, gate: Gate) -> None:
    await overwritten(pool)
    (job_id,) = (await pool.snapshots.delete(["v@s"])).job_ids
    await until(lambda: bool(pool.engine.jobs.get(job_id).detail))
    assert (await pool.engine.jobs.pause(job_id)).state == "paused"
    gate.open()
    await until(lambda: not rows(pool, Table.PUNCH))
    assert pool.engine.jobs.get(job_id).state == "paused"
    await pool.engine.jobs.resume(job_id)
    await done(pool, job_id)


async def test_a_device_that_is_away_is_named_and_waited_for(pool: SnapshotPool, gate: Gate) -> None:
    await overwritten(pool)
    (job_id,) = (await pool.snapshots.delete(["v@s"])).job_ids
    await until(lambda: bool(pool.engine.jobs.get(job_id).detail))
    away = pool.device.with_name("away")
    pool.device.rename(away)
    gate.open()
    job = await pool.engine.jobs.finished(job_id)
    assert job.state == "failed"
    assert "device disk" in job.error
    assert str(pool.device) in job.error
    assert rows(pool, Table.PUNCH)
    away.rename(pool.device)
    await pool.engine.jobs.resume(job_id)
    await done(pool, job_id)


@pytest.mark.parametrize("is_busy", [False, True])
async def test_a_disk_that_refuses_is_named_and_tried_again(
    pool: SnapshotPool, gate: Gate, monkeypatch: pytest.MonkeyPatch, is_busy: bool
) -> None:
    """Also where the next pass begins as soon as one ends."""
    await overwritten(pool)
    real = gate.punch

    async def busy(puncher: Puncher, batch: Sequence[punch._Punch]) -> None:
        await real(puncher, batch)
        pool.engine.context.punches.set()

    gate.punch = busy if is_busy else real
    gate.open()

    def broken(_fd: int, _offset: int, _length: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(punch, "punch_hole", broken)
        (job_id,) = (await pool.snapshots.delete(["v@s"])).job_ids
        job = await pool.engine.jobs.finished(job_id)
    assert job.state == "failed"
    assert str(pool.device) in job.error
    assert os.strerror(errno.EIO) in job.error
    await pool.engine.jobs.resume(job_id)
    await done(pool, job_id)


async def test_a_mistake_in_a_pass_fails_the_job_and_not_the_puncher(
    pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await overwritten(pool)

    async def broken(_puncher: Puncher, _batch: Sequence[punch._Punch]) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(Puncher, "_punch", broken)
        (job_id,) = (await pool.snapshots.delete(["v@s"])).job_ids
        job = await pool.engine.jobs.finished(job_id)
    assert (job.state, "ZeroDivisionError" in job.error) == ("failed", True)
    await pool.engine.jobs.resume(job_id)
    await done(pool, job_id)


async def test_a_pass_that_was_under_way_is_not_enough(
    pool: SnapshotPool, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows come too late for it: those that it is at belong to a later file."""
    monkeypatch.setattr(punch, "PUNCHES_PER_BATCH", CHUNKS // 2)
    await overwritten(pool, "first")
    await overwritten(pool, "second")
    (later,) = (await pool.snapshots.delete(["second@s"])).job_ids
    await until(lambda: gate.batches == 1)
    (job_id,) = (await pool.snapshots.delete(["first@s"])).job_ids
    await until(lambda: bool(pool.engine.jobs.get(job_id).detail))
    gate.let_one_pass()
    gate.let_one_pass()
    await until(lambda: gate.batches == 3)
    for _ in range(4):  # as many commits as it takes to end a job
        await pool.engine.store.commit(lambda _writer: None)
    assert pool.engine.jobs.get(job_id).state == "running"
    assert rows(pool, Table.PUNCH) == CHUNKS
    gate.open()
    assert {(await pool.engine.jobs.finished(each)).state for each in (job_id, later)} == {"done"}
    assert not rows(pool, Table.PUNCH)


async def test_those_of_later_files_are_not_waited_for(
    pool: SnapshotPool, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(punch, "PUNCHES_PER_BATCH", CHUNKS)
    await overwritten(pool, "first")
    await overwritten(pool, "second")
    first, second = (await pool.snapshots.delete(["first@s", "second@s"])).job_ids
    await until(lambda: gate.batches == 1 and all(pool.engine.jobs.get(job).detail for job in (first, second)))
    real = gate.punch

    async def broken(_puncher: Puncher, _batch: Sequence[punch._Punch]) -> None:
        gate.punch = real
        raise ZeroDivisionError  # ends the pass that was under way: they wait for the next

    gate.punch = broken
    gate.let_one_pass()
    gate.let_one_pass()
    await until(lambda: gate.batches == 3)
    assert (await pool.engine.jobs.finished(first)).state == "done"
    assert pool.engine.jobs.get(second).state == "running"
    assert rows(pool, Table.PUNCH) == CHUNKS
    gate.open()
    assert (await pool.engine.jobs.finished(second)).state == "done"


async def test_those_that_wait_keep_nobody_from_freeing(pool: SnapshotPool, gate: Gate) -> None:
    names = [f"v{number}" for number in range(5)]
    for name in names:
        await overwritten(pool, name)
    jobs = [(await pool.snapshots.delete([f"{name}@s"])).job_ids[0] for name in names]
    await until(lambda: rows(pool, Table.PUNCH) >= len(names) and not rows(pool, Table.RECLAIM))
    await until(lambda: all(pool.engine.jobs.get(job).detail for job in jobs))
    gate.open()
    assert {(await pool.engine.jobs.finished(job)).state for job in jobs} == {"done"}
    assert not rows(pool, Table.PUNCH)


async def test_not_too_many_leave_their_place_to_others(
    pool: SnapshotPool, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_queues, "WAITING_JOBS_PER_KIND", 1)
    names = [f"v{number}" for number in range(5)]
    for name in names:
        await overwritten(pool, name)
    jobs = [(await pool.snapshots.delete([f"{name}@s"])).job_ids[0] for name in names]
    at_once = RUNNING_JOBS_PER_KIND + 1
    await until(lambda: len([job for job in jobs if pool.engine.jobs.get(job).detail]) == at_once)
    assert len(pool.engine.jobs.list(state="running")) == at_once
    gate.open()
    assert {(await pool.engine.jobs.finished(job)).state for job in jobs} == {"done"}


async def test_a_purge_waits_for_what_clones_do_not_see(pool: SnapshotPool, gate: Gate) -> None:
    await overwritten(pool)
    origin = pool.snapshots.find("v@s")
    await pool.catalogue.create(NewVolume(size_bytes=SIZE, name="c"), origin=origin)
    job_id = (await pool.catalogue.delete("v")).job_id
    await until(lambda: bool(pool.engine.jobs.get(job_id).detail))
    assert pool.engine.jobs.get(job_id).state == "running"
    gate.open()
    await done(pool, job_id)
