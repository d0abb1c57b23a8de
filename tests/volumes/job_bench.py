"""A job board on a real store, with a clock that is set by hand and workers that are led step by step."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from blockvirt.ids import new_id
from blockvirt.meta.keys import Table
from blockvirt.meta.records import JobRecord
from blockvirt.meta.store import Store
from blockvirt.volumes.jobs import JobBoard, Running, State, queue_job

START_S = 1_000_000.0


class Clock:
    """Seconds since the epoch, as the test has them."""

    def __init__(self) -> None:
        self.now_s = START_S

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Steps:
    """A worker that does one step for each that it is allowed, and remembers which it did for which subject."""

    total: int = 3
    done: list[tuple[str, int]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    failures: list[BaseException] = field(default_factory=list)
    """Raised, one after the other, where a step would be."""
    _allowed: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    _waiting: asyncio.Condition = field(default_factory=asyncio.Condition)
    waiting: list[str] = field(default_factory=list)
    """Subjects whose worker waits for leave."""

    async def __call__(self, job: Running) -> None:
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            for step in range(job.record.position, self.total):
                job.checkpoint()
                await self._leave(job.record.subject)
                if self.failures:
                    raise self.failures.pop(0)
                self.done.append((job.record.subject, step))
                await job.advance(step + 1, self.total, step + 1)
        finally:
            self.at_once -= 1

    async def _leave(self, subject: str) -> None:
        async with self._waiting:
            self.waiting.append(subject)
            self._waiting.notify_all()
        try:
            await self._allowed.acquire()
        finally:
            self.waiting.remove(subject)

    def allow(self, steps: int = 1_000_000) -> None:
        """Let that many steps be done, by whoever waits first."""
        for _ in range(min(steps, 1_000)):
            self._allowed.release()

    async def until_waiting(self, *subjects: str) -> None:
        """Return when just these wait for leave."""
        async with self._waiting:
            await self._waiting.wait_for(lambda: sorted(self.waiting) == sorted(subjects))

    def steps_of(self, subject: str) -> list[int]:
        """The steps that were done for a subject, in order."""
        return [step for name, step in self.done if name == subject]


def new_job(kind: str = "flatten", subject: str = "web1", created_s: float = START_S, **fields: object) -> JobRecord:
    """A job that nobody has stored."""
    state = fields.pop("state", State.QUEUED)
    return JobRecord(new_id(), kind, state, subject, created_s, **fields)  # type: ignore[arg-type]


def stored(store: Store, job_id: str) -> JobRecord:
    """The job as the store has it."""
    with store.read() as reader:
        record = reader.record(JobRecord, Table.JOBS, job_id.encode())
    assert record is not None
    return record


class Bench:
    """A store, a clock, a board of two kinds ('flatten' can be cancelled, 'reclaim' is retried) and their workers."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.clock = Clock()
        self.flatten, self.reclaim = Steps(), Steps()
        self.board = self.new_board()

    def new_board(self) -> JobBoard:
        """Another board, as a new process would make it."""
        board = JobBoard(self.store, self.clock)
        board.register("flatten", self.flatten, cancellable=True, retries=False)
        board.register("reclaim", self.reclaim, cancellable=False, retries=True)
        self.board = board
        return board

    async def put(self, record: JobRecord) -> str:
        """Store a job in whatever state, and say so to the board."""
        if record.state == State.QUEUED:
            await self.store.commit(partial(queue_job, record=record))
        else:
            await self.store.commit(lambda writer: writer.put_record(Table.JOBS, record.id.encode(), record))
        self.board.wake(record.id)
        return record.id

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[JobBoard]:
        """The board with its worker task."""
        task = asyncio.create_task(self.board.run())
        try:
            yield self.board
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def after(self, seconds: float) -> None:
        """Set the clock forward and have the board look at it."""
        self.clock.now_s += seconds
        self.board.wake()
