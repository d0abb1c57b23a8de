"""When a schedule is due: cron expressions of five fields, in UTC. Pure.

They mean what they mean to Debian's cron (crontab(5)): with both a day of the month and a day of the week given, either
is enough, unless one of the two begins with a star. ``L`` is the last day of the month, ``MON#1`` its first Monday.
Times are seconds since 1970.
"""

from datetime import UTC, datetime, timedelta
from itertools import islice

from cronsim import CronSim, CronSimError

from blockvirt.errors import InvalidRequest
from blockvirt.limits import MAX_CRON_CHARS

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIELDS = {
    "minute": "0 to 59",
    "hour": "0 to 23",
    "day-of-month": "1 to 31, or L for the last",
    "month": "1 to 12, or JAN to DEC",
    "day-of-week": "0 to 7 (0 and 7 are Sunday), or SUN to SAT",
}
_EXAMPLE = "'30 2 * * MON-FRI' is 02:30 UTC from Monday to Friday"


def check_cron(text: str) -> str:
    """Return ``text`` with single spaces if it is a cron expression that fires now and then; raises InvalidRequest."""
    fields = text.split()
    if len(text) > MAX_CRON_CHARS or not text.isascii() or len(fields) != len(_FIELDS):
        raise InvalidRequest(
            f"{text[:80]!r} is not a cron expression of five fields",
            correction=f"write {' '.join(_FIELDS)}: {_EXAMPLE}",
        )
    for place, (name, values) in enumerate(_FIELDS.items()):
        alone = ["*"] * len(_FIELDS)
        alone[place] = fields[place]
        if not _is_cron(" ".join(alone)):
            raise InvalidRequest(
                f"the field {name} of the cron expression {text[:80]!r} cannot be {fields[place][:40]!r}",
                correction=f"use {values}; also lists (1,5), ranges (1-5), steps (*/5), or * for all",
                field=name,
            )
    cron = " ".join(fields)
    # No expression that fires at all leaves out more than 40 years (29 February on a certain day of the week, around
    # 2100); the search gives up after 50.
    if not _is_cron(cron) or next(CronSim(cron, _EPOCH), None) is None:
        raise InvalidRequest(
            f"the cron expression {cron!r} never fires",
            cause="no year has such a day",
            correction=f"choose a day that its months have: 'L' as the day of the month is the last one; {_EXAMPLE}",
        )
    return cron


def next_run_s(cron: str, after_s: float) -> float:
    """Return the first time after ``after_s`` that ``cron`` (one that ``check_cron`` returned) is due."""
    return next_runs_s(cron, after_s, 1)[0]


def next_runs_s(cron: str, after_s: float, count: int) -> tuple[float, ...]:
    """Return the first ``count`` times after ``after_s`` that ``cron`` is due."""
    return tuple(moment.timestamp() for moment in islice(CronSim(cron, _moment(after_s)), count))


def runs_between(cron: str, after_s: float, upto_s: float, limit: int) -> tuple[float, ...]:
    """Return the times after ``after_s`` and not after ``upto_s`` that ``cron`` is due; the newest ``limit`` of them.

    The oldest comes first. Work and memory are bounded by ``limit``, however far the two are apart.
    """
    # Backwards, the iterator begins before its start.
    runs = CronSim(cron, _moment(upto_s).replace(microsecond=0) + timedelta(seconds=1), reverse=True)
    found: list[float] = []
    for moment in islice(runs, limit):
        if moment.timestamp() <= after_s:
            break
        found.append(moment.timestamp())
    return tuple(reversed(found))


def _is_cron(text: str) -> bool:
    try:
        CronSim(text, _EPOCH)
    except CronSimError:
        return False
    return True


def _moment(time_s: float) -> datetime:
    return _EPOCH + timedelta(seconds=time_s)
