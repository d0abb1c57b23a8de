"""Bugs for the attack "full": what goes wrong where there is no space."""

from contextlib import suppress
from typing import Any, cast

import pytest

from blockvirt.errors import PoolFull
from blockvirt.lun.address import ADDRESS_MASK
from blockvirt.pool.backing import BackingFile
from blockvirt.snapshots.importing import SnapshotImports
from blockvirt.snapshots.schedules import Schedules
from blockvirt.syscalls import allocate
from blockvirt.volumes import checkpoint, journal, journal_opening
from blockvirt.volumes.catalogue import Catalogue, Deletion
from blockvirt.volumes.journal_opening import open_journal
from blockvirt.volumes.storage import PoolStorage
from blockvirt.volumes.volume import Volume
from tests.attacks.planted.bugs import Bug, replacing


def _reserve(self: BackingFile, chunks: int) -> None:
    """Count space before it is there."""
    start = self.reserved_chunks << self._chunk_shift
    self.reserved_chunks += chunks
    allocate(self.fd, start, chunks << self._chunk_shift)


def _check_nothing(self: PoolStorage) -> None:
    """Give chunks though the metadata may find no room for them."""


def _admit(self: PoolStorage, device_id: str, needed_bytes: int) -> None:
    """Let a device be filled to the brim."""
    self._check_metadata()


def _write_now(self: Volume, offset: int, data: memoryview) -> bool:
    """Ask for room for every write, for those too whose chunks are there."""
    for device_id in self.context.storage.paths():
        self.context.storage.admit(device_id, self.chunk_bytes)
    return _WRITE_NOW(self, offset, data)


_WRITE_NOW = Volume.write_now


def _mapped(self: PoolStorage, device_id: str, file: int, change_chunks: int) -> None:
    """Count what comes into use, and nothing that goes out of it."""
    _MAPPED(self, device_id, file, max(0, change_chunks))


_MAPPED = PoolStorage.mapped


def _no_small_journal(changes: int) -> int:
    """Know no journal but the usual one."""
    raise PoolFull("no room for a journal", cause="it needs 2 MiB", correction="add a device")


def _refuse_checkpoints(patch: pytest.MonkeyPatch) -> None:
    """Take a checkpoint for something that needs a chunk."""
    real = checkpoint.checkpoint

    async def refusing(parts: Any) -> None:
        for part in parts:
            storage = part.volume.context.storage
            for device_id in storage.paths():
                storage.admit(device_id, part.volume.chunk_bytes)
        await real(parts)

    patch.setattr(checkpoint, "checkpoint", refusing)


def lose_fresh(patch: pytest.MonkeyPatch) -> None:
    """Forget of what was just written that the head alone has it: every overwrite takes another chunk."""
    stage = Volume.stage
    patch.setattr(Volume, "stage", lambda self, chunk, count, entry: stage(self, chunk, count, entry & ADDRESS_MASK))


def _ask_for_room_to_delete(patch: pytest.MonkeyPatch) -> None:
    """Refuse to delete volumes where no chunk could be given."""
    real = Catalogue.delete

    async def wrong(self: Catalogue, name_or_id: str, **options: Any) -> Deletion:
        storage = cast("PoolStorage", self._space)
        for device_id in storage.paths():
            storage.admit(device_id, self._chunk_bytes)
        return await real(self, name_or_id, **options)

    patch.setattr(Catalogue, "delete", wrong)


def _leave_half_a_journal(patch: pytest.MonkeyPatch) -> None:
    """Forget what is there of a journal that could not be made."""
    patch.setattr(journal, "unlink_files", lambda paths: None)


def _stop_for_want_of_a_journal(patch: pytest.MonkeyPatch) -> None:
    """Take a disk on which no journal can be made for one that has failed."""

    async def wrong(volume: Volume) -> None:
        try:
            await open_journal(volume)
        except PoolFull as error:
            raise volume.stop("no journal can be made", error) from error

    patch.setattr("blockvirt.volumes.slow_path.open_journal", wrong)


def _answer_what_was_refused(patch: pytest.MonkeyPatch) -> None:
    """Say that a schedule is deleted, whether it is or not."""
    real = Schedules.delete

    async def wrong(self: Schedules, name_or_id: str, **options: Any) -> None:
        with suppress(PoolFull):
            await real(self, name_or_id, **options)

    patch.setattr(Schedules, "delete", wrong)


def _stay_at_work(patch: pytest.MonkeyPatch) -> None:
    """Never forget that an import is at work on a volume: nobody takes back what it has left."""

    class Stubborn(set[str]):
        def discard(self, each: object) -> None:
            pass

    real = SnapshotImports.__init__

    def wrong(self: SnapshotImports, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        self.running = Stubborn()

    patch.setattr(SnapshotImports, "__init__", wrong)


BUGS: tuple[Bug, ...] = (
    Bug(
        "count-space-before-it-is-there",
        "a reservation is counted though the filesystem refused it",
        ("I10",),
        "full",
        replacing(BackingFile, "reserve", _reserve),
        seed=2,
    ),
    Bug(
        "ignore-the-metadata-reserve",
        "chunks are given while the metadata reserve is not whole",
        ("I10",),
        "full",
        replacing(PoolStorage, "_check_metadata", _check_nothing),
        seed=4,
    ),
    Bug(
        "ignore-the-limit",
        "a device is filled beyond its limit",
        ("I10",),
        "full",
        replacing(PoolStorage, "admit", _admit),
        seed=0,
    ),
    Bug(
        "overwrites-ask-for-room",
        "what is there is overwritten only where there is room for it anew",
        ("I10",),
        "full",
        replacing(Volume, "write_now", _write_now),
        seed=1,
    ),
    Bug(
        "freed-space-stays-counted",
        "what was given back to the filesystem counts as used",
        ("I6", "I10"),
        "full",
        replacing(PoolStorage, "mapped", _mapped),
        seed=0,
    ),
    Bug(
        "a-full-pool-has-no-small-journal",
        "a trim in a full pool wants a whole journal",
        ("I10",),
        "full",
        replacing(journal_opening, "smallest_file_bytes", _no_small_journal),
        seed=1,
    ),
    Bug(
        "checkpoints-ask-for-room",
        "a checkpoint wants space where chunks are",
        ("I10",),
        "full",
        _refuse_checkpoints,
        seed=7,
    ),
    Bug(
        "deletions-ask-for-room",
        "a volume is deleted only where there is room for a chunk",
        ("I10",),
        "full",
        _ask_for_room_to_delete,
        seed=0,
    ),
    Bug(
        "half-a-journal-stays",
        "what there is of a journal that could not be made stays",
        ("I10",),
        "full",
        _leave_half_a_journal,
        seed=9,
    ),
    Bug(
        "no-journal-no-volume",
        "a volume stops where there is no room for its journal",
        ("I10",),
        "full",
        _stop_for_want_of_a_journal,
        seed=9,
    ),
    Bug(
        "a-refused-deletion-is-answered",
        "a schedule is said to be deleted though the metadata had no room for that",
        ("I10",),
        "full",
        _answer_what_was_refused,
        seed=126,
    ),
    Bug(
        "an-import-stays-at-work",
        "an import that was refused counts as at work for ever",
        ("I10",),
        "full",
        _stay_at_work,
        seed=133,
    ),
    Bug(
        "fresh-lost",
        "the FRESH flag of what was just written is lost: it is overwritten at another address",
        ("I10",),
        "full",
        lose_fresh,
        seed=1,
    ),
)
