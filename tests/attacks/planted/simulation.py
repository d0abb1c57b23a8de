"""Bugs for the attack "simulation": what makes a storage lose, mix up or resurrect data once in a thousand crashes."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import pytest

from blockvirt.lun.address import ADDRESS_MASK, FRESH, chunk_of, file_of
from blockvirt.pool import backing
from blockvirt.pool.backing import BackingFile
from blockvirt.volumes import checkpoint, commit, flush, journal, recovery
from blockvirt.volumes.journal import Journal
from blockvirt.volumes.leaf_map import LeafMap
from blockvirt.volumes.ranges import InPlace
from blockvirt.volumes.slow_path import SlowPath
from blockvirt.volumes.tail import Tail
from blockvirt.volumes.volume import Volume
from tests.attacks.planted.bugs import Bug, replacing
from tests.attacks.planted.data_syncs import in_flushes, none_at_all, noted_afterwards, sync_nothing
from tests.attacks.planted.full import lose_fresh
from tests.attacks.planted.simulation_data import (
    bring_home_always,
    copy_anew,
    data_is_forgotten,
    embedded_is_synced,
    never_void,
)

_QUICK = 30


def _write_frame_later(self: Journal, frame: bytes, crc: int) -> None:
    fd, at = self._fds[self.generation & 1], self._at

    def write() -> None:
        with suppress(OSError):
            os.pwrite(fd, frame, at)

    asyncio.get_running_loop().call_later(1e-3, write)
    self._at += len(frame)
    self.sequence += 1
    self.chain = crc
    self.appended_bytes += len(frame)


def _room_first(verb: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Make room for a chunk before anything of this verb is done, whether it needs one or not."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right = getattr(SlowPath, verb)

        async def wrong(self: SlowPath, *arguments: Any) -> None:
            tail = self._volume.tail
            if not tail.room():
                await tail.make_room(1, self._admit_device)
            await right(self, *arguments)

        patch.setattr(SlowPath, verb, wrong)

    return plant


@asynccontextmanager
async def _not_stopped(self: InPlace) -> AsyncIterator[None]:
    self._stops += 1
    try:
        yield
    finally:
        self._stops -= 1
        self._wake()


def _step_with_its_leaves(patch: pytest.MonkeyPatch) -> None:
    step = LeafMap.step

    def wrong(self: LeafMap, epoch: int) -> None:
        before = self.epoch
        step(self, epoch)
        for leaf in self.leaves.values():
            if leaf.birth == before:
                leaf.birth = epoch

    patch.setattr(LeafMap, "step", wrong)


def _cut_nothing(self: BackingFile) -> None:
    self.reserved_chunks = max(self.reserved_chunks, self.used_chunks)


def _hand_out_again(patch: pytest.MonkeyPatch) -> None:
    dropped = Volume._dropped

    def wrong(self: Volume, chunk: int, old: int) -> None:
        dropped(self, chunk, old)
        if old >= FRESH:
            file = self.files.get(file_of(old))
            if file.used_chunks == chunk_of(old) + 1:
                file.used_chunks -= 1
                self.freed.remove(old & ADDRESS_MASK)

    patch.setattr(Volume, "_dropped", wrong)


def _free_before_commit(patch: pytest.MonkeyPatch) -> None:
    """Have the allocator take what the next commit is to free."""
    dropped, take = Volume._dropped, Tail.take
    volumes: WeakKeyDictionary[Tail, Volume] = WeakKeyDictionary()

    def noted(self: Volume, chunk: int, old: int) -> None:
        dropped(self, chunk, old)
        volumes[self.tail] = self

    def wrong(self: Tail, count: int) -> tuple[BackingFile, int]:
        volume = volumes.get(self)
        if count > 1 or volume is None or not volume.freed:
            return take(self, count)
        address = volume.freed.pop()
        file = volume.files.get(file_of(address))
        volume.context.storage.mapped(file.device_id, file.number, -1)
        return file, address

    patch.setattr(Volume, "_dropped", noted)
    patch.setattr(Tail, "take", wrong)


def _ignore_stops(patch: pytest.MonkeyPatch) -> None:
    async def note_nothing(self: Volume) -> None:
        pass

    patch.setattr(journal, "_stop_reason", lambda _: "")
    patch.setattr(Volume, "note_stop", note_nothing)


def _unmap_but_the_last(patch: pytest.MonkeyPatch) -> None:
    unmap = SlowPath._unmap

    async def wrong(self: SlowPath, first: int, end: int) -> None:
        await unmap(self, first, end - 1 if end % 512 == 0 else end)

    patch.setattr(SlowPath, "_unmap", wrong)


def _switch_to_the_same_file(patch: pytest.MonkeyPatch) -> None:
    switch = Journal.switch

    def wrong(self: Journal) -> None:
        switch(self)
        self._fds = self._fds[1], self._fds[0]

    patch.setattr(Journal, "switch", wrong)


def _mark_the_newest(patch: pytest.MonkeyPatch) -> None:
    mark = Journal.mark
    patch.setattr(Journal, "mark", lambda self, upto: mark(self, self.map_sequence))


def _count_before(self: BackingFile, data: memoryview, position: int) -> None:
    self.unsynced_bytes += len(data)
    self._last_changes.append((position, bytes(data)))
    done = 0
    while done < len(data):
        done += os.pwrite(self.fd, data[done:], position + done)


def _sync_twice(patch: pytest.MonkeyPatch) -> None:
    def again(sync: Callable[[Any], None]) -> Callable[[Any], None]:
        def wrong(self: Any) -> None:
            try:
                sync(self)
            except OSError:
                sync(self)

        return wrong

    patch.setattr(BackingFile, "sync", again(BackingFile.sync))
    patch.setattr(Journal, "sync", again(Journal.sync))


def _sync_no_directory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(backing, "sync_directory", lambda _: None)
    patch.setattr(journal, "sync_directory", lambda _: None)


def _free_what_snapshots_see(_: Any, change: Any) -> list[int]:
    return [address for _, address in change.dropped]


def _size_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    reserve = BackingFile.reserve

    def wrong(self: BackingFile, chunks: int) -> None:
        reserve(self, chunks)
        self.grown = False

    patch.setattr(BackingFile, "reserve", wrong)


Plant = Callable[[pytest.MonkeyPatch], None]


def _bug(name: str, what: str, breaks: tuple[str, ...], plant: Plant, most: int, seed: int = 0) -> Bug:
    """``most``: several times as many histories as it takes from ``seed`` on; what shows within a few is quick."""
    return Bug(name, what, breaks, "simulation", plant, count=most, seed=seed, is_quick=most <= _QUICK)


BUGS: tuple[Bug, ...] = (
    _bug(
        "sim-mark-without-data",
        "a flush marks journal frames as durable without a sync of the data that they name",
        ("I1", "I3"),
        in_flushes(none_at_all),
        30,
    ),
    _bug(
        "sim-commit-without-data",
        "a checkpoint commits map entries without a sync of the data that they name",
        ("I1", "I5"),
        replacing(checkpoint, "sync_data", sync_nothing),
        30,
    ),
    _bug(
        "sim-reply-before-journal",
        "journal frames are written a moment after the reply",
        ("I3b",),
        replacing(Journal, "_write", _write_frame_later),
        60,
    ),
    _bug(
        "sim-freeze-without-waiting",
        "a freeze does not wait for overwrites in place that are in a thread",
        ("I5",),
        replacing(InPlace, "stopped", _not_stopped),
        400,
    ),
    _bug(
        "sim-fresh-after-a-step",
        "what the head had allocated before a snapshot is overwritten in place after it",
        ("I5",),
        _step_with_its_leaves,
        30,
    ),
    _bug(
        "sim-files-not-cut",
        "recovery leaves what was written to addresses that it hands out again",
        ("I2", "I8"),
        replacing(BackingFile, "cut", _cut_nothing),
        200,
    ),
    _bug(
        "sim-address-reused",
        "the address at the end of a file is handed out again when its chunk is trimmed",
        ("I1", "I2", "I3"),
        _hand_out_again,
        100,
    ),
    _bug(
        "sim-free-before-commit",
        "the allocator has chunks as free before the transaction that unmaps them is committed",
        ("I1", "I2", "I3"),
        _free_before_commit,
        100,
    ),
    _bug("sim-fresh-lost", "what is written to a new chunk has its FRESH flag lost", ("I10",), lose_fresh, 1_500),
    _bug("sim-stop-note-ignored", "recovery ignores that the volume had stopped", ("I7",), _ignore_stops, 400),
    _bug("sim-last-slot", "a trim leaves the last chunk of a leaf", ("I4", "I8"), _unmap_but_the_last, 120),
    _bug(
        "sim-generation-reused",
        "the journal's next generation overwrites the one that no commit covers yet",
        ("I3b",),
        _switch_to_the_same_file,
        300,
    ),
    _bug(
        "sim-sync-then-forget",
        "a flush forgets what was written to a file while it was being synced",
        ("I3",),
        replacing(flush, "data_syncs", noted_afterwards),
        60,
    ),
    _bug(
        "sim-mark-too-new",
        "a mark names the newest frame, also where that came after the sync of the data had begun",
        ("I1", "I3"),
        _mark_the_newest,
        3_000,  # a narrow window: one history in 500 has it
    ),
    _bug(
        "sim-count-before-write",
        "a thread counts a write as unsynced before it is in the page cache",
        ("I3",),
        replacing(BackingFile, "write", _count_before),
        1_500,
    ),
    _bug("sim-sync-tried-again", "a failed sync is tried again", ("I7",), _sync_twice, 1_000),
    _bug(
        "sim-directory-not-synced", "new files are not made durable in their directory", ("I3",), _sync_no_directory, 30
    ),
    _bug(
        "sim-freed-under-a-snapshot",
        "what the head drops is freed although an older snapshot sees it",
        ("I5", "I6"),
        replacing(commit, "_no_longer_held", _free_what_snapshots_see),
        30,
    ),
    _bug(
        "sim-embedded-counts-as-synced",
        "a mark without data speaks for files whose data went into the journal only",
        ("I1", "I3"),
        embedded_is_synced,
        400,
    ),
    _bug(
        "sim-data-never-void",
        "recovery writes older data of the journal over what was synced at home since",
        ("I3",),
        replacing(recovery, "_embedded", never_void),
        8_000,
    ),
    _bug(
        "sim-data-after-sigkill",
        "recovery writes data of the journal over newer writes where the page cache is whole",
        ("I3b",),
        bring_home_always,
        2_500,
    ),
    _bug(
        "sim-data-forgotten",
        "a flush syncs at home alone although the journal has older data",
        ("I3",),
        data_is_forgotten,
        400,
    ),
    _bug(
        "sim-copied-anew",
        "a second write of a turn to a chunk that is copied loses the first",
        ("I3b",),
        copy_anew,
        2_000,
    ),
    _bug(
        "sim-size-not-durable",
        "a flush speaks for chunks behind the size that the disk knows",
        ("I3",),
        _size_is_not_looked_at,
        400,
    ),
    _bug(
        "sim-overwrites-need-space",
        "in a full pool writes fail that need no new chunk",
        ("I10",),
        _room_first("_write_held"),
        200,
    ),
    _bug("sim-trims-need-space", "in a full pool trims fail", ("I10",), _room_first("_unmap"), 320),
)
