"""A job at work, as its worker sees it: where to go on, how to tell progress, when to stop."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from blockvirt.errors import BlockvirtError, PoolFull, WrongJobState
from blockvirt.limits import JOB_PROGRESS_S
from blockvirt.meta.records import JobRecord
from blockvirt.volumes.job_states import Action
from blockvirt.volumes.job_views import Pace

log = logging.getLogger("blockvirt.jobs")


class Stop(Exception):
    """Leaves a worker at a step boundary, because its job is to pause or to be cancelled. Only the board catches it."""


class Moot(Exception):
    """Ends a job of a cancellable kind as cancelled, with its words as the reason: what it was about is gone."""


class Running:
    """One run of a job. The worker gets it; the board keeps it while the worker is at it."""

    __slots__ = (
        "_clock",
        "_give_way",
        "_save",
        "_saved_s",
        "_stir",
        "asked",
        "detail",
        "ended",
        "fault",
        "pace",
        "record",
    )

    def __init__(
        self,
        record: JobRecord,
        clock: Callable[[], float],
        save: Callable[[JobRecord], Awaitable[None]],
        give_way: Callable[[int], None],
    ) -> None:
        """``save(record)`` makes the progress in it durable; ``give_way`` hears by how many more jobs only wait."""
        self.record = record
        """The job with its progress up to this moment; ``record.position`` says where to go on."""
        self.pace = Pace(clock(), record.done_units)
        self.detail = ""
        """What the worker is at, in words for users; empty: nothing that the kind does not say."""
        self.asked: Action | None = None
        """What the worker is to stop for."""
        self.ended = asyncio.Event()
        """Set when nothing of this run is at work any more, and what became of the job is recorded."""
        self.fault: BlockvirtError | None = None
        """Why the end of the run could not be recorded."""
        self._clock = clock
        self._save = save
        self._saved_s = clock()
        self._give_way = give_way
        self._stir: Callable[[], None] | None = None

    @property
    def stopping(self) -> bool:
        """Whether the worker is to stop at its next step boundary."""
        return self.asked is not None

    def checkpoint(self) -> None:
        """Return if the worker is to go on. To be called between two steps; what it raises is not to be caught."""
        if self.asked is not None:
            raise Stop

    async def advance(self, done_units: int, total_units: int, position: int) -> None:
        """Tell progress after a step: so much is done of so much (0: not known), and where to go on.

        It is seen at once, and durable every few seconds and whenever the worker ends, however it does; a kill repeats
        what lies in between. Raises MetadataFault; a lack of space only defers what is durable.
        """
        assert done_units >= 0, "units are counted up from 0"
        assert total_units >= 0, "0 is for a total that is not known"
        assert position >= 0, "a position is stored as a number from 0 on"
        now_s = self._clock()
        self.record = replace(self.record, done_units=done_units, total_units=total_units, position=position)
        self.pace.note(now_s, done_units)
        if not 0 <= now_s - self._saved_s < JOB_PROGRESS_S:  # below 0: the clock was set back
            self._saved_s = now_s
            try:
                await self._save(self.record)
            except PoolFull as error:  # reclaim makes the space that is lacking: it must not end for want of it
                log.warning("progress of job %s is not durable for now: %s", self.record.id, error)

    @contextmanager
    def waiting(self, stir: Callable[[], None]) -> Iterator[None]:
        """Inside, the worker only waits for others, so further jobs may start; ``stir()`` wakes it up."""
        self._stir = stir
        self._give_way(1)
        try:
            yield
        finally:
            self._give_way(-1)
            self._stir = None
            self.detail = ""

    def ask(self, action: Action) -> None:
        """Have the worker stop for ``action``; raises WrongJobState for a pause of what is being cancelled."""
        if self.asked is Action.CANCEL and action is Action.PAUSE:
            raise WrongJobState(
                f"job {self.record.id} ({self.record.kind} of {self.record.subject}) cannot be paused",
                cause="it is being cancelled",
                correction="start a new one if need be",
                state=self.record.state,
                possible=[],
            )
        self.asked = action
        if self._stir is not None:
            self._stir()
