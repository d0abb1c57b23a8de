"""Which snapshots stay: against a slow model, and the properties that whoever loses one would have counted on."""

from datetime import UTC, datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blockvirt.errors import InvalidRequest
from blockvirt.limits import MAX_KEPT_SNAPSHOTS
from blockvirt.meta.records import SnapshotRecord
from blockvirt.snapshots.retention import RULES, Decision, check_keep, plan

OURS = "ours"
NOW_S = datetime(2026, 11, 22, 14, 15, tzinfo=UTC).timestamp()


def snapshot(
    name: str, created_s: float, *, schedule_id: str = OURS, holds: tuple[str, ...] = (), epoch: int = 1
) -> SnapshotRecord:
    """A snapshot of the one volume there is."""
    return SnapshotRecord(name, "v", name, 1, epoch, 0, created_s, schedule_id=schedule_id, holds=holds)


def at(text: str) -> float:
    """Seconds since 1970 of an ISO date and time in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def kept(decisions: tuple[Decision, ...]) -> set[str]:
    """The ids of what stays."""
    return {decision.snapshot.id for decision in decisions if decision.keep}


# --- the model -------------------------------------------------------------------------------------------------------

FORMATS = {"hourly": "%Y-%m-%d %H", "daily": "%Y-%m-%d", "weekly": "%G %V", "monthly": "%Y-%m", "yearly": "%Y"}


def model(snapshots: list[SnapshotRecord], keep: dict[str, int], now_s: float, bases: set[str]) -> set[str]:
    """What stays, by the words of the documentation: one bucket after the other, each from the beginning."""
    if not any(keep.values()):
        return {each.id for each in snapshots}
    staying = {each.id for each in snapshots if each.schedule_id != OURS or each.holds or each.id in bases}
    staying |= {each.id for each in snapshots if each.created_s > now_s}
    counted = [each for each in snapshots if each.schedule_id == OURS and each.created_s <= now_s]
    counted.sort(key=lambda each: (each.created_s, each.epoch, each.id))
    for rule, count in keep.items():
        if rule == "last":
            staying |= {each.id for each in counted[len(counted) - min(count, len(counted)) :]}
            continue
        newest_of: dict[str, SnapshotRecord] = {}
        for each in counted:  # the oldest first: later ones take the place of earlier ones
            newest_of[datetime.fromtimestamp(each.created_s, UTC).strftime(FORMATS[rule])] = each
        newest = sorted(newest_of.values(), key=lambda each: (each.created_s, each.epoch, each.id), reverse=True)
        staying |= {each.id for each in newest[:count]}
    return staying


HOUR_S = 3_600
MIDNIGHT_S = datetime(2026, 11, 22, tzinfo=UTC).timestamp()
TIMES = st.one_of(
    *(  # few enough to meet in one bucket; at midnight they meet its edge
        st.integers(-span, 1).map(lambda number, base_s=base_s, unit_s=unit_s: base_s + number * unit_s)  # type: ignore[misc]
        for base_s in (NOW_S, MIDNIGHT_S)
        for span, unit_s in ((150, 60), (72, HOUR_S), (60, 24 * HOUR_S), (3 * 366, 24 * HOUR_S))
    ),
    st.integers(-5 * 366 * 24 * HOUR_S, 0).map(lambda seconds: NOW_S + seconds),
)
KEEPS = st.dictionaries(st.sampled_from(RULES), st.one_of(st.integers(0, 4), st.just(MAX_KEPT_SNAPSHOTS)))


@st.composite
def volumes(draw: st.DrawFn) -> tuple[list[SnapshotRecord], set[str]]:
    """The snapshots of a volume in any order, some of one instant, and which of them are bases."""
    shapes = draw(
        st.lists(
            st.tuples(
                TIMES, st.sampled_from([OURS, OURS, OURS, "", "other"]), st.sampled_from([(), (), (), ("legal",)])
            ),
            max_size=40,
        )
    )
    snapshots = [
        snapshot(f"s{number:02d}", created_s, schedule_id=schedule_id, holds=holds, epoch=(len(shapes) - number) // 2)
        for number, (created_s, schedule_id, holds) in enumerate(shapes)
    ]
    bases = draw(st.sets(st.sampled_from([each.id for each in snapshots]))) if snapshots else set()
    return draw(st.permutations(snapshots)), bases


@given(volumes(), KEEPS)
def test_what_stays_is_what_the_rules_say(volume: tuple[list[SnapshotRecord], set[str]], keep: dict[str, int]) -> None:
    """The one pass over sorted snapshots is as good as looking at each bucket alone."""
    snapshots, bases = volume
    decisions = plan(snapshots, keep, NOW_S, schedule_id=OURS, bases=bases)
    assert kept(decisions) == model(snapshots, keep, NOW_S, bases)
    assert {decision.snapshot.id for decision in decisions} == {each.id for each in snapshots}
    assert all(decision.reasons for decision in decisions)


@given(volumes(), KEEPS)
def test_pruning_twice_is_pruning_once(volume: tuple[list[SnapshotRecord], set[str]], keep: dict[str, int]) -> None:
    """At the same time; otherwise each run would eat into what the one before it left."""
    snapshots, bases = volume
    first = plan(snapshots, keep, NOW_S, schedule_id=OURS, bases=bases)
    left = [decision.snapshot for decision in first if decision.keep]
    assert kept(plan(left, keep, NOW_S, schedule_id=OURS, bases=bases)) == kept(first)


@given(volumes(), KEEPS, st.sampled_from(RULES), st.integers(0, 4))
def test_a_higher_count_keeps_no_less(
    volume: tuple[list[SnapshotRecord], set[str]], keep: dict[str, int], rule: str, count: int
) -> None:
    """Who asks for more gets no less, unless it was the first rule of all: before it nothing was pruned."""
    snapshots, bases = volume
    more = keep | {rule: min(keep.get(rule, 0) + count, MAX_KEPT_SNAPSHOTS)}
    if any(keep.values()):
        before = kept(plan(snapshots, keep, NOW_S, schedule_id=OURS, bases=bases))
        assert before <= kept(plan(snapshots, more, NOW_S, schedule_id=OURS, bases=bases))


@given(volumes(), KEEPS)
def test_what_was_pruned_would_never_be_wanted_again(
    volume: tuple[list[SnapshotRecord], set[str]], keep: dict[str, int]
) -> None:
    """A newer snapshot pushes older ones out, and never calls one back."""
    snapshots, bases = volume
    before = kept(plan(snapshots, keep, NOW_S, schedule_id=OURS, bases=bases))
    newer = [*snapshots, snapshot("newest", NOW_S + 2 * 24 * HOUR_S, epoch=100)]
    # Of those dated in the future nothing is said: the next one may find that they were not.
    past = {each.id for each in snapshots if each.created_s <= NOW_S}
    now_s = NOW_S + 2 * 24 * HOUR_S
    after = kept(
        plan([each for each in newer if each.id in {*past, "newest"}], keep, now_s, schedule_id=OURS, bases=bases)
    )
    assert after - {"newest"} <= before


@given(volumes(), KEEPS)
@example(([snapshot("a", NOW_S), snapshot("b", NOW_S)], set()), {"yearly": 1})
def test_the_newest_always_stays(volume: tuple[list[SnapshotRecord], set[str]], keep: dict[str, int]) -> None:
    """Whatever the rules are: a run never deletes what it has just taken."""
    snapshots, bases = volume
    own = [each for each in snapshots if each.schedule_id == OURS and each.created_s <= NOW_S]
    if own:
        newest = max(own, key=lambda each: (each.created_s, each.epoch, each.id))
        assert newest.id in kept(plan(snapshots, keep, NOW_S, schedule_id=OURS, bases=bases))


# --- cases -----------------------------------------------------------------------------------------------------------


def test_a_snapshot_says_why_it_stays() -> None:
    """The reasons name the bucket, the hold and the base; what goes says so too."""
    snapshots = [
        snapshot("sunday", at("2026-11-22 02:30")),
        snapshot("sunday-early", at("2026-11-22 01:30")),
        snapshot("saturday", at("2026-11-21 02:30"), holds=("legal", "audit")),
        snapshot("mine", at("2026-11-20 02:30"), schedule_id=""),
        snapshot("week-before", at("2026-11-15 02:30")),
        snapshot("january", at("2026-01-01 00:00")),
    ]
    keep = {"last": 1, "hourly": 1, "daily": 2, "weekly": 2, "monthly": 1, "yearly": 1}
    decisions = plan(snapshots, keep, NOW_S, schedule_id=OURS, bases={"january"})
    assert [(decision.snapshot.id, decision.keep, decision.reasons) for decision in decisions] == [
        (
            "sunday",
            True,
            ("last 1", "hourly 2026-11-22T02", "daily 2026-11-22", "weekly 2026-W47", "monthly 2026-11", "yearly 2026"),
        ),
        ("sunday-early", False, ("no rule keeps it",)),
        ("saturday", True, ("daily 2026-11-21", "held: legal, audit")),
        ("mine", True, ("not taken by this schedule",)),
        ("week-before", True, ("weekly 2026-W46",)),
        ("january", True, ("base of an archive",)),
    ]


def test_weeks_are_those_of_iso_8601() -> None:
    """1 January 2027 lies in the last week of 2026; a week is not cut in two by the year."""
    snapshots = [snapshot("friday", at("2027-01-01 12:00")), snapshot("monday", at("2026-12-28 12:00"))]
    decisions = plan(snapshots, {"weekly": 5}, at("2027-01-02 00:00"), schedule_id=OURS)
    assert [(decision.keep, decision.reasons) for decision in decisions] == [
        (True, ("weekly 2026-W53",)),
        (False, ("no rule keeps it",)),
    ]


def test_a_day_ends_at_midnight_utc() -> None:
    """Buckets are calendar days, not distances of 24 hours."""
    snapshots = [
        snapshot("first-of-day", at("2026-11-22 00:00")),
        snapshot("last-of-day", at("2026-11-21 23:59:59")),
        snapshot("hair-before", at("2026-11-22 00:00") - 3e-7),
        snapshot("before", at("2026-11-21 23:59:58")),
    ]
    assert kept(plan(snapshots, {"daily": 2}, NOW_S, schedule_id=OURS)) == {"first-of-day", "hair-before"}


@pytest.mark.parametrize(
    ("rule", "newest", "begin", "before"),
    [
        ("hourly", "2026-11-22 13:59", "2026-11-22 13:00", "2026-11-22 12:59"),
        ("daily", "2026-11-22 23:59", "2026-11-22 00:00", "2026-11-21 23:59"),
        ("weekly", "2026-11-22 23:59", "2026-11-16 00:00", "2026-11-15 23:59"),
        ("monthly", "2026-11-30 23:59", "2026-11-01 00:00", "2026-10-31 23:59"),
        ("yearly", "2026-12-31 23:59", "2026-01-01 00:00", "2025-12-31 23:59"),
    ],
)
def test_a_bucket_begins_with_its_first_second(rule: str, newest: str, begin: str, before: str) -> None:
    """The newest of a bucket hides all others down to its first second, and not the one before that."""
    snapshots = [
        snapshot("newest", at(newest)),
        snapshot("between", at(begin) + 1_800.5),
        snapshot("begin", at(begin)),
        snapshot("before", at(before)),
    ]
    now_s = at("2027-01-01 00:00")
    assert kept(plan(snapshots, {rule: 3}, now_s, schedule_id=OURS)) == {"newest", "before"}
    assert kept(plan(snapshots[1:], {rule: 3}, now_s, schedule_id=OURS)) == {"between", "before"}


@pytest.mark.parametrize("keep", [{}, {"last": 0}, {"daily": 0, "weekly": 0}])
def test_without_a_rule_nothing_is_pruned(keep: dict[str, int]) -> None:
    """Zero switches a rule off; it is no way to say 'delete them all'."""
    (decision,) = plan([snapshot("a", at("2001-01-01 00:00"))], keep, NOW_S, schedule_id=OURS)
    assert (decision.keep, decision.reasons) == (True, ("no rule prunes",))


def test_a_snapshot_from_the_future_takes_nobodys_place() -> None:
    """The clock was wrong once: what it dated stays, and what is taken until then is kept by the rules all the same."""
    snapshots = [snapshot("wrong", at("2036-01-01 00:00")), snapshot("new", NOW_S), snapshot("old", NOW_S - 60)]
    decisions = plan(snapshots, {"last": 1}, NOW_S, schedule_id=OURS)
    assert [decision.reasons for decision in decisions] == [
        ("dated in the future",),
        ("last 1",),
        ("no rule keeps it",),
    ]


def test_what_is_held_counts_as_what_it_is() -> None:
    """A held snapshot fills its bucket, as it would without the hold: releasing it changes nothing for the others."""
    held = [snapshot("held", NOW_S, holds=("legal",)), snapshot("next", NOW_S - 60)]
    assert kept(plan(held, {"last": 1}, NOW_S, schedule_id=OURS)) == {"held"}


@pytest.mark.parametrize("created_s", [-1e11, 0.0, 0.25, 1e18])
def test_no_date_is_too_strange(created_s: float) -> None:
    """Retention must not stop at one record."""
    if created_s < 0:
        created_s = at("0001-01-02 00:00")
    found = kept(plan([snapshot("strange", created_s), snapshot("a", NOW_S)], {"yearly": 9}, NOW_S, schedule_id=OURS))
    assert found == {"strange", "a"}


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ({"lastly": 1}, "no rule 'lastly'"),
        ({"last": -1}, "cannot keep -1"),
        ({"daily": MAX_KEPT_SNAPSHOTS + 1}, "cannot keep 10001"),
        ({"daily": True}, "cannot keep True"),
        ({"daily": 1.5}, "cannot keep 1.5"),
        ({"daily": "7"}, "cannot keep '7'"),
    ],
)
def test_rules_that_are_none_are_refused(keep: dict[str, int], said: str) -> None:
    """Before anything is pruned by them."""
    with pytest.raises(InvalidRequest, match=said):
        plan([snapshot("a", NOW_S)], keep, NOW_S, schedule_id=OURS)


def test_the_rules_come_back_in_their_order() -> None:
    """So that two people who ask for the same are told the same."""
    assert list(check_keep({"yearly": 0, "last": MAX_KEPT_SNAPSHOTS, "daily": 1})) == ["last", "daily", "yearly"]
