"""Reclaim: freeing what nobody sees any more, in the background, a few leaves at a time. Needs no space to make space.

A row (branch, epoch) says that a point went there, or that a checkpoint left older versions of its leaves behind. Each
step is one small transaction that removes dead versions and queues their addresses for punching, so a crash repeats
nothing but a look; the row goes after the last step, if nobody has put more to free under it meanwhile: its value is
another one then. A branch that neither a head nor a point keeps goes as a whole: its files are unlinked, then its rows,
then its hold on its origin, which may be next.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from blockvirt.errors import DamagedRecord, DeviceFault
from blockvirt.ids import new_id
from blockvirt.limits import PUNCH_COUNT_ROWS, RECLAIM_BATCH_LEAVES, RECLAIM_BATCH_ROWS, RECLAIM_BATCH_VERSIONS
from blockvirt.meta.keys import Table, child_point_key, number_key, pair_key, split_pair, volume_branch_key
from blockvirt.meta.records import BranchRecord, FileRecord, JobRecord, punch_count
from blockvirt.meta.store import Reader, Writer
from blockvirt.pool.backing import backing_path, unlink_files
from blockvirt.units import format_size
from blockvirt.volumes.concerned import volume_name
from blockvirt.volumes.context import VolumeContext, files_of
from blockvirt.volumes.gaps import Gap, born_between, gap_around
from blockvirt.volumes.jobs import Running, State, queue_job
from blockvirt.volumes.journal import journal_paths
from blockvirt.volumes.punch import Puncher
from blockvirt.volumes.versions import free_gap, is_pinned, next_point, previous_point, release

log = logging.getLogger("blockvirt.reclaim")

RECLAIM = "reclaim"
PURGE = "purge"


def queue_reclaim(writer: Writer, branch: int, epoch: int, *, subject: str, volume_id: str = "") -> str | None:
    """Note that a point went, and queue its reclaim; returns the job's id, or None where something keeps the point.

    For the board: wake it once the transaction is committed.
    """
    if any(True for _ in Reader.scan(writer, Table.POINTS, prefix=pair_key(branch, epoch))):
        return None
    writer.mark(Table.RECLAIM, pair_key(branch, epoch))
    job = JobRecord(
        id=new_id(),
        kind=RECLAIM,
        state="queued",
        subject=subject,
        created_s=time.time(),
        volume_id=volume_id,
        branch=branch,
        position=epoch,
    )
    queue_job(writer, job)
    return job.id


def leave_behind(writer: Writer, branch: BranchRecord, head_epoch: int) -> bool:
    """Leave versions that a new one in ``head_epoch`` hides to a reclaim; tells whether a job was queued for them.

    They lie behind the last point and were born before the head's epoch. So the epoch before that is none of a point,
    and a reclaim of it finds them from either side: they are all before it, and a later one of each leaf is after it.
    """
    epoch = head_epoch - 1
    if writer.get(Table.RECLAIM, pair_key(branch.number, epoch)) is not None:
        # It has its job, which may have looked at some of these leaves already.
        writer.mark(Table.RECLAIM, pair_key(branch.number, epoch))
        return False
    subject = f"older versions of {volume_name(writer, branch.volume_id)}"
    return queue_reclaim(writer, branch.number, epoch, subject=subject, volume_id=branch.volume_id) is not None


def adopt_rows(writer: Writer) -> None:
    """Queue a job for every row that has none: of a purge that ended early, or put there by a repair. At start."""
    claimed: set[tuple[int, int]] = set()
    purging: set[str] = set()
    for key, _ in writer.scan(Table.JOBS):
        try:
            job = writer.record(JobRecord, Table.JOBS, key)
        except DamagedRecord as error:
            log.error("%s", error)
            continue
        if job is None or job.state in (State.DONE, State.CANCELLED):
            continue
        if job.kind == RECLAIM:
            claimed.add((job.branch, job.position))
        elif job.kind == PURGE:  # does all rows of its volume
            purging.add(job.volume_id)
    for key, _ in writer.scan(Table.RECLAIM):
        branch, epoch = split_pair(key)
        try:
            record = writer.record(BranchRecord, Table.BRANCHES, number_key(branch))
        except DamagedRecord as error:  # the row stays, for when the record is mended
            log.error("%s", error)
            continue
        volume_id = record.volume_id if record is not None else ""
        if (branch, epoch) not in claimed and volume_id not in purging:
            queue_reclaim(writer, branch, epoch, subject=f"branch {branch}", volume_id=volume_id)


class Reclaimer:
    """The worker of reclaim jobs. One per pool."""

    def __init__(self, context: VolumeContext, puncher: Puncher, wake_jobs: Callable[[], None]) -> None:
        self._store = context.store
        self._storage = context.storage
        self._threads = context.threads
        self._punches = context.punches
        self._puncher = puncher
        self._chunk_shift = context.chunk_shift
        self._drained = context.drained
        self._wake_jobs = wake_jobs

    async def work(self, job: Running) -> None:
        """Do a reclaim job: ``branch``, and in ``position`` the epoch of the point that went."""
        await self.free(job, job.record.branch, job.record.position)
        await self.give_back(job, [job.record.branch])

    async def free(self, job: Running, branch: int, epoch: int) -> None:
        """Free what only the point at ``epoch`` saw; the whole branch if nothing keeps it any more.

        Nothing is done where its row is gone: then it was done before.
        Raises DeviceFault where a device that must be reached is missing, MetadataFault, OSError.
        """
        is_done = False
        while not is_done:
            with self._store.read() as reader:
                mark = reader.get(Table.RECLAIM, pair_key(branch, epoch))
                record = reader.record(BranchRecord, Table.BRANCHES, number_key(branch))
                kept = record is not None and (record.head_epoch or is_pinned(reader, branch))
            if mark is None:
                return
            if record is not None and kept:
                await self._free_gap(job, record, epoch)
            elif record is not None:
                await self._drop(job, record)
            is_done = await self._store.commit(partial(_end, pair_key(branch, epoch), mark))

    async def give_back(self, job: Running, branches: Sequence[int]) -> None:
        """Return when the filesystem has back what is freed by now of some branches; other jobs may go on meanwhile.

        Raises DeviceFault where it cannot get some of it for now.
        """
        files = {file.number for branch in branches for file in files_of(self._store, branch)}
        with self._puncher.turn(files) as turn:
            chunks, is_known = await self._threads.run(partial(self._to_be_punched, files))
            if not chunks:
                return
            turn.done_chunks = 0
            with job.waiting(turn.changed.set):
                while not turn.is_over:
                    job.checkpoint()
                    done = min(turn.done_chunks, chunks) if is_known else turn.done_chunks
                    left = format_size((chunks - done) << self._chunk_shift) if is_known else "freed space"
                    job.detail = f"{left} still to be given back to the filesystem"
                    await job.advance(done, chunks if is_known else 0, job.record.position)
                    await turn.changed.wait()
                    turn.changed.clear()
        if turn.problem is not None:
            raise turn.problem

    def _to_be_punched(self, files: Collection[int]) -> tuple[int, bool]:
        """Return how many chunks of some files the punch table has, and whether that is all; blocks."""
        chunks = rows = 0
        with self._store.read() as reader:
            for file in files:
                for key, stored in reader.scan(Table.PUNCH, prefix=number_key(file)):
                    try:
                        chunks += punch_count(key, stored)
                    except DamagedRecord:  # the puncher says so
                        chunks += 1
                    rows += 1
                    if rows == PUNCH_COUNT_ROWS:
                        return chunks, False
        return chunks, True

    # --- one gap -------------------------------------------------------------------------------------------------

    async def _free_gap(self, job: Running, branch: BranchRecord, epoch: int) -> None:
        gap = await self._threads.run(partial(self._look, branch, epoch))
        done = 0
        place: _Place | None = _BEGIN
        while place is not None:
            job.checkpoint()
            visited, place = await self._store.commit(partial(_step, gap, epoch, place))
            self._punches.set()
            done += visited
            await job.advance(done, max(done, gap.leaves), epoch)
            await asyncio.sleep(0)

    def _look(self, branch: BranchRecord, epoch: int) -> Gap:
        with self._store.read() as reader:
            return gap_around(reader, branch, epoch)

    # --- a whole branch --------------------------------------------------------------------------------------------

    async def _drop(self, job: Running, branch: BranchRecord) -> None:
        files = files_of(self._store, branch.number)
        await self._drained()
        await self._unlink(branch.number, files)
        tables = [(table, number_key(branch.number)) for table in (Table.LEAVES, Table.BORN, Table.SEALS)]
        tables += [(table, number_key(file.number)) for table in (Table.PUNCH, Table.CHECKSUMS) for file in files]
        done = 0
        for table, prefix in tables:
            while removed := await self._store.commit(partial(_delete_rows, table, prefix)):
                done += removed
                await job.advance(done, 0, job.record.position)
        if await self._store.commit(partial(_forget_branch, branch.number)):
            self._wake_jobs()
        for file in files:
            self._storage.removed(file.device_id, file.number)
        log.info("branch %d is gone, with %d files", branch.number, len(files))

    async def _unlink(self, branch: int, files: list[FileRecord]) -> None:
        paths = self._storage.paths()
        missing = {file.device_id for file in files} - paths.keys()
        if missing:
            raise DeviceFault(
                f"device {missing.pop()} is missing", correction="bring it back: the deletion then goes on by itself"
            )
        doomed = [backing_path(paths[file.device_id], branch, file.number) for file in files]
        doomed += [path for folder in paths.values() for path in journal_paths(folder, branch) if path.exists()]
        await self._threads.run(lambda: unlink_files(doomed))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a step goes on."""

    key: bytes
    """The row of the index of births to go on from."""
    leaf: int | None = None
    """One that is to be judged before, whose row may have gone: some of its dead versions are left."""


_BEGIN = _Place(b"")


def _step(gap: Gap, epoch: int, place: _Place, writer: Writer) -> tuple[int, _Place | None]:
    """Free some of a gap's leaves; returns how many are done, and where to go on (None: that was all)."""
    branch = writer.record(BranchRecord, Table.BRANCHES, number_key(gap.branch))
    if branch is None:
        return 0, None
    # The neighbours may have changed since the gap was looked at: another point went, and has its own row.
    after, upto = previous_point(writer, gap.branch, epoch), next_point(writer, branch, epoch)
    leaves: dict[int, bytes] = {} if place.leaf is None else {place.leaf: place.key}
    behind = None
    for _, leaf, key in born_between(writer, gap.branch, gap.first_epoch, gap.last_epoch, place.key):
        if len(leaves) == RECLAIM_BATCH_LEAVES:
            behind = _Place(key)
            break
        leaves.setdefault(leaf, key)
    room = RECLAIM_BATCH_VERSIONS
    for done, (leaf, key) in enumerate(leaves.items()):
        try:
            removed, freed = free_gap(writer, gap.branch, leaf, after, upto, room)
        except DamagedRecord as error:
            log.error("leaf %d of branch %d is not reclaimed: %s", leaf, gap.branch, error)
            continue
        release(writer, freed)
        if removed == room:
            return done, _Place(key, leaf)
        room -= removed
    return len(leaves), behind


def _end(key: bytes, mark: bytes | None, writer: Writer) -> bool:
    """Remove the row of what is freed now; tells whether it is: its mark is that of when the work began."""
    if writer.get(Table.RECLAIM, key) not in (mark, None):
        return False
    writer.delete(Table.RECLAIM, key)
    return True


def _delete_rows(table: Table, prefix: bytes, writer: Writer) -> int:
    """Remove some of the rows under ``prefix``; returns how many."""
    keys = [key for (key, _), _ in zip(writer.scan(table, prefix=prefix), range(RECLAIM_BATCH_ROWS), strict=False)]
    for key in keys:
        writer.delete(table, key)
    return len(keys)


def _forget_branch(number: int, writer: Writer) -> bool:
    """Remove a branch's record and its hold on its origins; tells whether jobs were queued for those."""
    branch = writer.record(BranchRecord, Table.BRANCHES, number_key(number))
    if branch is None:
        return False
    assert not branch.head_epoch
    assert not is_pinned(writer, number)
    for key, _ in writer.scan(Table.BRANCH_FILES, prefix=number_key(number)):
        writer.delete(Table.FILES, number_key(split_pair(key)[1]))
        writer.delete(Table.BRANCH_FILES, key)
    for key, _ in writer.scan(Table.RECLAIM, prefix=number_key(number)):
        writer.delete(Table.RECLAIM, key)
    writer.delete(Table.VOLUME_BRANCHES, volume_branch_key(branch.volume_id, number))
    writer.delete(Table.BRANCHES, number_key(number))
    return release_origins(writer, branch)


def release_origins(writer: Writer, branch: BranchRecord) -> bool:
    """Let go of everything older that a branch keeps; tells whether jobs were queued for what that leaves behind."""
    origins = [(branch.origin_branch, branch.origin_epoch), *branch.pins]
    queued = False
    for origin, epoch in origins:
        if origin:
            writer.delete(Table.POINTS, child_point_key(origin, epoch, branch.number))
            subject = f"what branch {branch.number} came from"
            queued |= queue_reclaim(writer, origin, epoch, subject=subject) is not None
    return queued
