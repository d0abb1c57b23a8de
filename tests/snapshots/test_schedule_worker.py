"""The worker of the schedules: what it takes when, what it prunes, and what trouble leaves behind."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blockvirt.limits import SCHEDULE_LOOK_S
from blockvirt.meta.keys import Table
from blockvirt.snapshots.schedule_worker import wait_for
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


# --- when ------------------------------------------------------------------------------------------------------------


async def test_a_snapshot_is_taken_when_it_is_due(world: World) -> None:
    """Not before, once, and it says which schedule took it."""
    schedule_id, web = await create(world)
    await world.move_to("2026-11-22 14:14:59")
    assert world.snapshots.names_of(web) == []
    await world.move_to("2026-11-22 15:16")
    assert world.snapshots.names_of(web) == ["auto-hourly-20261122t141500z", "auto-hourly-20261122t151500z"]
    assert {each.schedule_id for each in world.snapshots.records} == {schedule_id}
    seen = world.schedules.show("hourly")
    assert (seen.last_run_s, seen.next_run_s) == (at("2026-11-22 15:15"), at("2026-11-22 16:15"))
    assert (seen.last_error, seen.missed_runs, seen.revision, seen.state) == ("", 0, 1, "active")


async def test_it_sleeps_until_then_but_looks_at_the_clock(world: World) -> None:
    """The clock may be set meanwhile, forwards too: never longer than a minute."""
    await world.jump_to("2026-11-22 14:13:50")
    await create(world)
    assert world.time.timeouts_s[-1] == SCHEDULE_LOOK_S
    await world.jump_to("2026-11-22 14:14:50")
    assert world.time.timeouts_s[-1] == 10
    await create(world, "sooner", "14 * * * *")
    await world.schedules.change("hourly", ScheduleChange(paused=True))
    await world.settle()
    assert world.time.timeouts_s[-1] == SCHEDULE_LOOK_S  # the change woke it; no minute has passed


async def test_a_group_is_one_instant(world: World) -> None:
    """All volumes with the labels at the time of the run, by one call; none where nobody carries them."""
    await world.schedules.create(NewSchedule("hourly", HOURLY, labels={"backup": "yes"}))
    await world.schedules.create(NewSchedule("nobody", HOURLY, labels={"backup": "no"}))
    world.volume("new", backup="yes")
    await world.move_to("2026-11-22 14:15")
    taken = world.snapshots.records
    assert [world.snapshots.names[each.volume_id] for each in taken] == ["web", "db", "new"]
    assert len({each.group_id for each in taken}) == 1
    nobody = world.schedules.show("nobody")
    assert (nobody.last_run_s, nobody.last_error, nobody.missed_runs) == (at("2026-11-22 14:15"), "", 0)


async def test_a_change_wakes_the_worker(world: World) -> None:
    """A cron that is due sooner; a pause; its end, which owes nothing of what was due in between."""
    _, web = await create(world, cron="15 20 * * *")
    await world.schedules.change("hourly", ScheduleChange(cron=HOURLY))
    await world.move_to("2026-11-22 14:15")
    assert times(world, web) == ["20261122t141500z"]
    await world.schedules.change("hourly", ScheduleChange(paused=True))
    await world.move_to("2026-11-22 16:20")
    await world.schedules.change("hourly", ScheduleChange(paused=False))
    await world.move_to("2026-11-22 17:20")
    assert times(world, web) == ["20261122t141500z", "20261122t171500z"]
    assert world.schedules.show("hourly").missed_runs == 0


async def test_a_deleted_schedule_runs_no_more(world: World) -> None:
    """What it took stays."""
    _, web = await create(world, last=1)
    await world.move_to("2026-11-22 14:15")
    await world.schedules.delete("hourly")
    await world.move_to("2026-11-22 15:20")
    assert times(world, web) == ["20261122t141500z"]


# --- pruning ---------------------------------------------------------------------------------------------------------


async def test_it_prunes_its_own_and_nothing_else(world: World) -> None:
    """Neither what somebody took or holds, nor another schedule's, nor a base, nor another volume's."""
    schedule_id, web = await create(world, last=2)
    other_id, _ = await create(world, "other", "0 0 1 1 *", last=1)
    db = next(each for each, name in world.snapshots.names.items() if name == "db")
    spared = {
        world.snapshots.add(web, "by-hand", at("2026-01-01 00:00")),
        world.snapshots.add(web, "others-1", at("2026-01-01 00:00"), other_id),
        world.snapshots.add(web, "others-2", at("2026-01-02 00:00"), other_id),
        world.snapshots.add(web, "held", at("2026-01-03 00:00"), schedule_id, holds=("legal",)),
        world.snapshots.add(db, "moved", at("2026-01-04 00:00"), schedule_id),
    }
    base = world.snapshots.add(web, "base", at("2026-01-05 00:00"), schedule_id)
    world.snapshots.archived = {base}
    gone = world.snapshots.add(web, "old", at("2026-11-22 13:15"), schedule_id)
    await world.move_to("2026-11-22 16:20")
    left = {each.id for each in world.snapshots.records}
    assert spared | {base} <= left
    assert gone not in left
    assert [name for name in world.snapshots.names_of(web) if name.startswith("auto")] == [
        "auto-hourly-20261122t151500z",
        "auto-hourly-20261122t161500z",
    ]


async def test_without_rules_nothing_goes(world: World) -> None:
    """However many there are."""
    _, web = await create(world, cron="* * * * *")
    await world.move_to("2026-11-22 14:30")
    assert len(times(world, web)) == 30


async def test_pruning_goes_by_the_rules_of_now(world: World) -> None:
    """A change while snapshots are taken counts for the pruning after it."""
    schedule_id, web = await create(world, last=1)
    old = world.snapshots.add(web, "old", at("2026-11-22 13:15"), schedule_id)
    release = world.snapshots.stuck[web] = asyncio.Event()
    world.time.move_to(at("2026-11-22 14:15"))
    await world.snapshots.reached.wait()
    assert world.schedules.show("hourly").state == "running"
    await world.schedules.change("hourly", ScheduleChange(keep={"last": 2}))
    await world.settle(but=["hourly"])
    release.set()
    await world.settle()
    assert world.snapshots.names_of(web) == ["old", "auto-hourly-20261122t141500z"]
    assert old in {each.id for each in world.snapshots.records}
    assert world.schedules.show("hourly").revision == 2


async def test_a_schedule_that_is_deleted_while_it_runs_stays_deleted(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """The run takes what it had begun, and prunes nothing."""
    schedule_id, web = await create(world, last=1)
    world.snapshots.add(web, "old", at("2026-11-22 13:15"), schedule_id)
    release = world.snapshots.stuck[web] = asyncio.Event()
    world.time.move_to(at("2026-11-22 14:15"))
    await world.snapshots.reached.wait()
    await world.schedules.delete("hourly")
    release.set()
    await create(world, "next", "20 * * * *")
    await world.move_to("2026-11-22 14:20")
    assert world.snapshots.names_of(web) == ["old", "auto-hourly-20261122t141500z", "auto-next-20261122t142000z"]
    with world.store.read() as reader:
        assert reader.count(Table.SCHEDULES) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# --- downtime --------------------------------------------------------------------------------------------------------


async def test_missed_runs_are_counted_and_caught_up_by_one(world: World) -> None:
    """The snapshot is called by when it was really taken; the next run is the regular one."""
    _, web = await create(world)
    await world.stop()
    world.time.now_s = at("2026-11-22 18:05")
    assert world.schedules.show("hourly").next_run_s == at("2026-11-22 14:15")  # overdue
    await world.start()
    assert times(world, web) == ["20261122t180500z"]
    seen = world.schedules.show("hourly")
    assert (seen.missed_runs, seen.next_run_s) == (4, at("2026-11-22 18:15"))
    await world.move_to("2026-11-22 18:15")
    assert times(world, web) == ["20261122t180500z", "20261122t181500z"]
    assert world.schedules.show("hourly").missed_runs == 4


async def test_a_short_downtime_misses_nothing(world: World) -> None:
    """A restart across the minute of a run delays it by seconds: it takes place, under its own time."""
    _, web = await create(world)
    await world.stop()
    world.time.now_s = at("2026-11-22 14:15:40")
    await world.start()
    assert times(world, web) == ["20261122t141500z"]
    assert world.schedules.show("hourly").missed_runs == 0


async def test_a_restart_owes_nothing_twice(world: World) -> None:
    """What has run is noted; what was created, and not due yet, is not late."""
    _, web = await create(world)
    await world.move_to("2026-11-22 14:15")
    await world.stop()
    await world.start()
    await world.move_to("2026-11-22 14:30")
    assert (times(world, web), world.schedules.show("hourly").missed_runs) == (["20261122t141500z"], 0)


async def test_years_of_downtime_are_counted_up_to_a_bound(world: World) -> None:
    """And one snapshot is taken."""
    _, web = await create(world, cron="* * * * *")
    await world.stop()
    world.time.now_s = at("2028-11-22 14:15:30")
    await world.start()
    assert (times(world, web), world.schedules.show("hourly").missed_runs) == (["20281122t141500z"], 999)


async def test_a_run_that_was_cut_short_is_repeated(world: World) -> None:
    """The daemon dies while the snapshot is taken: the run is still owed at the next start."""
    _, web = await create(world)
    release = world.snapshots.stuck[web] = asyncio.Event()
    world.time.move_to(at("2026-11-22 14:15"))
    await world.snapshots.reached.wait()
    await world.stop()
    world.snapshots.stuck.clear()
    release.set()  # nobody waits for that any more
    world.time.now_s += 20
    await world.start()
    assert times(world, web) == ["20261122t141500z"]
    assert world.schedules.show("hourly").missed_runs == 0


async def test_a_run_longer_than_its_interval_misses_the_runs_between(world: World) -> None:
    """Never two of one schedule at once; what it slept through is counted, the last of it is in time."""
    _, web = await create(world, cron="* * * * *")
    release = world.snapshots.stuck[web] = asyncio.Event()
    world.time.move_to(at("2026-11-22 14:01"))
    await world.snapshots.reached.wait()
    world.time.move_to(at("2026-11-22 14:05:30"))
    del world.snapshots.stuck[web]
    release.set()
    await world.settle()
    assert times(world, web) == ["20261122t140100z", "20261122t140500z"]
    assert world.schedules.show("hourly").missed_runs == 3  # 14:02, 14:03, 14:04


# --- the clock -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restart", [False, True])
async def test_a_clock_that_is_corrected_a_little_repeats_no_run(world: World, restart: bool) -> None:
    """It goes back across the minute of a run that was."""
    _, web = await create(world)
    await world.move_to("2026-11-22 14:15")
    await world.jump_to("2026-11-22 14:14:59")
    if restart:
        await world.stop()
        await world.start()
    await world.move_to("2026-11-22 15:15")
    assert times(world, web) == ["20261122t141500z", "20261122t151500z"]


@pytest.mark.parametrize("restart", [False, True])
async def test_a_clock_that_was_wrong_by_years_stops_no_schedule(world: World, restart: bool) -> None:
    """Its runs are due by the clock as it is now, not when the wrong one comes round again."""
    _, web = await create(world)
    await world.jump_to("2036-01-01 00:15")
    assert len(times(world, web)) == 1
    if restart:
        await world.stop()
        world.time.now_s = at("2026-11-22 14:00")
        await world.start()
    else:
        await world.jump_to("2026-11-22 14:00")
    assert world.schedules.show("hourly").next_run_s == at("2026-11-22 14:15")
    await world.move_to("2026-11-22 15:15")
    assert times(world, web)[1:] == ["20261122t141500z", "20261122t151500z"]


async def test_a_clock_that_jumps_ahead_is_a_downtime(world: World) -> None:
    """The machine slept: one run, the others counted."""
    _, web = await create(world)
    await world.jump_to("2026-11-22 17:40")
    assert (times(world, web), world.schedules.show("hourly").missed_runs) == (["20261122t174000z"], 4)


async def test_waiting_ends_with_the_event_and_with_the_time() -> None:
    """The real clock's side of it: neither waits for the other."""
    event = asyncio.Event()
    await wait_for(event, 0.0)
    event.set()
    await wait_for(event, 3_600.0)
