"""Schedules: when snapshots are taken by themselves, of which volumes, and how many stay.

The record says what is wanted; ``ScheduleWorker`` does it. A schedule is for one volume, or for all that carry certain
labels when it runs: those are snapshotted in one instant. It prunes nothing but its own snapshots, of volumes that it
is still for; whatever else it took stays when a volume leaves it, and when the schedule is deleted.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from blockvirt.errors import DamagedRecord, Exists, InvalidName, InvalidRequest, NotFound
from blockvirt.ids import check_name, new_id
from blockvirt.limits import MAX_PREVIEW_RUNS, MAX_SCHEDULE_NAME_CHARS
from blockvirt.meta.keys import Table
from blockvirt.meta.records import ScheduleRecord
from blockvirt.meta.store import Store, Writer
from blockvirt.snapshots.cron import check_cron, next_run_s, next_runs_s
from blockvirt.snapshots.retention import Decision, check_keep
from blockvirt.snapshots.schedule_port import SnapshotPort
from blockvirt.snapshots.schedule_records import changed, check_revision, find, insert, remove, wish
from blockvirt.snapshots.schedule_worker import (
    READ_BATCH,
    ScheduleWorker,
    Wait,
    absence,
    decide,
    due_after_s,
    volumes_of,
    wait_for,
)
from blockvirt.volumes.requests import check_labels
from blockvirt.volumes.transactions import locate

__all__ = ["NewSchedule", "Preview", "Schedule", "ScheduleChange", "SchedulePage", "Schedules", "SnapshotPort"]

log = logging.getLogger("blockvirt.schedules")


@dataclass(frozen=True, slots=True)
class NewSchedule:
    """A schedule to create: for ``volume`` (name or id), or for the volumes that carry all of ``labels``."""

    name: str
    cron: str
    """Five fields, in UTC."""
    volume: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    keep: Mapping[str, int] = field(default_factory=dict)
    """Rule of ``retention.RULES`` -> how many; empty: nothing is ever pruned."""
    paused: bool = False


@dataclass(frozen=True, slots=True)
class ScheduleChange:
    """What to change of a schedule; None leaves a thing as it is. The rules to keep by are replaced as a whole."""

    cron: str | None = None
    keep: Mapping[str, int] | None = None
    paused: bool | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule as users see it. Times are seconds since 1970."""

    id: str
    name: str
    cron: str
    created_s: float
    revision: int
    """Counts its users' changes; runs leave it alone."""
    volumes: tuple[tuple[str, str], ...]
    """(id, name) of the volumes that it is for now."""
    volume_id: str
    """The one volume that it is for; empty: those that carry ``labels``."""
    labels: dict[str, str]
    keep: dict[str, int]
    state: str
    """'active', 'running' (a run is under way), 'paused', or 'volume-gone' (its one volume was deleted)."""
    problem: str
    """Why it takes no snapshots, and what to do; empty: nothing is wrong with it."""
    next_run_s: float | None
    """None: it is paused, or its volume is gone."""
    last_run_s: float | None
    """When it last ran, whatever came of it; None: never."""
    last_error: str
    """What went wrong in the last run; empty: nothing."""
    missed_runs: int
    """Runs that did not take place in time, or took no snapshots, ever since it was created."""


@dataclass(frozen=True, slots=True)
class SchedulePage:
    """Some schedules in the order of their names, and the name to go on after (None: that was all)."""

    schedules: tuple[Schedule, ...]
    next_after: str | None


@dataclass(frozen=True, slots=True)
class Preview:
    """What a schedule would do: its next runs, and what retention makes of each volume's snapshots as they are now."""

    next_runs_s: tuple[float, ...]
    decisions: tuple[tuple[str, str, tuple[Decision, ...]], ...]
    """(volume id, volume name, the decisions, newest snapshot first)."""


class Schedules:
    """All schedules of the pool. One per process; call it on the event loop."""

    def __init__(
        self,
        store: Store,
        clock: Callable[[], float],
        snapshots: SnapshotPort,
        *,
        wait: Wait = wait_for,
    ) -> None:
        """``clock()`` is the time in seconds since 1970; ``wait`` is what the worker sleeps by."""
        self._store = store
        self._clock = clock
        self._snapshots = snapshots
        self._worker = ScheduleWorker(store, snapshots, clock=clock, wait=wait)

    async def run(self) -> None:
        """Take snapshots when they are due and prune, until cancelled."""
        await self._worker.run()

    # --- reading ---------------------------------------------------------------------------------------------------

    def show(self, name_or_id: str) -> Schedule:
        """Return a schedule by name or id; raises NotFound, DamagedRecord."""
        with self._store.read() as reader:
            record = find(reader, name_or_id)
        return self._view(record)

    async def list(self, *, after: str = "", limit: int = 100) -> SchedulePage:
        """Return up to ``limit`` schedules named behind ``after``, in the order of names; damaged ones are left out."""
        found: list[Schedule] = []
        while True:
            with self._store.read() as reader:
                names = reader.scan(Table.SCHEDULE_NAMES, start=after.encode() + b"\0" if after else b"")
                batch = [key.decode() for (key, _), _ in zip(names, range(READ_BATCH), strict=False)]
            for name in batch:
                if len(found) == limit:
                    return SchedulePage(tuple(found), after)
                after = name
                try:
                    found.append(self.show(name))
                except (DamagedRecord, NotFound) as error:
                    log.error("schedule %s is left out: %s", name, error.message)
            if len(batch) < READ_BATCH:
                return SchedulePage(tuple(found), None)
            await asyncio.sleep(0)

    def _view(self, record: ScheduleRecord) -> Schedule:
        problem = absence(self._store, record)
        state = "paused" if record.paused else "volume-gone" if problem else "active"
        return Schedule(
            id=record.id,
            name=record.name,
            cron=record.cron,
            created_s=record.created_s,
            revision=record.revision,
            volumes=tuple(volumes_of(self._store, self._snapshots, record)),
            volume_id=record.volume_id,
            labels=dict(record.labels),
            keep=check_keep(record.keep),
            state="running" if self._worker.is_running(record.id) else state,
            problem=problem,
            next_run_s=None if state != "active" else next_run_s(record.cron, due_after_s(record, self._clock())),
            last_run_s=record.last_run_s or None,
            last_error=record.last_error,
            missed_runs=record.missed_runs,
        )

    # --- creating and changing -------------------------------------------------------------------------------------

    async def create(self, wanted: NewSchedule) -> tuple[Schedule, bool]:
        """Create a schedule; True with it if it is new. The same request again returns what is there.

        Its first run is the first one due from now on. Raises InvalidName, InvalidRequest (cron, keep, or not exactly
        one of volume and labels), NotFound (the volume), Exists (the name belongs to another schedule), LimitReached.
        """
        record = self._checked(wanted)
        stored = await self._store.commit(lambda writer: insert(writer, record))
        if stored.id != record.id:
            if wish(stored) != wish(record):
                raise Exists(
                    f"a schedule {record.name!r} exists already and is another one",
                    correction="choose another name, or change the one that is there",
                    schedule_id=stored.id,
                )
            return self._view(stored), False
        log.info("schedule %s (%s) created: %s", record.name, record.id, record.cron)
        self._worker.wake(record.id)
        return self._view(record), True

    def _checked(self, wanted: NewSchedule) -> ScheduleRecord:
        """Return the record that a new schedule would have; raises what ``create`` says of its form."""
        check_name(wanted.name, what="schedule")
        if len(wanted.name) > MAX_SCHEDULE_NAME_CHARS:
            raise InvalidName(
                f"{wanted.name!r} is too long for a schedule",
                cause="its snapshots carry its name and the time in theirs",
                correction=f"use at most {MAX_SCHEDULE_NAME_CHARS} characters",
            )
        if bool(wanted.volume) == bool(wanted.labels):
            raise InvalidRequest(
                "a schedule is for one volume, or for the volumes with certain labels",
                cause="both were given" if wanted.volume else "neither was given",
                correction="give exactly one of volume and labels",
            )
        check_labels(wanted.labels)
        volume_id = ""
        if wanted.volume:
            with self._store.read() as reader:
                volume_id, _ = locate(reader, wanted.volume)
        now_s = self._clock()
        return ScheduleRecord(
            id=new_id(),
            name=wanted.name,
            cron=check_cron(wanted.cron),
            created_s=now_s,
            volume_id=volume_id,
            labels=dict(wanted.labels),
            keep=check_keep(wanted.keep),
            paused=wanted.paused,
            due_after_s=now_s,
        )

    async def change(
        self, name_or_id: str, change: ScheduleChange, *, expected_revision: int | None = None
    ) -> Schedule:
        """Change a schedule; it goes by that at once. What was due while it was paused is not caught up.

        Raises NotFound, PreconditionFailed (another revision than expected), InvalidRequest, DamagedRecord.
        """
        cron = None if change.cron is None else check_cron(change.cron)
        keep = None if change.keep is None else check_keep(change.keep)
        now_s = self._clock()

        def apply(writer: Writer) -> ScheduleRecord:
            current = find(writer, name_or_id)
            check_revision(current, expected_revision)
            wanted = changed(current, cron, keep, change.paused, now_s)
            if wanted == current:
                return current
            wanted = replace(wanted, revision=current.revision + 1)
            writer.put_record(Table.SCHEDULES, wanted.id.encode(), wanted)
            return wanted

        record = await self._store.commit(apply)
        self._worker.wake(record.id)
        return self._view(record)

    async def delete(self, name_or_id: str, *, expected_revision: int | None = None) -> None:
        """Delete a schedule; the snapshots that it took stay. A damaged one can be deleted too, without a revision.

        A run that is under way still takes its snapshots, and prunes no more. Raises NotFound, PreconditionFailed.
        """
        schedule_id = await self._store.commit(lambda writer: remove(writer, name_or_id, expected_revision))
        log.info("schedule %s (%s) deleted", name_or_id, schedule_id)
        self._worker.wake(schedule_id)

    # --- what would be ---------------------------------------------------------------------------------------------

    def preview(self, name_or_id: str, change: ScheduleChange | None = None, *, runs: int = 5) -> Preview:
        """Return what a schedule would do, with ``change`` if one is given; changes nothing.

        ``runs`` is how many next runs are told (0 to ``limits.MAX_PREVIEW_RUNS``); a paused schedule has none, nor
        one whose volume is gone. Raises NotFound, InvalidRequest, DamagedRecord.
        """
        with self._store.read() as reader:
            record = find(reader, name_or_id)
        if change is not None:
            cron = None if change.cron is None else check_cron(change.cron)
            keep = None if change.keep is None else check_keep(change.keep)
            record = changed(record, cron, keep, change.paused, self._clock())
        return self._previewed(record, runs)

    def preview_new(self, wanted: NewSchedule, *, runs: int = 5) -> Preview:
        """Return what a schedule would do if it were created; raises what ``create`` says of its form."""
        return self._previewed(self._checked(wanted), runs)

    def _previewed(self, record: ScheduleRecord, runs: int) -> Preview:
        if not 0 <= runs <= MAX_PREVIEW_RUNS:
            raise InvalidRequest(f"{runs} next runs cannot be told", correction=f"ask for 0 to {MAX_PREVIEW_RUNS}")
        now_s = self._clock()
        is_idle = record.paused or absence(self._store, record)
        next_runs = () if is_idle else next_runs_s(record.cron, due_after_s(record, now_s), runs)
        decisions = tuple(
            (volume_id, name, decide(self._snapshots, record, volume_id, now_s))
            for volume_id, name in volumes_of(self._store, self._snapshots, record)
        )
        return Preview(next_runs, decisions)
