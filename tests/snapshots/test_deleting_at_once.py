"""A deletion is judged by what was written up to it, not by what the last checkpoint happened to know."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from blockvirt.errors import NotFound
from blockvirt.meta.records import SnapshotRecord
from blockvirt.volumes import checkpoint
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.requests import NewVolume
from tests.snapshots.conftest import SnapshotPool
from tests.snapshots.test_histories import settled
from tests.volumes.conftest import findings, write

CHUNK = 4096
SIZE = 600 * CHUNK  # two leaves
WRITTEN = 16 * CHUNK


async def overwritten(pool: SnapshotPool, name: str = "v") -> Handle:
    """An open volume with a snapshot 'a', all of which was overwritten since: no checkpoint knows."""
    handle = await pool.open(await pool.volume(SIZE, name))
    await write(handle, 0, b"a" * WRITTEN)
    await pool.snapshots.create({name: "a"})
    await write(handle, 0, b"b" * WRITTEN)
    return handle


def held_commits(monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Have checkpoints wait between freeze and commit; returns what says that one does, and what lets them go on."""
    frozen, go_on = asyncio.Event(), asyncio.Event()
    commit: Callable[..., Awaitable[object]] = checkpoint._commit

    async def held(*arguments: object) -> object:
        frozen.set()
        await go_on.wait()
        return await commit(*arguments)

    monkeypatch.setattr(checkpoint, "_commit", held)
    return frozen, go_on


async def test_what_was_overwritten_just_now_is_freed(pool: SnapshotPool) -> None:
    handle = await overwritten(pool)
    dry = await pool.snapshots.delete(["v@a"], dry_run=True)
    assert (dry.freed_bytes, dry.deleted) == (WRITTEN, False)
    await write(handle, WRITTEN, b"c" * CHUNK)
    gone = await pool.snapshots.delete(["v@a"])
    assert gone.freed_bytes == WRITTEN
    await settled(pool)
    assert pool.engine.storage.status().used_bytes == WRITTEN + CHUNK
    await handle.close()
    assert not findings(pool, leaks=True)


async def test_a_schedule_gives_the_space_back_as_soon(pool: SnapshotPool) -> None:
    handle = await overwritten(pool)
    await pool.snapshots.delete_ids([pool.snapshots.find("v@a").id])
    await settled(pool)
    assert pool.engine.storage.status().used_bytes == WRITTEN
    await handle.close()


async def test_the_origin_of_a_branch_that_goes_is_judged_too(pool: SnapshotPool) -> None:
    """A snapshot that is the last of a branch without a head: with it goes what that branch kept of its origin."""
    handle = await pool.open(await pool.volume(SIZE, "v"))
    await write(handle, 0, b"a" * WRITTEN)
    (origin,) = await pool.snapshots.create({"v": "a"})
    await pool.catalogue.create(NewVolume(size_bytes=SIZE, name="clone"), origin=origin)
    await pool.snapshots.create({"clone": "c"})
    await pool.reverts.revert("clone@c", safety=False)
    await pool.engine.jobs.finished(await pool.flattening.start("clone"))
    await pool.snapshots.delete(["v@a"])
    await settled(pool)
    await write(handle, 0, b"b" * WRITTEN)
    gone = await pool.snapshots.delete(["clone@c"])
    assert gone.freed_bytes == WRITTEN
    await settled(pool)
    assert pool.engine.storage.status().used_bytes == 2 * WRITTEN, "the volume's, and the flattened clone's"
    await handle.close()


async def test_a_checkpoint_that_began_before_the_last_write_is_not_enough(
    pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await pool.open(await pool.volume(SIZE, "v"))
    await write(handle, 0, b"a" * WRITTEN)
    await pool.snapshots.create({"v": "a"})
    await write(handle, 0, b"b" * CHUNK)
    frozen, go_on = held_commits(monkeypatch)
    running = asyncio.create_task(handle._opened.checkpointer.run())
    await frozen.wait()
    await write(handle, 0, b"c" * WRITTEN)
    deleting = asyncio.create_task(pool.snapshots.delete(["v@a"]))
    await asyncio.sleep(0)
    go_on.set()
    assert (await deleting).freed_bytes == WRITTEN
    await running
    await handle.close()


async def test_a_volume_that_is_closing_is_waited_for(pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = await overwritten(pool)
    frozen, go_on = held_commits(monkeypatch)
    closing = asyncio.create_task(handle.close())
    await frozen.wait()
    deleting = asyncio.create_task(pool.snapshots.delete(["v@a"], dry_run=True))
    await asyncio.sleep(0)
    go_on.set()
    assert (await deleting).freed_bytes == WRITTEN
    await closing


async def test_there_is_no_checkpoint_without_need(pool: SnapshotPool) -> None:
    handle, other = await overwritten(pool), await overwritten(pool, "other")
    mine, stranger = handle._opened.volume.stats, other._opened.volume.stats
    before, before_stranger = mine.checkpoints, stranger.checkpoints
    await pool.snapshots.create({"v": "b"})
    await write(handle, 0, b"c" * CHUNK)
    assert mine.checkpoints == before + 1, "that of the snapshot"
    await pool.snapshots.delete(["v@a", "v@b"], dry_run=True)
    await pool.snapshots.delete(["v@a", "v@b"], dry_run=True)
    await pool.snapshots.delete(["v@a", "v@b"])
    assert mine.checkpoints == before + 2, "one for both snapshots, and none where nothing changed"
    assert stranger.checkpoints == before_stranger
    await handle.close()
    await other.close()


async def test_a_volume_that_has_stopped_keeps_nobody_from_deleting(pool: SnapshotPool) -> None:
    handle = await overwritten(pool)
    handle._opened.volume.stop("a sync of it failed", OSError(5, "broken"))
    assert (await pool.snapshots.delete(["v@a"], dry_run=True)).freed_bytes == 0, "nothing of what it had is certain"
    assert (await pool.snapshots.delete(["v@a"])).deleted
    await handle.close()


async def test_a_volume_that_is_set_aside_is_not_waited_for(pool: SnapshotPool) -> None:
    handle = await overwritten(pool)
    await handle.close()
    async with pool.engine.registry.set_aside(pool.catalogue.get("v").id):
        assert (await pool.snapshots.delete(["v@a"])).freed_bytes == WRITTEN


@pytest.mark.parametrize("judged", [True, False], ids=["before the space is counted", "before the guests are asked"])
@pytest.mark.parametrize("dry_run", [True, False])
async def test_who_comes_second_is_told_that_it_is_gone(
    pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, judged: bool, dry_run: bool
) -> None:
    """The last snapshot of a branch that a revert left behind: the branch goes with it."""
    handle = await pool.open(await pool.volume(SIZE, "v"))
    for name in ("a", "b"):
        await write(handle, 0, name.encode() * CHUNK)
        await pool.snapshots.create({"v": name})
    await handle.close()
    await pool.reverts.revert("v@a")
    bring_in = pool.snapshots._bring_in

    async def overtaken(records: Sequence[SnapshotRecord]) -> None:
        if judged:
            await bring_in(records)
        monkeypatch.setattr(pool.snapshots, "_bring_in", bring_in)
        await pool.snapshots.delete(["v@b"])
        await settled(pool)
        if not judged:
            await bring_in(records)

    monkeypatch.setattr(pool.snapshots, "_bring_in", overtaken)
    with pytest.raises(NotFound, match="meanwhile"):
        await pool.snapshots.delete(["v@b"], dry_run=dry_run)
    assert "missing" not in caplog.text
    assert not findings(pool, leaks=True)
