"""Jobs in the metadata store: what happens to their records inside one transaction, in the store's writer thread."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from blockvirt.errors import NotFound
from blockvirt.meta.keys import Table
from blockvirt.meta.records import JobRecord
from blockvirt.meta.store import Writer
from blockvirt.volumes.job_states import State


def queue_job(writer: Writer, record: JobRecord) -> None:
    """Store a new job, in the transaction that makes it necessary; ``JobBoard.wake`` once that is committed.

    There is no limit of its own: each job belongs to a volume or a snapshot, and those have limits.
    """
    assert record.state == State.QUEUED, "a job begins in the queue"
    writer.put_record(Table.JOBS, record.id.encode(), record)


def change_job(writer: Writer, job_id: str, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
    """Replace a job by what ``change`` makes of it, and return that; raises NotFound, DamagedRecord."""
    key = job_id.encode()
    stored = writer.record(JobRecord, Table.JOBS, key)
    if stored is None:
        raise no_such_job(job_id)
    changed = change(stored)
    if changed is not stored:
        writer.put_record(Table.JOBS, key, changed)
    return changed


def forget_jobs(writer: Writer, ids: Sequence[str], is_over: Callable[[str], bool]) -> list[str]:
    """Remove the jobs among ``ids`` whose state is still over (one may have been resumed); return whose are gone."""
    gone = []
    for job_id in ids:
        record = writer.record(JobRecord, Table.JOBS, job_id.encode())
        if record is None or is_over(record.state):
            writer.delete(Table.JOBS, job_id.encode())
            gone.append(job_id)
    return gone


def with_progress(record: JobRecord, progress: JobRecord) -> JobRecord:
    """Return ``record`` with the progress that ``progress`` has."""
    return replace(record, done_units=progress.done_units, total_units=progress.total_units, position=progress.position)


def no_such_job(job_id: str) -> NotFound:
    """Return the error for a job that is not there."""
    return NotFound(
        f"there is no job {job_id[:80]!r}",
        correction="list the jobs: of those that are over, only the newest are kept",
    )
