"""Making a journal: what is left of one that could not be made."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blockvirt.meta.records import BranchRecord
from blockvirt.volumes import journal
from blockvirt.volumes.journal import Journal, JournalHeader, read_journal, refuse_to_drop


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


def test_a_kill_while_a_pair_is_made_anew_leaves_nothing_that_looks_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an old pair could not be removed, the new one takes its place; half of either is no damage."""
    (tmp_path / "journal").mkdir()
    branch = BranchRecord(1, "volume", 1)
    header = JournalHeader("pool", 1)
    Journal.create(tmp_path, header, branch).close(remove=False)
    left, calls = 0, 0  # before the kill, and in all
    names = ("open", "unlink", "ftruncate", "pwrite", "fdatasync", "fsync")

    class Killed(BaseException):
        pass

    def killing(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > left:
                raise Killed
            return real(*arguments, **more)

        return call

    kills = 0
    while True:
        calls = 0
        with monkeypatch.context() as patched:
            for name in names:
                patched.setattr(os, name, killing(name))
            try:
                Journal.create(tmp_path, header, branch).close(remove=False)
            except Killed:
                kills += 1
            else:
                break
        if read_journal(tmp_path, "device", 1) is None:
            refuse_to_drop(tmp_path, branch)
        for path in (tmp_path / "journal").iterdir():
            path.unlink()
        Journal.create(tmp_path, header, branch).close(remove=False)
        left += 1
    assert kills > 6
