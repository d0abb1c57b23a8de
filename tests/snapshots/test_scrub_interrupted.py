"""Scrubs that are stopped, cancelled, killed, kept from space, or begun beside what changes the pool."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from blockvirt.errors import MetadataFault, PoolFull
from blockvirt.limits import JOB_PROGRESS_S
from blockvirt.meta.keys import Table
from blockvirt.meta.preread import ThroughFile
from blockvirt.meta.store import Store
from blockvirt.snapshots import scrub_run
from blockvirt.snapshots.scrub import Clocks, Scrubbing
from blockvirt.snapshots.scrub_chunks import ChunkProof, Reading
from blockvirt.snapshots.scrub_pace import Pace
from blockvirt.units import MIB
from tests.snapshots.conftest import SnapshotPool
from tests.snapshots.test_scrub import BATCH_CHUNKS, CHUNK, CHUNKS, Ground, flip
from tests.volumes.conftest import abandon, until

SEALED = CHUNKS + CHUNKS // 2


class Virtual:
    """Time that passes only where a scrub rests, and stands still after so many rests until it is let go on."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.rests: list[float] = []
        self.stop_after: int | None = None
        self.stopped = asyncio.Event()
        self.go_on = asyncio.Event()
        self.clocks = Clocks(lambda: 1_700_000_000.0 + self.now_s, lambda: self.now_s, self.rest)

    async def rest(self, seconds: float) -> None:
        """Have time pass."""
        self.rests.append(seconds)
        self.now_s += seconds
        if self.stop_after is not None and len(self.rests) >= self.stop_after:
            self.stopped.set()
            await self.go_on.wait()


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub_run, "SCRUB_BATCH_BYTES", BATCH_CHUNKS * CHUNK)


@pytest.fixture
def read_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses that are read, in order."""
    found: list[int] = []
    real = ChunkProof.read

    def read(self: ChunkProof, number: int, checksums: dict[int, int]) -> Reading:
        found.extend(checksums)
        return real(self, number, checksums)

    monkeypatch.setattr(ChunkProof, "read", read)
    return found


async def begun(folder: Path, time: Virtual) -> Ground:
    """A pool with sealed chunks, and scrubs that go by ``time``."""
    pool = await SnapshotPool(folder).start()
    ground = Ground(pool, Scrubbing(pool.engine, clocks=time.clocks))
    await ground.begin()
    return ground


async def again(ground: Ground, time: Virtual) -> Ground:
    """The same pool in a new process."""
    pool = await SnapshotPool(ground.pool.state_dir.parent).start()
    return Ground(pool, Scrubbing(pool.engine, clocks=time.clocks))


async def test_so_many_bytes_a_second_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub_run, "SCRUB_PAUSE_S", 0.01)
    time = Virtual()
    ground = await begun(tmp_path, time)
    rate = 1 * MIB
    began_s = time.now_s
    job_id = await ground.scrubbing.start(rate_bytes=rate)
    await ground.pool.engine.jobs.finished(job_id)
    found = ground.result(job_id)
    assert found.read_bytes > SEALED * CHUNK
    assert time.now_s - began_s == pytest.approx(found.read_bytes / rate)
    assert max(time.rests) == 0.01, "it looks up between two rests"
    await ground.pool.close()


async def test_a_cancelled_one_keeps_what_it_found_and_ends_at_once(tmp_path: Path) -> None:
    time = Virtual()
    ground = await begun(tmp_path, time)
    flip(ground.files()[0], 3)
    time.stop_after = 2  # the metadata's file, and a batch of chunks
    job_id = await ground.scrubbing.start()
    await time.stopped.wait()
    cancelling = asyncio.create_task(ground.pool.engine.jobs.cancel(job_id))
    await asyncio.sleep(0)
    time.go_on.set()
    assert (await cancelling).state == "cancelled"
    found = ground.result(job_id)
    assert (found.chunks, found.damaged, found.ended_s) == (BATCH_CHUNKS, 1, 0)
    assert len(ground.scrubbing.results().standing) == 1
    time.stop_after = None
    assert (await ground.scrub()).chunks == SEALED, "another one may begin, and does so anew"
    await ground.pool.close()


def test_the_slower_the_disk_the_longer_the_rest() -> None:
    pace = Pace(10 * MIB)
    assert pace.rest_s(100.0, 100.01, MIB) == pytest.approx(0.09)
    assert pace.rest_s(100.1, 105.1, MIB) == pytest.approx(5.0), "half of the disk's time at most"
    assert pace.rest_s(110.1, 110.1, MIB) == pytest.approx(0.1), "no burst makes up for what was slow"


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
async def test_it_goes_on_where_it_was_and_counts_nothing_twice(
    tmp_path: Path, killed: bool, read_chunks: list[int]
) -> None:
    time = Virtual()
    ground = await begun(tmp_path, time)
    flip(ground.files()[0], 3)
    flip(ground.files()[1], 3)
    time.stop_after = 4
    job_id = await ground.scrubbing.start()
    await time.stopped.wait()
    before = list(read_chunks)
    assert len(before) == 3 * BATCH_CHUNKS
    read_chunks.clear()
    if killed:
        ground.pool.sealer.cancel()
        dead = _deaf(ground.pool.engine.store)
        await abandon(ground.pool, power_cut=False)
        dead()
    else:
        await ground.pool.close()
    time.stop_after = None
    ground = await again(ground, time)
    job = await ground.pool.engine.jobs.finished(job_id)
    found = ground.result(job_id)
    assert (job.state, found.damaged, found.chunks) == ("done", 2, SEALED)
    assert len({each.address for each in found.findings}) == 2
    # Of the three batches only the first one, with the damage, is durable where the daemon was killed.
    assert set(read_chunks) & set(before) == set(before[BATCH_CHUNKS:] if killed else ())
    assert len(set(before) | set(read_chunks)) == SEALED
    assert job.percent == 100
    await ground.pool.close()


def _deaf(store: Store) -> Callable[[], None]:
    """Have no commit of a store come through any more; returns what ends that."""
    real = store.commit

    async def commit(change: object) -> None:
        raise MetadataFault("this process is dead")

    store.commit = commit  # type: ignore[method-assign, assignment]
    return lambda: setattr(store, "commit", real)


async def test_a_paused_one_waits_over_a_restart(tmp_path: Path, read_chunks: list[int]) -> None:
    time = Virtual()
    ground = await begun(tmp_path, time)
    time.stop_after = 3
    job_id = await ground.scrubbing.start()
    await time.stopped.wait()
    pausing = asyncio.create_task(ground.pool.engine.jobs.pause(job_id))
    await asyncio.sleep(0)
    time.go_on.set()
    assert (await pausing).state == "paused"
    assert await ground.scrubbing.start() == job_id, "the same joins what is paused, too"
    await ground.pool.close()
    time.stop_after = None
    ground = await again(ground, time)
    before = list(read_chunks)
    assert 0 < len(before) < SEALED
    await ground.pool.engine.jobs.resume(job_id)
    assert (await ground.pool.engine.jobs.finished(job_id)).state == "done"
    assert len(read_chunks) == len(set(read_chunks)) == SEALED
    await ground.pool.close()


async def test_without_room_in_the_metadata_it_reads_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time = Virtual()
    ground = await begun(tmp_path, time)
    flip(ground.files()[0], 3)
    store = ground.pool.engine.store
    real, refused = store.commit, 0

    async def commit(change: object) -> object:
        nonlocal refused
        if 0 < len(time.rests) < 5:
            refused += 1
            raise PoolFull("the metadata store has no room")
        return await real(change)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "commit", commit)
    real_rest = time.rest

    async def slowly(seconds: float) -> None:
        await real_rest(seconds + JOB_PROGRESS_S)

    ground.scrubbing._clocks = Clocks(time.clocks.time_s, time.clocks.monotonic_s, slowly)
    found = await ground.scrub()
    assert refused > 2
    assert (found.damaged, found.chunks, len(found.findings)) == (1, SEALED, 1)
    await ground.pool.close()


async def test_a_volume_that_is_deleted_meanwhile_is_no_damage(tmp_path: Path) -> None:
    time = Virtual()
    ground = await begun(tmp_path, time)
    time.stop_after = 3
    job_id = await ground.scrubbing.start(["v"])
    await time.stopped.wait()
    for name in ("clone", "v"):
        await ground.pool.catalogue.delete(name, purge=True)

    def gone() -> bool:
        with ground.pool.engine.store.read() as reader:
            return not reader.count(Table.FILES)

    await until(gone)
    assert not list((ground.pool.device / "files").iterdir())
    time.go_on.set()
    assert (await ground.pool.engine.jobs.finished(job_id)).state == "done"
    found = ground.result(job_id)
    assert (found.damaged, found.ended_s > 0) == (0, True)
    assert found.chunks < SEALED
    await ground.pool.close()


async def test_one_whose_volumes_are_gone_is_given_up(tmp_path: Path) -> None:
    time = Virtual()
    ground = await begun(tmp_path, time)
    time.stop_after = 1
    job_id = await ground.scrubbing.start(["clone"])
    await time.stopped.wait()
    pausing = asyncio.create_task(ground.pool.engine.jobs.pause(job_id))
    await asyncio.sleep(0)
    time.go_on.set()
    await pausing
    await ground.pool.catalogue.delete("clone", purge=True)

    def gone() -> bool:
        with ground.pool.engine.store.read() as reader:
            return reader.count(Table.VOLUMES) == 1

    await until(gone)
    await ground.pool.engine.jobs.resume(job_id)
    job = await ground.pool.engine.jobs.finished(job_id)
    assert (job.state, job.error) == ("cancelled", "what was to be read was deleted meanwhile")
    await ground.pool.close()


async def test_an_end_of_the_daemon_waits_for_the_read_that_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    time = Virtual()
    ground = await begun(tmp_path, time)
    reading, go_on, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()
    real = ThroughFile._from_disk

    def from_disk(self: ThroughFile, offset: int, length: int) -> str:
        with memoryview(self._buffer):
            loop.call_soon_threadsafe(reading.set)
            go_on.wait()
            return real(self, offset, length)

    with monkeypatch.context() as patch:
        patch.setattr(ThroughFile, "_from_disk", from_disk)
        job_id = await ground.scrubbing.start()
        await reading.wait()
        closing = asyncio.create_task(ground.pool.close())
        await until(lambda: ground.pool.engine.jobs._closing)
        loop.call_soon(go_on.set)  # by then the job has been cancelled
        await closing
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    ground = await again(ground, time)
    assert (await ground.pool.engine.jobs.finished(job_id)).state == "done"
    await ground.pool.close()


async def test_a_damaged_result_is_passed_over(tmp_path: Path) -> None:
    time = Virtual()
    ground = await begun(tmp_path, time)
    first, second = (await ground.scrub()).id, (await ground.scrub()).id
    await ground.pool.engine.store.commit(lambda writer: writer.put(Table.SCRUBS, first.encode(), b"damaged"))
    assert [each.id for each in ground.scrubbing.results().scrubs] == [second]
    found = await ground.scrub()
    assert [each.kind for each in found.findings] == ["record"], "it is damage like any other"
    await ground.pool.close()
