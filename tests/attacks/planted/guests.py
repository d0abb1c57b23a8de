"""Bugs that a guest notices, whose daemon is killed under it."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

from blockvirt.lun.plan import WriteStep, plan_write
from blockvirt.meta.records import BranchRecord, SnapshotRecord
from blockvirt.nbd.dispatch import Dispatcher
from blockvirt.pool import identity
from blockvirt.snapshots.reader import OpenSnapshot
from blockvirt.volumes import recovery
from blockvirt.volumes.context import VolumeContext
from blockvirt.volumes.slow_path import SlowPath
from blockvirt.volumes.volume import Volume
from tests.attacks.planted.bugs import Bug
from tests.attacks.planted.bugs import replacing as by

_LATE_S = 0.05
EXT4, XFS = 2, 3


def _answer_first(self: Any) -> None:
    out, self._out = self._out, []
    wrote, self._wrote = self._wrote, []
    self._outgoing.send(out)
    if wrote:
        time.sleep(_LATE_S)  # a kill at a random moment is to find it here
        self._handle.settle()


_frames = recovery._frames


def _without_the_newest(*arguments: Any, **named: Any) -> Any:
    return _frames(*arguments, **named)[:-1]


def _mounted_at_every_start(filesystem: int) -> int:
    return os.getpid()


def _mounted_by_namespace(filesystem: int) -> int:
    return os.stat("/proc/self/ns/mnt").st_ino


_zero_part = SlowPath._zero_part


async def _zero_whole(self: SlowPath, start: int, end: int, punch: bool) -> None:
    chunk_bytes = self._volume.chunk_bytes
    first = start // chunk_bytes * chunk_bytes
    await _zero_part(self, first, min(first + chunk_bytes, self._volume.size_bytes), punch)


def _open_later(self: OpenSnapshot, context: VolumeContext, record: SnapshotRecord, branch: BranchRecord) -> None:
    _open(self, context, replace(record, epoch=record.epoch + 1), branch)


_open = OpenSnapshot.__init__


def _plan(self: Volume, offset: int, length: int) -> list[WriteStep]:
    return plan_write(self.map.readable, offset, length, self.chunk_shift, self.size_bytes)


BUGS = (
    Bug(
        "guest-reply-before-journal",
        "replies leave a moment before their journal record is written",
        ("I3b",),
        "guests",
        by(Dispatcher, "_answer", _answer_first),
        seed=EXT4,
        is_quick=False,
    ),
    Bug(
        "guest-newest-frame-ignored",
        "recovery does not replay the newest frame",
        ("I3b",),
        "guests",
        by(recovery, "_frames", _without_the_newest),
        seed=XFS,
        is_quick=False,
    ),
    Bug(
        "guest-every-start-a-reboot",
        "every start takes the page cache for another one, and replays what was flushed only",
        ("I3b",),
        "guests",
        by(identity, "_mounted_node", _mounted_at_every_start),
        seed=EXT4,
        is_quick=False,
    ),
    Bug(
        "guest-mounts-taken-for-a-reboot",
        "another mount namespace is taken for another page cache",
        ("I3b",),
        "guests",
        by(identity, "_mounted_node", _mounted_by_namespace),
        count=4,  # a guest in three or so meets no such start with something that counts unflushed
        seed=XFS,
        is_quick=False,
    ),
    Bug(
        "guest-part-trimmed-as-a-whole",
        "trimming less than a chunk zeroes the whole chunk",
        ("I4",),
        "guests",
        by(SlowPath, "_zero_part", _zero_whole),
        seed=EXT4,
        is_quick=False,
    ),
    Bug(
        "guest-snapshot-read-an-epoch-later",
        "a snapshot is read as of the next one",
        ("I5",),
        "guests",
        by(OpenSnapshot, "__init__", _open_later),
        seed=EXT4,
        is_quick=False,
    ),
    Bug(
        "guest-overwrites-a-snapshot",
        "what was allocated before a snapshot is overwritten in place after it",
        ("I5",),
        "guests",
        by(Volume, "plan", _plan),
        seed=XFS,
        is_quick=False,
    ),
)
