"""An open volume: what can be answered at once, and the state that the slow paths share.

``read_now`` and ``write_now`` run on the event loop, without a task, a future, a thread or a lock: look up the map,
``preadv``/``pwrite`` the page cache, stage map changes in memory. ``settle`` then appends everything staged to the
journal in one ``pwrite``, before any reply and before the loop runs anything else: a write that was replied to survives
SIGKILL (I3b). What would block returns False and goes through ``slow_path``.
"""

import asyncio
import logging
import os
import struct
from collections.abc import Sequence

from blockvirt.errors import BlockvirtError, VolumeStopped
from blockvirt.limits import MAX_DIRTY_LEAVES
from blockvirt.lun.address import ADDRESS_MASK, CHUNK_MASK, FILE_MASK, FRESH, chunk_of, file_of
from blockvirt.lun.leaf import SLOT_BITS, SLOT_MASK, Leaf, is_run
from blockvirt.lun.plan import Action, WriteStep, plan_write
from blockvirt.meta.records import BranchRecord, VolumeRecord
from blockvirt.pool.backing import READ_CACHED, would_block
from blockvirt.tasks import TaskSet
from blockvirt.volumes.checksums import check_content
from blockvirt.volumes.context import VolumeContext
from blockvirt.volumes.copies import Copies
from blockvirt.volumes.journal import Journal
from blockvirt.volumes.journal_frames import CHANGE, add_change
from blockvirt.volumes.leaf_map import LeafMap
from blockvirt.volumes.ranges import Inflight, InPlace, RangeLock
from blockvirt.volumes.reads import ZEROS, Piece, pieces
from blockvirt.volumes.stats import VolumeStats
from blockvirt.volumes.tail import BranchFiles, Tail
from blockvirt.volumes.transfer import Transfer, assign
from blockvirt.volumes.versions import note_stopped

log = logging.getLogger("blockvirt.volumes")


class Volume:
    """One open volume, shared by all its sessions. Lives on the event loop."""

    def __init__(self, context: VolumeContext, record: VolumeRecord, branch: BranchRecord) -> None:
        self.context = context
        self.record = record
        self.branch_record = branch
        self.size_bytes = record.size_bytes
        self.chunk_shift = context.chunk_shift
        self.chunk_bytes = 1 << context.chunk_shift
        self.tasks = TaskSet(f"volume {record.name}", on_failure=self._task_failed)
        self.checkpoint_due = asyncio.Event()
        """Set when the journal, the dirty leaves or the age of a change ask for a checkpoint."""
        self.map = LeafMap(context.store, branch, context.cache, self.checkpoint_due.set)
        self.files = BranchFiles(context, branch.number)
        self.tail = Tail(context, self.files, record, self.tasks)
        self.tail.mapped_chunks = branch.mapped_chunks
        self.inherited_chunks = branch.inherited_chunks
        """How many of the mapped chunks lie in files of other branches."""
        self.busy = RangeLock()
        self.inflight = Inflight()
        self.in_place = InPlace()
        self.journal: Journal | None = None
        self.checksum_of = context.checksums.find
        self.stats = VolumeStats()
        self.freed: list[int] = []
        """Addresses that lost their last entry since the last freeze: punched after the next commit."""
        self.dropped: list[tuple[int, int]] = []
        """(chunk, address) that the head dropped since the last freeze, and that older versions may hold."""
        self.failure: BlockvirtError | None = None
        """Why nothing is answered any more: VolumeStopped (I7), or the volume is being deleted."""
        self.age_timer: asyncio.TimerHandle | None = None
        self._pressure = context.pressure
        self._changes: list[tuple[int, int, int]] = []
        self._copies = Copies(context.copy_buffer)
        self._mask = self.chunk_bytes - 1
        self._leaves = self.map.leaves
        self._open_files = self.files.open_files

    # --- what the event loop answers at once ---------------------------------------------------------------------

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Fill ``into`` from the page cache; False where a thread must read. Raises VolumeStopped, OSError."""
        if self._copies.held:
            self._write_copies()
        length = len(into)
        chunk = offset >> self.chunk_shift
        within = offset & self._mask
        if within + length > self.chunk_bytes:
            return self._read_span(offset, into)
        try:
            leaf = self._leaves[chunk >> SLOT_BITS]
        except KeyError:
            leaf = self.map.leaf(chunk >> SLOT_BITS)
        leaf.touched = True
        entry = leaf.entries[chunk & SLOT_MASK]
        if self.failure is not None:
            raise self.failure
        if not entry:
            into[:] = ZEROS[:length]
            return True
        try:
            file = self._open_files[(entry >> 28) & FILE_MASK]
        except KeyError:
            file = self.files.get(file_of(entry))
        try:  # BackingFile.read_cached
            position = ((entry & CHUNK_MASK) << self.chunk_shift) + within
            return os.preadv(file.fd, (into,), position, READ_CACHED) == length
        except OSError as error:
            return would_block(error)

    def _read_span(self, offset: int, into: memoryview) -> bool:
        if self.failure is not None:
            raise self.failure
        leaf = self.map.leaf(offset >> self.chunk_shift >> SLOT_BITS)
        entry = self._run(leaf, offset, len(into))
        if entry:
            file = self.files.get(file_of(entry))
            return file.read_cached(into, (chunk_of(entry) << self.chunk_shift) + (offset & self._mask))
        return all(file.read_cached(part, position) for file, position, part in self.pieces(offset, into))

    def _run(self, leaf: Leaf, offset: int, length: int) -> int:
        """Return the first entry of a range that begins in ``leaf``; 0 where it does not lie in one piece."""
        first, last = offset >> self.chunk_shift, (offset + length - 1) >> self.chunk_shift
        if first >> SLOT_BITS != last >> SLOT_BITS or not is_run(
            leaf.entries, first & SLOT_MASK, (last & SLOT_MASK) + 1
        ):
            return 0
        return leaf.entries[first & SLOT_MASK]

    def pieces(self, offset: int, into: memoryview) -> list[Piece]:
        """Fill with zeros what is unmapped of a range; return where the rest lies."""
        return pieces(self.map.readable, self.files.get, self.chunk_shift, offset, into)

    def write_now(self, offset: int, data: memoryview) -> bool:
        """Write into the page cache and stage map changes; False where something would block or must wait its turn.

        After True the caller must ``settle`` before it replies and before the loop runs anything else.
        """
        length = len(data)
        chunk = offset >> self.chunk_shift
        within = offset & self._mask
        if self.busy.holds and self.busy.touches(chunk, (offset + length - 1) >> self.chunk_shift):
            return False
        if self.failure is not None:
            raise self.failure
        if self._pressure.high:
            return False
        if within + length <= self.chunk_bytes:
            leaf = self._leaves.get(chunk >> SLOT_BITS)
            if leaf is None:
                leaf = self.map.leaf(chunk >> SLOT_BITS)
            leaf.touched = True
            entry = leaf.entries[chunk & SLOT_MASK]
            if leaf.birth != self.map.epoch:  # LeafMap.writable
                entry &= ADDRESS_MASK
            if entry < FRESH:
                return self._write_new_chunk(chunk, within, entry, data)
            file = self._open_files.get((entry >> 28) & FILE_MASK)
        else:
            leaf = self.map.leaf(chunk >> SLOT_BITS)
            entry = self._run(leaf, offset, length)
            file = self.files.get(file_of(entry)) if entry >= FRESH and leaf.birth == self.map.epoch else None
        if file is not None:
            file.write(data, ((entry & CHUNK_MASK) << self.chunk_shift) + within)
            self._pressure.wrote(length)
            return True
        return self._write_steps_now(offset, data)

    def _write_new_chunk(self, chunk: int, within: int, old: int, data: memoryview) -> bool:
        """Write inside one chunk, to a new address; what ``data`` does not cover is copied from ``old``, if anything.

        As ``_write_steps_now`` does it for any steps, with half the calls.
        """
        copies, length = self._copies, len(data)
        held = copies.held
        end, waiting = within + length, len(held)
        if chunk in held:
            held[chunk][within:end] = data
        elif not self.has_journal_room(waiting + 1) or self.tail.room() <= waiting:
            return False
        elif old and (within or end not in (self.chunk_bytes, self.size_bytes - (chunk << self.chunk_shift))):
            content = copies.slots[waiting] if waiting else copies.first_slot()
            if not self._fill_old(old, content):
                return False
            content[within:end] = data
            held[chunk] = content
            if waiting + 1 == len(copies.slots):
                self._write_copies()
        else:
            file, address = self.tail.take(1)
            file.write(data, ((address & CHUNK_MASK) << self.chunk_shift) + within)
            self.stage(chunk, 1, address | FRESH)
        self._pressure.wrote(length)
        return True

    def _write_copies(self) -> None:
        """Write the chunks that wait to be copied, and stage them. What keeps them from it, ``settle`` raises."""
        chunks, self._copies.held = self._copies.held, {}
        try:
            file, first = self.tail.take(len(chunks))
            try:
                size_bytes = len(chunks) << self.chunk_shift
                file.write(self._copies.content[:size_bytes], (first & CHUNK_MASK) << self.chunk_shift)
            except BaseException:
                self.give_up(range(first, first + len(chunks)))
                raise
            for entry, chunk in enumerate(chunks, first | FRESH):
                self.stage(chunk, 1, entry)
            self.stats.copied_chunks += len(chunks)
        except Exception as error:
            self._copies.failure = error

    def _write_steps_now(self, offset: int, data: memoryview) -> bool:
        if self._copies.held:
            self._write_copies()
        first, last = offset >> self.chunk_shift, (offset + len(data) - 1) >> self.chunk_shift
        if first >> SLOT_BITS == last >> SLOT_BITS:
            entries = self.map.leaf(first >> SLOT_BITS).entries
            if not any(entries[first & SLOT_MASK : (last & SLOT_MASK) + 1]):
                return self._write_new_run(first, last - first + 1, offset & self._mask, data)
        steps = self.plan(offset, len(data))
        if not self.has_room(steps) or (copies := self.old_contents(steps)) is None:
            return False
        self.write_steps(steps, data, copies)
        return True

    def write_steps(self, steps: list[WriteStep], data: memoryview, copies: list[bytearray]) -> None:
        """Write and stage what was planned and has room, with the ``old_contents``; the caller settles. OSError."""
        try:
            for transfer in assign(self.files, self.tail, self.chunk_shift, steps, data, copies):
                transfer.run()
                self.stage_transfer(transfer)
        except BaseException:
            if self._changes:
                self._journal_changes()  # the steps that went well are in the map, and no caller settles after an error
            raise
        self._pressure.wrote(len(data))

    def _write_new_run(self, first: int, count: int, within: int, data: memoryview) -> bool:
        """Write to chunks that are not mapped. As ``_write_steps_now`` would do it, with two thirds of the calls."""
        if not self.has_journal_room(1) or self.tail.room() < count:
            return False
        file, address = self.tail.take(count)
        file.write(data, ((address & CHUNK_MASK) << self.chunk_shift) + within)
        self.stage(first, count, address | FRESH)
        self._pressure.wrote(len(data))
        return True

    def old_contents(self, steps: list[WriteStep]) -> list[bytearray] | None:
        """Return what the chunks held that ``steps`` copy, from the page cache; None where a thread must read some."""
        copied = [step.entry for step in steps if step.action is Action.COPY]
        contents = [bytearray(self.chunk_bytes) for _ in copied]
        views = [memoryview(each) for each in contents]
        return contents if all(map(self._fill_old, copied, views)) else None

    def _fill_old(self, entry: int, content: memoryview) -> bool:
        number, position = (entry >> 28) & FILE_MASK, (entry & CHUNK_MASK) << self.chunk_shift
        file = self._open_files.get(number) or self.files.get(number)
        if not file.read_cached(content, position):
            return False
        checksum = self.checksum_of(entry)
        if checksum is not None:
            check_content(content, checksum, f"the chunk at {position} of {file.path}")
        return True

    # --- shared by the fast and the slow path --------------------------------------------------------------------

    def plan(self, offset: int, length: int) -> list[WriteStep]:
        """Return the steps of a write as the map is now."""
        return plan_write(self.map.writable, offset, length, self.chunk_shift, self.size_bytes)

    def has_room(self, steps: list[WriteStep]) -> bool:
        """Tell whether the journal, the tail and the dirty leaves can take what ``steps`` will stage."""
        new = [step.count for step in steps if step.action is not Action.OVERWRITE]
        return not new or (self.has_journal_room(len(new)) and self.tail.room() >= sum(new))

    def has_journal_room(self, changes: int) -> bool:
        """Tell whether so many more map changes can be staged before the next checkpoint."""
        if self.journal is None or len(self.map.dirty) >= MAX_DIRTY_LEAVES:
            return False
        return self.journal.room() >= len(self._changes) + changes

    def stage_transfer(self, transfer: Transfer) -> None:
        """Stage the entries of a transfer whose data has been written."""
        self.stats.copied_chunks += transfer.old is not None
        if transfer.first_entry:
            self.stage(transfer.chunk, transfer.count, transfer.first_entry | FRESH)

    def stage(self, chunk: int, count: int, entry: int) -> None:
        """Change ``count`` map entries from ``chunk`` on, in memory: to ``entry + i``, or to unmapped where it is 0.

        Journalled by the next ``settle``. What the head alone had allocated is freed.
        """
        if entry:
            number = (entry >> 28) & FILE_MASK
            file = self._open_files.get(number) or self.files.get(number)
            file.live_change += count
            self.tail.mapped_chunks += count
            self.context.storage.mapped(file.device_id, number, count)
        if entry and count > 1:
            for place, old in self.map.put_run(chunk, count, entry):
                self._dropped(place, old)
        else:
            for place in range(chunk, chunk + count):
                old = self.map.put(place, entry)
                if old:
                    self._dropped(place, old)
        add_change(self._changes, chunk, count, entry)

    def give_up(self, addresses: Sequence[int]) -> None:
        """Have addresses that were handed out, and that no entry names after all, freed by the next checkpoint."""
        for address in addresses:
            self.context.storage.mapped(self.files.get(file_of(address)).device_id, file_of(address), 1)
        self.freed += addresses

    def _dropped(self, chunk: int, old: int) -> None:
        self.tail.mapped_chunks -= 1
        if old >= FRESH:
            self.freed.append(old & ADDRESS_MASK)
            self.files.get(file_of(old)).live_change -= 1
        elif file_of(old) in self.files.records:
            self.dropped.append((chunk, old))  # older versions of the leaf may hold it: the commit looks
        else:
            self.inherited_chunks -= 1

    def settle(self) -> None:
        """Journal everything staged since the last call, in one append. Raises VolumeStopped, OSError.

        After OSError it is unknown which of the writes since the last call are there: none may be acknowledged.
        """
        copies = self._copies
        if copies.held:
            self._write_copies()
        failure, copies.failure = copies.failure, None
        if self._changes or self.failure is not None:
            self._journal_changes()
        if failure is not None:
            raise failure

    def _journal_changes(self) -> None:
        if self.failure is not None:
            self._changes.clear()
            raise self.failure
        journal = self.journal
        assert journal is not None
        changes, self._changes = self._changes, []
        try:
            journal.append(b"".join([CHANGE.pack(*change) for change in changes]))
        except (OSError, struct.error) as error:
            raise self.stop("its journal cannot be written", error) from error
        if self.age_timer is None:
            self.age_timer = asyncio.get_running_loop().call_later(
                self.context.checkpoint_age_s, self.checkpoint_due.set
            )
        if journal.half_full() or len(self.map.dirty) >= MAX_DIRTY_LEAVES // 2:
            self.checkpoint_due.set()
        self.stats.journal_appends += 1

    def unsettled(self) -> bool:
        """Tell whether something is staged and not journalled: never true while the loop runs anything else."""
        return bool(self._changes or self._copies.held)

    # --- failure -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise VolumeStopped where the volume has stopped."""
        if self.failure is not None:
            raise self.failure

    def stop(self, what: str, error: BaseException) -> BlockvirtError:
        """Acknowledge nothing more of this volume (I7): a failed sync or commit is never retried.

        Leaves word in the journal, so that recovery trusts nothing but durable marks. Returns the error to raise.
        """
        if self.failure is None:
            reason = f"{what}: {error}"
            self.failure = VolumeStopped.because(self.record.name, reason)
            log.error("volume %s stopped: %s", self.record.name, reason)
            if self.journal is not None:
                try:
                    self.journal.note_stop(reason)
                except OSError as note_error:
                    log.error("volume %s: cannot leave word in its journal: %s", self.record.name, note_error)
            else:  # overwrites in place alone need no journal
                self.tasks.start(self.note_stop(), "note")
            self.checkpoint_due.set()
        return self.failure

    async def note_stop(self) -> None:
        """Keep in the metadata why the volume stopped; best effort, the journal has its own note."""
        failure, number = self.failure, self.map.branch
        assert failure is not None
        try:
            await self.context.store.commit(lambda writer: note_stopped(writer, number, failure.cause))
        except BlockvirtError as error:
            log.error("volume %s: cannot note in the metadata that it stopped: %s", self.record.name, error)

    def _task_failed(self, error: BaseException) -> None:
        if not isinstance(error, BlockvirtError):
            self.stop("of a fault in blockvirt itself", error)
