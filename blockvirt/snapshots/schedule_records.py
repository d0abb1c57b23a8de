"""Schedules in the metadata store: finding, storing, changing and removing their records.

What takes a ``Reader`` or a ``Writer`` runs inside one transaction of the store.
"""

import logging
from dataclasses import replace

from blockvirt.errors import DamagedRecord, LimitReached, NotFound, PreconditionFailed
from blockvirt.ids import canonical_id, is_id
from blockvirt.limits import MAX_SCHEDULES
from blockvirt.meta.keys import Table
from blockvirt.meta.records import ScheduleRecord
from blockvirt.meta.store import Reader, Writer

log = logging.getLogger("blockvirt.schedules")


def wish(record: ScheduleRecord) -> tuple[object, ...]:
    """What somebody asked for, without what came of it."""
    return record.cron, record.volume_id, record.labels, record.keep, record.paused


def changed(
    record: ScheduleRecord, cron: str | None, keep: dict[str, int] | None, paused: bool | None, now_s: float
) -> ScheduleRecord:
    """Return ``record`` with a change; a new cron, or the end of a pause, owes nothing from before ``now_s``."""
    wanted = replace(
        record,
        cron=record.cron if cron is None else cron,
        keep=record.keep if keep is None else keep,
        paused=record.paused if paused is None else paused,
    )
    if wanted.cron != record.cron or (record.paused and not wanted.paused):
        return replace(wanted, due_after_s=now_s)
    return wanted


def identify(reader: Reader, name_or_id: str) -> str:
    """Return the id of a schedule by name or id; raises NotFound."""
    if is_id(name_or_id):
        schedule_id = canonical_id(name_or_id)
        if reader.get(Table.SCHEDULES, schedule_id.encode()) is not None:
            return schedule_id
    elif name_or_id and name_or_id.isascii():
        stored = reader.get(Table.SCHEDULE_NAMES, name_or_id.encode())
        if stored is not None:
            return stored.decode(errors="replace")
    raise NotFound(f"there is no schedule {name_or_id[:80]!r}", correction="'blockvirt schedule list' shows all")


def find(reader: Reader, name_or_id: str) -> ScheduleRecord:
    """Return the record of a schedule by name or id; raises NotFound, DamagedRecord."""
    schedule_id = identify(reader, name_or_id)
    record = reader.record(ScheduleRecord, Table.SCHEDULES, schedule_id.encode())
    if record is None:
        raise DamagedRecord(
            f"schedule {name_or_id!r} has a name but no record",
            correction="delete it and create it anew, or run 'blockvirt check'",
        )
    return record


def insert(writer: Writer, record: ScheduleRecord) -> ScheduleRecord:
    """Store a new schedule and return it, or the one that has its name; raises LimitReached, DamagedRecord."""
    if writer.get(Table.SCHEDULE_NAMES, record.name.encode()) is not None:
        return find(writer, record.name)
    if writer.count(Table.SCHEDULES) >= MAX_SCHEDULES:
        raise LimitReached(
            f"the pool has {MAX_SCHEDULES} schedules, which is the most it may have",
            correction="use one schedule for many volumes, by their labels, and delete those that nobody needs",
        )
    writer.put_record(Table.SCHEDULES, record.id.encode(), record)
    writer.put(Table.SCHEDULE_NAMES, record.name.encode(), record.id.encode())
    return record


def remove(writer: Writer, name_or_id: str, expected_revision: int | None) -> str:
    """Take a schedule and its name away, be its record whole or not, and return its id.

    Raises NotFound, PreconditionFailed.
    """
    schedule_id = identify(writer, name_or_id)
    try:
        check_revision(find(writer, schedule_id), expected_revision)
    except (DamagedRecord, NotFound) as error:
        log.warning("deleting a damaged schedule: %s", error.message)
    for name, stored in writer.scan(Table.SCHEDULE_NAMES):
        if stored == schedule_id.encode():
            writer.delete(Table.SCHEDULE_NAMES, name)
    writer.delete(Table.SCHEDULES, schedule_id.encode())
    return schedule_id


def check_revision(record: ScheduleRecord, expected: int | None) -> None:
    """Return if a schedule has the expected revision (None: any); raises PreconditionFailed."""
    if expected is not None and record.revision != expected:
        raise PreconditionFailed(
            f"schedule {record.name!r} is at revision {record.revision}, not {expected}",
            cause="it was changed since you read it",
            correction="read it again and repeat the request with its new ETag",
            revision=record.revision,
        )
