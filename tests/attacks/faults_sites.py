"""Which call can fail how: the cells of the attack, in a fixed order. Pure."""

import errno
import random
from collections.abc import Iterator
from dataclasses import dataclass

SHORT = "SHORT"
"""The call does a part of its work, and says so."""
ONCE, ALWAYS = "once", "always"


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """A kind of system call on a kind of file."""

    files: str
    """data, journal, label, device (its top directory), folder (in it), metadata, state (its directories), lock.

    Or disk: whatever lies on the devices.
    """
    call: str

    def __str__(self) -> str:
        return f"{self.files}-{self.call}"


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One fault: the ``nth`` call of a site fails; if ``how`` is ALWAYS, so does each later one."""

    site: Site
    fault: str
    """A name of ``errno``, or SHORT."""
    how: str
    nth: int

    @property
    def is_traced(self) -> bool:
        """It takes strace."""
        return self.site.files in _TRACED

    @property
    def number(self) -> int:
        """The error number; 0 for SHORT."""
        return int(getattr(errno, self.fault, 0))

    def fails(self, count: int) -> bool:
        """Tell whether the call number ``count`` fails."""
        # No kernel interrupts one call for ever: "always" is three times in a row there.
        most = 3 if self.fault == "EINTR" else 1 << 30
        return count == self.nth if self.how == ONCE else self.nth <= count < self.nth + most

    def __str__(self) -> str:
        return f"{self.site} number {self.nth} fails with {self.fault} {self.how}"


_OPEN = ("EIO", "ENOMEM", "EMFILE")
_CREATE = (*_OPEN, "ENOSPC")
_SYNC = ("EIO", "ENOSPC", "ENOMEM")
_CHANGE = ("EIO", "ENOSPC")
_SPACE = ("EIO", "ENOSPC", "ENOMEM", "EINTR")

DISK_CHANGE = Site("disk", "change")
"""Every call that changes something on a device, as when the disk dies."""
CHANGES = frozenset({"create", "write", "sync", "allocate", "zero", "punch", "truncate", "unlink", "rename"})

# What can fail, how, and how many of its calls are tried one by one.
_TABLE: tuple[tuple[str, str, tuple[str, ...], int], ...] = (
    ("data", "open", _OPEN, 8),
    ("data", "create", _CREATE, 4),
    ("data", "stat", ("EIO", "ENOMEM"), 6),
    ("data", "truncate", ("EIO", "ENOMEM"), 6),
    ("data", "write", ("EIO", "ENOSPC", "ENOMEM", SHORT), 16),
    ("data", "read", ("EIO", "ENOMEM", SHORT), 12),
    ("data", "look", ("EIO", "ENOMEM", SHORT, "EOPNOTSUPP", "EAGAIN"), 8),
    ("data", "sync", _SYNC, 12),
    ("data", "allocate", _SPACE, 6),
    ("data", "punch", (*_SPACE, "EOPNOTSUPP"), 3),
    ("data", "zero", (*_SPACE, "EOPNOTSUPP"), 2),
    ("data", "advise", ("EIO",), 1),
    ("data", "close", ("EIO",), 6),
    ("data", "unlink", ("EIO",), 2),
    ("journal", "create", _CREATE, 6),
    ("journal", "write", ("EIO", "ENOSPC", "ENOMEM", SHORT), 24),
    ("journal", "sync", _SYNC, 16),
    ("journal", "load", _OPEN, 3),
    ("journal", "close", ("EIO",), 4),
    ("journal", "unlink", ("EIO",), 4),
    ("folder", "open", _OPEN, 8),
    ("folder", "sync", _CHANGE, 8),
    ("folder", "close", ("EIO",), 4),
    ("device", "probe", _OPEN, 4),
    ("device", "open", _OPEN, 8),
    ("device", "stat", ("EIO",), 4),
    ("device", "sync", _CHANGE, 2),
    ("device", "space", ("EIO",), 12),
    ("label", "open", _OPEN, 4),
    ("label", "read", ("EIO",), 3),
    ("label", "create", _CREATE, 2),
    ("label", "write", (*_CHANGE, SHORT), 2),
    ("label", "sync", _CHANGE, 2),
    ("label", "rename", ("EIO",), 2),
    ("metadata", "open", _OPEN, 2),
    ("metadata", "allocate", _SPACE, 2),
    ("state", "open", _OPEN, 2),
    ("state", "sync", _CHANGE, 2),
    ("lock", "create", _OPEN, 2),
    ("lock", "truncate", ("EIO",), 1),
    ("lock", "write", _CHANGE, 2),
)


def all_cells() -> list[Cell]:
    """Return every cell; mixed, always in the same way, so that any few in a row are of many kinds."""
    cells = list(_cells())
    random.Random(1).shuffle(cells)
    return cells


def _cells() -> Iterator[Cell]:
    for files, call, faults, calls in _TABLE:
        for fault in faults:
            for how in (ONCE, ALWAYS):
                for nth in range(1, calls + 1):
                    yield Cell(Site(files, call), fault, how, nth)
    for fault in ("EIO", "ENOSPC"):
        for nth in range(1, 150, 5):
            yield Cell(DISK_CHANGE, fault, ALWAYS, nth)
    yield from _traced_cells()


_LMDB_NTH = (1, 4, 14)
_TRACED = frozenset({"lmdb", "lmdb-lock", "data-file", "journal-file"})


def _traced_cells() -> Iterator[Cell]:
    for call in ("pwrite64", "writev", "fdatasync"):
        for nth in _LMDB_NTH:
            for how in (ONCE, ALWAYS):
                for fault in ("EIO", "ENOSPC"):
                    yield Cell(Site("lmdb", call), fault, how, nth)
        yield Cell(Site("lmdb", call), "EINTR", ONCE, 3)
        if call != "fdatasync":
            yield Cell(Site("lmdb", call), SHORT, ONCE, 2)
    for files, call in (("lmdb", "openat"), ("lmdb", "mmap"), ("lmdb-lock", "openat"), ("lmdb-lock", "mmap")):
        for how in (ONCE, ALWAYS):
            yield Cell(Site(files, call), "ENOMEM", how, 1)
    for files, calls in (
        ("data-file", ("openat", "pwrite64", "preadv2", "fdatasync", "fallocate", "ftruncate")),
        ("journal-file", ("openat", "pwrite64", "fdatasync")),
    ):
        for call in calls:
            yield Cell(Site(files, call), "EINTR", ONCE, 1)
