"""The worker of the schedules: takes snapshots when they are due, then lets retention prune.

A run is owed from the time it is due until it has ended and that is noted in the schedule's record. So a crash repeats
a run (one snapshot too many, pruned like any other) and never drops one. Runs that a downtime, a machine asleep, or a
run that took too long left behind are counted and caught up by a single one.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

from blockvirt.errors import BlockvirtError, DamagedRecord, Exists, InvalidRequest, PoolFull, ShuttingDown
from blockvirt.limits import MAX_MISSED_RUNS, SCHEDULE_CLOCK_STEP_S, SCHEDULE_LATE_S, SCHEDULE_LOOK_S
from blockvirt.meta.keys import Table
from blockvirt.meta.records import ScheduleRecord, VolumeRecord
from blockvirt.meta.store import Store, Writer
from blockvirt.snapshots.cron import next_run_s, runs_between
from blockvirt.snapshots.retention import Decision, plan
from blockvirt.snapshots.schedule_port import SnapshotPort
from blockvirt.tasks import TaskSet

log = logging.getLogger("blockvirt.schedules")

READ_BATCH = 10  # schedules read before others run: about a millisecond, most of it for their cron expressions
MAX_NAME_ATTEMPTS = 9  # a run's name, then the same with -2 to -9 behind it

Wait = Callable[[asyncio.Event, float], Awaitable[None]]
"""``wait(event, timeout_s)`` returns when the event is set, and when the time is over."""


async def wait_for(event: asyncio.Event, timeout_s: float) -> None:
    """Return when ``event`` is set, at the latest after ``timeout_s``."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass


def due_after_s(record: ScheduleRecord, now_s: float) -> float:
    """Return the time after which runs of a schedule are owed.

    What is noted counts, unless it lies so far in the future that the clock must have been wrong when it was.
    """
    return record.due_after_s if record.due_after_s <= now_s + SCHEDULE_CLOCK_STEP_S else now_s


def snapshot_name(schedule_name: str, time_s: float, attempt: int = 1) -> str:
    """Return what the snapshots of a run are called; further attempts get a number behind it."""
    moment = datetime.fromtimestamp(time_s, UTC)
    return f"auto-{schedule_name}-{moment:%Y%m%dt%H%M%Sz}{f'-{attempt}' if attempt > 1 else ''}"


def volumes_of(store: Store, snapshots: SnapshotPort, record: ScheduleRecord) -> Sequence[tuple[str, str]]:
    """Return (id, name) of the volumes that a schedule is for now; the id stands for the name of one that is gone."""
    if not record.volume_id:
        return snapshots.volumes_with(record.labels)
    with store.read() as reader:
        volume = reader.record(VolumeRecord, Table.VOLUMES, record.volume_id.encode())
    return [(record.volume_id, volume.name if volume is not None else record.volume_id)]


def absence(store: Store, record: ScheduleRecord) -> str:
    """Say why the one volume of a schedule cannot be snapshotted for now, or ever again; empty: it is there."""
    if not record.volume_id:
        return ""
    with store.read() as reader:
        volume = reader.record(VolumeRecord, Table.VOLUMES, record.volume_id.encode())
    if volume is None or volume.deleting:
        return f"its volume {record.volume_id} is gone: 'blockvirt schedule delete {record.name}' ends it"
    if volume.trashed_s:
        return f"its volume {volume.name} is in the trash: 'blockvirt trash restore {volume.id}' lets it go on"
    return ""


def decide(snapshots: SnapshotPort, record: ScheduleRecord, volume_id: str, now_s: float) -> tuple[Decision, ...]:
    """Return what retention makes of a volume's snapshots, by the rules of a schedule."""
    found = snapshots.of_volume(volume_id)
    return plan(found, record.keep, now_s, schedule_id=record.id, bases=snapshots.bases())


class ScheduleWorker:
    """Runs the schedules of a pool. One per process; each schedule has at most one run at a time."""

    def __init__(
        self, store: Store, snapshots: SnapshotPort, *, clock: Callable[[], float], wait: Wait = wait_for
    ) -> None:
        """``clock()`` is the time in seconds since 1970; ``wait`` waits for an event or for so long."""
        self._store = store
        self._snapshots = snapshots
        self._clock = clock
        self._wait = wait
        self._woken = asyncio.Event()
        self._stale: set[str] = set()
        self._due_s: dict[str, float] = {}
        self._running: set[str] = set()

    def wake(self, schedule_id: str) -> None:
        """Say that a schedule was created, changed or deleted."""
        self._stale.add(schedule_id)
        self._woken.set()

    def is_running(self, schedule_id: str) -> bool:
        """Tell whether a run of the schedule is under way."""
        return schedule_id in self._running

    async def run(self) -> None:
        """Work until cancelled; a run that is under way then ends without being noted, and is owed at the next start.

        Never sleeps longer than ``limits.SCHEDULE_LOOK_S``, because the clock may be set meanwhile.
        """
        tasks = TaskSet("schedules")
        seen_s = math.inf
        try:
            while True:
                self._woken.clear()
                now_s = self._clock()
                if now_s >= seen_s - SCHEDULE_CLOCK_STEP_S or self._forget_all():  # the first look, or it went back
                    seen_s = now_s
                await self._read_stale()
                for schedule_id in [each for each, due_s in self._due_s.items() if due_s <= now_s]:
                    del self._due_s[schedule_id]
                    self._running.add(schedule_id)
                    tasks.start(self._work(schedule_id), schedule_id)
                next_s = min(self._due_s.values(), default=math.inf)
                await self._wait(self._woken, min(max(next_s - self._clock(), 0.0), SCHEDULE_LOOK_S))
        finally:
            await tasks.close()

    # --- when ------------------------------------------------------------------------------------------------------

    def _forget_all(self) -> bool:
        """Have all schedules read anew; False if that has to be tried again."""
        try:
            with self._store.read() as reader:
                self._stale |= {key.decode(errors="replace") for key, _ in reader.scan(Table.SCHEDULES)}
        except BlockvirtError as error:
            log.error("schedules cannot be read: %s", error)
            return False
        return True

    async def _read_stale(self) -> None:
        """Find out anew when the schedules that changed are due."""
        for number, schedule_id in enumerate(sorted(self._stale)):
            self._stale.discard(schedule_id)
            if schedule_id in self._running:
                continue  # read when its run has ended
            self._due_s.pop(schedule_id, None)
            try:
                record = self._record(schedule_id)
                if record is not None and not record.paused:
                    now_s = self._clock()
                    after_s = due_after_s(record, now_s)
                    if after_s < record.due_after_s:  # dated by a clock that was wrong: nothing would ever be owed
                        await self._store.commit(partial(_note, schedule_id, partial(replace, due_after_s=now_s)))
                    self._due_s[schedule_id] = next_run_s(record.cron, after_s)
            except (DamagedRecord, InvalidRequest) as error:
                log.error("schedule %s does not run: %s", schedule_id, error)
            except BlockvirtError as error:
                log.error("schedule %s cannot be read for now: %s", schedule_id, error)
                self._due_s[schedule_id] = self._clock() + SCHEDULE_LOOK_S
            if number % READ_BATCH == READ_BATCH - 1:
                await asyncio.sleep(0)

    def _record(self, schedule_id: str) -> ScheduleRecord | None:
        with self._store.read() as reader:
            return reader.record(ScheduleRecord, Table.SCHEDULES, schedule_id.encode())

    # --- one run ---------------------------------------------------------------------------------------------------

    async def _work(self, schedule_id: str) -> None:
        try:
            if await self._run_owed(schedule_id):
                self._stale.add(schedule_id)
        except DamagedRecord:
            self._stale.add(schedule_id)
        except ShuttingDown:
            log.info("a run of schedule %s is left to the next start", schedule_id)
        except Exception as error:  # not even a mistake of ours may end a schedule, or hurry it
            log.error("schedule %s is tried again in a while", schedule_id, exc_info=error)
            self._due_s[schedule_id] = self._clock() + SCHEDULE_LOOK_S
        finally:
            self._running.discard(schedule_id)
            self._woken.set()

    async def _run_owed(self, schedule_id: str) -> bool:
        """Do what is owed, if anything is; False: it could not be noted, and when to run next is set."""
        record = self._record(schedule_id)
        if record is None or record.paused:
            return True
        now_s = self._clock()
        owed = runs_between(record.cron, due_after_s(record, now_s), now_s, MAX_MISSED_RUNS)
        if not owed:
            return True
        if await self._is_without_volume(record, owed[-1]):
            return True
        is_late = now_s - owed[-1] > SCHEDULE_LATE_S
        missed = len(owed) if is_late else len(owed) - 1
        if missed:
            log.warning("schedule %s missed %d runs", record.name, missed)
        error = ""
        try:
            volumes = [volume_id for volume_id, _ in volumes_of(self._store, self._snapshots, record)]
            await self._take(record, volumes, now_s if is_late else owed[-1])
        except ShuttingDown:
            raise
        except Exception as failure:
            error = _words(failure)
            log.error("schedule %s took no snapshots: %s", record.name, error, exc_info=_unexpected(failure))
            missed = len(owed)
        else:
            error = await self._prune(record.id, volumes)

        ended_s = self._clock()

        def note(current: ScheduleRecord) -> ScheduleRecord:
            return replace(
                current,
                due_after_s=max(due_after_s(current, ended_s), owed[-1]),
                last_run_s=now_s,
                last_error=error,
                missed_runs=current.missed_runs + missed,
            )

        try:
            await self._store.commit(partial(_note, schedule_id, note))
        except PoolFull as failure:  # without a note the run stays owed; at once, it would be repeated without end
            log.error("a run of schedule %s could not be noted: %s", record.name, failure)
            self._due_s[schedule_id] = next_run_s(record.cron, ended_s)
            return False
        return True

    async def _is_without_volume(self, record: ScheduleRecord, due_s: float) -> bool:
        """Tell whether there is nothing to snapshot; then what was due by ``due_s`` is owed no more, and not missed."""
        try:
            why = absence(self._store, record)
        except DamagedRecord:  # said by the run that fails of it
            return False
        if not why:
            return False
        log.info("schedule %s does not run: %s", record.name, why)

        def note(current: ScheduleRecord) -> ScheduleRecord:
            return replace(current, due_after_s=max(due_after_s(current, self._clock()), due_s))

        await self._store.commit(partial(_note, record.id, note))
        return True

    async def _take(self, record: ScheduleRecord, volume_ids: Sequence[str], time_s: float) -> None:
        if not volume_ids:
            log.info("schedule %s: no volume carries its labels", record.name)
            return
        for attempt in range(1, MAX_NAME_ATTEMPTS + 1):
            name = snapshot_name(record.name, time_s, attempt)
            try:
                await self._snapshots.take(volume_ids, name, schedule_id=record.id)
                break
            except Exists:
                if attempt == MAX_NAME_ATTEMPTS:
                    raise
        log.info("schedule %s took %s of %d volumes", record.name, name, len(volume_ids))

    async def _prune(self, schedule_id: str, volume_ids: Sequence[str]) -> str:
        """Delete what retention no longer keeps, volume by volume; return what went wrong, or nothing."""
        error = ""
        for volume_id in volume_ids:
            try:
                record = self._record(schedule_id)  # its rules may have changed while snapshots were taken
                if record is None:
                    return error
                decisions = decide(self._snapshots, record, volume_id, self._clock())
                doomed = [decision.snapshot.id for decision in decisions if not decision.keep]
                if doomed:
                    await self._snapshots.delete(doomed)
                    log.info("schedule %s pruned %d snapshots of volume %s", record.name, len(doomed), volume_id)
            except ShuttingDown:
                return error
            except Exception as failure:
                error = f"the snapshots were taken, old ones of volume {volume_id} were not pruned: {_words(failure)}"
                log.error("schedule %s: %s", schedule_id, error, exc_info=_unexpected(failure))
            await asyncio.sleep(0)  # each volume may have thousands of snapshots to look at
        return error


def _note(schedule_id: str, change: Callable[[ScheduleRecord], ScheduleRecord], writer: Writer) -> None:
    """Write what a run came to; a schedule that was deleted meanwhile stays so. Its revision is its users'."""
    key = schedule_id.encode()
    current = writer.record(ScheduleRecord, Table.SCHEDULES, key)
    if current is not None:
        writer.put_record(Table.SCHEDULES, key, change(current))


def _words(failure: Exception) -> str:
    if isinstance(failure, BlockvirtError):
        return f"{failure.message}: {failure.cause}" if failure.cause else failure.message
    return f"internal error: {failure!r}"[:400]


def _unexpected(failure: Exception) -> Exception | None:
    """Return what deserves a traceback in the log."""
    return None if isinstance(failure, BlockvirtError) else failure
