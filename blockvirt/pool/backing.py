"""A backing file: chunks are appended to it, addresses in it are never reused, freed space is punched out.

Belongs to one branch. All verbs block: the event loop calls only ``write`` and ``read_cached`` (page cache), the rest
runs in threads. Positions and lengths are bytes, chunk numbers count from 0.
"""

import contextlib
import errno
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from blockvirt.errors import DeviceFault
from blockvirt.limits import FLUSH_EMBED_BYTES, FLUSH_EMBED_RANGES
from blockvirt.meta.records import FileRecord
from blockvirt.syscalls import EXT4, XFS, allocate, filesystem_type, punch_hole, zero_range

log = logging.getLogger("blockvirt.pool")

READ_CACHED = getattr(os, "RWF_NOWAIT", 0)
# Between looks for what the disk is to bring, where no thread may wait for it: a quiet disk takes 0.1 ms, one that is
# being synced up to 100 ms. After these 200 ms a thread waits all the same.
_LOOKS_AFTER_S = (0.000_1, 0.000_16, 0.000_26, 0.000_4, 0.000_65, 0.001, *[0.002] * 100)
_FOLIO_BYTES = 2 << 20  # the page cache has no larger pieces (MAX_PAGECACHE_ORDER on x86-64), and each is aligned
# ext4 looks at every block of a folio in each write to it (ext4_block_write_begin), and the page cache makes folios as
# large as the write that brings them. In what is filled in such pieces a write of 4 KiB takes 7 us less, a read 1 more.
_EXT4_WRITE_BYTES = 64 << 10


def backing_path(device_path: Path, branch: int, number: int) -> Path:
    """Return where backing file ``number`` of ``branch`` lies on a device."""
    return device_path / "files" / f"{branch:08x}-{number:07x}"


class BackingFile:
    """One open backing file.

    ``used_chunks`` is the high-water mark of handed-out addresses, ``reserved_chunks`` how far space is allocated and
    the size extends: an allocated chunk always lies below it, because a read past the end is short.
    """

    __slots__ = (
        "_chunk_shift",
        "_last_changes",
        "_noted_bytes",
        "_reads_lock",
        "_write_bytes",
        "device_id",
        "fd",
        "grown",
        "live_change",
        "number",
        "path",
        "reserved_chunks",
        "sealed",
        "unsynced_bytes",
        "used_chunks",
    )

    def __init__(self, record: FileRecord, path: Path, chunk_shift: int) -> None:
        """Describe the file of ``record``; ``open`` opens it."""
        self.number = record.number
        self.device_id = record.device_id
        self.used_chunks = record.used_chunks
        self.live_change = 0
        """How many more of its chunks are named than at the last commit."""
        self.sealed = record.sealed
        self.path = path
        self.reserved_chunks = 0
        self.unsynced_bytes = 0
        """Written since the last sync was noted; 0 means that a flush need not touch this file."""
        self._last_changes: deque[tuple[int, bytes | None]] = deque(maxlen=FLUSH_EMBED_RANGES + 1)
        """(position, bytes) of what was written since the last flush, noted after each write; None: what no copy brings
        back. Threads append, so whoever looks takes one after the other; where it is full, more may have been."""
        self._noted_bytes = 0
        """About how much of copies is held there: threads count too."""
        self.grown = False
        """Its size may not be durable: a sync must come before a flush speaks for chunks in it."""
        self.fd = -1
        self._chunk_shift = chunk_shift
        self._reads_lock = False
        """A read that waits for the disk keeps writes to the file waiting."""
        self._write_bytes = sys.maxsize
        """The most that one call writes."""

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk."""
        return 1 << self._chunk_shift

    def open(self, *, read_only: bool = False) -> None:
        """Open the file, creating it only where nothing was ever handed out in it; raises DeviceFault.

        ``read_only``: somebody else appends to it, perhaps by a newer record than this one. Nothing of it is changed.
        """
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self.fd = os.open(self.path, flags)
        except FileNotFoundError:
            if self.used_chunks or read_only:
                raise DeviceFault(
                    f"backing file {self.path} is missing",
                    cause=f"metadata says that {self.used_chunks} chunks were handed out in it",
                    correction="bring the file back, or restore the volume from a copy",
                ) from None
            self.fd = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise DeviceFault(
                f"cannot open backing file {self.path}: {error.strerror}",
                correction="check the device's mount and its kernel messages",
            ) from error
        try:
            kind = filesystem_type(self.fd)
            self._reads_lock = kind == XFS
            if kind == EXT4:
                self._write_bytes = _EXT4_WRITE_BYTES
            if not read_only:
                self._take_over()
        except OSError:
            self.close()
            raise

    def _take_over(self) -> None:
        if not self.used_chunks:
            os.ftruncate(self.fd, 0)  # nothing in it was ever handed out: what is there must not show
            sync_directory(self.path.parent)  # of one that is there already too: whoever made it may not have come here
        self.grown = True
        self.reserved_chunks = os.fstat(self.fd).st_size >> self._chunk_shift
        if self.reserved_chunks < self.used_chunks:
            # Truncated from outside. What is left can be read; appending would fill the gap with zeros.
            self.sealed = True
            log.error("backing file %s is shorter than what was handed out in it: run 'blockvirt check'", self.path)

    def cut(self) -> None:
        """Cut the file back to the high-water mark: an address that was never journalled is handed out anew (I2)."""
        used_bytes = self.used_chunks << self._chunk_shift
        if os.fstat(self.fd).st_size >= used_bytes:  # never longer: what was truncated from outside is not zeros
            os.ftruncate(self.fd, used_bytes)
            self.reserved_chunks = self.used_chunks

    def reserve(self, chunks: int) -> None:
        """Allocate space for ``chunks`` more behind the reserved ones. OSError ENOSPC where there is none."""
        allocate(self.fd, self.reserved_chunks << self._chunk_shift, chunks << self._chunk_shift)
        self.grown = True  # before an address in there is handed out
        self.reserved_chunks += chunks

    def write(self, data: memoryview, position: int) -> None:
        """Write all of ``data`` at ``position`` into the page cache."""
        # Counted after the write, never before: a flush on the loop that notes and clears the count while a thread
        # is between the two would leave dirty pages that no later flush looks for.
        length, most, written = len(data), self._write_bytes, None
        try:
            done = os.pwrite(self.fd, data if length <= most else data[:most], position)
            while done < length:
                more = os.pwrite(self.fd, data[done : done + most], position + done)
                if not more:
                    raise OSError(errno.EIO, f"short write to {self.path}")
                done += more
            if self._noted_bytes + length <= FLUSH_EMBED_BYTES:
                self._noted_bytes += length
                written = bytes(data)
        finally:
            self.unsynced_bytes += length
            self._last_changes.append((position, written))

    def mapped_unwritten(self, length: int) -> None:
        """Note that chunks were mapped which nothing was written to: their allocation must be durable."""
        self.unsynced_bytes += length
        self._last_changes.append((0, None))

    def take_last_changes(self) -> list[tuple[int, bytes]] | None:
        """Return (position, bytes) of what was written since the last call, and forget it; for a flush.

        Copies, and not what the page cache has: that may have dropped a page whose write-back failed, and read the old
        content again. None where it is more than FLUSH_EMBED_RANGES ranges or FLUSH_EMBED_BYTES: only a sync can speak
        for it then.
        """
        taken: list[tuple[int, bytes]] = []
        count = size_bytes = self._noted_bytes = 0
        while self._last_changes:
            position, written = self._last_changes.popleft()
            count += 1
            if written is not None:
                taken.append((position, written))
                size_bytes += len(written)
        return taken if len(taken) == count <= FLUSH_EMBED_RANGES and size_bytes <= FLUSH_EMBED_BYTES else None

    def forget_last_changes(self) -> None:
        """Note that a sync speaks for what was written since the last flush."""
        self._last_changes.clear()
        self._noted_bytes = 0

    def read_cached(self, into: memoryview, position: int) -> bool:
        """Fill ``into`` from the page cache; False where that would block."""
        try:
            return os.preadv(self.fd, (into,), position, READ_CACHED) == len(into)
        except OSError as error:
            return would_block(error)

    def read(self, into: memoryview, position: int) -> None:
        """Fill ``into``, waiting for the disk; raises DeviceFault where the file ends too early."""
        if self._reads_lock and self._comes(into, position):
            return
        done = 0
        while done < len(into):
            got = os.preadv(self.fd, (into[done:],), position + done)
            if not got:
                raise DeviceFault(
                    f"backing file {self.path} ends at {position + done}, inside a chunk that is mapped",
                    correction="run 'blockvirt check': the file was truncated from outside",
                )
            done += got

    def _comes(self, into: memoryview, position: int) -> bool:
        """Have the kernel read ahead, and look until ``into`` is filled; False where that helps nothing.

        XFS locks the inode while a buffered read waits for the disk (xfs_file_buffered_read takes XFS_IOLOCK_SHARED):
        the event loop's next write to the file would wait as long, with all its clients.
        """
        with contextlib.suppress(OSError):  # only advice
            os.posix_fadvise(self.fd, position, len(into), os.POSIX_FADV_WILLNEED)
        for pause_s in _LOOKS_AFTER_S:
            try:
                got = os.preadv(self.fd, (into,), position, READ_CACHED)
            except BlockingIOError:
                got = -1
            except OSError:
                return False  # a read that waits meets the same error, if it is one of the disk
            if got == len(into):
                return True
            if not got:
                return False  # the file ends here
            time.sleep(pause_s)
        return False

    def zero(self, position: int, length: int) -> None:
        """Zero a range inside live chunks without giving up its space (a later overwrite must not need any)."""
        try:
            zero_range(self.fd, position, length)
            self.unsynced_bytes += length
            self._last_changes.append((0, None))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            zeros = bytes(min(length, 1 << 20))
            for at in range(position, position + length, len(zeros)):
                self.write(memoryview(zeros)[: position + length - at], at)

    def punch(self, chunk: int, count: int) -> None:
        """Give the space of freed chunks back to the filesystem; they read as zeros from now on."""
        punch_hole(self.fd, chunk << self._chunk_shift, count << self._chunk_shift)

    def sync(self) -> None:
        """Make the content durable. A failure is never retried: the kernel may have dropped the pages (I7)."""
        os.fdatasync(self.fd)

    def forget_cached(self, position: int = 0, length: int = 0) -> None:
        """Have what is read from now on of a range come from the disk, as far as it is synced; length 0: to the end.

        The kernel drops no folio that reaches beyond the range, so that is made to end where folios do.
        After a failed write-back the kernel keeps the pages as clean ones: they would be read, and no sync would ever
        write them.
        """
        first = position // _FOLIO_BYTES * _FOLIO_BYTES
        end = -(-(position + length) // _FOLIO_BYTES) * _FOLIO_BYTES if length else first
        os.posix_fadvise(self.fd, first, end - first, os.POSIX_FADV_DONTNEED)

    def read_no_further(self) -> None:
        """Have the kernel read no more than what is asked for by this descriptor."""
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def close(self) -> None:
        """Close the descriptor; never raises. Whoever wrote must have synced before: what counts is durable by then."""
        fd, self.fd = self.fd, -1  # it is gone whatever the call says, and its number may be somebody else's next
        if fd >= 0:
            try:
                os.close(fd)
            except OSError as error:
                log.error("closing %s: %s", self.path, error)


def would_block(error: OSError) -> bool:
    """Return False where ``error`` says that a read with READ_CACHED needs a thread; else raise it."""
    if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):  # the last two: this filesystem cannot tell
        return False
    raise error


def sync_directory(path: Path) -> None:
    """Make creations and removals in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def unlink_files(paths: Sequence[Path]) -> None:
    """Remove files that may be gone already, and make that durable."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    for parent in {path.parent for path in paths}:
        if parent.exists():
            sync_directory(parent)
