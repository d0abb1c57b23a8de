"""The metadata reserve: filesystem blocks kept behind the last used page, so that commits never lack space (I10)."""

import errno
import logging
import os
from pathlib import Path

from blockvirt import syscalls
from blockvirt.units import MIB

log = logging.getLogger("blockvirt.meta")
_AHEAD_BYTES = 8 * MIB  # taken beyond the reserve, so that not every commit has to ask the filesystem
_MISSING = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Reserve:
    """Blocks behind the end of one data file. Not thread-safe: its owner holds a lock."""

    def __init__(self, data_file: Path, reserve_bytes: int) -> None:
        """Raises OSError if the file cannot be opened."""
        self._fd = os.open(data_file, os.O_RDWR | os.O_CLOEXEC)
        self._path = data_file
        self._reserve_bytes = reserve_bytes
        self._allocated_to = 0
        self._can_allocate = True
        self.whole = not reserve_bytes

    def top_up(self, used_bytes: int) -> None:
        """Make sure that ``reserve_bytes`` behind ``used_bytes`` are allocated; afterwards ``whole`` says if they are.

        Cheap where nothing is missing. Never raises: without space the reserve is not whole, and commits live on what
        is left of it.
        """
        if not self._reserve_bytes or self._allocated_to >= used_bytes + self._reserve_bytes:
            return
        was_whole, self.whole = self.whole, False
        for ahead_bytes in (_AHEAD_BYTES, 0):
            if self._allocate(used_bytes, self._reserve_bytes + ahead_bytes):
                self.whole = True
                break
        if was_whole and not self.whole:
            log.warning("the metadata reserve of %s is no longer whole: its filesystem is full", self._path)

    def _allocate(self, offset_bytes: int, length_bytes: int) -> bool:
        if not self._can_allocate:
            facts = os.fstatvfs(self._fd)
            return facts.f_bavail * facts.f_frsize >= length_bytes
        try:
            syscalls.allocate_keep_size(self._fd, offset_bytes, length_bytes)
        except OSError as error:
            if error.errno in _MISSING:
                log.warning("%s: its filesystem cannot allocate ahead; free space counts as the reserve", self._path)
                self._can_allocate = False
                return self._allocate(offset_bytes, length_bytes)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                log.error("allocating the metadata reserve of %s failed: %s", self._path, error)
            return False
        self._allocated_to = offset_bytes + length_bytes
        return True

    def tells_full(self, used_bytes: int) -> bool:
        """Tell whether a commit that failed did so for lack of space alone.

        LMDB says EIO for a write that was cut short, which is what a page write gets that fills the filesystem. So:
        nothing more can be allocated behind ``used_bytes``, and a sync through this descriptor is well. The kernel
        reports a write-back error once to each descriptor, so this one would hear of one that LMDB's sync met.
        """
        try:
            os.fdatasync(self._fd)
        except OSError:
            return False
        self._allocated_to = 0
        self.whole = self._allocate(used_bytes, max(self._reserve_bytes, _AHEAD_BYTES))
        return not self.whole

    def close(self) -> None:
        """Close the descriptor; the blocks stay. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
