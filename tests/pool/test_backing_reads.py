"""Reads that wait for the disk: on XFS they must not keep the writes to the same file waiting."""

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from blockvirt.errors import DeviceFault
from blockvirt.meta.records import FileRecord
from blockvirt.pool import backing
from blockvirt.pool.backing import BackingFile
from blockvirt.syscalls import EXT4, XFS, filesystem_type
from blockvirt.units import MIB
from tests.volumes.conftest import mounted

SHIFT = 16
CONTENT = os.urandom(1 << SHIFT)
PREADV = os.preadv


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A real XFS on a loop device."""
    with mounted(tmp_path / "xfs", 320 * MIB, ("mkfs.xfs", "-q")) as folder:
        yield folder


def cold_file(folder: Path) -> BackingFile:
    """An open file with one chunk, which is on the disk and not in the page cache."""
    file = BackingFile(FileRecord(1, 1, "device"), folder / "00000001-0000001", SHIFT)
    file.open()
    file.reserve(1)
    file.write(memoryview(CONTENT), 0)
    file.sync()
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return file


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The flags of each read that was made, in order."""
    made: list[int] = []

    def preadv(fd: int, buffers: Sequence[Any], position: int, flags: int = 0) -> int:
        made.append(flags)
        return PREADV(fd, buffers, position, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    return made


@pytest.mark.requires("root", "loop", "mkfs.xfs")
def test_on_xfs_a_read_looks_until_the_page_cache_has_it(xfs: Path, looks: list[int]) -> None:
    file = cold_file(xfs)
    assert filesystem_type(file.fd) == XFS
    into = bytearray(len(CONTENT))
    file.read(memoryview(into), 0)
    assert into == CONTENT
    assert set(looks) == {os.RWF_NOWAIT}, "no read may wait for the disk with the inode locked"
    file.close()


def test_elsewhere_a_read_waits_for_the_disk(tmp_path: Path, looks: list[int], as_if: Callable[[int], None]) -> None:
    as_if(EXT4)
    file = cold_file(tmp_path)
    into = bytearray(len(CONTENT))
    file.read(memoryview(into), 0)
    assert into == CONTENT
    assert looks == [0]
    file.close()


@pytest.fixture
def as_if(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have every file lie on a filesystem of some type."""
    return lambda magic: monkeypatch.setattr(backing, "filesystem_type", lambda _: magic)


def test_what_does_not_come_is_waited_for(
    tmp_path: Path, as_if: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page cache may lose it again at once, and a disk may be slow: nothing is looked for without end."""
    as_if(XFS)
    file = cold_file(tmp_path)
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def preadv(fd: int, buffers: Sequence[Any], position: int, flags: int = 0) -> int:
        if flags:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return PREADV(fd, buffers, position)

    monkeypatch.setattr(os, "preadv", preadv)
    into = bytearray(len(CONTENT))
    file.read(memoryview(into), 0)
    assert into == CONTENT
    assert 0.1 < sum(pauses) < 0.5
    file.close()


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EIO])
def test_an_error_is_told_by_the_read_that_waits(
    tmp_path: Path, as_if: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    as_if(XFS)
    file = cold_file(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("there is nothing to wait for"))

    def preadv(fd: int, buffers: Sequence[Any], position: int, flags: int = 0) -> int:
        if flags or error == errno.EIO:
            raise OSError(error, os.strerror(error))
        return PREADV(fd, buffers, position)

    monkeypatch.setattr(os, "preadv", preadv)
    into = bytearray(len(CONTENT))
    if error == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            file.read(memoryview(into), 0)
    else:
        file.read(memoryview(into), 0)
        assert into == CONTENT
    file.close()


def test_a_file_that_ends_too_early_is_named_at_once(
    tmp_path: Path, as_if: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if(XFS)
    file = cold_file(tmp_path)
    os.truncate(file.path, 0)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("there is nothing to wait for"))
    with pytest.raises(DeviceFault, match="ends at 0"):
        file.read(memoryview(bytearray(len(CONTENT))), 0)
    file.close()
