"""Backing files on a disk that fails: nothing is left open, and nothing that is promised hangs in the air."""

import errno
import os
from pathlib import Path

import pytest

from blockvirt.meta.records import FileRecord
from blockvirt.pool.backing import BackingFile

SHIFT = 12


def new_file(folder: Path) -> BackingFile:
    """A file in which nothing was handed out yet."""
    return BackingFile(FileRecord(1, 1, "device"), folder / "00000001-0000001", SHIFT)


def failing(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def descriptors() -> set[str]:
    """What this process has open."""
    return {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2 and _is_open(fd)}


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize("call", ["fsync", "ftruncate", "fstat"])
def test_what_cannot_be_opened_is_closed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    file = new_file(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(os, call, failing)
        with pytest.raises(OSError, match="Input/output error"):
            file.open()
    assert file.fd == -1
    assert str(file.path) not in descriptors()


def test_a_file_that_was_made_is_in_its_directory_for_good_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sync of the directory failed when it was made: a power cut would take the file with all that is flushed."""
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="Input/output error"):
            new_file(tmp_path).open()
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    file = new_file(tmp_path)
    file.open()
    assert synced == [str(tmp_path)]
    file.close()


def test_a_close_that_fails_has_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = new_file(tmp_path)
    file.open()
    asked: list[int] = []
    real = os.close

    def close(fd: int) -> None:
        asked.append(fd)
        real(fd)
        failing()

    with monkeypatch.context() as broken:
        broken.setattr(os, "close", close)
        file.close()
        file.close()
    assert len(asked) == 1, "the number may be another file's by now"
