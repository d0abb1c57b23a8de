"""What users see of a job: percent, rate and time left, from the progress that this process has watched. Pure."""

from collections import deque
from dataclasses import dataclass

from blockvirt.limits import JOB_RATE_WINDOW_S
from blockvirt.meta.records import JobRecord
from blockvirt.volumes.job_states import State

_SAMPLE_S = JOB_RATE_WINDOW_S / 30
"""The least time between two samples: so many of them fit the window, and no more are kept."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job as users see it. Times are seconds since the epoch; what a unit is depends on the kind."""

    id: str
    kind: str
    """'flatten', 'reclaim', 'purge' or 'scrub'."""
    state: str
    """'queued', 'running', 'paused', 'done', 'failed' or 'cancelled'."""
    subject: str
    """What it works on: the name of a volume or a snapshot."""
    volume_id: str
    created_s: float
    started_s: float | None
    finished_s: float | None
    done_units: int
    total_units: int | None
    """None: not known yet."""
    percent: float | None
    """0 to 100; None: not known yet."""
    rate_per_s: float | None
    """Units per second over the last half minute; None unless it runs and has been watched for a while."""
    eta_s: float | None
    """Seconds that are left at this rate; None where nothing can be said."""
    error: str
    """Why it failed; empty otherwise."""
    detail: str
    """What it is at, in words, while it runs; empty: nothing that its kind does not say."""


class Pace:
    """How fast a job gets on: its progress over a sliding window."""

    __slots__ = ("_done_units", "_samples")

    def __init__(self, now_s: float, done_units: int) -> None:
        """Begin to watch at ``now_s``, with so much done by others."""
        self._samples = deque([(now_s, done_units)])
        self._done_units = done_units

    def note(self, now_s: float, done_units: int) -> None:
        """Take in that ``done_units`` are done at ``now_s``."""
        if done_units < self._done_units or now_s < self._samples[-1][0]:
            self._samples.clear()  # counted anew, or the clock was set back: what was seen says nothing
        self._done_units = done_units
        if not self._samples or now_s - self._samples[-1][0] >= _SAMPLE_S:
            self._samples.append((now_s, done_units))
        self._forget(now_s)

    def rate_per_s(self, now_s: float) -> float | None:
        """Return units per second as of ``now_s``; None while less than a sample's time was watched."""
        self._forget(now_s)
        since_s, done_units = self._samples[0]
        if now_s - since_s < _SAMPLE_S:
            return None
        return (self._done_units - done_units) / (now_s - since_s)

    def _forget(self, now_s: float) -> None:
        """Drop what lies before the window; one sample stays to count from."""
        while len(self._samples) > 1 and now_s - self._samples[0][0] > JOB_RATE_WINDOW_S:
            self._samples.popleft()


def view_of(record: JobRecord, pace: Pace | None, now_s: float, detail: str = "") -> Job:
    """Return the view of a job; ``pace`` is None where this process does not work on it."""
    rate_per_s = pace.rate_per_s(now_s) if pace is not None and record.state == State.RUNNING else None
    return Job(
        id=record.id,
        kind=record.kind,
        state=record.state,
        subject=record.subject,
        volume_id=record.volume_id,
        created_s=record.created_s,
        started_s=record.started_s or None,
        finished_s=record.finished_s or None,
        done_units=record.done_units,
        total_units=record.total_units or None,
        percent=_percent(record),
        rate_per_s=rate_per_s,
        eta_s=_left_s(record, rate_per_s),
        error=record.error,
        detail=detail if record.state == State.RUNNING else "",
    )


def _percent(record: JobRecord) -> float | None:
    if record.state == State.DONE:
        return 100.0
    return min(100.0, 100 * record.done_units / record.total_units) if record.total_units else None


def _left_s(record: JobRecord, rate_per_s: float | None) -> float | None:
    if not rate_per_s or not record.total_units:
        return None
    return max(0, record.total_units - record.done_units) / rate_per_s
