"""A flatten whose volume is deleted or reverted meanwhile is given up: nobody has anything to mend."""

import pytest

from blockvirt.volumes.job_states import Action
from blockvirt.volumes.opened import OpenVolume
from tests.snapshots.conftest import SnapshotPool
from tests.snapshots.test_flatten import Family
from tests.volumes.conftest import until


@pytest.fixture
async def family(pool: SnapshotPool) -> Family:
    made = Family(pool)
    await made.begin()
    return made


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "gone"])
async def test_what_was_reverted_away_is_not_flattened(
    family: Family, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    """Whether a snapshot keeps the branch that the job is about, or it went whole."""
    await family.clone(family.golden, "clone")
    await family.snapshot("clone", "c")
    await family.pool.reverts.revert("clone@c", safety=False)
    jobs, leaf = family.pool.engine.jobs, family.pool.flattening._leaf

    async def leaf_and_pause(opened: OpenVolume, number: int) -> bool:
        run = jobs._queues.entries[job_id].run
        assert run is not None
        run.ask(Action.PAUSE)
        return await leaf(opened, number)

    monkeypatch.setattr(family.pool.flattening, "_leaf", leaf_and_pause)
    job_id = await family.pool.flattening.start("clone")
    await until(lambda: jobs.get(job_id).state == "paused")
    monkeypatch.setattr(family.pool.flattening, "_leaf", leaf)
    await family.pool.reverts.revert("clone@c", safety=keep)
    await until(lambda: not jobs.list(state="queued") and not jobs.list(state="running"))
    await jobs.resume(job_id)
    job = await jobs.finished(job_id)
    assert job.state == "cancelled", "nobody has anything to mend"
    assert "clone was reverted meanwhile" in job.error
    assert "flatten what it holds now" in job.error
    await family.flatten("clone")


@pytest.mark.parametrize("purge", [True, False], ids=["purged", "in the trash"])
@pytest.mark.parametrize("after_leaves", [0, 1])
async def test_the_flatten_of_a_volume_that_was_deleted_is_cancelled(
    family: Family, monkeypatch: pytest.MonkeyPatch, purge: bool, after_leaves: int
) -> None:
    """Before its start, or in its midst; a failed job wants a person, and here is nothing for one to do."""
    pool = family.pool
    await family.clone(family.golden, "clone")
    jobs, leaf = pool.engine.jobs, pool.flattening._leaf

    async def leaf_and_pause(opened: OpenVolume, number: int) -> bool:
        run = jobs._queues.entries[job_id].run
        assert run is not None
        run.ask(Action.PAUSE)
        return await leaf(opened, number)

    if after_leaves:
        monkeypatch.setattr(pool.flattening, "_leaf", leaf_and_pause)
    job_id = await pool.flattening.start("clone")
    if not after_leaves:
        await jobs.pause(job_id)
    await until(lambda: jobs.get(job_id).state == "paused")
    monkeypatch.setattr(pool.flattening, "_leaf", leaf)
    await pool.catalogue.delete("clone", purge=purge)
    await until(lambda: not jobs.list(state="queued") and not jobs.list(state="running"))
    await jobs.resume(job_id)
    job = await jobs.finished(job_id)
    assert job.state == "cancelled"
    assert "deleted" in job.error
    assert not jobs.list(state="failed")
