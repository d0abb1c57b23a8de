"""A disk under real files: it remembers what was not synced, and at a power cut makes one of the states that are legal.

The files themselves are the page cache. Beside them lie, for each sector that was changed since the last sync of its
file, the contents that it has had: at a power cut the disk may hold any of them (writes are lost, reordered and torn at
sectors). Changes of a file's metadata (size, holes) survive in their order, up to some moment; so do the names in a
directory. What a failed sync could not write stays in the page cache as if it were clean, and no later sync writes it.
"""

import os
import random
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

SECTOR = 512
_ZERO = bytes(SECTOR)
_ZEROS = bytes(1 << 16)


class Loss(Enum):
    """What of the unsynced writes a power cut takes."""

    ALL = "all"
    NOTHING = "nothing"
    SOME = "some"


@dataclass(frozen=True, slots=True)
class _Version:
    """A content of a sector."""

    moment: int
    content: bytes
    is_metadata: bool = False
    """It came from a truncation or a punch: that is on the disk with the other metadata of its time."""


@dataclass(slots=True, eq=False)
class SimFile:
    """One file, under whatever name."""

    path: str
    name: str
    """As the trace calls it."""
    versions: dict[int, list[_Version]] = field(default_factory=dict)
    """By sector: what the disk may hold, the oldest first, the page cache's last; synced sectors are not here."""
    stale: dict[int, bytes] = field(default_factory=dict)
    """What the disk holds of sectors that a failed sync left clean."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(moment, size) since the last sync, with the one before that first; empty: synced."""

    def moments(self) -> list[int]:
        """Return the moments up to which its metadata may have survived."""
        found = {version.moment for kept in self.versions.values() for version in kept if version.is_metadata}
        return [0, *sorted(found | {moment for moment, _ in self.sizes})]


@dataclass(slots=True)
class _Entry:
    """A change of a directory that was not synced yet."""

    moment: int
    file: SimFile
    path: str
    is_creation: bool
    aside: str = ""
    """Where a file that was removed is kept, until that is durable."""


class Disk:
    """All files under one device."""

    def __init__(self, root: Path, dice: random.Random) -> None:
        self.root = root
        self.dice = dice
        self.files: dict[str, SimFile] = {}
        self.entries: dict[str, list[_Entry]] = {}
        """By directory."""
        self.figures = {"sectors lost": 0, "sectors torn away": 0, "names lost": 0}
        self._moment = 0
        self._aside = root.parent / "aside"
        self._aside.mkdir(exist_ok=True)

    def file(self, path: str) -> SimFile:
        """Return what is known of the file that has a path now."""
        found = self.files.get(path)
        if found is None:
            found = self.files[path] = SimFile(path, os.path.relpath(path, self.root))
        return found

    def tick(self) -> int:
        """Return the next moment."""
        self._moment += 1
        return self._moment

    # --- directories ---------------------------------------------------------------------------------------------

    def created(self, path: str) -> SimFile:
        """Note that a file was made."""
        file = self.file(path)
        self.entries.setdefault(os.path.dirname(path), []).append(_Entry(self.tick(), file, path, is_creation=True))
        return file

    def unlink(self, path: str) -> None:
        """Remove a name; raises FileNotFoundError. The file is kept until that is durable."""
        moment = self.tick()
        aside = str(self._aside / str(moment))
        os.rename(path, aside)
        file = self.file(path)
        del self.files[path]
        file.path = aside
        entry = _Entry(moment, file, path, is_creation=False, aside=aside)
        self.entries.setdefault(os.path.dirname(path), []).append(entry)

    def directory_synced(self, path: str, upto: int) -> None:
        """Note that a sync of a directory that began at the moment ``upto`` has succeeded."""
        left = []
        for entry in self.entries.pop(path, []):
            if entry.moment > upto:
                left.append(entry)
            elif entry.aside:
                os.unlink(entry.aside)
        if left:
            self.entries[path] = left

    def is_new(self, file: SimFile) -> bool:
        """Tell whether a file could be gone after a power cut."""
        return any(entry.file is file for entries in self.entries.values() for entry in entries)

    # --- content -------------------------------------------------------------------------------------------------

    def write(self, file: SimFile, fd: int, data: bytes, offset: int) -> int:
        """Write into the page cache; returns how much."""
        first, last = offset // SECTOR, (offset + len(data) - 1) // SECTOR
        start, length = first * SECTOR, (last - first + 1) * SECTOR
        size = os.fstat(fd).st_size
        before = _REAL_PREAD(fd, length, start).ljust(length, b"\0")
        done = _REAL_PWRITE(fd, data, offset)
        after = _REAL_PREAD(fd, length, start).ljust(length, b"\0")
        moment = self.tick()
        for sector in range(first, last + 1):
            at = (sector - first) * SECTOR
            self._changed(file, sector, before[at : at + SECTOR], _Version(moment, after[at : at + SECTOR]))
        if offset + done > size:
            self._resized(file, size, offset + done)
        return done

    def _changed(self, file: SimFile, sector: int, before: bytes, version: _Version) -> None:
        kept = file.versions.get(sector)
        if kept is None:
            kept = file.versions[sector] = [_Version(0, file.stale.pop(sector, before))]
        kept.append(version)

    def _resized(self, file: SimFile, before: int, after: int) -> None:
        if not file.sizes:
            file.sizes.append((0, before))
        file.sizes.append((self.tick(), after))

    def truncate(self, file: SimFile, fd: int, size: int) -> None:
        """Set the file's size."""
        before = os.fstat(fd).st_size
        if size < before:
            self._cleared(file, fd, size, before)
        _REAL_FTRUNCATE(fd, size)
        if size != before:
            self._resized(file, before, size)

    def punch(self, file: SimFile, fd: int, offset: int, length: int) -> None:
        """Make a range read as zeros, without writing to it."""
        end = min(offset + length, os.fstat(fd).st_size)
        if offset < end:
            self._cleared(file, fd, offset, end)

    def _cleared(self, file: SimFile, fd: int, start: int, end: int) -> None:
        """Note that a range, from a whole sector on, becomes zeros by a change of metadata; and write them."""
        moment = self.tick()
        touched = {sector for sector in (*file.versions, *file.stale) if start <= sector * SECTOR < end}
        while start < end:
            length = min(len(_ZEROS), end - start)
            content = _REAL_PREAD(fd, length, start)
            if content != _ZEROS[: len(content)]:
                first = start // SECTOR
                touched |= {first + at for at in range(-(-len(content) // SECTOR)) if _sector(content, at) != _ZERO}
            start += length
        for sector in sorted(touched):
            old = _REAL_PREAD(fd, SECTOR, sector * SECTOR).ljust(SECTOR, b"\0")
            self._changed(file, sector, old, _Version(moment, _ZERO, is_metadata=True))
            _REAL_PWRITE(fd, _ZERO, sector * SECTOR)

    def synced(self, file: SimFile, upto: int) -> None:
        """Note that a sync that began at the moment ``upto`` has succeeded: nothing before that can be lost."""
        for sector, kept in list(file.versions.items()):
            newest = max(place for place, version in enumerate(kept) if not place or version.moment <= upto)
            if newest == len(kept) - 1:
                del file.versions[sector]
            else:
                file.versions[sector] = [_Version(0, kept[newest].content), *kept[newest + 1 :]]
        if file.sizes:
            newest = max(place for place, (moment, _) in enumerate(file.sizes) if not place or moment <= upto)
            file.sizes = [(0, file.sizes[newest][1]), *file.sizes[newest + 1 :]]
            if len(file.sizes) == 1:
                file.sizes = []

    def sync_failed(self, file: SimFile) -> None:
        """Have a sync fail as Linux does: what it could not write is lost, and clean. Metadata is another matter."""
        for sector, kept in file.versions.items():
            newest = max(place for place, version in enumerate(kept) if not place or version.is_metadata)
            chosen = self.dice.choice(kept[newest:]).content
            if chosen != kept[-1].content:
                file.stale[sector] = chosen
        file.versions.clear()

    def forget_cached(self, file: SimFile, fd: int) -> None:
        """Drop the clean pages: what is read from now on is what the disk holds."""
        for sector, content in sorted(file.stale.items()):
            _overwrite(fd, sector, content)
        file.stale.clear()

    # --- the power cut -------------------------------------------------------------------------------------------

    def cut_power(self) -> Loss:
        """Turn every file into what the disk may hold now; returns in which mood."""
        loss = self.dice.choice((Loss.ALL, Loss.NOTHING, Loss.SOME, Loss.SOME, Loss.SOME))
        for folder in sorted(self.entries):
            self._cut_names(self.entries[folder], loss)
        self.entries.clear()
        for path in sorted(self.files):
            self._cut_file(self.files[path], loss)
        return loss

    def _cut_names(self, entries: list[_Entry], loss: Loss) -> None:
        kept = {Loss.ALL: 0, Loss.NOTHING: len(entries), Loss.SOME: self.dice.randrange(len(entries) + 1)}[loss]
        for entry in reversed(entries[kept:]):
            self.figures["names lost"] += 1
            if entry.is_creation:
                os.unlink(entry.path)
                del self.files[entry.path]
            else:
                os.rename(entry.aside, entry.path)
                entry.file.path = entry.path
                self.files[entry.path] = entry.file
        for entry in entries[:kept]:
            if entry.aside:
                os.unlink(entry.aside)

    def _cut_file(self, file: SimFile, loss: Loss) -> None:
        if not (file.versions or file.stale or file.sizes):
            return
        moments = file.moments()
        upto = {Loss.ALL: 0, Loss.NOTHING: moments[-1], Loss.SOME: self.dice.choice(moments)}[loss]
        favour = self.dice.random()
        with open(file.path, "r+b", buffering=0) as real:
            fd = real.fileno()
            for sector, content in sorted(file.stale.items()):
                _overwrite(fd, sector, content)
            for sector, kept in sorted(file.versions.items()):
                chosen = self._survivor(kept, upto, loss, favour)
                if chosen != kept[-1].content:
                    self.figures["sectors lost" if chosen == kept[0].content else "sectors torn away"] += 1
                    _overwrite(fd, sector, chosen)
            if file.sizes:
                _REAL_FTRUNCATE(fd, next(size for moment, size in reversed(file.sizes) if moment <= upto))
        file.versions.clear()
        file.stale.clear()
        file.sizes.clear()

    def _survivor(self, kept: list[_Version], upto: int, loss: Loss, favour: float) -> bytes:
        done = [place for place, version in enumerate(kept) if version.is_metadata and version.moment <= upto]
        legal = [v for v in kept[done[-1] if done else 0 :] if not v.is_metadata or v.moment <= upto]
        if loss is Loss.ALL:
            return legal[0].content
        if loss is Loss.NOTHING or self.dice.random() < favour:
            return legal[-1].content
        return self.dice.choice(legal).content


_REAL_PREAD, _REAL_PWRITE, _REAL_FTRUNCATE = os.pread, os.pwrite, os.ftruncate


def _sector(content: bytes, number: int) -> bytes:
    return content[number * SECTOR : (number + 1) * SECTOR].ljust(SECTOR, b"\0")


def _overwrite(fd: int, sector: int, content: bytes) -> None:
    size = os.fstat(fd).st_size
    at = sector * SECTOR
    if at + SECTOR > size and content == _ZERO and at >= size:
        return
    _REAL_PWRITE(fd, content, at)
