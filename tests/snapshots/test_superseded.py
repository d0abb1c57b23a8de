"""What a checkpoint hides of older versions: few go in its own transaction, the others soon after, none is lost."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from blockvirt.meta.keys import Table
from blockvirt.meta.records import JobRecord
from blockvirt.meta.store import Writer
from blockvirt.volumes import checkpoint, jobs, reclaim, recovery
from blockvirt.volumes.commit import MapChange, Rows, Written, write_map
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.job_running import Running
from blockvirt.volumes.leftovers import Leftovers
from blockvirt.volumes.versions import leaf_births
from tests.snapshots.conftest import SnapshotPool
from tests.snapshots.test_histories import SEEDS, History, settled
from tests.volumes.conftest import abandon, findings, read, until, until_punched, write
from tests.volumes.proof_pool import check

CHUNK = 4096
LEAF = 512 * CHUNK
LEAVES = 3
SNAPSHOTS = 8
SIZE = LEAVES * LEAF


@pytest.fixture(params=[1, 3])
def most(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many versions one transaction may remove."""
    value: int = request.param
    for module in (checkpoint, recovery, reclaim):
        monkeypatch.setattr(module, "RECLAIM_BATCH_VERSIONS", value)
    return value


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Written, int]]:
    """What each checkpoint of a map came to, and how many versions its own transaction really removed."""
    found: list[tuple[Written, int]] = []

    def counted(writer: Writer, change: MapChange, rows: Rows, most: int) -> Written:
        before = set(leaf_births(writer, change.branch))
        result = write_map(writer, change, rows, most)
        found.append((result, len(before.difference(leaf_births(writer, change.branch)))))
        return result

    monkeypatch.setattr(checkpoint, "write_map", counted)
    monkeypatch.setattr(recovery, "write_map", counted)
    return found


def stored_versions(pool: SnapshotPool) -> int:
    with pool.engine.store.read() as reader:
        return reader.count(Table.LEAVES)


def reclaim_rows(pool: SnapshotPool) -> int:
    with pool.engine.store.read() as reader:
        return reader.count(Table.RECLAIM)


async def with_history(pool: SnapshotPool, name: str = "v") -> str:
    """Make a volume each leaf of which has a version for each of its snapshots, and none for its head; return its id.

    Chunk 0 of a leaf is another one in each, chunk 1 was written once.
    """
    handle = await pool.open(volume := await pool.volume(SIZE, name))
    for number in range(SNAPSHOTS):
        for leaf in range(LEAVES):
            await write(handle, leaf * LEAF, bytes([number + 1]) * CHUNK)
            if not number:
                await write(handle, leaf * LEAF + CHUNK, b"k" * CHUNK)
        await pool.snapshots.create({volume: f"s{number}"})
    await handle.close()
    return volume


async def delete_snapshots(pool: SnapshotPool, name: str = "v", upto: int = SNAPSHOTS) -> None:
    await pool.snapshots.delete([f"{name}@s{number}" for number in range(upto)])


async def write_heads(handle: Handle) -> None:
    """Give each leaf a version for the head, with the next checkpoint."""
    for leaf in range(LEAVES):
        await write(handle, leaf * LEAF, b"h" * CHUNK)


def hold_reclaims(pool: SnapshotPool) -> Callable[[], None]:
    """Keep the background from what it has to reclaim; return what lets it go on."""
    kind = pool.engine.jobs._queues.kinds[reclaim.RECLAIM]
    worker, kind.worker = kind.worker, None

    def go_on() -> None:
        kind.worker = worker
        pool.engine.jobs.wake()

    return go_on


async def only_heads_are_left(pool: SnapshotPool, volume: str) -> None:
    """Prove that nothing leaks, and that what the head sees is there."""
    await settled(pool)
    assert stored_versions(pool) == LEAVES
    assert pool.engine.storage.status().used_bytes == 2 * LEAVES * CHUNK
    assert not findings(pool, leaks=True)
    handle = await pool.open(volume)
    for leaf in range(LEAVES):
        assert await read(handle, leaf * LEAF, 2 * CHUNK) == b"h" * CHUNK + b"k" * CHUNK
    await handle.close()


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_checkpoint_amid_deletions_removes_few_versions(
    pool: SnapshotPool, most: int, written: list[tuple[Written, int]], restarted: bool
) -> None:
    volume = await with_history(pool)
    go_on = hold_reclaims(pool)
    await delete_snapshots(pool)
    handle = await pool.open(volume)
    written.clear()
    await write_heads(handle)
    await handle.close()
    assert [(result.versions_removed, removed) for result, removed in written] == [(most, most)]
    assert not findings(pool, leaks=True), "what is left is spoken for"
    if restarted:
        await pool.close()
        await pool.start()
    go_on()
    await only_heads_are_left(pool, volume)


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_checkpoint_queues_what_no_deletion_will_come_by(
    pool: SnapshotPool, written: list[tuple[Written, int]], restarted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deletions are done, so each leaf has one version for the head; it is hidden by the head's own."""
    monkeypatch.setattr(checkpoint, "RECLAIM_BATCH_VERSIONS", 1)
    volume = await with_history(pool)
    await delete_snapshots(pool)
    await settled(pool)
    handle = await pool.open(volume)
    written.clear()
    go_on = hold_reclaims(pool)
    await write_heads(handle)
    await handle.close()
    assert [(result.versions_removed, removed, result.has_queued) for result, removed in written] == [(1, 1, True)]
    assert stored_versions(pool) == 2 * LEAVES - 1
    assert not findings(pool, leaks=True), "what is left is spoken for"
    with pool.engine.store.read() as reader:
        jobs = [reader.record(JobRecord, Table.JOBS, key) for key, _ in reader.scan(Table.JOBS)]
    (queued,) = [job for job in jobs if job is not None and job.state == "queued"]
    assert (queued.subject, queued.volume_id) == ("older versions of v", volume)
    if restarted:
        await pool.close()
        await pool.start()
    go_on()
    await only_heads_are_left(pool, volume)


async def test_a_checkpoint_wakes_who_frees_the_rest(pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "RECLAIM_BATCH_VERSIONS", 1)
    volume = await with_history(pool)
    await delete_snapshots(pool)
    await settled(pool)
    handle = await pool.open(volume)
    await write_heads(handle)
    await handle._opened.checkpointer.run()
    await until(lambda: stored_versions(pool) == LEAVES and not reclaim_rows(pool))  # without a look at the board
    await handle.close()
    await only_heads_are_left(pool, volume)


async def test_what_a_checkpoint_hides_while_its_gap_is_freed_is_not_forgotten(
    pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row that stands for it is there already, and its job has gone over the leaves before they had a head."""
    monkeypatch.setattr(checkpoint, "RECLAIM_BATCH_VERSIONS", 1)
    volume = await with_history(pool)
    await delete_snapshots(pool, upto=SNAPSHOTS - 1)
    await settled(pool)
    reached, may_end = asyncio.Event(), asyncio.Event()

    class Slow(Running):
        async def advance(self, done_units: int, total_units: int, position: int) -> None:
            await super().advance(done_units, total_units, position)
            reached.set()
            await may_end.wait()

    monkeypatch.setattr(jobs, "Running", Slow)
    await pool.snapshots.delete([f"v@s{SNAPSHOTS - 1}"])
    await reached.wait()
    handle = await pool.open(volume)
    await write_heads(handle)
    await handle.close()
    assert stored_versions(pool) == 2 * LEAVES - 1
    assert reclaim_rows(pool) == 1
    may_end.set()
    await only_heads_are_left(pool, volume)


async def test_the_volumes_of_a_group_share_what_one_transaction_may_remove(
    pool: SnapshotPool, most: int, written: list[tuple[Written, int]]
) -> None:
    names = ["a", "b", "c"]
    volumes = [await with_history(pool, name) for name in names]
    go_on = hold_reclaims(pool)
    for name in names:
        await delete_snapshots(pool, name)
    handles = [await pool.open(volume) for volume in volumes]
    for handle in handles:
        await write_heads(handle)
    written.clear()
    await pool.snapshots.create(dict.fromkeys(names, "all"))
    assert [removed for _, removed in written] == [most, 0, 0]
    for handle in handles:
        await handle.close()
    assert not findings(pool, leaks=True), "what is left is spoken for"
    go_on()
    await settled(pool)
    assert stored_versions(pool) == len(names) * LEAVES
    assert not findings(pool, leaks=True)


async def test_a_recovery_removes_few_versions_and_the_others_follow(
    pool: SnapshotPool, most: int, written: list[tuple[Written, int]]
) -> None:
    volume = await with_history(pool)
    hold_reclaims(pool)
    await delete_snapshots(pool)
    await write_heads(await pool.open(volume))
    written.clear()
    pool.sealer.cancel()
    await abandon(pool, power_cut=False)
    await pool.start()
    assert [(result.versions_removed, removed) for result, removed in written] == [(most, most)]
    await only_heads_are_left(pool, volume)


async def killed_and_not_recovered(pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the engine, and start one that finds no journal: as if the devices came later."""
    pool.sealer.cancel()
    await abandon(pool, power_cut=False)

    async def nothing(_self: Leftovers) -> None:
        return

    with monkeypatch.context() as patched:
        patched.setattr(Leftovers, "settle_all", nothing)
        await pool.start()


async def test_a_late_recovery_gives_back_what_the_journal_freed(
    pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await pool.open(volume := await pool.volume(SIZE))
    await write(handle, 0, b"a" * 2 * CHUNK)
    await handle._opened.checkpointer.run()
    await handle.zero(0, CHUNK, punch=True)
    await killed_and_not_recovered(pool, monkeypatch)
    assert pool.engine.storage.status().used_bytes == 2 * CHUNK
    await until(lambda: not pool.engine.context.punches.is_set())
    handle = await pool.open(volume)
    await until_punched(pool)
    assert pool.engine.storage.status().used_bytes == CHUNK
    await handle.close()


async def test_a_late_recovery_wakes_who_frees_the_rest(pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "RECLAIM_BATCH_VERSIONS", 1)
    volume = await with_history(pool)
    await delete_snapshots(pool)
    await settled(pool)
    await write_heads(await pool.open(volume))
    await killed_and_not_recovered(pool, monkeypatch)
    await settled(pool)
    assert stored_versions(pool) == LEAVES
    handle = await pool.open(volume)
    await until(lambda: stored_versions(pool) == LEAVES and not reclaim_rows(pool))  # without a look at the board
    await until_punched(pool)
    await handle.close()
    await only_heads_are_left(pool, volume)


async def test_checkpoints_that_hide_nothing_leave_nothing_to_others(
    pool: SnapshotPool, most: int, written: list[tuple[Written, int]]
) -> None:
    """The first one after a snapshot, and the next in the same epoch, which replaces its own versions."""
    handle = await pool.open(volume := await pool.volume(SIZE, "v"))
    await write_heads(handle)
    await pool.snapshots.create({volume: "s"})
    written.clear()
    for chunk in range(2):
        for leaf in range(LEAVES):
            await write(handle, leaf * LEAF + chunk * CHUNK, b"x" * CHUNK)
        await handle._opened.checkpointer.run()
    await handle.close()
    assert [(result.versions_removed, removed, result.has_queued) for result, removed in written] == [(0, 0, False)] * 2
    assert not reclaim_rows(pool)
    await settled(pool)
    assert not findings(pool, leaks=True)


async def test_what_only_hidden_versions_held_is_given_back_at_once(pool: SnapshotPool) -> None:
    """Also where the head dropped nothing of its own just then."""
    handle = await pool.open(volume := await pool.volume(SIZE, "v"))
    await write(handle, 0, b"a" * CHUNK)
    await pool.snapshots.create({volume: "s"})
    await handle.zero(0, CHUNK, punch=True)
    await pool.snapshots.create({volume: "t"})
    go_on = hold_reclaims(pool)
    await pool.snapshots.delete(["v@s", "v@t"])
    await until_punched(pool)
    await write(handle, CHUNK, b"b" * CHUNK)
    await handle._opened.checkpointer.run()
    await until_punched(pool)
    assert pool.engine.storage.status().used_bytes == CHUNK
    go_on()
    await handle.close()


@pytest.mark.parametrize("seed", SEEDS)
async def test_histories_with_the_least_of_bounds(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One version per transaction, one leaf per step, killed now and then: clean at each of those moments."""
    for module in (checkpoint, recovery, reclaim):
        monkeypatch.setattr(module, "RECLAIM_BATCH_VERSIONS", 1)
    monkeypatch.setattr(reclaim, "RECLAIM_BATCH_LEAVES", 1)
    pool = await SnapshotPool(tmp_path).start()
    history = History(pool, seed)
    await history.new_volume()
    for step in range(60):
        if len(history.volumes) < 2:
            await history.new_volume()
        await history.step()
        if step % 10 == 9:
            pool.sealer.cancel()
            await abandon(pool, power_cut=False)
            for volume in history.volumes:
                volume.handle = None
            assert check(pool) == [], f"BLOCKVIRT_SEED={seed}, step {step}"
            await pool.start()
    await history.check()
    for volume in history.volumes:
        await history.shut(volume)
    await settled(pool)
    # A flatten that was killed may leave copies: anything else is to be found.
    left = [finding for finding in findings(pool, leaks=True) if finding.code != "chunks-leaked"]
    assert left == [], f"BLOCKVIRT_SEED={seed}"
    await pool.close()
