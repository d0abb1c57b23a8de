"""Bugs of the kind that crash states find: something is promised before what it rests on is on the disk."""

import asyncio
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from blockvirt.meta.records import BranchRecord, FileRecord
from blockvirt.pool.backing import BackingFile, unlink_files
from blockvirt.syscalls import zero_range
from blockvirt.volumes import checkpoint, flush, recovery
from blockvirt.volumes.context import VolumeContext
from blockvirt.volumes.flush import Flusher, Sync
from blockvirt.volumes.journal import Journal, journal_paths
from blockvirt.volumes.recovery import Replay
from tests.attacks.planted.bugs import Bug, replacing
from tests.attacks.planted.data_syncs import in_flushes, none_at_all, noted_afterwards, sync_nothing

ATTACK = "crash_states"


def _mark_first(self: Flusher) -> Iterator[Sync]:
    volume = self._volume
    volume.check()
    journal = volume.journal
    if journal is not None and journal.needs_mark():
        upto = journal.map_sequence
        journal.mark(upto)
        yield "its journal cannot be synced", journal.sync
        journal.durable_sequence = max(journal.durable_sequence, upto)
    yield from flush.data_syncs(volume)


def _mark_too_much(self: Flusher) -> Iterator[Sync]:
    volume = self._volume
    volume.check()
    journal = volume.journal
    yield from flush.data_syncs(volume)
    if journal is not None and journal.needs_mark():
        upto = journal.map_sequence  # by now, and not when the files to sync were noted
        journal.mark(upto)
        yield "its journal cannot be synced", journal.sync
        journal.durable_sequence = max(journal.durable_sequence, upto)


_rounds: "WeakKeyDictionary[Flusher, asyncio.Task[None]]" = WeakKeyDictionary()


async def _join_the_running_one(self: Flusher) -> None:
    running = _rounds.get(self)
    if running is None or running.done():
        running = _rounds[self] = self._volume.tasks.start(_whole_round(self), "flush", awaited=True)
    await asyncio.shield(running)


async def _whole_round(flusher: Flusher) -> None:
    async with flusher.syncing:
        for what, sync in flusher._syncs():
            await flush.sync_guarded(flusher._volume, what, sync)


_commit = recovery._commit


def _journal_removed_first(
    context: VolumeContext, branch: BranchRecord, records: list[FileRecord], replay: Replay
) -> None:
    for folder in context.storage.paths().values():
        unlink_files(journal_paths(folder, branch.number))
    _commit(context, branch, records, replay)


def _zero_uncounted(self: BackingFile, position: int, length: int) -> None:
    zero_range(self.fd, position, length)


def _nothing(*_: Any) -> None:
    """What should be done is not."""


def _yes(*_: Any) -> bool:
    return True


def _bug(name: str, what: str, plant: Any, *breaks: str, count: int = 400, is_quick: bool = False) -> Bug:
    return Bug(name, what, breaks, ATTACK, plant, count=count, seed=1, is_quick=is_quick)


BUGS: tuple[Bug, ...] = (
    _bug(
        "flush-without-data",
        "a flush syncs the journal and not the files",
        in_flushes(none_at_all),
        "I3",
        is_quick=True,
    ),
    _bug(
        "mark-before-data",
        "a flush syncs the mark, then the data",
        replacing(Flusher, "_syncs", _mark_first),
        "I1",
    ),
    _bug(
        "mark-speaks-for-later-writes",
        "a mark names the newest frame, not the newest before the sync",
        replacing(Flusher, "_syncs", _mark_too_much),
        "I1",
    ),
    _bug(
        "sync-noted-afterwards",
        "writes during a sync count as synced",
        in_flushes(noted_afterwards),
        "I3",
    ),
    _bug(
        "flush-joins-the-running-one",
        "who asks while one runs gets its answer",
        replacing(Flusher, "flush", _join_the_running_one),
        "I3",
    ),
    _bug(
        "checkpoint-without-data",
        "a checkpoint syncs no file",
        replacing(checkpoint, "sync_data", sync_nothing),
        "I1",
        "I5",
    ),
    _bug(
        "journal-never-synced",
        "marks stay in the page cache",
        replacing(Journal, "sync", _nothing),
        "I3",
        is_quick=True,
    ),
    _bug(
        "recovery-believes-every-frame",
        "after a power cut frames behind the last mark are replayed",
        replacing(recovery, "_same_page_cache", _yes),
        "I1",
    ),
    _bug(
        "recovery-keeps-the-tail",
        "files are not cut back to the high-water mark",
        replacing(BackingFile, "cut", _nothing),
        "I2",
        "I8",
    ),
    _bug(
        "journal-removed-first",
        "recovery removes the journal, then commits",
        replacing(recovery, "_commit", _journal_removed_first),
        "I3",
    ),
    _bug(
        "zeroes-uncounted",
        "zeroes in place are not looked for by a flush",
        replacing(BackingFile, "zero", _zero_uncounted),
        "I3",
        count=1_500,  # it takes zeroes in place between two flushes, and a state close behind the second
    ),
)
