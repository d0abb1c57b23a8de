"""When a schedule is due: against a model that looks at every minute, and the calendar's corners."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockvirt.errors import InvalidRequest
from blockvirt.limits import MAX_CRON_CHARS
from blockvirt.snapshots.cron import check_cron, next_run_s, next_runs_s, runs_between


def at(text: str) -> float:
    """Seconds since 1970 of an ISO date and time in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def said(times_s: tuple[float, ...]) -> list[str]:
    """The same, the other way round."""
    return [datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M") for time_s in times_s]


# --- the model -------------------------------------------------------------------------------------------------------


@st.composite
def fields(draw: st.DrawFn, first: int, last: int) -> tuple[str, frozenset[int], bool]:
    """A field: its text, the values it stands for, and whether it begins with a star."""
    everything = range(first, last + 1)
    kind = draw(st.sampled_from(["*", "*/n", "a", "a-b", "a,b", "a-b/n"]))
    low = draw(st.integers(first, last))
    high = draw(st.integers(low, last))
    step = draw(st.integers(1, 20))
    if kind == "*":
        return "*", frozenset(everything), True
    if kind == "*/n":
        return f"*/{step}", frozenset(everything[::step]), True
    if kind == "a":
        return str(low), frozenset({low}), False
    if kind == "a-b":
        return f"{low}-{high}", frozenset(range(low, high + 1)), False
    if kind == "a,b":
        return f"{low},{high}", frozenset({low, high}), False
    # Vixie's cron reads 5-5/2 as it stands, Debian's from 5 on: the two agree where the range is one.
    if low == high:
        return str(low), frozenset({low}), False
    return f"{low}-{high}/{step}", frozenset(range(low, high + 1, step)), False


EXPRESSIONS = st.tuples(fields(0, 59), fields(0, 23), fields(1, 31), fields(1, 12), fields(0, 6))
STARTS_S = st.floats(at("2027-12-01 00:00"), at("2028-04-01 00:00")).map(lambda time_s: round(time_s, 3))


def is_due(expression: tuple[tuple[str, frozenset[int], bool], ...], moment: datetime) -> bool:
    """What crontab(5) says of one minute."""
    (_, minutes, _), (_, hours, _), (_, days, any_day), (_, months, _), (_, weekdays, any_weekday) = expression
    day, weekday = moment.day in days, moment.isoweekday() % 7 in weekdays
    is_day = day and weekday if any_day or any_weekday else day or weekday
    return moment.minute in minutes and moment.hour in hours and moment.month in months and is_day


@given(EXPRESSIONS, STARTS_S, st.integers(0, 3 * 24 * 60), st.integers(1, 200))
def test_runs_are_due_when_every_field_says_so(
    expression: tuple[tuple[str, frozenset[int], bool], ...], after_s: float, minutes: int, limit: int
) -> None:
    """Each minute of three days is asked; the next run is the first of them, the missed ones are the newest."""
    text = " ".join(field for field, _, _ in expression)
    try:
        cron = check_cron(text)
    except InvalidRequest:
        return  # 30 February; that nothing else is refused is held by the calendar below
    upto_s = after_s + minutes * 60
    minute = datetime.fromtimestamp(after_s, UTC).replace(second=0, microsecond=0)
    due = []
    for _ in range(minutes + 2):
        if after_s < minute.timestamp() <= upto_s and is_due(expression, minute):
            due.append(minute.timestamp())
        minute += timedelta(minutes=1)
    assert list(runs_between(cron, after_s, upto_s, limit)) == due[-limit:]
    if due:
        assert next_run_s(cron, after_s) == due[0]
    else:
        assert next_run_s(cron, after_s) > upto_s


@given(EXPRESSIONS, STARTS_S)
def test_the_runs_ahead_are_those_that_will_have_been(
    expression: tuple[tuple[str, frozenset[int], bool], ...], after_s: float
) -> None:
    """Forwards and backwards the same times are due: neither a run twice nor one forgotten."""
    try:
        cron = check_cron(" ".join(field for field, _, _ in expression))
    except InvalidRequest:
        return
    ahead = next_runs_s(cron, after_s, 5)
    assert sorted(set(ahead)) == list(ahead)
    assert runs_between(cron, after_s, ahead[-1], 100) == ahead
    assert runs_between(cron, after_s, ahead[-1], 2) == ahead[-2:]
    assert runs_between(cron, ahead[0], ahead[-1] - 1, 100) == ahead[1:-1]


# --- the calendar ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cron", "after", "runs"),
    [
        ("0 0 29 2 *", "2026-11-22 00:00", ["2028-02-29 00:00", "2032-02-29 00:00"]),
        ("0 0 29 2 *", "2096-03-01 00:00", ["2104-02-29 00:00"]),  # 2100 is no leap year
        ("0 0 31 * *", "2026-11-22 00:00", ["2026-12-31 00:00", "2027-01-31 00:00", "2027-03-31 00:00"]),
        ("59 23 L * *", "2028-01-31 23:59", ["2028-02-29 23:59", "2028-03-31 23:59", "2028-04-30 23:59"]),
        # 2026-12-13 is a Sunday: either is enough ...
        ("0 6 13 * FRI", "2026-12-05 00:00", ["2026-12-11 06:00", "2026-12-13 06:00", "2026-12-18 06:00"]),
        # ... but with a star in front both must be: the odd days of the month that are Fridays.
        ("0 6 */2 * FRI", "2026-12-05 00:00", ["2026-12-11 06:00", "2026-12-25 06:00", "2027-01-01 06:00"]),
        ("0 0 * * 7", "2026-11-22 00:00", ["2026-11-29 00:00"]),
        ("0 0 * * sun", "2026-11-22 00:00", ["2026-11-29 00:00"]),
        ("30 2 * * *", "2026-03-28 12:00", ["2026-03-29 02:30", "2026-03-30 02:30"]),  # no summer time in UTC
        ("0 4 * * MON#1", "2026-11-22 00:00", ["2026-12-07 04:00"]),
        ("*/15 * * * *", "2026-12-31 23:45", ["2027-01-01 00:00"]),
    ],
)
def test_the_calendar(cron: str, after: str, runs: list[str]) -> None:
    """Leap days, ends of months, and both kinds of days at once."""
    assert said(next_runs_s(check_cron(cron), at(after), len(runs))) == runs


def test_a_run_is_due_once() -> None:
    """Not again within its second; and it is among what is owed up to then."""
    due_s = at("2026-11-22 14:15")
    assert next_run_s("* * * * *", due_s - 0.25) == due_s
    assert next_run_s("* * * * *", due_s) == due_s + 60
    assert next_run_s("* * * * *", due_s + 0.25) == due_s + 60
    assert runs_between("* * * * *", due_s - 0.25, due_s, 9) == (due_s,)
    assert runs_between("* * * * *", due_s, due_s + 59.75, 9) == ()
    assert runs_between("* * * * *", due_s - 60, due_s + 0.75, 9) == (due_s,)
    assert runs_between("* * * * *", due_s, due_s - 600, 9) == ()  # the clock went back


def test_years_of_missed_runs_are_bounded() -> None:
    """The newest are told."""
    assert said(runs_between("* * * * *", 0.0, at("2026-11-22 14:15"), 2)) == ["2026-11-22 14:14", "2026-11-22 14:15"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("60 * * * *", "minute"),
        ("*/0 * * * *", "minute"),
        ("-5 * * * *", "minute"),
        ("* 24 * * *", "hour"),
        ("* 5-3 * * *", "hour"),
        ("* 1.5 * * *", "hour"),
        ("* * 0 * *", "day-of-month"),
        ("* * 32 * *", "day-of-month"),
        ("* * * 13 *", "month"),
        ("* * * nov-foo *", "month"),
        ("* * * * 8", "day-of-week"),
        ("* * * * caturday", "day-of-week"),
        ("* * * * mon#6", "day-of-week"),
        ("at * * dawn *", "minute"),
    ],
)
def test_the_wrong_field_is_named(text: str, field: str) -> None:
    """With what it may be."""
    with pytest.raises(InvalidRequest, match=f"the field {field} ") as caught:
        check_cron(text)
    assert caught.value.details == {"field": field}
    assert caught.value.correction.startswith("use ")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "@daily",
        "* * * *",
        "* * * * * *",
        "0 3 * * ²",
        "0 3 * * \0 *",
        "1," * MAX_CRON_CHARS + "1 * * * *",
    ],
)
def test_what_has_not_five_fields_is_refused(text: str) -> None:
    """And told what the five are; six fields, which some tools read as seconds, are not guessed at."""
    with pytest.raises(InvalidRequest, match="of five fields") as caught:
        check_cron(text)
    assert "minute hour day-of-month month day-of-week" in caught.value.correction


@pytest.mark.parametrize("text", ["0 0 30 2 *", "0 0 31 4,6,9,11 *", "0 0 */29 1 MON#2", "0 0 30 2 */2"])
def test_what_never_fires_is_refused(text: str) -> None:
    """Somebody would find out when he needs the snapshot."""
    with pytest.raises(InvalidRequest, match="never fires"):
        check_cron(text)


def test_a_day_that_is_rare_is_not_never() -> None:
    """29 February on a Sunday comes every 28 years, but for 2100, which has none: 2088, then 2128."""
    cron = check_cron("0 0 29 2 */7")
    assert said(next_runs_s(cron, at("2061-01-01 00:00"), 2)) == ["2088-02-29 00:00", "2128-02-29 00:00"]


def test_blanks_are_no_matter() -> None:
    """Two people who write the same get the same."""
    assert check_cron("  0  3\t* * mon-fri ") == "0 3 * * mon-fri"


@given(st.text(alphabet="0123456789*/,-#LWlw MONSUNJAFEB@?\n", max_size=40) | st.text(max_size=20))
def test_any_text_is_a_schedule_or_is_refused(text: str) -> None:
    """Never another error; and what is taken has a next run."""
    try:
        cron = check_cron(text)
    except InvalidRequest:
        return
    assert check_cron(cron) == cron
    assert next_run_s(cron, at("2026-11-22 14:15")) > at("2026-11-22 14:15")


FIELD_TEXT = st.text(alphabet="0123456789*/,-#LW", min_size=1, max_size=8)


@given(st.tuples(*[FIELD_TEXT | st.just("*")] * 5).map(" ".join))
def test_any_five_fields_are_a_schedule_or_are_refused(text: str) -> None:
    """The same, where the number of fields is right."""
    try:
        cron = check_cron(text)
    except InvalidRequest:
        return
    assert next_run_s(cron, at("2026-11-22 14:15")) > at("2026-11-22 14:15")
