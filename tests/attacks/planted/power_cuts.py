"""Bugs of the kind that a power cut under a running daemon finds."""

from collections.abc import Callable
from typing import Any

import lmdb
import pytest

from blockvirt.pool import identity
from blockvirt.volumes import flush
from blockvirt.volumes.flush import Flusher
from blockvirt.volumes.journal import Journal
from blockvirt.volumes.slow_path import SlowPath
from blockvirt.volumes.volume import Volume
from tests.attacks.planted.bugs import Bug, replacing

ATTACK = "power_cuts"


async def _flush_at_once(self: Flusher) -> None:
    self._volume.check()


_write, _zero = SlowPath.write, SlowPath.zero


def _without_fua(patch: pytest.MonkeyPatch) -> None:
    async def write(self: SlowPath, offset: int, data: memoryview, *, fua: bool = False) -> None:
        await _write(self, offset, data)

    async def zero(
        self: SlowPath, offset: int, length: int, *, punch: bool, fast: bool = False, fua: bool = False
    ) -> None:
        await _zero(self, offset, length, punch=punch, fast=fast)

    patch.setattr(SlowPath, "write", write)
    patch.setattr(SlowPath, "zero", zero)


def _metadata_in_cache(patch: pytest.MonkeyPatch) -> None:
    real = lmdb.open

    def unsynced(*words: Any, **options: Any) -> Any:
        return real(*words, **options | {"sync": False, "metasync": False})

    patch.setattr(lmdb, "open", unsynced)


def _go_on(volume: Volume, _what: str, _took_s: float, _error: BaseException | None) -> None:
    volume.stats.syncs += 1


def _nothing(*_: Any) -> None:
    """What should be done is not."""


def _zero_of(*_: Any) -> int:
    return 0


def _bug(
    name: str, what: str, plant: Callable[[pytest.MonkeyPatch], None], *breaks: str, is_quick: bool = False
) -> Bug:
    return Bug(name, what, breaks, ATTACK, plant, count=20, seed=1, is_quick=is_quick)


BUGS: tuple[Bug, ...] = (
    _bug(
        "flush-answered-at-once",
        "a flush syncs nothing",
        replacing(Flusher, "flush", _flush_at_once),
        "I3",
        is_quick=True,
    ),
    _bug("fua-ignored", "a write with FUA is like any other", _without_fua, "I3"),
    _bug("metadata-in-cache", "the metadata store does not sync", _metadata_in_cache, "I1", "I5"),
    _bug("journal-in-cache", "marks are not synced", replacing(Journal, "sync", _nothing), "I3", is_quick=True),
    _bug(
        "mount-unnoticed",
        "a filesystem that was mounted anew is taken for the same",
        replacing(identity, "_mounted_node", _zero_of),
        "I1",
    ),
    _bug(
        "failed-sync-forgotten",
        "after a failed sync flushes are acknowledged",
        replacing(flush, "sync_ended", _go_on),
        "I7",
    ),
)
