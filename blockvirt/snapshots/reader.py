"""A snapshot that is open for reading: its map at one epoch, its files, and the handles of its sessions.

What it sees never changes, so there is no journal, no flush and no lock; reads are pinned against punching like those
of a volume, for the one case that matters: a clone's chunks that were read where the origin had them, until a flatten.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from blockvirt.device import ALLOCATION_DEPTH, STATE_DIRTY, Capabilities, Extent, ExtentState, Read
from blockvirt.errors import DeviceFault, NotSupported, ReadOnly
from blockvirt.lun.address import CHUNK_MASK, file_of
from blockvirt.lun.leaf import SLOT_BITS, SLOT_MASK
from blockvirt.meta.keys import Table, number_key
from blockvirt.meta.records import BranchRecord, FileRecord, SnapshotRecord
from blockvirt.pool.backing import BackingFile, backing_path
from blockvirt.snapshots.changes import Chain, Point, chain_of, changes
from blockvirt.volumes.context import VolumeContext
from blockvirt.volumes.layers import Layers, runs
from blockvirt.volumes.leaf_map import LeafMap
from blockvirt.volumes.ranges import Inflight
from blockvirt.volumes.reads import Piece, fill_zeros, pieces, read_cold


class OpenSnapshot:
    """One snapshot, shared by its readers. Lives on the event loop."""

    def __init__(self, context: VolumeContext, record: SnapshotRecord, branch: BranchRecord) -> None:
        self.context = context
        self.record = record
        self.chunk_shift = context.chunk_shift
        self.map = LeafMap(context.store, replace(branch, head_epoch=record.epoch), context.cache)
        self.inflight = Inflight()
        self._files: dict[int, BackingFile] = {}
        context.inflights.add(self.inflight)

    def file(self, number: int) -> BackingFile:
        """Return an open file; raises DeviceFault where its device or the file itself is not there."""
        file = self._files.get(number)
        if file is None:
            with self.context.store.read() as reader:
                record = reader.record(FileRecord, Table.FILES, number_key(number))
            if record is None:
                raise DeviceFault(
                    f"backing file {number} has no record in the metadata", correction="run 'blockvirt check'"
                )
            folder = self.context.storage.path_of(record.device_id)
            file = BackingFile(record, backing_path(folder, record.branch, number), self.chunk_shift)
            file.open(read_only=True)
            self._files[number] = file
        return file

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Fill ``into`` from the page cache; False where a thread must read. Raises DeviceFault, OSError."""
        chunk, within = offset >> self.chunk_shift, offset & ((1 << self.chunk_shift) - 1)
        if within + len(into) <= 1 << self.chunk_shift:
            entry = self.map.leaf(chunk >> SLOT_BITS).entries[chunk & SLOT_MASK]
            if not entry:
                fill_zeros(into)
                return True
            return self.file(file_of(entry)).read_cached(into, ((entry & CHUNK_MASK) << self.chunk_shift) + within)
        return all(file.read_cached(part, position) for file, position, part in self._pieces(offset, into))

    def _pieces(self, offset: int, into: memoryview) -> list[Piece]:
        return pieces(self.map.readable, self.file, self.chunk_shift, offset, into)

    async def read(self, reads: Sequence[Read]) -> Sequence[Exception | None]:
        """Do all of ``reads``, in a thread; see VolumeHandle."""
        number = self.inflight.enter()
        try:
            return await read_cold(self._pieces, reads, self._in_thread)
        finally:
            self.inflight.leave(number)

    async def _in_thread(self, work: Callable[[], None]) -> None:
        number = self.inflight.enter()
        await self.context.threads.run_to_end(work, lambda: self.inflight.leave(number))

    async def close_files(self) -> None:
        """Close the descriptors when no read under way uses them; later reads open the files anew."""
        files, self._files = list(self._files.values()), {}
        await self.inflight.drained()
        for file in files:
            file.close()

    async def close(self) -> None:
        """Close the descriptors when no read is under way."""
        await self.close_files()
        self.context.inflights.discard(self.inflight)
        self.map.close()

    # --- what contexts say -----------------------------------------------------------------------------------------

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Describe a range, or its beginning, by chunks: data, or a hole that reads as zeros."""
        hole, data = ExtentState.HOLE | ExtentState.ZERO, ExtentState.DATA  # looking them up takes longer than a chunk
        found = runs(self.map, lambda entry: data if entry else hole, offset, length, self.chunk_shift)
        return [Extent(size, state) for size, state in found]

    def depths(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Describe a range, or its beginning, by how far back its chunks lie (``Layers.depth``)."""
        layers = Layers(self.context.store, self.record.branch, self.record.epoch)
        return runs(self.map, layers.depth, offset, length, self.chunk_shift)

    def dirty(self, base: Chain, offset: int, length: int) -> list[tuple[int, int]]:
        """Describe a range by what differs from the point that ``base`` looks up. Blocks; for a thread."""
        shift, end = self.chunk_shift, offset + length
        found: list[tuple[int, int]] = []
        at = offset
        with self.context.store.read() as reader:
            mine = chain_of(reader, Point(self.record.branch, self.record.epoch))
            for change in changes(reader, base, mine, offset >> shift, ((end - 1) >> shift) + 1):
                start, stop = max(offset, change.chunk << shift), min(end, (change.chunk + change.count) << shift)
                if at < start:
                    found.append((start - at, 0))
                if found and found[-1][1] == STATE_DIRTY:
                    found[-1] = (found[-1][0] + stop - start, STATE_DIRTY)
                else:
                    found.append((stop - start, STATE_DIRTY))
                at = stop
        if at < end:
            found.append((end - at, 0))
        return found


class SnapshotHandle:
    """A session's handle on an open snapshot: the seam of ``device.VolumeHandle``, for reading only."""

    def __init__(
        self,
        opened: OpenSnapshot,
        session_id: str,
        bases: Mapping[str, SnapshotRecord],
        close: "Callable[[SnapshotHandle], Awaitable[None]]",
    ) -> None:
        """``bases``: the snapshots that dirty-bitmap contexts compare with, by context; they stay meanwhile."""
        self.opened = opened
        self.session_id = session_id
        self.bases = bases
        self.size_bytes = opened.record.size_bytes
        self.block_bytes = 1 << opened.chunk_shift
        self.capabilities = Capabilities(read_only=True)
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.read_now = opened.read_now
        self._close: Callable[[SnapshotHandle], Awaitable[None]] | None = close

    def write_now(self, offset: int, data: memoryview) -> bool:
        """See VolumeHandle; raises ReadOnly."""
        raise self._refusal()

    def settle(self) -> None:
        """See VolumeHandle: nothing is ever staged."""

    async def read(self, reads: Sequence[Read]) -> Sequence[Exception | None]:
        """See VolumeHandle."""
        return await self.opened.read(reads)

    async def write(self, offset: int, data: memoryview, *, fua: bool = False) -> None:
        """See VolumeHandle; raises ReadOnly."""
        raise self._refusal()

    async def zero(self, offset: int, length: int, *, punch: bool, fast: bool = False, fua: bool = False) -> None:
        """See VolumeHandle; raises ReadOnly."""
        raise self._refusal()

    def _refusal(self) -> ReadOnly:
        return ReadOnly(
            f"snapshot {self.opened.record.name} cannot be written to",
            correction="make a clone of it ('blockvirt snapshot clone')",
        )

    def start_flush(self, then: Callable[[BaseException | None], None]) -> None:
        """See VolumeHandle: everything was durable before the snapshot was."""
        asyncio.get_running_loop().call_soon(then, None)

    async def extents(self, offset: int, length: int) -> Sequence[Extent]:
        """See VolumeHandle."""
        return self.opened.extents(offset, length)

    async def block_status(self, context: str, offset: int, length: int) -> Sequence[tuple[int, int]]:
        """See VolumeHandle; raises NotSupported for a context that was not negotiated."""
        opened = self.opened
        if context == ALLOCATION_DEPTH:
            return opened.depths(offset, length)
        base = self.bases.get(context)
        if base is None:
            raise NotSupported(f"the snapshot has no metadata context {context!r}", correction="negotiate it first")
        with opened.context.store.read() as reader:
            chain = chain_of(reader, Point(base.branch, base.epoch))
        return await opened.context.threads.run(lambda: opened.dirty(chain, offset, length))

    def lose(self) -> None:
        """Tell the session to close its connection without a reply."""
        if not self.lost.done():
            self.lost.set_result(None)

    async def close(self) -> None:
        """See VolumeHandle."""
        close, self._close = self._close, None
        if close is not None:
            await close(self)
