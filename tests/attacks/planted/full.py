"""Bugs for the attack "full": what goes wrong where there is no space."""

from typing import Any

import pytest

from blockvirt.errors import PoolFull
from blockvirt.pool.backing import BackingFile
from blockvirt.syscalls import allocate
from blockvirt.volumes import checkpoint, journal_opening
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
)
