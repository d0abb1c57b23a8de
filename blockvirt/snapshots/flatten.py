"""Flatten: a clone gets copies of everything that it still shares with its origin, and lets go of it.

Leaf by leaf, as a job that can be paused, cancelled and resumed; what is copied stays copied. A leaf's sealed chunks
are copied while guests write; then its chunks are held for the length of one commit that replaces the addresses in the
head and in every older version, those that snapshots see included. The origin is let go of when no version of the
branch holds a foreign address. Branches that come from this one may hold some, copied from its versions: they keep the
origin for themselves (``BranchRecord.pins``).
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Container, Coroutine, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from blockvirt.errors import BeingDeleted, InUse, InvalidRequest, NotFound
from blockvirt.ids import new_id
from blockvirt.limits import FLATTEN_PIN_BYTES, LEAF_CHUNKS
from blockvirt.lun.address import ADDRESS_MASK, file_of
from blockvirt.lun.leaf import SLOT_BITS, encode
from blockvirt.meta.keys import (
    Table,
    born_key,
    child_point_key,
    leaf_key,
    leaf_prefix,
    number_key,
    pair_key,
    split_leaf,
)
from blockvirt.meta.records import BranchRecord, FileRecord, JobRecord, VolumeRecord, seal
from blockvirt.meta.store import Reader, Writer
from blockvirt.snapshots.readers import SnapshotReaders
from blockvirt.tasks import TaskSet
from blockvirt.volumes.allowance import check_background
from blockvirt.volumes.checkpoint import checkpoint_with
from blockvirt.volumes.engine import Engine
from blockvirt.volumes.job_states import FINISHED
from blockvirt.volumes.jobs import Moot, Running, in_one_line, queue_job
from blockvirt.volumes.opened import OpenVolume
from blockvirt.volumes.reclaim import release_origins
from blockvirt.volumes.transactions import locate
from blockvirt.volumes.versions import (
    branch_record,
    decoded,
    leaf_births,
    lineage,
    owner_of,
    points_of,
    visible_through,
)

if TYPE_CHECKING:
    from array import array

log = logging.getLogger("blockvirt.flatten")
T = TypeVar("T")

FLATTEN = "flatten"


class Flattening:
    """The worker of flatten jobs. One per pool."""

    def __init__(self, engine: Engine, readers: SnapshotReaders, *, clock: Callable[[], float] = time.time) -> None:
        """Registers with the job board: make it in the same turn of the event loop in which the engine has started."""
        self._engine = engine
        self._store = engine.store
        self._readers = readers
        self._clock = clock
        self._tasks = TaskSet("flatten")
        engine.jobs.register(FLATTEN, self.work, cancellable=True, retries=False)

    async def start(self, volume: str) -> str:
        """Queue the flatten of a volume (name or id); returns the job's id, of the one at work if there is one.

        Raises NotFound, InvalidRequest (it shares nothing with another volume's or an older branch).
        """
        with self._store.read() as reader:
            volume_id, name = locate(reader, volume)
        job_id = await self._store.commit(lambda writer: self._queue(writer, volume_id, name))
        self._engine.jobs.wake(job_id)
        return job_id

    def _queue(self, writer: Writer, volume_id: str, name: str) -> str:
        branch = _head(writer, volume_id)
        if not branch.origin_branch:
            raise InvalidRequest(
                f"volume {name!r} is no clone: it shares no chunk with another", correction="nothing is to be done"
            )
        for key, _ in writer.scan(Table.JOBS):
            job = writer.record(JobRecord, Table.JOBS, key)
            if job is not None and job.kind == FLATTEN and job.branch == branch.number and job.state not in FINISHED:
                return job.id
        job = JobRecord(
            id=new_id(),
            kind=FLATTEN,
            state="queued",
            subject=name,
            created_s=self._clock(),
            volume_id=volume_id,
            branch=branch.number,
        )
        queue_job(writer, job)
        return job.id

    async def work(self, job: Running) -> None:
        """Do a flatten job; ``position`` is the leaf to go on with.

        Raises Moot where the volume was deleted or reverted meanwhile; PoolFull, InUse, DeviceFault and others.
        """
        try:
            await self._flatten(job)
        except (NotFound, BeingDeleted) as gone:
            raise Moot(in_one_line(gone)) from gone

    async def _flatten(self, job: Running) -> None:
        leaves, inherited_chunks = await self._engine.context.threads.run(lambda: self._begin(job.record))
        leaf_bytes = LEAF_CHUNKS << self._engine.context.chunk_shift
        left = [leaf for leaf in leaves if leaf >= job.record.position]
        await job.advance((len(leaves) - len(left)) * leaf_bytes, len(leaves) * leaf_bytes, job.record.position)
        inherited_bytes = inherited_chunks << self._engine.context.chunk_shift
        while left:
            job.checkpoint()
            check_background(self._engine.storage.status(), inherited_bytes, f"the flatten of {job.record.subject}")
            inherited_bytes = 0  # the whole was looked at; from here on only whether guests leave it the room
            # Not for long at a time: whoever wants to revert or delete the volume waits for the pin.
            part = left[: max(1, FLATTEN_PIN_BYTES // leaf_bytes)]
            left = left[await self._whole(self._some_leaves(job, part)) :]
            done = len(leaves) - len(left)
            await job.advance(done * leaf_bytes, len(leaves) * leaf_bytes, left[0] if left else leaves[-1] + 1)
        await self._whole(self._finish(job))
        log.info("volume %s is flattened", job.record.subject)

    async def _whole(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a part to its end, pin and all, even if the job is cancelled with the engine: see ``checkpoint_with``."""
        return await asyncio.shield(self._tasks.start(work, "flatten", awaited=True))

    async def _some_leaves(self, job: Running, leaves: Sequence[int]) -> int:
        """Flatten some leaves; returns how many of them are done when the job is to stop, or all are."""
        async with self._engine.registry.pinned(job.record.volume_id) as opened:
            _check_branch(opened, job.record.branch)
            for done, leaf in enumerate(leaves):
                if job.stopping:
                    return done
                while not await self._leaf(opened, leaf):
                    if job.stopping:
                        return done
        return len(leaves)

    async def _finish(self, job: Running) -> None:
        number = job.record.branch
        async with self._engine.registry.pinned(job.record.volume_id) as opened:
            _check_branch(opened, number)
            await opened.checkpointer.run_all()
            if opened.volume.inherited_chunks:
                raise InUse(
                    f"volume {job.record.subject} still shares {opened.volume.inherited_chunks} chunks",
                    correction="flatten it again; if that does not help run 'blockvirt check'",
                )
            if await self._store.commit(lambda writer: _let_go(writer, number)):
                self._engine.jobs.wake()
            self._engine.sealing.set()
            await self._look_up_anew(number)

    def _begin(self, job: JobRecord) -> tuple[list[int], int]:
        """Return the leaves that the job's branch or an origin of it has, in order, and how many chunks are foreign.

        Raises Moot where the volume was reverted since the job was queued: the branch may be gone. Blocks.
        """
        with self._store.read() as reader:
            record = _head(reader, job.volume_id)
            if record.number != job.branch:
                raise _reverted(job.subject)
            chain = lineage(reader, record, record.head_epoch)
            leaves = sorted({leaf for number, _ in chain for leaf, _ in leaf_births(reader, number)})
            return leaves, record.inherited_chunks

    async def _look_up_anew(self, branch: int) -> None:
        """Have all that is open and comes from the branch forget the replaced addresses, and close their files."""
        volumes = [each for each in self._engine.registry.opened() if each.volume.map.comes_from(branch)]
        snapshots = [each for each in self._readers.opened() if each.map.comes_from(branch)]
        for leaf_map in [*(each.volume.map for each in volumes), *(each.map for each in snapshots)]:
            leaf_map.look_up_anew()
        for volume in volumes:
            await volume.close_foreign()
        for snapshot in snapshots:
            await snapshot.close_files()

    # --- one leaf ----------------------------------------------------------------------------------------------------

    async def _leaf(self, opened: OpenVolume, leaf: int) -> bool:
        """Replace the foreign addresses of one leaf; False where its versions changed meanwhile: look again."""
        volume, slow = opened.volume, opened.slow
        sources = await self._foreign(opened, leaf)
        if not sources:
            return True
        copies = dict(zip(sources, await slow.copy_chunks(sources), strict=True))
        first, number = leaf << SLOT_BITS, volume.map.branch
        used: set[int] = set()
        try:
            await opened.flusher.flush()  # the long part of the sync, while guests go on
            async with volume.busy.hold(first, first + LEAF_CHUNKS - 1):
                # Without FRESH: a snapshot that is just being taken may be given the same copies below.
                staged = [
                    (chunk, copies[address])
                    for address, chunk in _addresses(volume.map.leaf(leaf).entries, first, volume.files.records).items()
                    if address in copies
                ]
                await slow.stage_entries(staged)
                used.update(entry for _, entry in staged)
                # Always with a commit: only there it is certain which snapshots see the leaf.
                replaced = await checkpoint_with(
                    opened.checkpointer, lambda writer, _: _substitute(writer, number, leaf, copies, used)
                )
                for address in replaced.counted:
                    file = volume.files.get(file_of(address))
                    volume.context.storage.mapped(file.device_id, file.number, 1)
                used |= replaced.counted
                return replaced.whole
        finally:
            volume.give_up([copy for copy in copies.values() if copy not in used])
            slow.copies_counted(copies.values())

    async def _foreign(self, opened: OpenVolume, leaf: int) -> list[int]:
        """Return the foreign addresses in the versions of a leaf, in the order of their chunks."""
        first, own = leaf << SLOT_BITS, opened.volume.files.records
        found = _addresses(opened.volume.map.leaf(leaf).entries, first, own)
        stored = partial(self._stored_foreign, opened.volume.map.branch, leaf, own)
        found |= await self._engine.context.threads.run(stored)  # each snapshot may have brought a version
        return sorted(found, key=lambda address: found[address])

    def _stored_foreign(self, number: int, leaf: int, own: Container[int]) -> dict[int, int]:
        """Return the foreign addresses in the stored versions of a leaf, each with its chunk. Blocks."""
        first, found = leaf << SLOT_BITS, dict[int, int]()
        with self._store.read() as reader:
            branch = branch_record(reader, number)
            for _, entries in _stored_versions(reader, branch, leaf):
                found |= _addresses(entries, first, own)
            if _sees_origin(reader, branch, leaf):
                found |= _addresses(_of_origin(reader, branch, leaf), first, own)
        return found


@dataclass(frozen=True, slots=True)
class _Replaced:
    """What became of the stored versions of a leaf."""

    whole: bool
    """None of them holds a foreign address any more."""
    counted: set[int]
    """Copies that they name and the head does not."""


def _substitute(writer: Writer, number: int, leaf: int, copies: Mapping[int, int], staged: Set[int]) -> _Replaced:
    """Replace foreign addresses in the stored versions of a leaf, and give it one of its own for who saw the origin's.

    Runs behind the commit of the head's own version, in the same transaction.
    """
    branch = branch_record(writer, number)
    is_own = owner_of(writer, number)
    versions = list(_stored_versions(writer, branch, leaf))
    if _sees_origin(writer, branch, leaf):
        versions.append((branch.first_epoch, _of_origin(writer, branch, leaf)))
        writer.put(Table.BORN, born_key(number, branch.first_epoch, leaf), b"")
    named: set[int] = set()
    whole = True
    for birth, entries in versions:
        entries = entries[:]
        for slot, entry in enumerate(entries):
            address = entry & ADDRESS_MASK
            if not address or is_own(address):
                continue
            if address not in copies:
                whole = False
                continue
            entries[slot] = copies[address]
            named.add(copies[address])
        key = leaf_key(number, leaf, birth)
        writer.put(Table.LEAVES, key, seal(key, encode(entries)))
    counted = named - staged
    for address, count in Counter(file_of(address) for address in counted).items():
        file = writer.record(FileRecord, Table.FILES, number_key(address))
        assert file is not None
        writer.put_record(Table.FILES, number_key(address), replace(file, live_chunks=file.live_chunks + count))
    return _Replaced(whole, counted)


def _let_go(writer: Writer, number: int) -> bool:
    """Let a flattened branch go of its origins, and its children keep them; tells whether jobs were queued."""
    branch = branch_record(writer, number)
    if not branch.origin_branch:  # done already: by a job whose end was not recorded any more
        return False
    origins = [(branch.origin_branch, branch.origin_epoch), *branch.pins]
    for epoch, who in points_of(writer, number):
        if isinstance(who, str):
            # The copies that it sees now have no checksums yet.
            writer.mark(Table.SEALS, pair_key(number, epoch))
        else:
            child = branch_record(writer, who)
            new = tuple(origin for origin in origins if origin not in child.pins)
            writer.put_record(Table.BRANCHES, number_key(who), replace(child, pins=child.pins + new))
            for origin, origin_epoch in new:
                writer.put(Table.POINTS, child_point_key(origin, origin_epoch, who), b"")
    writer.put_record(Table.BRANCHES, number_key(number), replace(branch, origin_branch=0, origin_epoch=0, pins=()))
    return release_origins(writer, branch)


def _head(reader: Reader, volume_id: str) -> BranchRecord:
    volume = reader.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
    if volume is None:
        raise NotFound(f"volume {volume_id} was deleted meanwhile")
    return branch_record(reader, volume.branch)


def _check_branch(opened: OpenVolume, number: int) -> None:
    if opened.volume.map.branch != number:
        raise _reverted(opened.volume.record.name)


def _reverted(name: str) -> Moot:
    return Moot(
        f"volume {name} was reverted meanwhile; this job is about what it held before; "
        f"flatten what it holds now ('blockvirt clone flatten {name}')"
    )


def _stored_versions(reader: Reader, branch: BranchRecord, leaf: int) -> "Iterator[tuple[int, array[int]]]":
    for key, stored in Reader.scan(reader, Table.LEAVES, prefix=leaf_prefix(branch.number, leaf)):
        yield split_leaf(key)[2], decoded(key, stored)


def _sees_origin(reader: Reader, branch: BranchRecord, leaf: int) -> bool:
    """Tell whether a snapshot or a child of the branch sees its origin's version of a leaf."""
    points = points_of(reader, branch.number)
    births = [birth for birth, _ in _stored_versions(reader, branch, leaf)]
    return bool(points) and (not births or points[0][0] < births[0])


def _of_origin(reader: Reader, branch: BranchRecord, leaf: int) -> "array[int]":
    return visible_through(reader, lineage(reader, branch, branch.first_epoch)[1:], leaf)


def _addresses(entries: Iterable[int], first_chunk: int, own: Container[int]) -> dict[int, int]:
    """Return the foreign addresses among entries, each with its chunk."""
    return {
        entry & ADDRESS_MASK: chunk
        for chunk, entry in enumerate(entries, first_chunk)
        if entry and file_of(entry) not in own
    }
