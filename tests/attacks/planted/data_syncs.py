"""Other ways to sync what was written, for bugs of flushes and of checkpoints."""

from collections.abc import Callable, Iterator

import pytest

from blockvirt.volumes import checkpoint, flush, opened
from blockvirt.volumes.flush import Sync
from blockvirt.volumes.volume import Volume

_REAL = flush.data_syncs


def none_at_all(volume: Volume, *, also_grown: bool = False) -> Iterator[Sync]:
    """Note what was written as synced, and sync nothing."""
    for _ in _REAL(volume, also_grown=also_grown):
        pass
    yield from ()


def noted_afterwards(volume: Volume, *, also_grown: bool = False) -> Iterator[Sync]:
    """Sync first: what is written meanwhile is not looked for any more."""
    files = volume.files.unsynced(also_grown=also_grown)

    def sync_all() -> None:
        for file in files:
            file.sync()

    if files:
        yield "its data cannot be synced", sync_all
    for file in files:
        file.unsynced_bytes, file.grown = 0, False


async def sync_nothing(volume: Volume, *, also_grown: bool = False) -> None:
    """Stand for ``sync_data``."""
    for _ in _REAL(volume, also_grown=also_grown):
        pass


async def _sync_data(volume: Volume, *, also_grown: bool = False) -> None:
    for what, sync in _REAL(volume, also_grown=also_grown):
        await flush.sync_guarded(volume, what, sync)


def in_flushes(wrong: Callable[..., Iterator[Sync]]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return what has flushes sync in another way, and nobody else."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(flush, "data_syncs", wrong)
        patch.setattr(checkpoint, "sync_data", _sync_data)
        patch.setattr(opened, "sync_data", _sync_data)

    return plant
