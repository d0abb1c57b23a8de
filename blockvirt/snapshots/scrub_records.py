"""Scrubs in the metadata store: asking for one, their results, and what of the damage is still there.

What takes a ``Reader`` or a ``Writer`` runs inside one transaction of the store.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from blockvirt.errors import DamagedRecord, InUse, NotFound
from blockvirt.ids import new_id
from blockvirt.limits import KEPT_SCRUBS
from blockvirt.lun.address import chunk_of, file_of
from blockvirt.meta.keys import Table, number_key, pair_key, split_pair
from blockvirt.meta.records import BranchRecord, FileRecord, JobRecord, ScrubFinding, ScrubRecord, punch_count
from blockvirt.meta.store import Reader, Writer
from blockvirt.volumes.checksums import find_checksum
from blockvirt.volumes.deletion import branches_of
from blockvirt.volumes.job_records import queue_job
from blockvirt.volumes.job_states import FINISHED
from blockvirt.volumes.transactions import locate
from blockvirt.volumes.versions import branch_record

log = logging.getLogger("blockvirt.scrub")

SCRUB = "scrub"
EVERYTHING = "everything"
"""Subject of the job that reads all volumes."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody asks for."""

    volumes: tuple[str, ...] = ()
    """Names or ids; empty: everything."""
    rate_bytes: int = 0
    """Per second; 0: as configured."""
    scheduled_for_s: float = 0.0
    """The scheduled run that it is for; 0: none."""


def results(reader: Reader) -> list[ScrubRecord]:
    """Return the scrubs that are remembered, the newest first; damaged records are left out."""
    found = []
    for key, _ in reader.scan(Table.SCRUBS):
        try:
            record = reader.record(ScrubRecord, Table.SCRUBS, key)
        except DamagedRecord as error:
            log.error("%s", error)
            continue
        if record is not None:
            found.append(record)
    return sorted(found, key=lambda record: (record.created_s, record.id), reverse=True)


def find(reader: Reader, scrub_id: str) -> ScrubRecord:
    """Return a scrub; raises NotFound, DamagedRecord."""
    record = reader.record(ScrubRecord, Table.SCRUBS, scrub_id.encode())
    if record is None:
        raise NotFound(f"there is no scrub {scrub_id[:80]!r}", correction="'blockvirt scrub status' lists the last")
    return record


def queue(writer: Writer, wish: Wish, now_s: float) -> str:
    """Queue a scrub and return the id of its job; of the one at work where that is the same.

    Raises NotFound for a volume, InUse where another one is at work: two would read everything twice.
    """
    wanted = dict(sorted({locate(writer, each) for each in wish.volumes}, key=lambda each: each[1]))
    for record in results(writer):
        job = _job(writer, record.id)
        if job is None or job.state in FINISHED:
            continue
        if set(record.volumes) != set(wanted) or wish.rate_bytes not in (0, record.rate_bytes):
            raise InUse(
                f"a scrub of {job.subject} is {job.state} already",
                cause="one at a time, and it reads other volumes, or at another rate",
                correction=f"wait for it ('blockvirt job wait {job.id}'), or 'blockvirt job cancel {job.id}'",
                job_id=job.id,
            )
        if wish.scheduled_for_s:
            noted = replace(record, scheduled_for_s=wish.scheduled_for_s)
            writer.put_record(Table.SCRUBS, record.id.encode(), noted)
        return job.id
    subject = ", ".join(wanted.values()) or EVERYTHING
    job = JobRecord(
        id=new_id(),
        kind=SCRUB,
        state="queued",
        subject=subject,
        created_s=now_s,
        volume_id=next(iter(wanted)) if len(wanted) == 1 else "",
    )
    record = ScrubRecord(
        id=job.id,
        created_s=now_s,
        volumes=tuple(wanted),
        names=tuple(wanted.values()),
        rate_bytes=wish.rate_bytes,
        scheduled_for_s=wish.scheduled_for_s,
    )
    _forget_oldest(writer)
    writer.put_record(Table.SCRUBS, record.id.encode(), record)
    queue_job(writer, job)
    return job.id


def _job(reader: Reader, job_id: str) -> JobRecord | None:
    try:
        return reader.record(JobRecord, Table.JOBS, job_id.encode())
    except DamagedRecord as error:
        log.error("%s", error)
        return None


def _forget_oldest(writer: Writer) -> None:
    """Make room for one more; the last one that a schedule asked for stays: it says what is owed next."""
    known = results(writer)
    newest_scheduled = max((record.scheduled_for_s for record in known), default=0.0)
    for record in known[KEPT_SCRUBS - 1 :]:
        if not record.scheduled_for_s or record.scheduled_for_s != newest_scheduled:
            writer.delete(Table.SCRUBS, record.id.encode())


# --- what to read ----------------------------------------------------------------------------------------------------


def files_of_volumes(reader: Reader, volume_ids: Sequence[str]) -> frozenset[int]:
    """Return the backing files that some volumes and their snapshots may see chunks of, their origins' included."""
    seen: set[int] = set()
    left = [branch for each in volume_ids for branch in branches_of(reader, each)]
    while left:
        number = left.pop()
        if number in seen or reader.get(Table.BRANCHES, number_key(number)) is None:
            continue
        seen.add(number)
        try:
            record = branch_record(reader, number)
        except DamagedRecord:  # named by the walk over the records
            continue
        left += [origin for origin, _ in ((record.origin_branch, 0), *record.pins) if origin]
    return frozenset(
        split_pair(key)[1] for number in seen for key, _ in reader.scan(Table.BRANCH_FILES, prefix=number_key(number))
    )


# --- what is still so ------------------------------------------------------------------------------------------------


def is_live(reader: Reader, address: int, checksum: int | None = None) -> bool:
    """Tell whether a sealed chunk was not given up: its content then still is what its checksum says.

    What is freed has a row of ``punch`` until it is punched, and loses that and its checksum in one transaction; a
    branch that goes as a whole has neither head nor points before its files are unlinked. Raises DamagedRecord.
    """
    found = find_checksum(reader, address)
    if found is None or checksum not in (None, found):
        return False
    number = file_of(address)
    freed = reader.floor(Table.PUNCH, pair_key(number, chunk_of(address)), prefix=number_key(number))
    if freed is not None and chunk_of(address) < split_pair(freed[0])[1] + punch_count(*freed):
        return False
    return is_kept(reader, number)


def is_kept(reader: Reader, number: int) -> bool:
    """Tell whether a backing file's branch is kept by a head or a point; raises DamagedRecord."""
    file = reader.record(FileRecord, Table.FILES, number_key(number))
    if file is None:
        return False
    branch = reader.record(BranchRecord, Table.BRANCHES, number_key(file.branch))
    if branch is None:
        return False
    return bool(branch.head_epoch) or any(True for _ in reader.scan(Table.POINTS, prefix=number_key(file.branch)))


def standing(reader: Reader, scrubs: Iterable[ScrubRecord]) -> list[ScrubFinding]:
    """Return the damage that the last scrubs (``results``) found and nothing says is gone.

    That of the last scrub of everything that came to its end, and of whatever was read later.
    """
    found: dict[tuple[str, str, int, int], ScrubFinding] = {}
    for record in scrubs:
        for finding in record.findings:
            place = (finding.kind, finding.path, finding.address, finding.offset_bytes)
            if _stands(reader, finding):
                found.setdefault(place if finding.kind != "record" else (finding.problem, "", 0, 0), finding)
        if record.ended_s and not record.volumes:
            break
    return list(found.values())


def _stands(reader: Reader, finding: ScrubFinding) -> bool:
    try:
        if finding.kind == "chunk":
            return is_live(reader, finding.address)
        return finding.kind != "file" or is_kept(reader, finding.address)
    except DamagedRecord:
        return True
