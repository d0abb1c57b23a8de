"""Which job is whose turn: per kind a queue, those that are tried again later, and those that are over.

What is here is in memory only: it is made from the stored records, and follows each change of theirs.
"""

import asyncio
import heapq
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from blockvirt.errors import BlockvirtError
from blockvirt.limits import FINISHED_JOBS_PER_KIND, JOB_RETRY_S, RUNNING_JOBS_PER_KIND, WAITING_JOBS_PER_KIND
from blockvirt.meta.keys import Table
from blockvirt.meta.records import JobRecord
from blockvirt.meta.store import Reader
from blockvirt.volumes.job_running import Running
from blockvirt.volumes.job_states import FINISHED, State
from blockvirt.volumes.job_views import Job

log = logging.getLogger("blockvirt.jobs")

Worker = Callable[[Running], Awaitable[None]]
"""Does a job in steps that may each be repeated: ``checkpoint`` between two of them, ``advance`` after each."""


@dataclass(slots=True)
class Kind:
    """All jobs of one kind."""

    worker: Worker | None = None
    """None: nobody has registered for it, none of its jobs is started."""
    cancellable: bool = False
    retries: bool = False
    ready: list[tuple[float, str]] = field(default_factory=list)
    """Heap of (created, id) to be started; may name jobs that are not to be started any more."""
    over: dict[str, None] = field(default_factory=dict)
    """Ids of the jobs that may be forgotten, in the order they ended."""
    running: int = 0
    waiting: int = 0
    """How many of those that run only wait for others."""

    @property
    def has_room(self) -> bool:
        """Whether another job may be started."""
        return self.running - min(self.waiting, WAITING_JOBS_PER_KIND) < RUNNING_JOBS_PER_KIND

    def is_over(self, state: str) -> bool:
        """Tell whether nothing more will happen to a job in ``state`` unless somebody asks for it."""
        return state in FINISHED and not self.is_retried(state)

    def is_retried(self, state: str) -> bool:
        """Tell whether a job in ``state`` waits to be tried again."""
        return self.retries and state == State.FAILED

    def surplus(self) -> tuple[str, ...]:
        """Return which jobs to forget, oldest first, so that one more may end."""
        return tuple(islice(self.over, max(0, len(self.over) + 1 - FINISHED_JOBS_PER_KIND)))


@dataclass(slots=True, eq=False)
class Entry:
    """One job: as stored, and what this process does about it."""

    record: JobRecord
    kind: Kind
    run: Running | None = None
    due_s: float = 0.0
    """Not to be started before; 0: as soon as it is its turn."""
    waiters: set[asyncio.Future[Job]] = field(default_factory=set)

    @property
    def age(self) -> tuple[float, str]:
        """What jobs are sorted by: their creation."""
        return self.record.created_s, self.record.id

    @property
    def is_startable(self) -> bool:
        """Whether its worker is to start as soon as there is room."""
        is_wanted = self.record.state in (State.QUEUED, State.RUNNING) or self.kind.is_retried(self.record.state)
        return is_wanted and self.run is None and not self.due_s


class JobQueues:
    """The jobs that are known to the board."""

    def __init__(self) -> None:
        self.kinds: dict[str, Kind] = {}
        self.entries: dict[str, Entry] = {}
        self._damaged: set[bytes] = set()
        self._later: list[tuple[float, str]] = []

    # --- what the store has ----------------------------------------------------------------------------------------

    def look(self, reader: Reader, ids: list[str]) -> bool:
        """Take in the jobs called ``ids``, and, if the store then still has others than are known, those too.

        Tells whether any was new.
        """
        found: list[Entry] = []
        for job_id in ids:
            found += self._adopt(reader, job_id.encode())
        if reader.count(Table.JOBS) != len(self.entries) + len(self._damaged):
            for key, _ in reader.scan(Table.JOBS):
                found += self._adopt(reader, key)
        for entry in sorted(found, key=lambda entry: entry.record.finished_s):
            self.file(entry)
        return bool(found)

    def _adopt(self, reader: Reader, key: bytes) -> list[Entry]:
        """Return the entry of a stored job that was not known."""
        if key in self._damaged or key.decode(errors="replace") in self.entries:
            return []
        try:
            record = reader.record(JobRecord, Table.JOBS, key)
        except BlockvirtError as error:
            log.error("a job is left alone: %s", error)
            self._damaged.add(key)
            return []
        if record is None:
            return []
        entry = Entry(record, self.kinds.setdefault(record.kind, Kind()))
        self.entries[record.id] = entry
        return [entry]

    def forget(self, entry: Entry) -> None:
        """Drop a job that the store has no more."""
        entry.kind.over.pop(entry.record.id, None)
        self.entries.pop(entry.record.id, None)

    # --- whose turn it is ------------------------------------------------------------------------------------------

    def file(self, entry: Entry) -> None:
        """Put a job where its state belongs: in the queue, among those tried again later, or those that are over."""
        record, kind = entry.record, entry.kind
        if kind.is_over(record.state):
            kind.over.setdefault(record.id)
        else:
            kind.over.pop(record.id, None)
        if kind.is_retried(record.state):
            self.postpone(entry, record.finished_s)
        elif record.state in (State.QUEUED, State.RUNNING) and entry.run is None:
            self._make_ready(entry)

    def postpone(self, entry: Entry, since_s: float) -> None:
        """Have a job tried again in a while after ``since_s``."""
        entry.due_s = since_s + JOB_RETRY_S
        heapq.heappush(self._later, (entry.due_s, entry.record.id))

    def _make_ready(self, entry: Entry) -> None:
        entry.due_s = 0.0
        heapq.heappush(entry.kind.ready, entry.age)

    def next_due_s(self, now_s: float) -> float | None:
        """Queue the jobs whose time to be tried again has come; return when it comes for the next, None for never."""
        # A wait that is longer than any that was begun: the clock was set back.
        while self._later and not 0 < self._later[0][0] - now_s <= JOB_RETRY_S:
            due_s, job_id = heapq.heappop(self._later)
            entry = self.entries.get(job_id)
            if entry is not None and entry.due_s == due_s:
                self._make_ready(entry)
        return self._later[0][0] if self._later else None

    def startable(self) -> Iterator[tuple[Entry, Worker]]:
        """Yield the jobs whose turn it is, oldest of each kind first, while there is room; each is to be started."""
        for kind in self.kinds.values():
            while kind.worker is not None and kind.ready and kind.has_room:
                entry = self.entries.get(heapq.heappop(kind.ready)[1])
                if entry is not None and entry.is_startable:
                    yield entry, kind.worker
