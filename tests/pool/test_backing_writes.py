"""Writes of many pages: on ext4 no call may bring the page cache a folio so large that every later write is slow."""

import os
from pathlib import Path

import pytest

from blockvirt.meta.records import FileRecord
from blockvirt.pool import backing
from blockvirt.pool.backing import BackingFile
from blockvirt.syscalls import EXT4, XFS
from blockvirt.units import KIB

SHIFT = 14
PWRITE = os.pwrite


@pytest.mark.parametrize(
    ("filesystem", "calls"),
    [(EXT4, [(12, 64 * KIB), (12 + 64 * KIB, 64 * KIB), (12 + 128 * KIB, 5)]), (XFS, [(12, 128 * KIB + 5)])],
)
def test_ext4_is_written_to_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filesystem: int, calls: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(backing, "filesystem_type", lambda _: filesystem)
    file = BackingFile(FileRecord(1, 1, "device"), tmp_path / "00000001-0000001", SHIFT)
    file.open()
    file.reserve(10)
    made: list[tuple[int, int]] = []

    def pwrite(fd: int, data: memoryview, position: int) -> int:
        made.append((position, len(data)))
        return PWRITE(fd, data, position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    content = os.urandom(128 * KIB + 5)
    file.write(memoryview(content), 12)
    assert made == calls
    assert os.pread(file.fd, len(content), 12) == content
    file.close()
