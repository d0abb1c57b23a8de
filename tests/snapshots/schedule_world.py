"""What schedules live in, for their tests: a real store, a clock that tests move, snapshots that are only noted."""

import asyncio
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from blockvirt.errors import Exists, InUse
from blockvirt.ids import check_name, new_id
from blockvirt.meta.keys import Table
from blockvirt.meta.records import SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Store, Writer
from blockvirt.snapshots.schedules import NewSchedule, Schedules
from tests.control.ports import new_store


def at(text: str) -> float:
    """Seconds since 1970 of an ISO date and time in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@dataclass
class Time:
    """A clock, and sleep, which goes by the time that passes instead. Both stand still until a test moves them."""

    now_s: float
    passed_s: float = 0.0
    timeouts_s: list[float] = field(default_factory=list)
    """How long the worker wanted to sleep, each time."""
    deadline_s: float = 0.0
    event: asyncio.Event | None = None
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    asleep: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self) -> float:
        """The time."""
        return self.now_s

    def move_to(self, now_s: float) -> None:
        """Let time pass until it is ``now_s``, and wake who has slept until then."""
        self.passed_s += now_s - self.now_s
        self.now_s = now_s
        self.moved.set()

    def set_to(self, now_s: float) -> None:
        """Set the clock, so that it shows ``now_s`` a minute later."""
        self.passed_s += 60
        self.now_s = now_s
        self.moved.set()

    @property
    def is_asleep(self) -> bool:
        """Whether the worker sleeps and has no reason to wake."""
        return self.event is not None and not self.event.is_set() and self.passed_s < self.deadline_s

    async def wait(self, event: asyncio.Event, timeout_s: float) -> None:
        """Sleep until the event or the time."""
        self.timeouts_s.append(timeout_s)
        self.event, self.deadline_s = event, self.passed_s + timeout_s
        self.asleep.set()
        try:
            while self.is_asleep:
                self.moved.clear()
                await self._either(event)
        finally:
            self.event = None

    async def _either(self, event: asyncio.Event) -> None:
        tasks = [asyncio.create_task(event.wait()), asyncio.create_task(self.moved.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()


@dataclass
class Snapshots:
    """Snapshots as records; a volume in ``broken`` cannot be snapshotted, one in ``stuck`` takes until a test says."""

    time: Time
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    records: list[SnapshotRecord] = field(default_factory=list)
    archived: set[str] = field(default_factory=set)
    broken: dict[str, Exception] = field(default_factory=dict)
    undeletable: dict[str, Exception] = field(default_factory=dict)
    stuck: dict[str, asyncio.Event] = field(default_factory=dict)
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    epoch: int = 0

    async def take(self, volume_ids: Sequence[str], name: str, *, schedule_id: str) -> Sequence[SnapshotRecord]:
        """All of them or none."""
        check_name(name, what="snapshot")
        for volume_id in volume_ids:
            if volume_id in self.stuck:
                self.reached.set()
                await self.stuck[volume_id].wait()
            if volume_id in self.broken:
                raise self.broken[volume_id]
            if name in self.names_of(volume_id):
                raise Exists(f"there is a snapshot {name!r} already")
        group_id = new_id()
        self.epoch += 1
        taken = [
            SnapshotRecord(
                new_id(), volume_id, name, 1, self.epoch, 0, self.time(), group_id=group_id, schedule_id=schedule_id
            )
            for volume_id in volume_ids
        ]
        self.records += taken
        return taken

    def add(
        self, volume_id: str, name: str, created_s: float, schedule_id: str = "", holds: tuple[str, ...] = ()
    ) -> str:
        """A snapshot that is there already; returns its id."""
        record = SnapshotRecord(new_id(), volume_id, name, 1, 0, 0, created_s, schedule_id=schedule_id, holds=holds)
        self.records.append(record)
        return record.id

    def of_volume(self, volume_id: str) -> Sequence[SnapshotRecord]:
        """Those of a volume."""
        return [record for record in self.records if record.volume_id == volume_id]

    def names_of(self, volume_id: str) -> list[str]:
        """What they are called, in the order they were taken in."""
        return [record.name for record in self.of_volume(volume_id)]

    async def delete(self, snapshot_ids: Sequence[str]) -> None:
        """Take them away, as carefully as the real thing."""
        for record in self.records:
            if record.id in snapshot_ids:
                if record.volume_id in self.undeletable:
                    raise self.undeletable[record.volume_id]
                if record.holds or record.id in self.archived:
                    raise InUse(f"snapshot {record.name!r} is held")
        self.records = [record for record in self.records if record.id not in snapshot_ids]

    def bases(self) -> Set[str]:
        """What a test said."""
        return self.archived

    def volumes_with(self, labels: Mapping[str, str]) -> Sequence[tuple[str, str]]:
        """By the labels that the volumes were made with."""
        return [(each, self.names[each]) for each, own in self.labels.items() if labels.items() <= own.items()]


class World:
    """Schedules over a store, with volumes, and a worker that can be started and killed."""

    def __init__(self, path: Path, now_s: float) -> None:
        self.store: Store = new_store(path)
        self.time = Time(now_s)
        self.snapshots = Snapshots(self.time)
        self.schedules = Schedules(self.store, self.time, self.snapshots, wait=self.time.wait)
        self._task: asyncio.Task[None] | None = None

    def volume(self, name: str, **labels: str) -> str:
        """Make a volume; returns its id."""
        record = VolumeRecord(new_id(), name, 1 << 20, 1, 1.0, labels=labels)
        self.snapshots.labels[record.id] = labels
        self.snapshots.names[record.id] = name

        self.store.commit_now(lambda writer: writer.put_record(Table.VOLUMES, record.id.encode(), record))
        self.store.commit_now(lambda writer: writer.put(Table.VOLUME_NAMES, name.encode(), record.id.encode()))
        return record.id

    def change_volume(self, volume_id: str, **changes: object) -> None:
        """Change a volume's record; with ``gone`` it is no more."""

        def change(writer: Writer) -> None:
            record = writer.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
            assert record is not None
            if "gone" in changes:
                writer.delete(Table.VOLUMES, volume_id.encode())
            else:
                writer.put_record(Table.VOLUMES, volume_id.encode(), replace(record, **changes))  # type: ignore[arg-type]

        self.store.commit_now(change)

    async def start(self) -> None:
        """Start the worker, anew after a stop, and let it do what is due."""
        self.schedules = Schedules(self.store, self.time, self.snapshots, wait=self.time.wait)
        self._task = asyncio.create_task(self.schedules.run())
        await self.settle()

    async def stop(self) -> None:
        """End the worker wherever it is."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            assert self._task.cancelled(), self._task.exception()
            self._task = None

    async def close(self) -> None:
        """End everything."""
        await self.stop()
        self.store.close()

    async def move_to(self, text: str) -> None:
        """Let it become ``text``, minute by minute as a clock does, and everything happen that is due."""
        while self.time.now_s < at(text):
            self.time.move_to(min(self.time.now_s + 60 - self.time.now_s % 60, at(text)))
            await self.settle()

    async def jump_to(self, text: str) -> None:
        """Set the clock, and let everything happen that is due by what it shows a minute later."""
        self.time.set_to(at(text))
        await self.settle()

    async def settle(self, *, but: Sequence[str] = ()) -> None:
        """Return when the worker sleeps and no run is under way, but for those of the schedules in ``but``."""
        while not self.time.is_asleep or self._is_running(but):
            self.time.asleep.clear()
            await self.time.asleep.wait()

    def _is_running(self, but: Sequence[str]) -> bool:
        with self.store.read() as reader:
            names = [key.decode() for key, _ in reader.scan(Table.SCHEDULE_NAMES)]
        return any(self.schedules.show(name).state == "running" for name in names if name not in but)


HOURLY = "15 * * * *"


async def create(
    world: World, name: str = "hourly", cron: str = HOURLY, volume: str = "web", **keep: int
) -> tuple[str, str]:
    """A schedule for one volume; returns the ids of the schedule and the volume."""
    schedule, _ = await world.schedules.create(NewSchedule(name, cron, volume, keep=keep))
    await world.settle()
    return schedule.id, schedule.volume_id


def times(world: World, volume_id: str) -> list[str]:
    """When the snapshots of a volume were taken, by their names."""
    return [name.rsplit("-", 1)[1] for name in world.snapshots.names_of(volume_id)]
