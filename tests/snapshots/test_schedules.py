"""Schedules as their users see them: creating, changing, listing, deleting, looking ahead."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blockvirt.errors import (
    BlockvirtError,
    DamagedRecord,
    Exists,
    InvalidName,
    InvalidRequest,
    LimitReached,
    NotFound,
    PreconditionFailed,
)
from blockvirt.ids import check_name, new_id
from blockvirt.limits import MAX_PREVIEW_RUNS, MAX_SCHEDULE_NAME_CHARS
from blockvirt.meta.keys import Table
from blockvirt.snapshots import schedule_records
from blockvirt.snapshots.schedule_worker import MAX_NAME_ATTEMPTS, snapshot_name
from blockvirt.snapshots.schedules import NewSchedule, Schedule, ScheduleChange
from tests.snapshots.schedule_world import World, at

NIGHTLY = "30 2 * * *"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A Sunday afternoon, three volumes, no worker."""
    world = World(tmp_path / "meta", at("2026-11-22 14:00"))
    world.volume("web", backup="yes", tier="fast")
    world.volume("db", backup="yes")
    world.volume("scratch")
    yield world
    await world.close()


async def create(world: World, name: str = "nightly", cron: str = NIGHTLY, volume: str = "web") -> Schedule:
    """A schedule for one volume."""
    schedule, created = await world.schedules.create(NewSchedule(name, cron, volume))
    assert created
    return schedule


# --- creating --------------------------------------------------------------------------------------------------------


async def test_a_schedule_is_what_was_asked_for(world: World) -> None:
    """For one volume, by its name; found by name and by id."""
    wanted = NewSchedule("nightly", " 30 2  * * * ", "web", keep={"weekly": 4, "daily": 7})
    schedule, created = await world.schedules.create(wanted)
    assert created
    assert (schedule.name, schedule.cron, schedule.keep) == ("nightly", NIGHTLY, {"daily": 7, "weekly": 4})
    assert [name for _, name in schedule.volumes] == ["web"]
    assert schedule.volume_id == schedule.volumes[0][0]
    assert (schedule.state, schedule.revision, schedule.created_s) == ("active", 1, at("2026-11-22 14:00"))
    assert schedule.next_run_s == at("2026-11-23 02:30")
    assert (schedule.last_run_s, schedule.last_error, schedule.missed_runs) == (None, "", 0)
    for name_or_id in ("nightly", schedule.id, schedule.id.replace("-", "")):
        assert world.schedules.show(name_or_id) == schedule


async def test_a_schedule_for_labels_is_for_whoever_carries_them(world: World) -> None:
    """Also for volumes that come later."""
    schedule, _ = await world.schedules.create(NewSchedule("nightly", NIGHTLY, labels={"backup": "yes"}))
    assert (schedule.volume_id, schedule.labels) == ("", {"backup": "yes"})
    assert [name for _, name in schedule.volumes] == ["web", "db"]
    world.volume("new", backup="yes")
    assert [name for _, name in world.schedules.show("nightly").volumes] == ["web", "db", "new"]


async def test_a_volume_that_went_leaves_its_id(world: World) -> None:
    """The schedule can still be looked at, and deleted."""
    schedule = await create(world)
    world.store.commit_now(lambda writer: writer.delete(Table.VOLUMES, schedule.volume_id.encode()))
    assert world.schedules.show("nightly").volumes == ((schedule.volume_id, schedule.volume_id),)


async def test_the_same_again_is_what_is_there(world: World) -> None:
    """Whoever got no answer asks again; the times are those of the first request."""
    first = await create(world)
    world.time.now_s += 60
    again, created = await world.schedules.create(NewSchedule("nightly", NIGHTLY, first.volume_id))
    assert (again, created) == (first, False)


@pytest.mark.parametrize(
    "other",
    [
        NewSchedule("nightly", "0 3 * * *", "web"),
        NewSchedule("nightly", NIGHTLY, "db"),
        NewSchedule("nightly", NIGHTLY, labels={"backup": "yes"}),
        NewSchedule("nightly", NIGHTLY, "web", keep={"last": 1}),
        NewSchedule("nightly", NIGHTLY, "web", paused=True),
    ],
)
async def test_a_name_is_given_once(world: World, other: NewSchedule) -> None:
    """Another schedule needs another name; the one that is there stays as it is."""
    first = await create(world)
    with pytest.raises(Exists, match="'nightly' exists already") as caught:
        await world.schedules.create(other)
    assert caught.value.details == {"schedule_id": first.id}
    assert world.schedules.show("nightly") == first


@pytest.mark.parametrize(
    ("wanted", "error", "said"),
    [
        (NewSchedule("nightly", "nonsense", "web"), InvalidRequest, "'nonsense' is not a cron expression"),
        (NewSchedule("nightly", "0 25 * * *", "web"), InvalidRequest, "the field hour"),
        (NewSchedule("nightly", "0 0 30 2 *", "web"), InvalidRequest, "never fires"),
        (NewSchedule("nightly", NIGHTLY), InvalidRequest, "for one volume, or for"),
        (NewSchedule("nightly", NIGHTLY, ""), InvalidRequest, "for one volume, or for"),
        (NewSchedule("nightly", NIGHTLY, "web", {"backup": "yes"}), InvalidRequest, "for one volume, or for"),
        (NewSchedule("nightly", NIGHTLY, labels={"": "yes"}), InvalidRequest, "the label ''"),
        (NewSchedule("nightly", NIGHTLY, "nothing"), NotFound, "no volume 'nothing'"),
        (NewSchedule("nightly", NIGHTLY, new_id()), NotFound, "no volume"),
        (NewSchedule("nightly", NIGHTLY, "web", keep={"hourly": 1, "minutely": 5}), InvalidRequest, "'minutely'"),
        (NewSchedule("nightly", NIGHTLY, "web", keep={"daily": -1}), InvalidRequest, "cannot keep -1"),
        (NewSchedule("nightly", NIGHTLY, "web", keep={"daily": 10_001}), InvalidRequest, "cannot keep 10001"),
        (NewSchedule("", NIGHTLY, "web"), InvalidName, "cannot be the name"),
        (NewSchedule("web@night", NIGHTLY, "web"), InvalidName, "cannot be the name"),
        (NewSchedule("a/b", NIGHTLY, "web"), InvalidName, "cannot be the name"),
        (NewSchedule("a\0", NIGHTLY, "web"), InvalidName, "cannot be the name"),
        (NewSchedule("x" * 300, NIGHTLY, "web"), InvalidName, "cannot be the name"),
        (NewSchedule(new_id(), NIGHTLY, "web"), InvalidName, "looks like an id"),
        (NewSchedule("x" * (MAX_SCHEDULE_NAME_CHARS + 1), NIGHTLY, "web"), InvalidName, "too long"),
    ],
)
async def test_what_cannot_be_is_refused(
    world: World, wanted: NewSchedule, error: type[BlockvirtError], said: str
) -> None:
    """With what would be right; nothing is stored, and a preview says the same."""
    with pytest.raises(error, match=said) as caught:
        await world.schedules.create(wanted)
    assert caught.value.correction
    with pytest.raises(error, match=said):
        world.schedules.preview_new(wanted)
    assert (await world.schedules.list()).schedules == ()


def test_every_name_of_a_snapshot_is_one() -> None:
    """Also for the longest schedule, and when others have taken the name."""
    name = snapshot_name("x" * MAX_SCHEDULE_NAME_CHARS, at("2026-11-22 14:15"), MAX_NAME_ATTEMPTS)
    assert check_name(name, what="snapshot").endswith("x-20261122t141500z-9")
    assert snapshot_name("nightly", at("2026-11-22 14:15")) == "auto-nightly-20261122t141500z"


async def test_schedules_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is refused; what is there can still be asked for again."""
    monkeypatch.setattr(schedule_records, "MAX_SCHEDULES", 2)
    await create(world, "a")
    await create(world, "b")
    with pytest.raises(LimitReached, match="2 schedules"):
        await create(world, "c")
    assert (await world.schedules.create(NewSchedule("b", NIGHTLY, "web")))[1] is False


# --- looking ---------------------------------------------------------------------------------------------------------


async def test_the_list_goes_by_name_in_pages(world: World) -> None:
    """More than one batch of them; the end is told."""
    names = [f"s{number:02d}" for number in range(25)]
    for name in reversed(names):
        await create(world, name)
    first = await world.schedules.list(limit=12)
    assert ([each.name for each in first.schedules], first.next_after) == (names[:12], "s11")
    rest = await world.schedules.list(after="s11", limit=100)
    assert ([each.name for each in rest.schedules], rest.next_after) == (names[12:], None)


@pytest.mark.parametrize("name", ["", "nothing", "x" * 5_000, "ä", "\udcff", "5ad0cd27-6a5c-4c3a-8f3c-0c2d7d5c3c11"])
async def test_what_is_not_there_is_not_found(world: World, name: str) -> None:
    """Whatever it is called, and whatever was to be done with it."""
    await create(world)
    with pytest.raises(NotFound, match="there is no schedule"):
        world.schedules.show(name)
    with pytest.raises(NotFound):
        world.schedules.preview(name)
    with pytest.raises(NotFound):
        await world.schedules.change(name, ScheduleChange(paused=True))
    with pytest.raises(NotFound):
        await world.schedules.delete(name)


async def test_a_damaged_schedule_hides_no_other_and_can_go(world: World) -> None:
    """Its record cannot be read, but it can be deleted, and its name used again."""
    damaged = await create(world, "a")
    await create(world, "b")
    world.store.commit_now(lambda writer: writer.put(Table.SCHEDULES, damaged.id.encode(), b"nonsense"))
    assert [each.name for each in (await world.schedules.list()).schedules] == ["b"]
    with pytest.raises(DamagedRecord):
        world.schedules.show("a")
    await world.schedules.delete(damaged.id)
    await create(world, "a")


async def test_a_name_without_a_record_can_go(world: World) -> None:
    """The same, where the record is missing."""
    lost = await create(world)
    world.store.commit_now(lambda writer: writer.delete(Table.SCHEDULES, lost.id.encode()))
    with pytest.raises(DamagedRecord, match="no record"):
        world.schedules.show("nightly")
    assert (await world.schedules.list()).schedules == ()
    await world.schedules.delete("nightly")
    await create(world)


# --- changing --------------------------------------------------------------------------------------------------------


async def test_a_change_counts_and_what_is_not_named_stays(world: World) -> None:
    """A new cron goes by the time of the change; a change that changes nothing is none."""
    first, _ = await world.schedules.create(NewSchedule("nightly", NIGHTLY, "web", keep={"daily": 7}))
    world.time.now_s = at("2026-11-22 15:00")
    second = await world.schedules.change("nightly", ScheduleChange(cron="30  14 * * *"))
    assert (second.cron, second.keep, second.revision) == ("30 14 * * *", first.keep, 2)
    assert second.next_run_s == at("2026-11-23 14:30")  # not half an hour ago
    third = await world.schedules.change(first.id, ScheduleChange(keep={"last": 3}), expected_revision=2)
    assert (third.cron, third.keep, third.revision) == ("30 14 * * *", {"last": 3}, 3)
    fourth = await world.schedules.change("nightly", ScheduleChange(keep={"last": 3}, paused=False))
    assert fourth == third


async def test_a_paused_schedule_has_no_next_run(world: World) -> None:
    """Until the pause ends."""
    await create(world)
    paused = await world.schedules.change("nightly", ScheduleChange(paused=True))
    assert (paused.state, paused.next_run_s) == ("paused", None)
    resumed = await world.schedules.change("nightly", ScheduleChange(paused=False))
    assert (resumed.state, resumed.next_run_s) == ("active", at("2026-11-23 02:30"))


async def test_a_change_over_anothers_is_refused(world: World) -> None:
    """If-Match; the same for deleting, after which the schedule is gone by name and by id."""
    schedule = await create(world)
    await world.schedules.change("nightly", ScheduleChange(paused=True))
    with pytest.raises(PreconditionFailed, match="revision 2, not 1"):
        await world.schedules.change("nightly", ScheduleChange(paused=False), expected_revision=1)
    with pytest.raises(PreconditionFailed):
        await world.schedules.delete("nightly", expected_revision=1)
    assert world.schedules.show("nightly").state == "paused"
    await world.schedules.delete("nightly", expected_revision=2)
    assert (await world.schedules.list()).schedules == ()
    with pytest.raises(NotFound):
        world.schedules.show(schedule.id)


@pytest.mark.parametrize(
    "change",
    [ScheduleChange(cron="nonsense"), ScheduleChange(keep={"minutely": 1}), ScheduleChange(keep={"daily": -1})],
)
async def test_a_change_to_nonsense_is_refused(world: World, change: ScheduleChange) -> None:
    """And nothing of it is kept."""
    first = await create(world)
    with pytest.raises(InvalidRequest):
        await world.schedules.change("nightly", change)
    with pytest.raises(InvalidRequest):
        world.schedules.preview("nightly", change)
    assert world.schedules.show("nightly") == first


# --- looking ahead ---------------------------------------------------------------------------------------------------


async def test_a_preview_tells_the_next_runs_and_what_would_go(world: World) -> None:
    """For each volume, with the reasons; nothing is touched."""
    schedule, _ = await world.schedules.create(
        NewSchedule("nightly", NIGHTLY, labels={"backup": "yes"}, keep={"last": 1})
    )
    (web, _), (db, _) = schedule.volumes
    old = world.snapshots.add(web, "old", at("2026-11-20 02:30"), schedule.id)
    new = world.snapshots.add(web, "new", at("2026-11-21 02:30"), schedule.id)
    base = world.snapshots.add(db, "base", at("2026-11-19 02:30"), schedule.id)
    hand = world.snapshots.add(db, "by-hand", at("2026-11-20 02:30"))
    world.snapshots.archived = {base}
    before = list(world.snapshots.records)
    preview = world.schedules.preview("nightly", runs=2)
    assert preview.next_runs_s == (at("2026-11-23 02:30"), at("2026-11-24 02:30"))
    assert [
        (volume_id, name, [(each.snapshot.id, each.keep, each.reasons) for each in decisions])
        for volume_id, name, decisions in preview.decisions
    ] == [
        (web, "web", [(new, True, ("last 1",)), (old, False, ("no rule keeps it",))]),
        (db, "db", [(hand, True, ("not taken by this schedule",)), (base, True, ("last 1", "base of an archive"))]),
    ]
    changed = world.schedules.preview("nightly", ScheduleChange(cron="0 12 * * *", keep={"last": 2}), runs=1)
    assert changed.next_runs_s == (at("2026-11-23 12:00"),)
    assert all(each.keep for _, _, decisions in changed.decisions for each in decisions)
    assert (world.schedules.show("nightly"), world.snapshots.records) == (schedule, before)


async def test_a_preview_of_what_is_not_there_yet(world: World) -> None:
    """Before it is created; it is not."""
    preview = world.schedules.preview_new(NewSchedule("nightly", NIGHTLY, "web"), runs=1)
    assert preview.next_runs_s == (at("2026-11-23 02:30"),)
    assert [name for _, name, _ in preview.decisions] == ["web"]
    assert (await world.schedules.list()).schedules == ()
    assert world.schedules.preview_new(NewSchedule("nightly", NIGHTLY, "web", paused=True)).next_runs_s == ()


async def test_a_preview_is_bounded(world: World) -> None:
    """So many runs, and not fewer than none."""
    await create(world)
    assert len(world.schedules.preview("nightly", runs=MAX_PREVIEW_RUNS).next_runs_s) == MAX_PREVIEW_RUNS
    assert world.schedules.preview("nightly", runs=0).next_runs_s == ()
    for runs in (-1, MAX_PREVIEW_RUNS + 1):
        with pytest.raises(InvalidRequest, match="cannot be told"):
            world.schedules.preview("nightly", runs=runs)
