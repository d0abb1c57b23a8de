"""What may happen to a job in which state: the whole table; and what users are told of its progress."""

import pytest

from blockvirt.errors import WrongJobState
from blockvirt.limits import JOB_ERROR_CHARS, JOB_RATE_WINDOW_S
from blockvirt.meta.records import JobRecord
from blockvirt.volumes.job_states import FINISHED, Action, State, moved
from blockvirt.volumes.job_views import Pace, view_of

NOW_S = 1_000.0

# State before -> what start, finish, fail, cancel, pause and resume make of it; '-' is refused.
TABLE = """
queued     running  -     -       cancelled  paused  queued
running    running  done  failed  cancelled  paused  running
paused     -        -     -       cancelled  paused  queued
done       -        -     -       -          -       -
failed     running  -     -       cancelled  paused  queued
cancelled  -        -     -       cancelled  -       -
"""
CASES = [
    (before, action, after)
    for before, *afters in (line.split() for line in TABLE.strip().splitlines())
    for action, after in zip(Action, afters, strict=True)
]


def job(state: str = "queued", **fields: object) -> JobRecord:
    """A job in that state, with what a job in it would have."""
    started_s = 0.0 if state == "queued" else 20.0
    finished_s = 30.0 if state in FINISHED else 0.0
    error = "no luck" if state == "failed" else ""
    base = {"started_s": started_s, "finished_s": finished_s, "error": error} | fields
    return JobRecord("1", "flatten", state, "web1", 10.0, **base)  # type: ignore[arg-type]


def test_the_table_has_all_states() -> None:
    assert {before for before, _, _ in CASES} == set(State)
    assert len(CASES) == len(State) * len(Action)


@pytest.mark.parametrize(("before", "action", "after"), CASES)
def test_an_action_in_a_state(before: str, action: Action, after: str) -> None:
    record = job(before, done_units=3, total_units=9, position=4)
    if after == "-":
        with pytest.raises(WrongJobState) as refused:
            moved(record, action, NOW_S, cancellable=True)
        assert refused.value.details["state"] == before
        assert before in refused.value.cause
        return
    changed = moved(record, action, NOW_S, cancellable=True, error="a broken disk" if action is Action.FAIL else "")
    assert changed.state == after
    assert (changed.done_units, changed.total_units, changed.position) == (3, 9, 4)
    if after == before:
        assert changed is record
        return
    assert changed.finished_s == (NOW_S if after in FINISHED else 0.0)
    assert changed.started_s == (NOW_S if action is Action.START and before == "queued" else record.started_s)
    assert bool(changed.error) == (action is Action.FAIL or (before == "failed" and action in ("cancel", "pause")))


@pytest.mark.parametrize("state", State)
def test_what_is_deleted_stays_deleted(state: State) -> None:
    with pytest.raises(WrongJobState) as refused:
        moved(job(state), Action.CANCEL, NOW_S, cancellable=False)
    possible = {"queued": ["pause"], "running": ["pause"], "paused": ["resume"], "failed": ["pause", "resume"]}
    assert refused.value.details["possible"] == possible.get(state, [])
    for command in refused.value.details["possible"]:
        assert f"{command}d" in refused.value.correction


def test_a_failure_keeps_a_message_of_bounded_length() -> None:
    failed = moved(job("running"), Action.FAIL, NOW_S, cancellable=True, error="x" * 5_000)
    assert failed.error == "x" * JOB_ERROR_CHARS


def test_a_pace_is_that_of_the_window() -> None:
    pace = Pace(0.0, 100)
    assert pace.rate_per_s(0.0) is None
    for second in range(1, 101):
        pace.note(float(second), 100 + 10 * second)
    assert pace.rate_per_s(100.0) == 10.0
    for second in range(101, 101 + int(JOB_RATE_WINDOW_S)):
        pace.note(float(second), 1_100 + 40 * (second - 100))
    assert pace.rate_per_s(100.0 + JOB_RATE_WINDOW_S) == 40.0, "what was before the window is forgotten"
    assert len(pace._samples) < 40
    assert pace.rate_per_s(100.0 + 3 * JOB_RATE_WINDOW_S) == 0.0, "a job that got stuck has no pace"


def test_a_pace_survives_a_clock_that_is_set_back_and_a_count_that_begins_anew() -> None:
    pace = Pace(1_000.0, 0)
    pace.note(1_010.0, 50)
    pace.note(10.0, 60)
    assert pace.rate_per_s(10.0) is None
    pace.note(20.0, 80)
    assert pace.rate_per_s(20.0) == 2.0
    pace.note(30.0, 5)
    assert pace.rate_per_s(30.0) is None


def test_a_view_tells_percent_rate_and_time_left() -> None:
    record = job("running", done_units=25, total_units=100)
    pace = Pace(0.0, 5)
    pace.note(10.0, 25)
    seen = view_of(record, pace, 10.0)
    assert (seen.percent, seen.rate_per_s, seen.eta_s, seen.total_units) == (25.0, 2.0, 37.5, 100)
    assert (seen.started_s, seen.finished_s, seen.detail) == (20.0, None, "")
    assert view_of(record, pace, 10.0, "half of it").detail == "half of it"


@pytest.mark.parametrize("state", State)
def test_a_view_does_not_guess(state: State) -> None:
    seen = view_of(job(state), None, 50.0, "at it")
    assert (seen.rate_per_s, seen.eta_s, seen.total_units) == (None, None, None)
    assert bool(seen.detail) is (state == "running")
    assert seen.percent == (100.0 if state == "done" else None)
    assert view_of(job(state, done_units=7, total_units=5), None, 50.0).percent == 100.0
    assert view_of(job("running", total_units=5), Pace(0.0, 0), 50.0).eta_s is None, "no pace, no end in sight"
