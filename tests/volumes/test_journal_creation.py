"""Making a journal: what is left of one that could not be made."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from blockvirt.meta.records import BranchRecord
from blockvirt.volumes import journal
from blockvirt.volumes.journal import Journal, JournalHeader


def test_nothing_is_left_where_a_sync_and_then_every_close_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By seed 5002 of the attack on faults: one close that failed left the other file open, and both in place."""
    (tmp_path / "journal").mkdir()
    opened: list[int] = []

    def open_file(*arguments: object, **more: object) -> int:
        opened.append(os.open(*arguments, **more))  # type: ignore[arg-type]
        return opened[-1]

    def sync(fd: int) -> None:
        if len(opened) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(fd: int) -> None:
        os.close(fd)  # Linux does, and then tells of the error
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    calls = SimpleNamespace(**vars(os) | {"open": open_file, "fdatasync": sync, "close": close})
    monkeypatch.setattr(journal, "os", calls)
    with pytest.raises(OSError) as raised:  # noqa: PT011 - which one is compared
        Journal.create(tmp_path, JournalHeader("pool", 1), BranchRecord(1, "volume", 1))
    assert raised.value.errno == errno.ENOSPC, "the error that matters is the first"
    assert not list((tmp_path / "journal").iterdir())
    assert len(opened) == 2
    for fd in opened:
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.fstat(fd)
