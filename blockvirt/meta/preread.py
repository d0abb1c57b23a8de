"""Reading the metadata's file through before LMDB maps it: an unreadable sector under a mapping is a SIGBUS.

What was read lies in the page cache then, and mapped reads find it there. All verbs block.
"""

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from blockvirt.errors import MetadataFault
from blockvirt.limits import METADATA_PREREAD_BYTES
from blockvirt.units import KIB, MIB

PIECE_BYTES = 1 * MIB
_SECTOR_BYTES = 4 * KIB  # a page of the cache: what one unreadable sector takes with it


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A page of the file that cannot be read from the disk."""

    offset_bytes: int
    problem: str
    is_cached: bool
    """The page cache has it still: a mapped read gets that until it is dropped."""


class ThroughFile:
    """Reads a file from the disk, past the page cache where its filesystem can do that."""

    def __init__(self, path: Path) -> None:
        """Open the file; raises OSError."""
        self._cached = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECT)
        except OSError:
            self._direct = -1  # this filesystem cannot
        self._buffer = mmap.mmap(-1, PIECE_BYTES)  # aligned, as O_DIRECT demands

    def __enter__(self) -> "ThroughFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in {self._cached, self._direct} - {-1}:
            os.close(fd)
        self._buffer.close()

    def piece(self, offset_bytes: int) -> Iterator[Unreadable]:
        """Read one piece, from a multiple of ``PIECE_BYTES`` on; yields what cannot be read of it."""
        if not self._problem(offset_bytes, PIECE_BYTES):
            return
        for at in range(offset_bytes, offset_bytes + PIECE_BYTES, _SECTOR_BYTES):
            if problem := self._problem(at, _SECTOR_BYTES):
                yield Unreadable(at, problem, is_cached=not self._from_cache(at, _SECTOR_BYTES))

    def _problem(self, offset_bytes: int, length: int) -> str:
        return self._from_cache(offset_bytes, length) if self._direct < 0 else self._from_disk(offset_bytes, length)

    def _from_disk(self, offset_bytes: int, length: int) -> str:
        try:
            with memoryview(self._buffer) as whole, whole[:length] as part:
                os.preadv(self._direct, (part,), offset_bytes)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def _from_cache(self, offset_bytes: int, length: int) -> str:
        try:
            os.pread(self._cached, length, offset_bytes)
        except OSError as error:
            return error.strerror or str(error)
        return ""


def read_ahead(data_file: Path, used_bytes: int) -> None:
    """Read the file's first ``METADATA_PREREAD_BYTES`` into the page cache; raises MetadataFault where that fails."""
    at = 0
    try:
        fd = os.open(data_file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while at < min(used_bytes, METADATA_PREREAD_BYTES) and os.pread(fd, PIECE_BYTES, at):
                at += PIECE_BYTES
        finally:
            os.close(fd)
    except OSError as error:
        raise MetadataFault(
            f"the metadata file {data_file} cannot be read",
            cause=f"{error.strerror} between its bytes {at} and {at + PIECE_BYTES}",
            correction="look at the disk's health; "
            "restore the newest intact copy with 'blockvirt check --restore-metadata'",
            path=str(data_file),
        ) from error
