"""The job board: durable jobs for what takes time. Each is a record; the board runs the workers of their kinds.

Whoever starts a job stores it in the transaction of the deed that it completes (``queue_job``), so a crash leaves both
or neither. What the store says is enough to go on: a job found 'running' by a new board was interrupted, and is started
again from its position. The board alone changes stored jobs, and decides each change inside its transaction.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

from blockvirt.errors import BlockvirtError, ShuttingDown, WrongJobState
from blockvirt.ids import is_id
from blockvirt.limits import JOB_RETRY_S
from blockvirt.meta.records import JobRecord
from blockvirt.meta.store import Store, Writer
from blockvirt.tasks import TaskSet
from blockvirt.volumes.job_queues import Entry, JobQueues, Kind, Worker
from blockvirt.volumes.job_records import change_job, forget_jobs, no_such_job, queue_job, with_progress
from blockvirt.volumes.job_running import Moot, Running, Stop
from blockvirt.volumes.job_states import FINISHED, Action, State, check, moved
from blockvirt.volumes.job_views import Job, view_of

__all__ = ["Job", "JobBoard", "Moot", "Running", "State", "Worker", "queue_job"]

log = logging.getLogger("blockvirt.jobs")

_ENDS = (Action.FINISH, Action.FAIL, Action.CANCEL)


class JobBoard:
    """All jobs of the pool. One per process; call it on the event loop."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time, work: asyncio.Event | None = None) -> None:
        """``clock`` tells seconds since the epoch. ``work`` may be set instead of a call of ``wake``."""
        self._store = store
        self._clock = clock
        self._queues = JobQueues()
        self._new: list[str] = []
        self._timer: asyncio.TimerHandle | None = None
        self._work = work if work is not None else asyncio.Event()
        self._work.set()
        self._runs = TaskSet("jobs")
        self._commits = TaskSet("job-commits")
        self._closing = False

    def register(self, kind: str, worker: Worker, *, cancellable: bool, retries: bool) -> None:
        """Say who does the jobs of ``kind``. At start-up, before anything else is asked of the board.

        ``cancellable``: they may be given up half-way. ``retries``: a failed one is tried again after a while.
        """
        assert kind not in self._queues.kinds, "a kind is registered once, before its jobs are looked at"
        self._queues.kinds[kind] = Kind(worker, cancellable, retries)

    def wake(self, *ids: str) -> None:
        """Say that jobs were queued; naming them spares a look at the whole table."""
        self._new += ids
        self._work.set()

    # --- what users ask --------------------------------------------------------------------------------------------

    def list(self, state: str | None = None, kind: str | None = None, volume_id: str | None = None) -> tuple[Job, ...]:
        """Return the jobs that fit what is given, in order of creation."""
        self._look()
        found = [
            entry
            for entry in self._queues.entries.values()
            if state in (None, entry.record.state)
            and kind in (None, entry.record.kind)
            and volume_id in (None, entry.record.volume_id)
        ]
        return tuple(self._view(entry) for entry in sorted(found, key=lambda entry: entry.age))

    def get(self, job_id: str) -> Job:
        """Return a job; raises NotFound."""
        return self._view(self._entry(job_id))

    def counts(self) -> Mapping[tuple[str, str], int]:
        """Return how many jobs there are by (kind, state), for metrics; 0 for what a registered kind has none of."""
        self._look()
        counts = {(kind, state.value): 0 for kind in self._queues.kinds for state in State}
        return counts | Counter((entry.record.kind, str(entry.record.state)) for entry in self._queues.entries.values())

    async def finished(self, job_id: str) -> Job:
        """Return the job once it is done, cancelled or failed; raises NotFound, ShuttingDown."""
        entry = self._entry(job_id)
        if entry.record.state in FINISHED:
            return self._view(entry)
        if self._closing:
            raise _shutting_down()
        waiter: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
        entry.waiters.add(waiter)
        try:
            return await waiter
        finally:
            entry.waiters.discard(waiter)

    async def cancel(self, job_id: str) -> Job:
        """Give a job up for good; raises NotFound, WrongJobState. When it returns, nothing of it is at work."""
        return await self._command(job_id, Action.CANCEL)

    async def pause(self, job_id: str) -> Job:
        """Stop a job until it is resumed; raises NotFound, WrongJobState. When it returns, nothing is at work."""
        return await self._command(job_id, Action.PAUSE)

    async def resume(self, job_id: str) -> Job:
        """Let a paused job go on, or a failed one try again; raises NotFound, WrongJobState."""
        return await self._command(job_id, Action.RESUME)

    async def _command(self, job_id: str, action: Action) -> Job:
        entry = self._entry(job_id)
        check(entry.record, action, cancellable=entry.kind.cancellable)
        while (run := entry.run) is not None:
            if action is not Action.RESUME:
                run.ask(action)
            elif not run.stopping and entry.record.state not in FINISHED:
                return self._view(entry)  # it goes on already; one that has just failed has its run for a moment still
            await run.ended.wait()
            if run.fault is not None:
                raise run.fault
        return await self._move(entry, action)

    # --- the worker task of the pool -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run jobs until cancelled; those that run then are interrupted, and go on with the next board."""
        try:
            while True:
                await self._work.wait()
                self._work.clear()
                try:
                    self._start_ready()
                except Exception as error:  # a mistake of ours with one job must not end the board of all
                    log.error("no job is started for now: %s", error, exc_info=not isinstance(error, BlockvirtError))
                    self._wake_in(JOB_RETRY_S)
        finally:
            self._closing = True
            if self._timer is not None:
                self._timer.cancel()
            await self._runs.close()
            await self._commits.wait()
            self._dismiss()

    def _dismiss(self) -> None:
        """Tell those who wait that the board is closed."""
        for entry in self._queues.entries.values():
            for waiter in entry.waiters:
                if not waiter.done():
                    waiter.set_exception(_shutting_down())

    def _start_ready(self) -> None:
        self._look()
        now_s = self._clock()
        due_s = self._queues.next_due_s(now_s)
        if due_s is not None:
            self._wake_in(due_s - now_s)
        for entry, worker in self._queues.startable():
            entry.run = Running(entry.record, self._clock, self._save, partial(self._give_way, entry))
            entry.kind.running += 1
            self._runs.start(self._attend(entry, entry.run, worker), f"{entry.record.kind} {entry.record.id}")

    def _give_way(self, entry: Entry, change: int) -> None:
        entry.kind.waiting += change
        self._work.set()

    def _wake_in(self, delay_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._work.set)

    async def _attend(self, entry: Entry, run: Running, worker: Worker) -> None:
        """Start a job, see its worker to its end, and record what became of it."""
        try:
            await self._move(entry, Action.START)
            run.record = entry.record
            action, message = await _outcome(run, worker)
            await self._move(entry, action, error=message)
        except WrongJobState:
            log.debug("job %s was paused or cancelled a moment before its start", entry.record.id)
        except asyncio.CancelledError:
            run.fault = _shutting_down()
            self._commits.start(self._save(run.record), f"save {run.record.id}", awaited=True)
            raise
        except Exception as error:
            is_ours = isinstance(error, BlockvirtError)
            log.error("job %s is not recorded for now: %s", entry.record.id, error, exc_info=not is_ours)
            run.fault = error if isinstance(error, BlockvirtError) else BlockvirtError(str(error))
        finally:
            entry.run = None
            entry.kind.running -= 1
            if run.fault is None:
                self._queues.file(entry)
            else:
                self._queues.postpone(entry, self._clock())
            run.ended.set()
            self._work.set()

    # --- records ---------------------------------------------------------------------------------------------------

    async def _move(self, entry: Entry, action: Action, *, error: str = "") -> Job:
        """Change a job's state, durably; raises WrongJobState. Goes on to its end where the caller is cancelled."""
        work = self._commit_move(entry, action, error)
        return await asyncio.shield(self._commits.start(work, f"{action} {entry.record.id}", awaited=True))

    async def _commit_move(self, entry: Entry, action: Action, error: str) -> Job:
        job_id, kind, now_s = entry.record.id, entry.kind, self._clock()
        progress = entry.run.record if entry.run is not None else None
        surplus = [other for other in kind.surplus() if other != job_id] if action in _ENDS else []

        def move(stored: JobRecord) -> JobRecord:
            changed = moved(stored, action, now_s, cancellable=kind.cancellable, error=error)
            return changed if progress is None else with_progress(changed, progress)

        def change(writer: Writer) -> tuple[JobRecord, list[str]]:
            return change_job(writer, job_id, move), forget_jobs(writer, surplus, kind.is_over)

        entry.record, gone = await self._store.commit(change)
        for other in gone:
            if other in self._queues.entries:
                self._queues.forget(self._queues.entries[other])
        self._queues.file(entry)
        self._work.set()
        seen = self._view(entry)
        if seen.state in FINISHED:
            for waiter in entry.waiters:
                if not waiter.done():
                    waiter.set_result(seen)
        return seen

    async def _save(self, progress: JobRecord) -> None:
        def save(stored: JobRecord) -> JobRecord:
            return with_progress(stored, progress)

        saved = await self._store.commit(lambda writer: change_job(writer, progress.id, save))
        self._queues.entries[progress.id].record = saved

    def _look(self) -> None:
        """Take in the jobs that were stored since the last look."""
        with self._store.read() as reader:
            named, self._new = self._new, []
            if self._queues.look(reader, named):
                self._work.set()

    def _entry(self, job_id: str) -> Entry:
        entries = self._queues.entries
        if job_id not in entries and is_id(job_id):
            self._new.append(job_id)
            self._look()
        if job_id not in entries:
            raise no_such_job(job_id)
        return entries[job_id]

    def _view(self, entry: Entry) -> Job:
        if entry.run is None:
            return view_of(entry.record, None, self._clock())
        record = with_progress(entry.record, entry.run.record)
        return view_of(record, entry.run.pace, self._clock(), entry.run.detail)


async def _outcome(run: Running, worker: Worker) -> tuple[Action, str]:
    """Run the worker; return what that makes of the job, with the message of a failure."""
    what = f"{run.record.kind} of {run.record.subject}"
    task = asyncio.current_task()
    try:
        await worker(run)
        return Action.FINISH, ""
    except Stop:
        message = ""
    except Moot as moot:
        log.info("%s is given up: %s", what, moot)
        return Action.CANCEL, str(moot)
    except BlockvirtError as error:
        message = in_one_line(error)
        log.error("%s has failed: %s", what, message)
    except OSError as error:
        message = str(error)
        log.error("%s has failed: %s", what, message)
    except (Exception, asyncio.CancelledError) as error:
        if task is not None and task.cancelling():
            raise
        log.exception("%s has failed", what)  # a mistake of ours with one job must not end the board of all
        message = f"a mistake of blockvirt, see its log: {error!r}"
    return run.asked or Action.FAIL, message


def in_one_line(error: BlockvirtError) -> str:
    """Return what happened, why, and what to do about it, as the record of a job has it."""
    return "; ".join(part for part in (error.message, error.cause, error.correction) if part)


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the daemon is stopping", correction="ask again when it has started: the job goes on then")
