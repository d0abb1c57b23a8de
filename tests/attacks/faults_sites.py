"""Which call can fail how: the cells of the attack, in a fixed order. Pure."""

import errno
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SHORT = "SHORT"
"""The call does a part of its work, and says so."""
ONCE, ALWAYS = "once", "always"
INTERRUPTIONS = 100
"""So often in a row is "always" for EINTR: no kernel interrupts a call for ever, and it is to be tried until then."""


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """A kind of system call on a kind of file."""

    files: str
    """data, journal, label, device (its top directory), folder (in it), metadata, state (its directories), lock.

    Or copy (of the metadata), copies (their directory); or disk: whatever lies on the devices.
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
        most = INTERRUPTIONS if self.fault == "EINTR" else 1 << 30
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
CHANGES = frozenset({"create", "fill", "write", "sync", "allocate", "zero", "punch", "truncate", "unlink", "rename"})

_Table = tuple[tuple[str, str, tuple[str, ...], int], ...]
# What can fail, how, and how many of its calls are tried one by one.
_TABLE: _Table = (
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


_FURTHER_TABLE: _Table = (
    ("data", "truncate", ("ENOSPC",), 6),
    ("metadata", "read", ("EIO", "ENOMEM", SHORT), 2),
    ("copy", "create", _CREATE, 4),
    ("copy", "fill", _SPACE[:3], 4),
    ("copy", "sync", _SYNC, 4),
    ("copy", "read", ("EIO", "ENOMEM", SHORT), 4),
    ("copy", "rename", _CHANGE, 4),
    ("copy", "unlink", ("EIO",), 3),
    ("copy", "close", ("EIO",), 4),
    ("copies", "open", _OPEN, 4),
    ("copies", "list", _OPEN, 4),
    ("copies", "sync", _CHANGE, 4),
    ("copies", "close", ("EIO",), 2),
)


def first_cells() -> list[Cell]:
    """Return the cells that come first; mixed, always in the same way, so that any few in a row are of many kinds."""
    disks = [Cell(DISK_CHANGE, fault, ALWAYS, nth) for fault in ("EIO", "ENOSPC") for nth in range(1, 150, 5)]
    return _mixed([*_cells(_TABLE), *disks, *_traced_cells()])


def further_cells() -> list[Cell]:
    """Return the others, mixed likewise: a list of its own, so that the seeds of the first stay theirs."""
    return _mixed([*_cells(_FURTHER_TABLE), *_further_traced_cells()])


def _mixed(cells: list[Cell]) -> list[Cell]:
    random.Random(1).shuffle(cells)
    return cells


def _cells(table: _Table) -> Iterator[Cell]:
    for files, call, faults, calls in table:
        yield from _each(Site(files, call), faults, range(1, calls + 1))


def _each(site: Site, faults: Sequence[str], nths: Sequence[int], hows: Sequence[str] = (ONCE, ALWAYS)) -> list[Cell]:
    return [Cell(site, fault, how, nth) for fault in faults for how in hows for nth in nths]


_LMDB_NTH = (1, 4, 14)
_TRACED = frozenset({"lmdb", "lmdb-lock", "data-file", "journal-file", "copy-file", "copies-list"})
_ENGINE_CALLS = (
    ("data-file", ("openat", "pwrite64", "preadv2", "fdatasync", "fallocate", "ftruncate")),
    ("journal-file", ("openat", "pwrite64", "fdatasync")),
)


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
    for files, calls in _ENGINE_CALLS:
        for call in calls:
            yield Cell(Site(files, call), "EINTR", ONCE, 1)


# strace counts the calls of each thread by itself, so these come again in the next thread that makes so many.
# Of the six openings of data.mdb in a start: the first look at it, LMDB's two, the metadata reserve's.
_LMDB_OPENINGS = (1, 4, 5, 6)


def _further_traced_cells() -> Iterator[Cell]:
    yield from _each(Site("lmdb", "openat"), ("EIO", "ENOSPC", "EMFILE"), _LMDB_OPENINGS)
    yield from _each(Site("lmdb", "openat"), ("ENOMEM",), _LMDB_OPENINGS[1:])
    yield from _each(Site("lmdb-lock", "openat"), ("EIO", "ENOSPC", "EMFILE"), (1,))
    yield from _each(Site("lmdb", "pread64"), ("EIO", "ENOMEM"), (1, 2, 3))
    yield from _each(Site("lmdb", "read"), ("EIO",), (1,))
    for call in ("pwrite64", "writev", "fdatasync"):
        yield from _each(Site("lmdb", call), ("ENOMEM",), (1, 4))
        yield from _each(Site("lmdb", call), ("EINTR",), (1, 4), (ALWAYS,))
        if call != "fdatasync":
            yield Cell(Site("lmdb", call), SHORT, ALWAYS, 2)
    for files, calls in _ENGINE_CALLS:
        for call in calls:
            yield Cell(Site(files, call), "EINTR", ALWAYS, 1)
            if call != "ftruncate":  # no thread does it twice
                yield from _each(Site(files, call), ("EINTR",), (2 if call == "fdatasync" else 4,))
    # No SHORT for these two: strace would have what was "written" missing in the file, behind everybody's back.
    # LMDB writes each copy in a new thread, and strace counts by threads: each first write is every one.
    yield from _each(Site("copy-file", "write"), ("EIO", "ENOSPC", "ENOMEM", "EINTR"), (1,), (ALWAYS,))
    for call in ("openat", "fsync", "rename"):
        yield from _each(Site("copy-file", call), ("EINTR",), (1,))
    for call, faults in (("openat", _CREATE), ("write", _CHANGE), ("fsync", _CHANGE), ("rename", ("EIO",))):
        yield from _each(Site("copies-list", call), (*faults, "EINTR"), (2,))  # there is a list already
