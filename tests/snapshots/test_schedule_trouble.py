"""The worker of the schedules in trouble: what fails, hangs or is damaged ends no schedule, and is told."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from blockvirt.errors import BeingDeleted, InUse, MetadataFault, NotFound, PoolFull, VolumeStopped
from blockvirt.meta.keys import Table
from blockvirt.meta.records import ScheduleRecord
from blockvirt.meta.store import Writer
from blockvirt.snapshots.schedules import NewSchedule, ScheduleChange
from tests.snapshots.schedule_world import HOURLY, World, at, create, times


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A Sunday afternoon, three volumes, a worker that has nothing to do yet."""
    world = World(tmp_path / "meta", at("2026-11-22 14:00"))
    world.volume("web", backup="yes")
    world.volume("db", backup="yes")
    world.volume("scratch")
    await world.start()
    yield world
    await world.close()


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (VolumeStopped("volume 'web' has stopped", cause="a sync failed"), "volume 'web' has stopped: a sync failed"),
        (RuntimeError("a mistake"), "internal error: RuntimeError('a mistake')"),
    ],
)
async def test_a_run_that_fails_is_noted_and_ends_nothing(world: World, trouble: Exception, said: str) -> None:
    """It counts as missed; nothing is pruned; other schedules run, and so does the next run of this one."""
    schedule_id, web = await create(world, last=1)
    _, db = await create(world, "other", volume="db")
    world.snapshots.add(web, "one", at("2026-11-22 12:15"), schedule_id)
    world.snapshots.add(web, "two", at("2026-11-22 13:15"), schedule_id)
    world.snapshots.broken[web] = trouble
    await world.move_to("2026-11-22 14:16")
    assert world.snapshots.names_of(web) == ["one", "two"]
    seen = world.schedules.show("hourly")
    assert (seen.last_error, seen.missed_runs, seen.last_run_s) == (said, 1, at("2026-11-22 14:15"))
    assert (times(world, db), world.schedules.show("other").last_error) == (["20261122t141500z"], "")
    world.snapshots.broken.clear()
    await world.move_to("2026-11-22 15:15")
    assert times(world, web) == ["20261122t151500z"]
    seen = world.schedules.show("hourly")
    assert (seen.last_error, seen.missed_runs) == ("", 1)


async def test_a_volume_in_the_trash_is_waited_for(world: World) -> None:
    """Nothing is missed for want of it; when it is back, runs go on with the next one."""
    schedule_id, web = await create(world, last=2)
    await world.move_to("2026-11-22 14:16")
    world.change_volume(web, trashed_s=1.0, purge_at_s=2e9)
    world.snapshots.broken[web] = BeingDeleted("volume 'web' is in the trash")
    await world.move_to("2026-11-22 17:20")
    seen = world.schedules.show("hourly")
    assert (seen.state, seen.next_run_s, seen.missed_runs, seen.last_error) == ("volume-gone", None, 0, "")
    assert f"blockvirt trash restore {web}" in seen.problem
    assert world.schedules.preview("hourly").next_runs_s == ()
    assert times(world, web) == ["20261122t141500z"], "and none is pruned"
    world.change_volume(web, trashed_s=0.0, purge_at_s=0.0)
    world.snapshots.broken.clear()
    seen = world.schedules.show("hourly")
    assert (seen.state, seen.problem, seen.next_run_s) == ("active", "", at("2026-11-22 18:15"))
    await world.move_to("2026-11-22 18:15")
    assert times(world, web) == ["20261122t141500z", "20261122t181500z"]
    assert world.schedules.show(schedule_id).missed_runs == 0


@pytest.mark.parametrize("change", [{"deleting": True}, {"gone": True}])
async def test_a_volume_that_is_gone_is_told(world: World, change: dict[str, bool]) -> None:
    """The schedule is there to be looked at and deleted; also a start after a long time misses nothing."""
    _, web = await create(world)
    world.change_volume(web, **change)
    world.snapshots.broken[web] = NotFound("there is no volume 'web'")
    await world.move_to("2026-11-22 15:20")
    await world.stop()
    world.time.set_to(at("2026-11-25 15:20"))
    await world.start()
    seen = world.schedules.show("hourly")
    assert (seen.state, seen.next_run_s, seen.missed_runs, seen.last_run_s) == ("volume-gone", None, 0, None)
    assert web in seen.problem
    assert "blockvirt schedule delete hourly" in seen.problem
    assert [each.state for each in (await world.schedules.list()).schedules] == ["volume-gone"]
    await world.schedules.change("hourly", ScheduleChange(paused=True))
    assert world.schedules.show("hourly").state == "paused"
    await world.schedules.delete("hourly")


async def test_a_run_that_hangs_keeps_no_other_waiting(world: World) -> None:
    """Each schedule runs by itself."""
    _, web = await create(world)
    _, db = await create(world, "other", volume="db")
    world.snapshots.stuck[web] = asyncio.Event()
    world.time.move_to(at("2026-11-22 14:15"))
    await world.snapshots.reached.wait()
    await world.settle(but=["hourly"])
    world.time.move_to(at("2026-11-22 15:15"))
    await world.settle(but=["hourly"])
    assert times(world, db) == ["20261122t141500z", "20261122t151500z"]
    assert times(world, web) == []


async def test_a_name_that_is_taken_gets_a_number(world: World) -> None:
    """Somebody called his own snapshot so; a schedule does not stop for that, at least not for the first."""
    _, web = await create(world)
    world.snapshots.add(web, "auto-hourly-20261122t141500z", at("2026-11-22 13:00"))
    await world.move_to("2026-11-22 14:15")
    assert world.snapshots.names_of(web)[1:] == ["auto-hourly-20261122t141500z-2"]
    for number in range(1, 10):
        world.snapshots.add(
            web, "auto-hourly-20261122t151500z" + (f"-{number}" if number > 1 else ""), at("2026-11-22 13:00")
        )
    await world.move_to("2026-11-22 15:15")
    seen = world.schedules.show("hourly")
    assert (seen.missed_runs, seen.last_error) == (1, "there is a snapshot 'auto-hourly-20261122t151500z-9' already")


async def test_a_damaged_schedule_stops_no_other(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Neither at the start nor while all are running; the log says so once each time."""
    damaged, web = await create(world)
    _, db = await create(world, "other", volume="db")
    world.store.commit_now(lambda writer: writer.put(Table.SCHEDULES, damaged.encode(), b"nonsense"))
    world.time.move_to(at("2026-11-22 14:15"))
    await world.settle(but=["hourly"])
    await world.stop()
    world.store.commit_now(lambda writer: writer.delete(Table.SCHEDULE_NAMES, b"hourly"))
    await world.start()
    await world.move_to("2026-11-22 15:15")
    assert times(world, db) == ["20261122t141500z", "20261122t151500z"]
    assert times(world, web) == []
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 2


@pytest.mark.parametrize("failing", [0, 1])
async def test_what_cannot_be_read_is_read_a_minute_later(
    world: World, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Neither the list of schedules nor one of them, at the start: it runs all the same."""
    _, web = await create(world)
    await world.stop()
    reads, read = count(), world.store.read

    def read_or_fail() -> object:
        if next(reads) == failing:
            raise MetadataFault("no reader is free")
        return read()

    monkeypatch.setattr(world.store, "read", read_or_fail)
    await world.start()
    assert next(reads) > failing + 1
    await world.move_to("2026-11-22 14:15")
    assert times(world, web) == ["20261122t141500z"]


async def test_a_pause_counts_before_the_worker_has_heard_of_it(world: World) -> None:
    """What the store says when a run begins."""
    schedule_id, web = await create(world)
    key = schedule_id.encode()

    def pause(writer: Writer) -> None:
        record = writer.record(ScheduleRecord, Table.SCHEDULES, key)
        assert record is not None
        writer.put_record(Table.SCHEDULES, key, replace(record, paused=True))

    world.store.commit_now(pause)
    await world.move_to("2026-11-22 14:20")
    assert times(world, web) == []


async def test_a_run_that_cannot_be_noted_is_not_repeated_without_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without room for the note the next run is the regular one, and it notes both."""
    _, web = await create(world)

    async def full(change: object) -> None:
        raise PoolFull("no room")

    with monkeypatch.context() as patched:
        patched.setattr(world.store, "commit", full)
        await world.move_to("2026-11-22 14:25")
    assert times(world, web) == ["20261122t141500z"]
    assert world.schedules.show("hourly").last_run_s is None
    await world.move_to("2026-11-22 15:15")
    assert times(world, web) == ["20261122t141500z", "20261122t151500z"]
    assert world.schedules.show("hourly").last_run_s == at("2026-11-22 15:15")


async def test_pruning_that_fails_is_no_missed_run(world: World) -> None:
    """It is noted, the other volumes are pruned, and the next run prunes what this one left."""
    schedule, _ = await world.schedules.create(
        NewSchedule("hourly", HOURLY, labels={"backup": "yes"}, keep={"last": 1})
    )
    (web, _), (db, _) = schedule.volumes
    for volume_id in (web, db):
        world.snapshots.add(volume_id, "old", at("2026-11-22 13:15"), schedule.id)
    world.snapshots.undeletable[web] = InUse("it is being exported", cause="a copy reads it")
    await world.move_to("2026-11-22 14:15")
    assert (len(world.snapshots.of_volume(web)), len(world.snapshots.of_volume(db))) == (2, 1)
    seen = world.schedules.show("hourly")
    assert "were not pruned: it is being exported: a copy reads it" in seen.last_error
    assert (seen.missed_runs, seen.last_run_s) == (0, at("2026-11-22 14:15"))
    world.snapshots.undeletable.clear()
    await world.move_to("2026-11-22 15:15")
    assert times(world, web) == ["20261122t151500z"]
    assert world.schedules.show("hourly").last_error == ""
