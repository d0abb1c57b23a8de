"""Checkpoints: the journal makes map changes durable, a checkpoint into the metadata store makes them cheap to find.

Sync the files once beforehand, so that what follows is short; let a running flush end; freeze on the event loop with
no await in between and open the journal's next generation; sync again; one metadata transaction; then the frozen
generation's file is free and the freed addresses go to the punch queue.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from blockvirt.errors import BlockvirtError
from blockvirt.lun.address import chunk_of, file_of
from blockvirt.lun.leaf import encode
from blockvirt.meta.keys import Table, born_key, leaf_key, number_key, pair_key
from blockvirt.meta.records import BranchRecord, FileRecord, seal
from blockvirt.meta.store import Writer
from blockvirt.volumes.flush import Flusher, sync_data
from blockvirt.volumes.leaf_map import FrozenLeaf
from blockvirt.volumes.volume import Volume

log = logging.getLogger("blockvirt.volumes")


@dataclass(frozen=True, slots=True)
class Frozen:
    """What one checkpoint commits: the volume's map state at one instant."""

    branch: BranchRecord
    files: Sequence[FileRecord]
    leaves: list[FrozenLeaf]
    freed: list[int]
    sequence: int


class Checkpointer:
    """The checkpoints of one open volume: one at a time, and a task that starts them when they are due."""

    def __init__(self, volume: Volume, flusher: Flusher) -> None:
        self._volume = volume
        self._flusher = flusher
        self._running: asyncio.Task[None] | None = None

    async def watch(self) -> None:
        """Run a checkpoint whenever one is due, until the volume stops or this task is cancelled."""
        volume = self._volume
        while volume.failure is None:
            await volume.checkpoint_due.wait()
            if volume.failure is None:
                try:
                    await self.run()
                except BlockvirtError as error:
                    log.error("volume %s: checkpoint failed: %s", volume.record.name, error)

    async def run(self) -> None:
        """Run a checkpoint, or join the one that runs; raises VolumeStopped."""
        if self._running is None or self._running.done():
            self._running = self._volume.tasks.start(self._checkpoint(), "checkpoint", awaited=True)
        await asyncio.shield(self._running)

    async def run_all(self) -> None:
        """Run checkpoints until one covers everything there is; raises VolumeStopped. For a volume without sessions.

        One that runs already may have frozen before the last change: joining it is not enough.
        """
        await self.run()
        while self._uncovered():
            await self.run()

    def _uncovered(self) -> bool:
        volume = self._volume
        volume.check()
        journal = volume.journal
        return bool(volume.map.dirty or volume.freed or (journal is not None and journal.needs_mark()))

    async def _checkpoint(self) -> None:
        volume = self._volume
        started_s = time.perf_counter()
        async with self._flusher.syncing:
            # As a flush would, never beside one: of two syncs of a file only one is told of a failed write-back.
            await sync_data(volume)
        async with self._flusher.syncing:
            volume.check()
            frozen = self._freeze()
            if frozen is None:
                return
            await sync_data(volume)
            rows = await volume.context.threads.run(lambda: leaf_rows(frozen.branch, frozen.leaves))
            try:
                await volume.context.store.commit(lambda writer: _commit(writer, frozen, rows))
            except BlockvirtError as error:
                raise volume.stop("its map cannot be committed to the metadata", error) from error
            self._committed(frozen)
        volume.stats.checkpoints += 1
        volume.stats.checkpoint_s += time.perf_counter() - started_s
        if frozen.freed:
            volume.context.punches.set()

    def _freeze(self) -> Frozen | None:
        """Take the volume's map state, in one piece: no await in here."""
        volume = self._volume
        assert not volume.unsettled()
        volume.checkpoint_due.clear()
        if volume.age_timer is not None:
            volume.age_timer.cancel()
            volume.age_timer = None
        journal = volume.journal
        if journal is None:
            return None
        files = [file.record(volume.map.branch) for file in volume.files.own()]
        if not volume.map.dirty and not volume.freed and all(volume.files.records[f.number] == f for f in files):
            return None
        branch = replace(
            volume.branch_record,
            covered_generation=journal.generation,
            covered_sequence=journal.sequence,
            journal_chain=journal.chain,
            mapped_chunks=volume.tail.mapped_chunks,
        )
        frozen = Frozen(branch, files, volume.map.freeze(), volume.freed, journal.sequence)
        volume.freed = []
        journal.switch()
        return frozen

    def _committed(self, frozen: Frozen) -> None:
        volume = self._volume
        volume.branch_record = frozen.branch
        for record in frozen.files:
            volume.files.records[record.number] = record
        volume.map.committed(frozen.leaves)
        assert volume.journal is not None
        volume.journal.covered(frozen.sequence)


Rows = list[tuple[bytes, bytes, bytes]]


def leaf_rows(branch: BranchRecord, leaves: Sequence[FrozenLeaf]) -> Rows:
    """Encode leaves of the branch's head: (leaf key, sealed value, born key). In an I/O thread, not in the store's."""
    rows = []
    for item in leaves:
        key = leaf_key(branch.number, item.number, branch.head_epoch)
        rows.append((key, seal(key, encode(item.entries)), born_key(branch.number, branch.head_epoch, item.number)))
    return rows


def _commit(writer: Writer, frozen: Frozen, rows: Rows) -> None:
    write_map(writer, frozen.branch, frozen.files, rows)
    write_punches(writer, frozen.freed)


def write_map(writer: Writer, branch: BranchRecord, files: Sequence[FileRecord], rows: Rows) -> None:
    """Store a branch's state: its record, its files' high-water marks and leaf versions."""
    writer.put_record(Table.BRANCHES, number_key(branch.number), branch)
    for file in files:
        writer.put_record(Table.FILES, number_key(file.number), file)
    for key, value, born in rows:
        writer.put(Table.LEAVES, key, value)
        writer.put(Table.BORN, born, b"")


def write_punches(writer: Writer, freed: Sequence[int]) -> None:
    """Queue freed addresses for punching, neighbours merged."""
    run_start = run_count = 0
    for entry in [*sorted(freed), 0]:
        if run_count and entry == run_start + run_count:
            run_count += 1
            continue
        if run_count:
            key = pair_key(file_of(run_start), chunk_of(run_start))
            writer.put(Table.PUNCH, key, seal(key, run_count.to_bytes(8, "little")))
        run_start, run_count = entry, 1
