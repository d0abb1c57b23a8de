"""The states of a job and what leads from one to another: a table, and the records that it makes. Pure."""

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum

from blockvirt.errors import WrongJobState
from blockvirt.limits import JOB_ERROR_CHARS
from blockvirt.meta.records import JobRecord


class State(StrEnum):
    """What ``JobRecord.state`` may be."""

    QUEUED = "queued"
    RUNNING = "running"
    """Its worker is at it; in a store that nobody works on: it was interrupted."""
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Action(StrEnum):
    """What happens to a job: the first three come from the board, the others are asked for."""

    START = "start"
    FINISH = "finish"
    FAIL = "fail"
    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    """Of a failed job: try again from its position."""


FINISHED = frozenset({State.DONE, State.FAILED, State.CANCELLED})
"""States in which nobody works on the job, and nobody is asked to."""

TRANSITIONS: Mapping[Action, Mapping[str, State]] = {
    Action.START: {State.QUEUED: State.RUNNING, State.RUNNING: State.RUNNING, State.FAILED: State.RUNNING},
    Action.FINISH: {State.RUNNING: State.DONE},
    Action.FAIL: {State.RUNNING: State.FAILED},
    Action.CANCEL: {state: State.CANCELLED for state in State if state is not State.DONE},
    Action.PAUSE: dict.fromkeys((State.QUEUED, State.RUNNING, State.PAUSED, State.FAILED), State.PAUSED),
    Action.RESUME: {
        State.QUEUED: State.QUEUED,
        State.RUNNING: State.RUNNING,
        State.PAUSED: State.QUEUED,
        State.FAILED: State.QUEUED,
    },
}
"""Action -> state before -> state after; what is not there is refused."""

_PARTICIPLES: Mapping[Action, str] = {
    Action.START: "started",
    Action.FINISH: "finished",
    Action.FAIL: "given up",
    Action.CANCEL: "cancelled",
    Action.PAUSE: "paused",
    Action.RESUME: "resumed",
}
_COMMANDS = (Action.CANCEL, Action.PAUSE, Action.RESUME)


def possible(state: str, *, cancellable: bool) -> tuple[Action, ...]:
    """Return what can be asked of a job in ``state`` and would change it."""
    return tuple(
        action
        for action in _COMMANDS
        if TRANSITIONS[action].get(state, state) != state and (cancellable or action is not Action.CANCEL)
    )


def check(record: JobRecord, action: Action, *, cancellable: bool) -> State:
    """Return the state that ``action`` leads to; raises WrongJobState, which says what is possible instead."""
    target = TRANSITIONS[action].get(record.state)
    if target is not None and (cancellable or action is not Action.CANCEL):
        return target
    actions = possible(record.state, cancellable=cancellable)
    cause = f"it is {record.state}"
    if action is Action.CANCEL and not cancellable:
        cause = f"what a {record.kind} has to delete stays deleted"
    names = " or ".join(_PARTICIPLES[other] for other in actions)
    correction = f"it can be {names}" if names else f"it stays {record.state}; start a new one if need be"
    raise WrongJobState(
        f"job {record.id} ({record.kind} of {record.subject}) cannot be {_PARTICIPLES[action]}",
        cause=cause,
        correction=correction,
        state=record.state,
        possible=[str(other) for other in actions],
    )


def moved(record: JobRecord, action: Action, now_s: float, *, cancellable: bool, error: str = "") -> JobRecord:
    """Return the record after ``action``, itself where nothing changes; raises WrongJobState.

    ``error`` is what the worker ended with, if it failed; ``now_s`` is in seconds since the epoch.
    """
    target = check(record, action, cancellable=cancellable)
    if target == record.state:
        return record
    if action in (Action.START, Action.RESUME):
        return replace(record, state=target, started_s=_started(record, action, now_s), finished_s=0.0, error="")
    return replace(
        record,
        state=target,
        finished_s=now_s if target in FINISHED else 0.0,
        error="" if action is Action.FINISH else (error or record.error)[:JOB_ERROR_CHARS],
    )


def _started(record: JobRecord, action: Action, now_s: float) -> float:
    return now_s if action is Action.START and not record.started_s else record.started_s
