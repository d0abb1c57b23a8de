"""Changed blocks a page at a time, as byte ranges: of a snapshot, or of a volume as it is now."""

import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from blockvirt.errors import NotFound, OutOfRange
from blockvirt.limits import CHANGED_LEAF_LISTS
from blockvirt.meta.keys import Table
from blockvirt.meta.records import SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Reader
from blockvirt.snapshots.catalogue import Snapshots
from blockvirt.snapshots.changes import Chain, Point, chain_of, changed_leaves, changed_runs
from blockvirt.volumes.engine import Engine
from blockvirt.volumes.transactions import locate
from blockvirt.volumes.versions import branch_record

Range = tuple[int, int, bool]
"""What may differ: (offset, length, both in bytes; whether it reads as zeros now). No class: a page has thousands."""


@dataclass(frozen=True, slots=True)
class Page:
    """Some ranges in order, and where to go on (None: that was all)."""

    ranges: Sequence[Range]
    next_offset_bytes: int | None
    size_bytes: int
    """Of the snapshot or volume that was asked about."""


class ChangedBlocks:
    """Finds changed blocks, in threads. One per process; call it on the event loop."""

    def __init__(self, engine: Engine, snapshots: Snapshots) -> None:
        self._engine = engine
        self._snapshots = snapshots
        self._context = engine.context
        self._leaves: dict[tuple[Chain, Chain], array[int]] = {}
        """By the points compared, the latest used last."""
        self._guard = threading.Lock()

    async def of_snapshot(self, name_or_id: str, since: str | None, offset: int, limit: int) -> Page:
        """Return up to ``limit`` ranges from the byte ``offset`` on in which a snapshot differs from ``since``.

        Without ``since``: from nothing, so all of its data. Any two snapshots can be compared; those without a common
        history differ in all data of both. Raises NotFound, OutOfRange, DamagedRecord.
        """
        record = self._snapshots.find(name_or_id)
        base = self._base(since)
        return await self._context.threads.run(partial(self._of_snapshot, record, base, offset, limit))

    def _of_snapshot(self, record: SnapshotRecord, base: SnapshotRecord | None, offset: int, limit: int) -> Page:
        with self._context.store.read() as reader:
            _still_there(reader, record)
            new = chain_of(reader, Point(record.branch, record.epoch))
            return self._page(reader, base, new, record.size_bytes, offset, limit, is_fixed=True)

    async def of_volume(self, name_or_id: str, since: str | None, offset: int, limit: int) -> Page:
        """Return the same for a volume with all writes replied to by now; raises VolumeStopped too.

        Writes between two pages show in the later one, if they lie there.
        """
        with self._engine.store.read() as reader:
            volume_id, _ = locate(reader, name_or_id)
        base = self._base(since)
        async with self._engine.registry.pinned(volume_id) as opened:
            await opened.checkpointer.run()
            await opened.checkpointer.run()  # the one that was joined may have frozen before the latest writes
        return await self._context.threads.run(partial(self._of_volume, volume_id, base, offset, limit))

    def _of_volume(self, volume_id: str, base: SnapshotRecord | None, offset: int, limit: int) -> Page:
        with self._context.store.read() as reader:
            record = reader.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
            if record is None or record.deleting or record.trashed_s:
                raise NotFound(f"volume {volume_id} was deleted meanwhile")
            new = chain_of(reader, Point(record.branch, branch_record(reader, record.branch).head_epoch))
            return self._page(reader, base, new, record.size_bytes, offset, limit)

    def _base(self, since: str | None) -> SnapshotRecord | None:
        return None if since is None else self._snapshots.find(since)

    def _page(
        self,
        reader: Reader,
        base: SnapshotRecord | None,
        new: Chain,
        size_bytes: int,
        offset: int,
        limit: int,
        *,
        is_fixed: bool = False,
    ) -> Page:
        if offset > size_bytes:
            raise OutOfRange(f"{offset} lies beyond the end, at {size_bytes}", correction="begin with 0")
        old: Chain = ()
        if base is not None:
            _still_there(reader, base)
            old = chain_of(reader, Point(base.branch, base.epoch))
        shift = self._context.chunk_shift
        found: list[Range] = []
        end_chunk = ((size_bytes - 1) >> shift) + 1
        leaves = self._leaves_of(reader, old, new) if is_fixed else None
        for chunk, count, zero in changed_runs(reader, old, new, offset >> shift, end_chunk, leaves):
            start = max(offset, chunk << shift)
            if len(found) == limit:
                return Page(found, start, size_bytes)
            end = min(size_bytes, (chunk + count) << shift)
            if start < end:
                found.append((start, end - start, zero))
        return Page(found, None, size_bytes)

    def _leaves_of(self, reader: Reader, old: Chain, new: Chain) -> "array[int]":
        """Return the leaves that differ between two snapshots, found once for all pages of a client.

        A flatten in between may give the two other addresses for the same bytes: those need not be told.
        """
        key = (tuple(old), tuple(new))
        leaves = self._leaves.pop(key, None)
        if leaves is None:
            leaves = array("Q", changed_leaves(reader, old, new))
        with self._guard:
            self._leaves[key] = leaves
            while len(self._leaves) > CHANGED_LEAF_LISTS:
                del self._leaves[next(iter(self._leaves))]
        return leaves


def _still_there(reader: Reader, record: SnapshotRecord) -> None:
    if reader.get(Table.SNAPSHOTS, record.id.encode()) is None:
        raise NotFound(f"snapshot {record.name!r} was deleted meanwhile")
