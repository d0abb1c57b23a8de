"""Retention: which of a volume's snapshots stay, and why. Pure.

The rules are those of restic and borg: ``last`` keeps the newest N snapshots, the others keep the newest snapshot of
each of the newest N hours, days, ISO weeks, months or years that have one, by the UTC calendar. A snapshot stays if one
rule keeps it. Each rule counts alone, as in restic: what one rule keeps counts for the others too.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import inf

from blockvirt.errors import InvalidRequest
from blockvirt.limits import MAX_KEPT_SNAPSHOTS
from blockvirt.meta.records import SnapshotRecord

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _week(monday: datetime) -> str:
    year, week, _ = monday.isocalendar()
    return f"{year:04d}-W{week:02d}"


# Rule -> the day or hour that the bucket of a full hour begins with, and what the bucket is called.
_BUCKETS: dict[str, tuple[Callable[[datetime], datetime], Callable[[datetime], str]]] = {
    "hourly": (lambda hour: hour, lambda begin: begin.isoformat()[:13]),
    "daily": (lambda hour: hour.replace(hour=0), lambda begin: begin.isoformat()[:10]),
    "weekly": (lambda hour: hour.replace(hour=0) - timedelta(days=hour.weekday()), _week),
    "monthly": (lambda hour: hour.replace(day=1, hour=0), lambda begin: begin.isoformat()[:7]),
    "yearly": (lambda hour: hour.replace(month=1, day=1, hour=0), lambda begin: begin.isoformat()[:4]),
}
RULES = ("last", *_BUCKETS)
"""All rules there are, the finest first."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one snapshot."""

    snapshot: SnapshotRecord
    keep: bool
    reasons: tuple[str, ...]
    """Why, for people: 'last 1', 'daily 2026-11-22', 'held: legal' ...; one at least."""


def check_keep(keep: Mapping[str, int]) -> dict[str, int]:
    """Return ``keep`` (rule -> how many), the finest rule first; raises InvalidRequest.

    A count is 0 to ``limits.MAX_KEPT_SNAPSHOTS``; 0 switches the rule off.
    """
    for rule, count in keep.items():
        if rule not in RULES:
            raise InvalidRequest(f"there is no rule {rule[:40]!r} to keep by", correction=f"use {', '.join(RULES)}")
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_KEPT_SNAPSHOTS:
            raise InvalidRequest(
                f"the rule {rule!r} cannot keep {count!r} snapshots",
                correction=f"give a whole number from 0 to {MAX_KEPT_SNAPSHOTS}",
            )
    return {rule: keep[rule] for rule in RULES if rule in keep}


def plan(
    snapshots: Sequence[SnapshotRecord],
    keep: Mapping[str, int],
    now_s: float,
    *,
    schedule_id: str,
    bases: Set[str] = frozenset(),
) -> tuple[Decision, ...]:
    """Decide over the snapshots of one volume, the newest first; raises InvalidRequest for rules that are none.

    Only what ``schedule_id`` took counts, and only that is ever pruned: never what somebody holds, nor what is in
    ``bases`` (ids of snapshots that an archive goes on from). Without a rule above 0 nothing is pruned. A snapshot
    dated after ``now_s`` (the clock was wrong) is kept and not counted: it would take the places of all that are
    taken until then.
    """
    newest_first = sorted(snapshots, key=lambda snapshot: (snapshot.created_s, snapshot.epoch, snapshot.id))[::-1]
    rules = {rule: count for rule, count in check_keep(keep).items() if count}
    own = [snapshot for snapshot in newest_first if snapshot.schedule_id == schedule_id]
    by_rule = _kept_by_rules([snapshot for snapshot in own if snapshot.created_s <= now_s], rules)
    decisions = []
    for snapshot in newest_first:
        reasons = list(by_rule.get(snapshot.id, ()))
        if snapshot.schedule_id != schedule_id:
            reasons.append("not taken by this schedule")
        elif not rules:
            reasons.append("no rule prunes")
        elif snapshot.created_s > now_s:
            reasons.append("dated in the future")
        if snapshot.holds:
            reasons.append(f"held: {', '.join(snapshot.holds)}")
        if snapshot.id in bases:
            reasons.append("base of an archive")
        decisions.append(Decision(snapshot, bool(reasons), tuple(reasons) or ("no rule keeps it",)))
    return tuple(decisions)


def _kept_by_rules(newest_first: Sequence[SnapshotRecord], rules: Mapping[str, int]) -> dict[str, list[str]]:
    """Return what the rules keep: snapshot id -> the reasons."""
    kept = {
        snapshot.id: [f"last {place}"] for place, snapshot in enumerate(newest_first[: rules.get("last", 0)], start=1)
    }
    open_rules = {rule: count for rule, count in rules.items() if rule in _BUCKETS}
    begins_s: dict[str, float] = {}  # of each rule's latest bucket: a number to compare, thousands of times
    for snapshot in newest_first:
        if not open_rules:
            break  # all that follow are older than everything the rules may keep
        for rule in [rule for rule in open_rules if snapshot.created_s < begins_s.get(rule, inf)]:
            begin_of, name_of = _BUCKETS[rule]
            begin = begin_of(_EPOCH + timedelta(hours=snapshot.created_s // 3_600))
            begins_s[rule] = (begin - _EPOCH).total_seconds()
            kept.setdefault(snapshot.id, []).append(f"{rule} {name_of(begin)}")
            open_rules[rule] -= 1
            if not open_rules[rule]:
                del open_rules[rule]
    return kept
