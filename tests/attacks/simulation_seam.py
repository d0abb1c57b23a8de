"""The simulated computer: system calls with faults and crashes, a clock, and what becomes of a process.

``Machine`` is one simulated computer: a disk, a clock, and at most one process at a time, which lives in a ``SimLoop``.
Every call that has an effect is counted; at the one that the seed names the process dies, before it or within it.
"""

import errno
import os
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmdb

from blockvirt import syscalls
from blockvirt.meta.group_commit import run_group
from blockvirt.pool.identity import PageCacheIdentity
from blockvirt.volumes.journal import BLOCK_BYTES, FRAMES_AT_BYTES
from tests.attacks.simulation_disk import SECTOR, Disk, Loss, SimFile
from tests.attacks.simulation_loop import Killed, SimLoop

_PAGE = 4096


_RUN_GROUP, _OPEN_LMDB = run_group, lmdb.open
_REAL = SimpleNamespace(
    **{
        name: getattr(os, name)
        for name in ("open", "close", "pwrite", "preadv", "ftruncate", "unlink", "fdatasync", "fsync", "posix_fadvise")
    }
)


@dataclass(slots=True)
class Faults:
    """What goes wrong for a while, and how likely it is at each call."""

    sync_fails: float = 0.0
    write_fails: float = 0.0
    write_is_short: float = 0.0
    look_misses: float = 0.15
    """A read of the page cache alone finds nothing."""
    presses: float = 0.1
    """The kernel would throttle a write on the loop."""
    is_full: bool = False
    """No space can be allocated."""


class Machine:
    """One simulated computer."""

    def __init__(self, root: Path, seed: int) -> None:
        self.dice = random.Random(seed)
        self.root = root
        self.disk = Disk(root / "disk", self.dice)
        self.loop: SimLoop | None = None
        self.faults = Faults()
        self.failed_branches: dict[int, float] = {}
        """Branches of which a sync failed, and when: they must stop."""
        self.hit_by_errors: set[int] = set()
        """Branches of which something failed since somebody looked."""
        self.shaken: set[int] = set()
        """Those among them that come back as after a power cut."""
        self.unsaid: set[int] = set()
        """Branches of which a sync has failed, with no word of it anywhere: nobody dies now, see ``counts``."""
        self.is_served: Callable[[int], bool] = lambda branch: False
        """Tells whether a branch's volume is open."""
        self.was_full = False
        self.boot = 1
        self.calls = 0
        """With an effect, of this life."""
        self.dies_at: int | None = None
        """The call at which the process dies."""
        self.trace = 0
        """A checksum over everything that happened."""
        self.log: list[str] | None = None
        self._born_s = 0.0
        self._fds: dict[int, SimFile | str] = {}
        self._others: set[int] = set()
        self._environments: list[Any] = []

    # --- lives ---------------------------------------------------------------------------------------------------

    def now_s(self) -> float:
        """Return the time since the machine was built."""
        return self._born_s + (self.loop.now_s if self.loop is not None else 0.0)

    def begin(self) -> SimLoop:
        """Start a process."""
        self.calls = 0
        self.loop = SimLoop(self.dice, in_order=self.dice.random() < 0.4)
        return self.loop

    def bury(self) -> None:
        """End the process, if it has not come to its end: nothing of it is left but what the page cache holds."""
        assert self.loop is not None
        self.loop.bury()
        self.unsaid.clear()
        self._born_s += self.loop.now_s
        self.loop = None
        for environment in self._environments:
            environment.close()
        self._environments.clear()
        for fd in [*self._fds, *self._others]:
            try:
                _REAL.close(fd)
            except OSError:
                pass
        self._fds.clear()
        self._others.clear()
        self.note("dead")

    def cut_power(self) -> Loss:
        """Lose what was not synced, and boot again."""
        self.boot += 1
        loss = self.disk.cut_power()
        self.note("power cut", loss.value)
        return loss

    def note(self, *what: object) -> None:
        """Take something into the trace."""
        line = " ".join(map(str, what))
        self.trace = zlib.crc32(line.encode(), self.trace)
        if self.log is not None:
            self.log.append(line)

    def acts(self, *what: object) -> bool:
        """Count a call with an effect, perhaps after a rest; raises as ``counts``."""
        self.check_alive()
        assert self.loop is not None
        self.loop.rest()
        return self.counts(*what)

    def counts(self, *what: object) -> bool:
        """Count a call with an effect; raises Killed if the process is dead. True: it dies within this very call."""
        self.check_alive()
        assert self.loop is not None
        self.calls += 1
        self.note(*what)
        if self.calls == self.dies_at and self.unsaid:
            # The kernel tells of a failed sync once. Who dies before he could leave word takes that along.
            self.dies_at += 1
        elif self.calls == self.dies_at:
            self.loop.is_dead = True
            if self.dice.random() < 0.6:
                raise Killed
            return True
        return False

    def check_alive(self) -> None:
        """Raise Killed if the process is dead."""
        if self.loop is not None and self.loop.is_dead:
            raise Killed

    def is_dead(self) -> bool:
        """Tell whether the process has died."""
        return self.loop is None or self.loop.is_dead

    def kill(self) -> None:
        """Have the process die right here; raises Killed."""
        assert self.loop is not None
        self.loop.is_dead = True
        raise Killed

    def chance(self, probability: float) -> bool:
        """Tell whether something happens that is so likely."""
        return probability > 0 and self.dice.random() < probability

    # --- system calls --------------------------------------------------------------------------------------------

    def open(self, path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        """See os.open."""
        text = os.fspath(path)
        if self.loop is None or not isinstance(text, str):
            return int(_REAL.open(path, flags, mode, **more))
        self.check_alive()
        folder = os.path.dirname(text)
        is_ours = folder.endswith(("/disk/files", "/disk/journal"))
        if not is_ours:
            fd = _REAL.open(path, flags, mode, **more)
            if text.endswith(("/disk/files", "/disk/journal")):
                self._fds[fd] = text
            else:
                self._others.add(fd)
            return int(fd)
        is_new = bool(flags & os.O_CREAT) and not os.path.exists(text)
        if is_new:
            self.acts("create", self.name(text))
        if flags & os.O_ACCMODE == os.O_WRONLY:
            flags ^= os.O_WRONLY | os.O_RDWR  # the disk looks at what a write hides
        fd = _REAL.open(path, flags & ~os.O_TRUNC, mode, **more)
        self._fds[fd] = self.disk.created(text) if is_new else self.disk.file(text)
        if flags & os.O_TRUNC and not is_new:
            self.ftruncate(fd, 0)
        return int(fd)

    def name(self, path: str) -> str:
        """Return what the trace calls a path."""
        return os.path.relpath(path, self.root)

    def close(self, fd: int) -> None:
        """See os.close."""
        self._fds.pop(fd, None)
        self._others.discard(fd)
        _REAL.close(fd)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        """See os.pwrite."""
        file = self._fds.get(fd)
        if not isinstance(file, SimFile):
            self.check_alive()
            return int(_REAL.pwrite(fd, data, offset))
        content = bytes(data)
        dies = self.acts("write", file.name, offset, len(content), zlib.crc32(content))
        if dies:  # a signal that kills interrupts a long write between two pages
            pages = self.dice.randrange(len(content) // _PAGE + 2)
            if pages:
                self.disk.write(file, fd, content[: pages * _PAGE], offset)
            raise Killed
        if self.chance(self.faults.write_fails):
            self._failed("write", file)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if file.name.startswith("files/") and len(content) > SECTOR and self.chance(self.faults.write_is_short):
            content = content[: self.dice.randrange(SECTOR, len(content), SECTOR)]
        if file.name.startswith("journal/") and content.startswith(b"STOPPED "):
            self.unsaid.discard(_branch_of(file))
        return self.disk.write(file, fd, content, offset)

    def preadv(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        """See os.preadv."""
        if not isinstance(self._fds.get(fd), SimFile):
            return int(_REAL.preadv(fd, buffers, offset, flags))
        self.check_alive()
        assert self.loop is not None
        if flags and self.chance(self.faults.look_misses):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.loop.rest()
        return int(_REAL.preadv(fd, buffers, offset))

    def sync(self, fd: int) -> None:
        """See os.fdatasync and os.fsync."""
        found = self._fds.get(fd)
        if found is None:
            self.check_alive()  # of the label and the like: written before the first crash
            return
        name = found.name if isinstance(found, SimFile) else self.name(found)
        upto = self.disk.tick()
        if self.acts("sync", name):
            raise Killed
        assert self.loop is not None
        self.loop.rest(0.9)
        if isinstance(found, str):
            self.disk.directory_synced(found, upto)
            return
        # While a journal is made nothing depends on it: that its syncs fail is a write that fails.
        if not self.disk.is_new(found) and self.chance(self.faults.sync_fails) and not _is_being_made(found, fd):
            self._failed("sync", found)
            self.disk.sync_failed(found)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.disk.synced(found, upto)
        if self.acts("synced", name):
            raise Killed

    def _failed(self, what: str, file: SimFile) -> None:
        branch = _branch_of(file)
        self.hit_by_errors.add(branch)
        if what == "sync" or file.name.startswith("journal/"):
            self.shaken.add(branch)
        if what == "sync" and self.is_served(branch):
            self.failed_branches.setdefault(branch, self.now_s())
        if what == "sync":
            self.unsaid.add(branch)
        elif file.name.startswith("journal/"):
            self.unsaid.discard(branch)  # the word could not be left: the disk does not take it
        self.note(what, "failed", file.name)

    def ftruncate(self, fd: int, length: int) -> None:
        """See os.ftruncate."""
        file = self._fds.get(fd)
        if not isinstance(file, SimFile):
            self.check_alive()
            _REAL.ftruncate(fd, length)
            return
        dies = self.acts("truncate", file.name, length)
        self.disk.truncate(file, fd, length)
        if dies:
            raise Killed

    def unlink(self, path: Any, **more: Any) -> None:
        """See os.unlink."""
        text = os.fspath(path)
        if self.loop is None or not os.path.dirname(text).endswith(("/disk/files", "/disk/journal")):
            _REAL.unlink(path, **more)
            return
        dies = self.acts("unlink", self.name(text))
        self.disk.unlink(text)
        if dies:
            raise Killed

    def posix_fadvise(self, fd: int, offset: int, length: int, advice: int) -> None:
        """See os.posix_fadvise."""
        file = self._fds.get(fd)
        if isinstance(file, SimFile) and advice == os.POSIX_FADV_DONTNEED:
            self.check_alive()
            self.disk.forget_cached(file, fd)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """See blockvirt.syscalls: all its verbs come through here."""
        file = self._fds.get(fd)
        if not isinstance(file, SimFile):
            self.check_alive()  # of the metadata's reserve, which is another matter
            return
        if mode & syscalls._ZERO_RANGE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if not mode and self.faults.is_full:
            self.was_full = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        dies = self.acts("punch" if mode else "allocate", file.name, offset, length)
        if mode:
            self.disk.punch(file, fd, offset, length)
        elif offset + length > os.fstat(fd).st_size:
            self.disk.truncate(file, fd, offset + length)
        if dies:
            raise Killed

    # --- the rest of the world -----------------------------------------------------------------------------------

    def run_group(self, *arguments: Any) -> Any:
        """See meta.group_commit: a commit is whole and durable when it returns, and lost as a whole before that."""
        dies = self.counts("commit", len(arguments[2]))  # no rest: the caller holds a lock
        outcome = _RUN_GROUP(*arguments)
        self.unsaid.clear()  # without a journal the word is in the metadata
        if dies or self.counts("committed", outcome[1]):
            assert self.loop is not None
            self.loop.is_dead = True
            raise Killed
        return outcome

    def open_lmdb(self, *arguments: Any, **more: Any) -> Any:
        """See lmdb.open; nothing here needs its syncs, since the process does not really die."""
        self.check_alive()
        environment = _OPEN_LMDB(*arguments, **{**more, "sync": False, "metasync": False})
        self._environments.append(environment)
        return environment

    def identity_of(self, directory: Path) -> PageCacheIdentity:
        """See pool.identity."""
        return _Identity(f"boot {self.boot}", directory.stat().st_dev, 1)


def _branch_of(file: SimFile) -> int:
    return int(Path(file.name).name.replace(".", "-").partition("-")[0], 16)


def _is_being_made(file: SimFile, fd: int) -> bool:
    """Tell whether a file is a journal without any frame yet; another one's sync may have kept its name already."""
    return file.name.startswith("journal/") and not any(os.pread(fd, BLOCK_BYTES, FRAMES_AT_BYTES))


class _Identity(PageCacheIdentity):
    """One that is the same on every filesystem that the simulation may run on."""

    def digest(self) -> str:
        return self.boot_id
