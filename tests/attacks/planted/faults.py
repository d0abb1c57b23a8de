"""Bugs for the attack "faults": what a failed call makes go wrong."""

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import pytest

from blockvirt.meta import copies, group_commit, store
from blockvirt.meta.group_commit import Change, Outcome
from blockvirt.meta.keys import Table
from blockvirt.meta.records import BranchRecord
from blockvirt.meta.store import Writer
from blockvirt.pool import backing
from blockvirt.pool.backing import BackingFile
from blockvirt.volumes import flush, recovery
from blockvirt.volumes.context import VolumeContext
from blockvirt.volumes.journal import FoundJournal, Journal
from blockvirt.volumes.punch import Puncher, _Punch
from blockvirt.volumes.volume import Volume
from tests.attacks.faults import seed_of
from tests.attacks.faults_hangs import HANG_S
from tests.attacks.faults_sites import ALWAYS, ONCE, SHORT, Cell, Site
from tests.attacks.planted.bugs import Bug, replacing


def _sync(self: BackingFile) -> None:
    """Try a failed sync again."""
    try:
        os.fdatasync(self.fd)
    except OSError:
        os.fdatasync(self.fd)


def _append(self: Journal, frame: bytes, crc: int) -> None:
    """Go on as if a frame were written."""
    with contextlib.suppress(OSError):
        os.pwrite(self._fds[self.generation & 1], frame, self._at)
    self._at += len(frame)
    self.sequence += 1
    self.chain = crc


def _write(self: BackingFile, data: memoryview, position: int) -> None:
    """Take a part for the whole."""
    try:
        os.pwrite(self.fd, data, position)
    finally:
        self.unsynced_bytes += len(data)


def _acknowledge_failed_copies(patch: pytest.MonkeyPatch) -> None:
    """Take a turn for good of whose copies some could not be written."""
    settle = Volume.settle

    def wrong(self: Volume) -> None:
        if self._copies.held:
            self._write_copies()
        self._copies.failure = None
        settle(self)

    patch.setattr(Volume, "settle", wrong)


def _sync_ended(_volume: Volume, _what: str, _began_s: float, error: BaseException | None) -> BaseException | None:
    """Tell who asked, and let the volume go on."""
    return error


def _punch_all(self: Puncher, path: Path, punches: Sequence[_Punch]) -> tuple[Sequence[_Punch], str]:
    """Take what cannot be punched for done: its row goes, its space does not come back."""
    _PUNCH_ALL(self, path, punches)
    return punches, ""


_PUNCH_ALL = Puncher._punch_all


def _note_nothing(context: VolumeContext, branch: BranchRecord, found: FoundJournal, reason: str) -> None:
    """Forget that a sync of recovery failed."""


def _forget_directories(patch: pytest.MonkeyPatch) -> None:
    def synced(path: Path) -> None:
        pass

    patch.setattr(backing, "sync_directory", synced)


def _forget_stops(patch: pytest.MonkeyPatch) -> None:
    async def note_stop(self: Volume) -> None:
        pass

    patch.setattr(Journal, "note_stop", lambda self, reason: None)
    patch.setattr(Volume, "note_stop", note_stop)


def _run_group(env: Any, tables: Mapping[Table, Any], changes: Sequence[Change]) -> tuple[list[Outcome], bool]:
    """Take a commit for done, whatever it says."""
    transaction = env.begin(write=True)
    outcomes = [group_commit._run(change, Writer(transaction, tables, set())) for change in changes]
    with contextlib.suppress(lmdb.Error):
        transaction.commit()
    return outcomes, True


_RUN_GROUP = group_commit.run_group


def _run_group_twice(env: Any, tables: Mapping[Table, Any], changes: Sequence[Change]) -> tuple[list[Outcome], bool]:
    """Try a commit again that failed."""
    try:
        return _RUN_GROUP(env, tables, changes)
    except lmdb.Error:
        return _RUN_GROUP(env, tables, changes)


def _append_patiently(self: Journal, frame: bytes, crc: int) -> None:
    """Give a disk that fails some time, here and now."""
    try:
        _APPEND(self, frame, crc)
    except OSError:
        time.sleep(HANG_S + 1)
        raise


_APPEND = Journal._write


class _WithoutSync:
    """The module ``os``, but nothing is synced."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, fd: int) -> None:
        """Do nothing."""


def _leave_copies_in_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(copies, "os", _WithoutSync())


def _bug(name: str, what: str, breaks: tuple[str, ...], plant: Any, cell: Cell, ending: str = "") -> Bug:
    return Bug(name, what, breaks, "faults", plant, seed=seed_of(cell, ending), is_quick=not cell.is_traced)


_DATA_SYNC = Site("data", "sync")

BUGS: tuple[Bug, ...] = (
    _bug(
        "retry-a-failed-sync",
        "a data sync that failed is tried again, and believed",
        ("I7",),
        replacing(BackingFile, "sync", _sync),
        Cell(_DATA_SYNC, "EIO", ONCE, 2),
    ),
    _bug(
        "ignore-a-failed-append",
        "a write is answered although its journal frame was not written",
        ("I3b", "I7"),
        replacing(Journal, "_write", _append),
        Cell(Site("journal", "write"), "EIO", ALWAYS, 5),
    ),
    _bug(
        "a-short-write-is-done",
        "of a write that the disk took in part the rest is forgotten",
        ("I3b", "I4"),
        replacing(BackingFile, "write", _write),
        Cell(Site("data", "write"), SHORT, ONCE, 1),
    ),
    _bug(
        "failed-copies-are-answered",
        "writes whose copies could not be written are acknowledged",
        ("I3b",),
        _acknowledge_failed_copies,
        Cell(Site("data", "write"), "EIO", ONCE, 12),
    ),
    _bug(
        "a-failed-sync-stops-nothing",
        "after a failed sync the volume goes on; the next flush finds nothing to do",
        ("I3", "I7"),
        replacing(flush, "sync_ended", _sync_ended),
        Cell(_DATA_SYNC, "ENOSPC", ONCE, 4),
    ),
    _bug(
        "a-failed-punch-loses-its-row",
        "what could not be given back is forgotten",
        ("I6",),
        replacing(Puncher, "_punch_all", _punch_all),
        Cell(Site("data", "punch"), "EIO", ALWAYS, 1),
        "close",
    ),
    _bug(
        "recovery-forgets-its-failed-sync",
        "the next recovery takes the page cache for whole",
        ("I7",),
        replacing(recovery, "_note_stop", _note_nothing),
        Cell(_DATA_SYNC, "EIO", ALWAYS, 7),
        "kill",
    ),
    _bug(
        "forget-to-sync-the-directory",
        "a new backing file is not durably in its directory",
        ("I3",),
        _forget_directories,
        Cell(Site("data", "unlink"), "EIO", ONCE, 1),
        "power cut",
    ),
    _bug(
        "a-stop-leaves-no-note",
        "that a volume has stopped is forgotten with its daemon",
        ("I7",),
        _forget_stops,
        Cell(_DATA_SYNC, "ENOMEM", ONCE, 3),
    ),
    _bug(
        "ignore-a-failed-commit",
        "a metadata commit that failed is taken for done",
        ("I1", "I7"),
        replacing(store, "run_group", _run_group),
        Cell(Site("lmdb", "fdatasync"), "EIO", ONCE, 1),
    ),
    _bug(
        "retry-a-failed-commit",
        "a metadata commit whose sync failed is tried again, and believed",
        ("I7",),
        replacing(store, "run_group", _run_group_twice),
        Cell(Site("lmdb", "fdatasync"), "EIO", ONCE, 4),
    ),
    _bug(
        "copies-in-cache",
        "neither a copy of the metadata nor its name is synced",
        (),
        _leave_copies_in_cache,
        Cell(Site("copy", "create"), "EIO", ONCE, 1),
        "power cut",
    ),
    replace(
        _bug(
            "wait-for-the-disk-on-the-loop",
            "after a failed write of the journal the event loop waits for the disk to come to itself",
            (),
            replacing(Journal, "_write", _append_patiently),
            Cell(Site("journal", "write"), "EIO", ONCE, 5),
        ),
        is_quick=False,
    ),
)
