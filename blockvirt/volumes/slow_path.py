"""What cannot be answered at once: cold reads, copies of cold chunks, waiting for space, zeroes and trims, extents.

Every operation that writes or stages holds its chunks (``Volume.busy``) from the plan to the staging, so that address,
copy and entry are decided in one piece. Between a ``stage`` and its ``settle`` there is never an await.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from blockvirt.device import Extent, ExtentState, Read
from blockvirt.errors import NotSupported
from blockvirt.limits import COPY_BATCH_BYTES, LEAF_CHUNKS
from blockvirt.lun.address import ADDRESS_MASK, FRESH, chunk_of, file_of
from blockvirt.lun.leaf import NO_ENTRIES, SLOT_BITS
from blockvirt.lun.plan import Action, WriteStep
from blockvirt.pool.backing import BackingFile
from blockvirt.volumes.checkpoint import Checkpointer
from blockvirt.volumes.checksums import check_content
from blockvirt.volumes.flush import Flusher, sync_guarded
from blockvirt.volumes.journal_opening import open_journal
from blockvirt.volumes.reads import read_cold
from blockvirt.volumes.transfer import assign
from blockvirt.volumes.volume import Volume


class SlowPath:
    """The async verbs of one open volume."""

    def __init__(self, volume: Volume, flusher: Flusher, checkpointer: Checkpointer) -> None:
        self._volume = volume
        self._flusher = flusher
        self._checkpointer = checkpointer
        self._opening_journal: asyncio.Task[None] | None = None

    # --- read ----------------------------------------------------------------------------------------------------

    async def read(self, reads: Sequence[Read]) -> Sequence[Exception | None]:
        """Do all of ``reads``, in a thread; see VolumeHandle."""
        volume = self._volume
        volume.check()
        volume.stats.slow_reads += len(reads)
        number = volume.inflight.enter()
        try:
            return await read_cold(volume.pieces, reads, self._in_thread)
        finally:
            volume.inflight.leave(number)

    async def _in_thread(self, work: Callable[[], None], *, in_place: bool = False) -> None:
        """Run ``work`` in a thread, as an operation that punches must wait for, and freezes if it is ``in_place``.

        A caller that is cancelled waits for its end too: until then nobody else may have its chunks.
        """
        volume = self._volume
        volume.check()
        number = volume.inflight.enter()
        if in_place:
            volume.in_place.enter()

        def at_end() -> None:
            volume.inflight.leave(number)
            if in_place:
                volume.in_place.leave()

        await volume.context.threads.run_to_end(work, at_end)

    # --- write ---------------------------------------------------------------------------------------------------

    async def write(self, offset: int, data: memoryview, *, fua: bool = False) -> None:
        """Write ``data``; raises PoolFull, VolumeStopped, DeviceFault, OSError."""
        volume = self._volume
        volume.stats.slow_writes += 1
        first, last = offset >> volume.chunk_shift, (offset + len(data) - 1) >> volume.chunk_shift
        async with volume.busy.hold(first, last):
            await self._write_held(offset, data)
        if fua:
            await self._flusher.flush()

    async def _write_held(self, offset: int, data: memoryview) -> None:
        volume = self._volume
        while True:
            volume.check()
            steps = volume.plan(offset, len(data))
            if not volume.has_room(steps):
                await self._make_room(steps)
                continue
            # What waited for room may well be in the page cache: 32 threads' round trips take 5 ms.
            copies = None if volume.context.pressure.high else volume.old_contents(steps)
            if copies is not None:
                volume.write_steps(steps, data, copies)
                volume.settle()
                return
            in_place = any(step.action is Action.OVERWRITE for step in steps)
            if not in_place or volume.in_place.open:
                break
            await volume.in_place.opened()
        transfers = assign(volume.files, volume.tail, volume.chunk_shift, steps, data, checksum_of=volume.checksum_of)

        def run_all() -> None:
            for transfer in transfers:
                transfer.run()

        await self._in_thread(run_all, in_place=in_place)
        volume.context.pressure.wrote(len(data))
        # A checkpoint may have filled up the room meanwhile; the entries belong to this operation alone (busy).
        changes = sum(1 for transfer in transfers if transfer.first_entry)
        while changes and not volume.has_journal_room(changes):
            await self._make_journal_room(changes)
        for transfer in transfers:
            volume.stage_transfer(transfer)
        volume.settle()

    # --- replacing addresses (flatten) -----------------------------------------------------------------------------

    async def copy_chunks(self, sources: Sequence[int]) -> list[int]:
        """Copy the content of chunks to new addresses of this volume's; nothing is staged. Returns them in order.

        They count as reserved until ``copies_counted``: no entry names them yet, and nobody else may have their space.
        Raises PoolFull, VolumeStopped, DeviceFault, OSError; what was handed out by then is freed again.
        """
        volume = self._volume
        made: list[int] = []
        try:
            most = max(1, COPY_BATCH_BYTES >> volume.chunk_shift)
            for start in range(0, len(sources), most):
                batch = sources[start : start + most]
                steps = [WriteStep(Action.ALLOCATE, 0, len(batch), 0, 0, 0, 0)]
                while not volume.has_room(steps):  # guests take from it while this waits for the journal
                    await self._make_room(steps)
                volume.check()
                places = [
                    _Place(
                        volume.files.get(file_of(each)), chunk_of(each) << volume.chunk_shift, volume.checksum_of(each)
                    )
                    for each in batch
                ]
                file, first = volume.tail.take(len(batch))
                made += range(first, first + len(batch))
                volume.context.storage.reserved(file.device_id, len(batch) << volume.chunk_shift)
                await self._in_thread(partial(_copy_all, places, file, chunk_of(first) << volume.chunk_shift))
        except BaseException:
            volume.give_up(made)
            self.copies_counted(made)
            raise
        return made

    def copies_counted(self, copies: Iterable[int]) -> None:
        """Hear that copies that ``copy_chunks`` made are named by entries, or given up: they count as such."""
        volume = self._volume
        for copy in copies:
            device_id = volume.files.get(file_of(copy)).device_id
            volume.context.storage.reserved(device_id, -volume.chunk_bytes)

    async def stage_entries(self, changes: Sequence[tuple[int, int]]) -> None:
        """Stage (chunk, entry) pairs. The caller holds the chunks, and has written what the entries name."""
        volume = self._volume
        while not volume.has_journal_room(len(changes)):
            await self._make_journal_room(len(changes))
        volume.check()
        for chunk, entry in changes:
            volume.stage(chunk, 1, entry)
        volume.settle()

    async def _make_room(self, steps: list[WriteStep]) -> None:
        new = [step for step in steps if step.action is not Action.OVERWRITE]
        chunks = sum(step.count for step in new)
        if self._volume.tail.room() < chunks:
            await self._volume.tail.make_room(chunks, self._admit_device)
        if not self._volume.has_journal_room(len(new)):
            await self._make_journal_room(len(new))

    async def _make_journal_room(self, changes: int) -> None:
        """Return when so many changes can be journalled: opens the journal, or waits for a checkpoint."""
        volume = self._volume
        volume.check()
        if volume.journal is None:
            if self._opening_journal is None or self._opening_journal.done():
                self._opening_journal = volume.tasks.start(open_journal(volume), "journal", awaited=True)
            await asyncio.shield(self._opening_journal)
        elif not volume.has_journal_room(changes):
            await self._checkpointer.run()

    async def _admit_device(self, device_id: str) -> None:
        """Have the journal know a device before anything of the volume lies there; raises VolumeStopped."""
        volume = self._volume
        identity = volume.context.storage.identity_of(device_id)
        # One that is being made may not know the device yet; one that is made later will.
        while self._opening_journal is not None and not self._opening_journal.done():
            await asyncio.wait([self._opening_journal])
        journal = volume.journal
        if journal is None or journal.header.identities.get(device_id) == identity:
            return
        async with self._flusher.syncing:  # of two syncs of a file only one is told of a failed write-back
            volume.check()
            await sync_guarded(
                volume, "its journal cannot be synced", partial(journal.admit_device, device_id, identity)
            )

    # --- zero and trim -------------------------------------------------------------------------------------------

    async def zero(self, offset: int, length: int, *, punch: bool, fast: bool = False, fua: bool = False) -> None:
        """Make a range read as zeros: unmapped where ``punch`` allows it, else allocated and zeroed."""
        volume = self._volume
        volume.check()
        if fast and not punch:
            raise NotSupported("allocating zeroes is no faster than writing them", correction="write zeros instead")
        shift, end = volume.chunk_shift, offset + length
        first, last = offset >> shift, (end - 1) >> shift
        async with volume.busy.hold(first, last):
            whole = (offset + volume.chunk_bytes - 1) >> shift
            # The chunk in which the volume ends counts as whole when the range reaches that end.
            whole_end = last + 1 if end == volume.size_bytes else end >> shift
            head_end = min(end, whole << shift)
            if offset < head_end:
                await self._zero_part(offset, head_end, punch)
            while whole < whole_end:
                stop = min(whole_end, ((whole >> SLOT_BITS) + 1) << SLOT_BITS)
                await (self._unmap(whole, stop) if punch else self._allocate_zeros(whole, stop))
                whole = stop
                if whole < whole_end:
                    await asyncio.sleep(0)  # one leaf at a time, then others get a turn: 4 GiB of trim stalls nobody
            tail_start = max(head_end, whole_end << shift)
            if tail_start < end:
                await self._zero_part(tail_start, end, punch)
        if fua:
            await self._flusher.flush()

    async def _zero_part(self, start: int, end: int, punch: bool) -> None:
        """Zero less than a chunk: written into it, so that a later overwrite needs no space."""
        volume = self._volume
        if punch and not volume.map.readable(start >> volume.chunk_shift):
            return
        await self._write_held(start, memoryview(bytes(end - start)))

    async def _unmap(self, first: int, end: int) -> None:
        """Unmap whole chunks of one leaf. Needs no new chunk, so it works in a full pool (I10)."""
        volume = self._volume
        volume.check()
        entries = volume.map.leaf(first >> SLOT_BITS).entries
        base = first >> SLOT_BITS << SLOT_BITS
        if entries is NO_ENTRIES or not any(entries[first - base : end - base]):
            return
        for number in {file_of(entry) for entry in entries[first - base : end - base] if entry >= FRESH}:
            volume.files.get(number)  # one that is not there is to refuse the trim before anything has changed
        while not volume.has_journal_room(1):
            await self._make_journal_room(1)
        volume.check()
        volume.stage(first, end - first, 0)
        volume.settle()

    async def _allocate_zeros(self, first: int, end: int) -> None:
        """Allocate whole chunks and make them zero: fresh ones are zeroed in place, others get a new address."""
        volume = self._volume
        chunk = first
        while chunk < end:
            await volume.in_place.opened()
            volume.check()
            entry = volume.map.writable(chunk)
            count = 1
            while chunk + count < end and _alike(entry, volume.map.writable(chunk + count), count):
                count += 1
            if entry >= FRESH:
                file, position = volume.files.get(file_of(entry)), chunk_of(entry) << volume.chunk_shift
                await self._in_thread(partial(file.zero, position, count << volume.chunk_shift), in_place=True)
            else:
                await self._map_new(chunk, count)
            chunk += count

    async def _map_new(self, chunk: int, count: int) -> None:
        volume = self._volume
        while volume.tail.room() < count or not volume.has_journal_room(1):
            await self._make_room([WriteStep(Action.ALLOCATE, chunk, count, 0, 0, 0, 0)])
        volume.check()
        file, entry = volume.tail.take(count)
        file.mapped_unwritten(count << volume.chunk_shift)
        volume.stage(chunk, count, entry | FRESH)
        volume.settle()

    # --- extents -------------------------------------------------------------------------------------------------

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Describe a range by chunks: data, or a hole that reads as zeros."""
        volume = self._volume
        volume.check()
        shift, end = volume.chunk_shift, offset + length
        found: list[Extent] = []
        at = offset
        while at < end:
            chunk = at >> shift
            leaf = volume.map.leaf(chunk >> SLOT_BITS)
            leaf_end = min(end, ((chunk >> SLOT_BITS) + 1) << (SLOT_BITS + shift))
            if leaf.entries is NO_ENTRIES:
                _extend(found, leaf_end - at, ExtentState.HOLE | ExtentState.ZERO)
                at = leaf_end
            else:
                for entry in leaf.entries[chunk % LEAF_CHUNKS : ((leaf_end - 1) >> shift) % LEAF_CHUNKS + 1]:
                    stop = min(leaf_end, (at >> shift) + 1 << shift)
                    state = ExtentState.DATA if entry & ADDRESS_MASK else ExtentState.HOLE | ExtentState.ZERO
                    _extend(found, stop - at, state)
                    at = stop
            if not (chunk >> SLOT_BITS) & 63:
                await asyncio.sleep(0)
        return found


class _Place(NamedTuple):
    """A sealed chunk that is copied."""

    file: BackingFile
    position: int
    checksum: int | None


def _copy_all(places: Sequence[_Place], target: BackingFile, position: int) -> None:
    content = memoryview(bytearray(target.chunk_bytes))
    for index, place in enumerate(places):
        place.file.read(content, place.position)
        check_content(content, place.checksum, f"the chunk at {place.position} of {place.file.path}")
        target.write(content, position + index * target.chunk_bytes)


def _alike(first: int, entry: int, distance: int) -> bool:
    if first >= FRESH:
        return entry == first + distance
    return entry < FRESH


def _extend(found: list[Extent], length: int, state: ExtentState) -> None:
    if found and found[-1].state == state:
        found[-1] = Extent(found[-1].length_bytes + length, state)
    else:
        found.append(Extent(length, state))
