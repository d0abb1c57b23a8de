"""Checkpoints: the journal makes map changes durable, a checkpoint into the metadata store makes them cheap to find.

Sync the files once beforehand, so that what follows is short; let a running flush end; freeze on the event loop with
no await in between and open the journal's next generation; sync again; one metadata transaction; then the frozen
generation's file is free and the freed addresses go to the punch queue.

A snapshot is a checkpoint of its volumes, frozen in one piece, with an epoch step: what the head allocated before may
not be overwritten from then on.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TypeVar

from blockvirt.errors import BlockvirtError
from blockvirt.limits import RECLAIM_BATCH_VERSIONS
from blockvirt.meta.store import Writer
from blockvirt.volumes.commit import FileChange, MapChange, Written, leaf_rows, write_map
from blockvirt.volumes.flush import Flusher, sync_data
from blockvirt.volumes.volume import Volume

log = logging.getLogger("blockvirt.volumes")
T = TypeVar("T")


Also = Callable[[Writer, Sequence[MapChange]], T]
"""Writes more in a checkpoint's transaction; is told what the checkpoint brings, in the order of branch numbers."""


@dataclass(slots=True)
class Frozen:
    """One volume's part of a checkpoint."""

    volume: Volume
    change: MapChange
    switched: bool
    """The journal went on to its next generation."""
    committed: bool = False


class Checkpointer:
    """The checkpoints of one open volume: one at a time, and a task that starts them when they are due."""

    def __init__(self, volume: Volume, flusher: Flusher) -> None:
        self.volume = volume
        self.flusher = flusher
        self._running: asyncio.Task[None] | None = None

    async def watch(self) -> None:
        """Run a checkpoint whenever one is due, until the volume stops or this task is cancelled."""
        volume = self.volume
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
            self._running = self.volume.tasks.start(checkpoint([self]), "checkpoint", awaited=True)
        await asyncio.shield(self._running)

    async def run_now(self) -> None:
        """Bring what there is now into the metadata; raises VolumeStopped. Nothing is done where there is nothing.

        What is written meanwhile may stay out, so this ends on a busy volume too.
        """
        # One task, which whoever takes the volume's parts away waits for.
        await asyncio.shield(self.volume.tasks.start(self._run_behind(self._running), "checkpoint now", awaited=True))

    async def _run_behind(self, running: asyncio.Task[None] | None) -> None:
        if running is not None and not running.done():
            await asyncio.wait([running])  # it may have frozen before the last change
        if self._uncovered():
            await self.run()

    async def run_all(self) -> None:
        """Run checkpoints until one covers everything there is; raises VolumeStopped. For a volume without sessions.

        One that runs already may have frozen before the last change: joining it is not enough.
        """
        await self.run()
        while self._uncovered():
            await self.run()

    def _uncovered(self) -> bool:
        volume = self.volume
        volume.check()
        journal = volume.journal
        # The files too: a write that failed has taken addresses and changed nothing else (I2).
        return bool(
            volume.map.dirty or volume.freed or _file_changes(volume) or (journal is not None and journal.needs_mark())
        )


async def checkpoint(parts: Sequence[Checkpointer]) -> None:
    """Bring the map of each volume into the metadata store, where there is anything to bring; raises VolumeStopped."""
    await _run(parts, None, step=False)


async def checkpoint_with(part: Checkpointer, also: Also[T]) -> T:
    """Bring a volume's map into the metadata store, and what ``also`` writes, in one piece; see below."""
    result = await _run([part], also, step=False)
    assert result is not None
    return result


async def checkpoint_and_step(parts: Sequence[Checkpointer], also: Also[T]) -> T:
    """Close the epoch of all volumes in one instant; commit their maps and what ``also`` writes in one piece.

    ``also`` never raises: what it refuses it returns, because the maps must be committed anyhow. Not to be cancelled
    (shield it). Raises VolumeStopped, of any of them; nothing of ``also`` is written then.
    """
    result = await _run(parts, also, step=True)
    assert result is not None
    return result


async def _run(parts: Sequence[Checkpointer], also: Also[T] | None, *, step: bool) -> T | None:
    started_s = time.perf_counter()
    parts = sorted(parts, key=lambda part: part.volume.map.branch)  # one order: two groups do not wait for each other
    for part in parts:
        if step:
            part.volume.tail.turn()
        async with part.flusher.syncing:
            # As a flush would, never beside one: of two syncs of a file only one is told of a failed write-back.
            await sync_data(part.volume)
    async with AsyncExitStack() as held:
        for part in parts:
            await held.enter_async_context(part.flusher.syncing)
        async with AsyncExitStack() as gates:  # closed until the freeze, not until the commit
            if step:
                for part in parts:
                    await gates.enter_async_context(part.volume.in_place.stopped())
            for part in parts:
                part.volume.check()
            # From the first freeze to the last there is no await: one instant.
            frozen = [each for part in parts if (each := _freeze(part.volume, step=step)) is not None]
        if not frozen and also is None:
            return None
        try:
            result = await _commit(parts[0].volume, frozen, also)
        except BaseException as error:  # cancelled too: what is frozen is in nobody's hands then
            for each in frozen:
                if not each.committed:
                    each.volume.stop("its map cannot be committed to the metadata", error)
            raise
    for part in parts:
        part.volume.stats.checkpoints += 1
        part.volume.stats.checkpoint_s += time.perf_counter() - started_s
    return result


async def _commit(first: Volume, frozen: Sequence[Frozen], also: Also[T] | None) -> T | None:
    """Sync and commit. A volume whose sync fails has stopped: the others are committed, without ``also``."""
    context = first.context
    # The size as well: a write that has taken an address may not have begun, and the mark is above that address.
    syncs = [each.volume.tasks.start(sync_data(each.volume, also_grown=True), "sync", awaited=True) for each in frozen]
    if syncs:
        await asyncio.wait(syncs)
    failures = [failure for sync in syncs if (failure := sync.exception()) is not None]
    whole = [each for each, sync in zip(frozen, syncs, strict=True) if sync.exception() is None]
    if failures and not whole:
        raise failures[0]
    changes = [each.change for each in whole]
    rows = await context.threads.run(lambda: [leaf_rows(each.branch, each.epoch, each.leaves) for each in changes])

    def write(writer: Writer) -> tuple[list[Written], T | None]:
        done: list[Written] = []
        for change, mine in zip(changes, rows, strict=True):
            room = RECLAIM_BATCH_VERSIONS - sum(each.versions_removed for each in done)  # one transaction for all
            done.append(write_map(writer, change, mine, room))
        return done, None if failures or also is None else also(writer, changes)

    try:
        written, result = await context.store.commit(write)
    except BlockvirtError as error:
        raise first.stop("its map cannot be committed to the metadata", error) from error
    for each, mine in zip(whole, written, strict=True):
        _committed(each, mine)
    if failures:
        raise failures[0]
    return result


def _freeze(volume: Volume, *, step: bool) -> Frozen | None:
    """Take the volume's map state, in one piece: no await in here. None where there is nothing to commit."""
    assert not volume.unsettled()
    volume.checkpoint_due.clear()
    if volume.age_timer is not None:
        volume.age_timer.cancel()
        volume.age_timer = None
    journal, files = volume.journal, _file_changes(volume)
    holds_data = journal is not None and journal.holds_data
    changed = bool(volume.map.dirty or volume.freed or volume.dropped or files or holds_data)
    if not changed and not step:
        return None
    branch, epoch = volume.branch_record, volume.map.epoch
    switched = journal is not None and changed
    change = MapChange(
        branch=branch.number,
        epoch=epoch,
        head_epoch=epoch + 1 if step else epoch,
        covered_generation=journal.generation if journal is not None and switched else branch.covered_generation,
        covered_sequence=journal.sequence if journal is not None and switched else branch.covered_sequence,
        journal_chain=journal.chain if journal is not None and switched else branch.journal_chain,
        mapped_chunks=volume.tail.mapped_chunks,
        inherited_chunks=volume.inherited_chunks,
        files=files,
        leaves=volume.map.freeze(),
        freed=volume.freed,
        dropped=volume.dropped,
    )
    volume.freed, volume.dropped = [], []
    for file in volume.files.own():
        file.live_change = 0
        # Home, durably, before the commit; no flush comes until then. In a later generation it would be brought home
        # after a power cut although its chunk may be punched by then: that takes space, and there may be none.
        file.forget_last_changes()
    if step:
        volume.map.step(epoch + 1)
    if journal is not None and switched:
        journal.switch()
    return Frozen(volume, change, switched)


def _file_changes(volume: Volume) -> list[FileChange]:
    """Return the marks of a volume's files that differ from what the store has."""
    records = volume.files.records
    return [
        FileChange(file.number, file.used_chunks, file.sealed, file.live_change)
        for file in volume.files.own()
        if file.live_change
        or (file.used_chunks, file.sealed) != (records[file.number].used_chunks, records[file.number].sealed)
    ]


def _committed(frozen: Frozen, written: Written) -> None:
    volume, change = frozen.volume, frozen.change
    frozen.committed = True
    volume.branch_record = written.branch
    for mark in change.files:
        volume.files.marked(mark.number, mark.used_chunks, sealed=mark.sealed)
    volume.map.committed(change.leaves)
    if frozen.switched:
        assert volume.journal is not None
        volume.journal.covered(change.covered_sequence)
    if written.has_freed:
        volume.context.punches.set()
    if written.has_queued:
        volume.context.jobs.set()
