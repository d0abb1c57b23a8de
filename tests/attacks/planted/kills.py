"""Bugs that a kill at the right moment must bring to light."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockvirt.meta.keys import Table, number_key
from blockvirt.meta.records import BranchRecord, DeviceRecord, FileRecord, VolumeRecord
from blockvirt.meta.store import Writer
from blockvirt.nbd.dispatch import Dispatcher
from blockvirt.pool import identity
from blockvirt.pool.backing import BackingFile, backing_path, unlink_files
from blockvirt.snapshots.catalogue import Snapshots
from blockvirt.snapshots.importing import SnapshotImports
from blockvirt.snapshots.revert import Revert, Reverts
from blockvirt.volumes import catalogue, checkpoint, recovery, transactions
from blockvirt.volumes.opened import OpenVolume
from blockvirt.volumes.slow_path import SlowPath
from blockvirt.volumes.transfer import assign
from blockvirt.volumes.volume import Volume
from tests.attacks.kills_trial import exact, slot_of
from tests.attacks.planted.bugs import Bug, replacing

_WINDOW_CALLS = 40


def _answer_first(self: Any) -> None:
    out, self._out = self._out, []
    wrote, self._wrote = self._wrote, []
    self._outgoing.send(out)
    if wrote:
        _make_calls(_WINDOW_CALLS)  # under load a call more or less comes before the window: it must not be narrow
        self._handle.settle()


def _make_calls(count: int) -> None:
    """Do what the kill counts, and nothing else comes of."""
    descriptor = os.memfd_create("window")
    try:
        for _ in range(count):
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


async def _unmap_without_a_word(self: Any, first: int, end: int) -> None:
    volume = self._volume
    while not volume.has_journal_room(1):
        await self._make_journal_room(1)
    volume.stage(first, end - first, 0)
    volume._changes.clear()


def _journal_first(self: Any, offset: int, data: memoryview) -> bool:
    steps = self.plan(offset, len(data))
    if not self.has_room(steps):
        return False
    copies = self.old_contents(steps)
    if copies is None:
        return False
    transfers = assign(self.files, self.tail, self.chunk_shift, steps, data, copies)
    for transfer in transfers:
        self.stage_transfer(transfer)
    self.settle()
    for transfer in transfers:
        transfer.run()
    return True


def _map_first(patch: pytest.MonkeyPatch) -> None:
    def in_one_chunk(self: Any, chunk: int, within: int, old: int, data: memoryview) -> bool:
        return _journal_first(self, (chunk << self.chunk_shift) + within, data)

    patch.setattr(Volume, "_write_steps_now", _journal_first)
    patch.setattr(Volume, "_write_new_chunk", in_one_chunk)


_close = OpenVolume.close


async def _journal_gone_first(self: OpenVolume) -> None:
    if self.volume.journal is not None:
        unlink_files(self.volume.journal.paths)
    await _close(self)


_commit = checkpoint._commit


async def _covered_first(first: Volume, frozen: Sequence[Any], also: Any) -> Any:
    def cover(writer: Writer) -> None:
        for each in frozen:
            change = each.change
            key = number_key(change.branch)
            branch = writer.record(BranchRecord, Table.BRANCHES, key)
            assert branch is not None
            covered = (change.covered_generation, change.covered_sequence, change.journal_chain)
            generation, sequence, chain = covered
            branch = replace(branch, covered_generation=generation, covered_sequence=sequence, journal_chain=chain)
            writer.put_record(Table.BRANCHES, key, branch)

    await first.context.store.commit(cover)
    return await _commit(first, frozen, also)


async def _snapshot_first(first: Volume, frozen: Sequence[Any], also: Any) -> Any:
    if also is None:
        return await _commit(first, frozen, None)
    result = await first.context.store.commit(lambda writer: also(writer, [each.change for each in frozen]))
    await _commit(first, frozen, None)
    return result


_take = Snapshots._take


async def _one_by_one(self: Snapshots, wanted: Any) -> Any:
    made = []
    for volume_id, name in sorted(wanted.names.items()):
        made += await _take(self, replace(wanted, names={volume_id: name}))
    return made


_revert = Reverts._revert


async def _safety_first(
    self: Any, volume: VolumeRecord, target: Any, safety: Any, now_s: float, *, force: bool
) -> Revert:
    if safety is not None:
        await self._snapshots.create({volume.id: safety.name})
    return await _revert(self, volume, target, None, now_s, force=force)


_frames = recovery._frames


def _without_the_newest(*arguments: Any, **named: Any) -> Any:
    return _frames(*arguments, **named)[:-1]


def _of_one_generation(branch: BranchRecord, *arguments: Any, **named: Any) -> Any:
    oldest = branch.covered_generation + 1
    return [frame for frame in _frames(branch, *arguments, **named) if frame.generation == oldest]


def _leave_tail(self: BackingFile) -> None:
    return None


_retire = transactions.retire


def _files_first(writer: Writer, volume_id: str, **named: Any) -> Any:
    record = writer.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
    assert record is not None
    is_alone = not any(True for _ in writer.scan(Table.SNAPSHOT_NAMES, prefix=f"{volume_id}/".encode()))
    for key, _ in writer.scan(Table.FILES):
        file = writer.record(FileRecord, Table.FILES, key)
        if is_alone and file is not None and file.branch == record.branch:
            device = writer.record(DeviceRecord, Table.DEVICES, file.device_id.encode())
            assert device is not None
            backing_path(Path(device.path), file.branch, file.number).unlink()
    return _retire(writer, volume_id, **named)


async def _leave_imports(self: SnapshotImports) -> None:
    return None


def _other_mounts(filesystem: int) -> int:
    return os.stat("/proc/self/ns/mnt").st_ino


def _bug(
    name: str,
    what: str,
    breaks: str,
    plant: Callable[[pytest.MonkeyPatch], None],
    story: str,
    calls: range,
    *,
    is_apart: bool = False,
    is_quick: bool = False,
) -> Bug:
    """Return a bug that kills at ``calls`` of a story catch: more than one, as a call more or less may come before."""
    seed = exact(slot_of(story, "calls"), calls.start, is_apart=is_apart)
    return Bug(name, what, tuple(breaks.split()), "kills", plant, len(calls), seed, is_quick)


BUGS = (
    _bug(
        "reply-before-journal",
        "replies leave before their journal record is written",
        "I3b",
        replacing(Dispatcher, "_answer", _answer_first),
        "first-write",
        range(28 + _WINDOW_CALLS // 2, 29 + _WINDOW_CALLS // 2),
        is_quick=True,
    ),
    _bug(
        "trims-not-journalled",
        "a trim changes the map in memory only",
        "I3b",
        replacing(SlowPath, "_unmap", _unmap_without_a_word),
        "trims",
        range(25, 27),
        is_quick=True,
    ),
    _bug(
        "map-before-data",
        "a write is journalled before its data is written",
        "I3b I8",
        _map_first,
        "copies",
        range(20, 24),
    ),
    _bug(
        "journal-gone-before-checkpoint",
        "closing removes the journal before the checkpoint",
        "I3b",
        replacing(OpenVolume, "close", _journal_gone_first),
        "overwrites",
        range(32, 37),
    ),
    _bug(
        "covered-before-commit",
        "the store says that the journal is covered before it has the map",
        "I3b",
        replacing(checkpoint, "_commit", _covered_first),
        "copies",
        range(40, 46),
    ),
    _bug(
        "snapshot-before-its-map",
        "a snapshot is recorded before the map that it is to hold",
        "I5",
        replacing(checkpoint, "_commit", _snapshot_first),
        "snapshots",
        range(23, 31),
        is_quick=True,
    ),
    _bug(
        "group-one-by-one",
        "a group's snapshots are committed one after the other",
        "I5",
        replacing(Snapshots, "_take", _one_by_one),
        "groups",
        range(27, 37),
    ),
    _bug(
        "revert-in-two-steps",
        "a revert's safety snapshot is committed before the revert",
        "I5",
        replacing(Reverts, "_revert", _safety_first),
        "reverts",
        range(40, 47),
    ),
    _bug(
        "newest-frame-ignored",
        "recovery does not replay the newest frame",
        "I3b",
        replacing(recovery, "_frames", _without_the_newest),
        "recovery",
        range(1, 3),
        is_quick=True,
    ),
    _bug(
        "newest-generation-ignored",
        "recovery does not replay what was journalled while a checkpoint ran",
        "I3b",
        replacing(recovery, "_frames", _of_one_generation),
        "writes-in-checkpoint",
        range(78, 86),
    ),
    _bug(
        "mounts-taken-for-a-reboot",
        "another mount namespace is taken for another page cache",
        "I3b",
        replacing(identity, "_mounted_node", _other_mounts),
        "recovery",
        range(1, 3),
        is_apart=True,
    ),
    _bug(
        "tail-not-cut",
        "recovery leaves what no journal record names at the end of files",
        "I2 I8",
        replacing(BackingFile, "cut", _leave_tail),
        "first-write",
        range(26, 30),
    ),
    _bug(
        "files-before-their-record",
        "deleting a volume unlinks its files before that is committed",
        "I6",
        replacing(catalogue, "retire", _files_first),
        "deletion",
        range(78, 88),
    ),
    _bug(
        "imports-not-taken-back",
        "a start leaves what is half imported",
        "I6",
        replacing(SnapshotImports, "take_back_all", _leave_imports),
        "imports",
        range(20, 24),
    ),
)
