"""When a scrub begins by itself, by a clock that tests move."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from blockvirt.limits import KEPT_SCRUBS, SCHEDULE_LOOK_S
from blockvirt.meta.keys import POOL_KEY, Table
from blockvirt.meta.records import PoolRecord, ScrubRecord
from blockvirt.meta.store import Writer
from blockvirt.snapshots.scrub import Clocks, Scrubbing
from blockvirt.snapshots.scrub_schedule import ScrubSchedule
from tests.snapshots.conftest import SnapshotPool
from tests.snapshots.schedule_world import Time, at

MONTHLY = "0 3 1 * *"


class World:
    """A pool that was made in the middle of January, and the schedule of its scrubs."""

    def __init__(self, pool: SnapshotPool, time: Time, scrubbing: Scrubbing) -> None:
        self.pool, self.time, self.scrubbing = pool, time, scrubbing

    @asynccontextmanager
    async def running(self, cron: str = MONTHLY) -> "AsyncIterator[asyncio.Task[None]]":
        """Have the schedule at work, and asleep when the block begins."""
        clocks = Clocks(time_s=self.time)
        schedule = ScrubSchedule(self.pool.engine.store, self.scrubbing, cron, clocks=clocks, wait=self.time.wait)
        self.time.asleep.clear()
        task = asyncio.create_task(schedule.run())
        await asyncio.wait([task, asyncio.create_task(self.time.asleep.wait())], return_when=asyncio.FIRST_COMPLETED)
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def move_to(self, text: str) -> None:
        """Let time pass, and return when the schedule has looked and sleeps again."""
        self.time.asleep.clear()
        self.time.move_to(at(text))
        await self.time.asleep.wait()

    async def done(self) -> list[tuple[float, bool]]:
        """Return when nothing is at work any more; when each scrub was asked for, and whether by the schedule."""
        for job in self.pool.engine.jobs.list(kind="scrub"):
            await self.pool.engine.jobs.finished(job.id)
        return [(each.created_s, bool(each.scheduled_for_s)) for each in reversed(self.scrubbing.results().scrubs)]


@pytest.fixture
async def world(pool: SnapshotPool) -> World:
    time = Time(at("2026-01-15T12:00"))

    def age(writer: Writer) -> None:
        record = writer.record(PoolRecord, Table.POOL, POOL_KEY)
        assert record is not None
        fields = {name: getattr(record, name) for name in PoolRecord.__slots__} | {"created_s": time.now_s}
        writer.put_record(Table.POOL, POOL_KEY, PoolRecord(**fields))

    await pool.engine.store.commit(age)
    return World(pool, time, Scrubbing(pool.engine, clocks=Clocks(time_s=time)))


async def test_once_when_it_is_due_and_never_slept_longer_than_a_minute(world: World) -> None:
    async with world.running():
        assert await world.done() == []
        await world.move_to("2026-02-01T02:59")
        assert await world.done() == []
        await world.move_to("2026-02-01T03:00")
        assert await world.done() == [(at("2026-02-01T03:00"), True)]
        await world.move_to("2026-02-28T23:00")
        await world.move_to("2026-03-01T03:00:30")
        assert await world.done() == [(at("2026-02-01T03:00"), True), (at("2026-03-01T03:00:30"), True)]
    assert max(world.time.timeouts_s) <= SCHEDULE_LOOK_S


async def test_what_was_missed_is_made_up_for_once(world: World) -> None:
    async with world.running():
        await world.move_to("2026-02-01T03:00")
        await world.done()
    world.time.move_to(at("2026-07-09T10:00"))
    async with world.running():
        assert await world.done() == [(at("2026-02-01T03:00"), True), (at("2026-07-09T10:00"), True)]
        await world.move_to("2026-07-31T10:00")
        assert len(await world.done()) == 2
    async with world.running():
        assert len(await world.done()) == 2, "a start is no reason"


async def test_never_where_nobody_wants_it(world: World) -> None:
    async with world.running("") as task:
        assert task.done()
        assert task.exception() is None
    assert await world.done() == []


async def test_another_one_at_work_is_waited_for_and_the_same_counts(world: World) -> None:
    gate = asyncio.Event()

    async def rest(seconds: float) -> None:
        await gate.wait()

    await world.pool.volume(1 << 20, "v")
    world.scrubbing._clocks = Clocks(time_s=world.time, rest=rest)
    part = await world.scrubbing.start(["v"])
    async with world.running():
        await world.move_to("2026-02-01T03:00")
        assert len(world.scrubbing.results().scrubs) == 1
        gate.set()
        await world.pool.engine.jobs.finished(part)
        await world.move_to("2026-02-01T03:01")
        assert [by_schedule for _, by_schedule in await world.done()] == [False, True]
        gate.clear()
        whole = await world.scrubbing.start()
        await world.move_to("2026-03-01T03:00")
        gate.set()
        await world.pool.engine.jobs.finished(whole)
        await world.move_to("2026-03-01T03:01")
        assert [by_schedule for _, by_schedule in await world.done()] == [False, True, True], "that one will do"


async def test_a_wrong_clock_stops_it_only_until_it_is_right(world: World) -> None:
    world.time.move_to(at("2036-01-01T12:00"))
    async with world.running():
        assert len(await world.done()) == 1, "the first look, ten years late"
        world.time.asleep.clear()
        world.time.set_to(at("2026-01-20T12:00"))
        await world.time.asleep.wait()
        assert len(await world.done()) == 1
    schedule = ScrubSchedule(world.pool.engine.store, world.scrubbing, MONTHLY)
    assert schedule.due_after_s(at("2026-01-20T12:00")) == at("2026-01-20T12:00")


async def test_only_the_last_results_are_kept_and_what_says_when_the_next_is_owed(world: World) -> None:
    async with world.running():
        await world.move_to("2026-02-01T03:00")
        await world.done()
        for _ in range(KEPT_SCRUBS + 5):
            world.time.now_s += 1
            await world.pool.engine.jobs.finished(await world.scrubbing.start())
    kept: list[ScrubRecord] = list(world.scrubbing.results().scrubs)
    assert len(kept) == KEPT_SCRUBS + 1
    assert [bool(each.scheduled_for_s) for each in kept] == [False] * KEPT_SCRUBS + [True]
    assert [each.created_s for each in kept] == sorted((each.created_s for each in kept), reverse=True)
