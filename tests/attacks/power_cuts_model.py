"""What a pool must hold after a power cut: which writes, snapshots and volumes were promised, and since when. Pure.

Every write has a number, and its content tells it: what a sector holds names the write that it came from. The promise,
sector by sector (I3): what the newest write left that was replied to before the newest acknowledged flush was asked
for, or what any later write left; nothing else, and no mixture but those that the kernel makes (``_is_torn``). A
snapshot holds what was replied to before it was asked for, where nothing was written meanwhile (I5).

The clock is the harness's own: any number that never falls. A state of the disk has a place on it too, ``at``: what was
answered by then must be there, what was asked for since cannot.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from zlib import crc32

SECTOR_BYTES = 512
NEVER = 1 << 62
Allowed = list[tuple[int, ...]]
"""For each sector the numbers of the writes whose content it may hold; 0 is zeros."""
_STAMP = struct.Struct("=QQ")


@lru_cache(1 << 16)
def sector_content(number: int, sector: int) -> bytes:
    """Return what write ``number`` puts into a sector."""
    return _STAMP.pack(number, sector) * (SECTOR_BYTES // _STAMP.size) if number else bytes(SECTOR_BYTES)


def content(number: int, first: int, count: int) -> bytes:
    """Return what write ``number`` puts into ``count`` sectors from ``first`` on."""
    return b"".join([sector_content(number, sector) for sector in range(first, first + count)])


def writers(data: bytes) -> list[int]:
    """Return for each sector the number of the write that it is of; of what is of none a number of its own, below 0."""
    numbers = list(memoryview(data).cast("Q")[:: SECTOR_BYTES // 8])
    if data == b"".join([sector_content(number, sector) for sector, number in enumerate(numbers)]):
        return numbers
    found = []
    for sector, number in enumerate(numbers):
        held = _sector(data, sector)
        found.append(number if held == sector_content(number, sector) else ~crc32(held))
    return found


def _sector(data: bytes, sector: int) -> bytes:
    return data[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES]


def _is_torn(held: bytes, sector: int, allowed: Sequence[int]) -> bool:
    """Tell whether a sector has parts of several contents that it may have, each in its place.

    Linux does not hold a page still while it writes it back, unless the device asks for that (``stable_writes``): where
    a sector is written again meanwhile, the disk may take a part of each. Two threads that write and sync one file
    have one such sector in 900 logged on XFS, and one in 4,700 on ext4, with nothing of ours.
    """
    stamps = {(number, sector if number else 0) for number in allowed if number >= 0}
    return all(stamp in stamps for stamp in _STAMP.iter_unpack(held))


def judge(what: str, data: bytes, allowed: Allowed) -> str:
    """Return how ``data`` breaks the promise; empty: it keeps it."""
    if len(data) != len(allowed) * SECTOR_BYTES:
        return f"{what} has {len(data)} bytes instead of {len(allowed) * SECTOR_BYTES}"
    found = writers(data)
    wrong = [
        sector
        for sector, number in enumerate(found)
        if number not in allowed[sector] and not _is_torn(_sector(data, sector), sector, allowed[sector])
    ]
    if not wrong:
        return ""
    first = wrong[0]
    may_hold = f"may hold {' or '.join(map(_told, allowed[first]))} ({len(wrong)} sectors are wrong)"
    if found[first] < 0:
        stamps = dict.fromkeys(_STAMP.iter_unpack(_sector(data, first)))
        held = ", ".join(f"write {number} of sector {sector}" for number, sector in stamps)
        return f"sector {first} of {what} is a mixture, or somebody else's: {held}; it {may_hold}"
    return f"sector {first} of {what} holds {_told(found[first])}, and {may_hold}"


def _told(number: int) -> str:
    return f"write {number}" if number > 0 else "zeros" if number == 0 else "what it held when it was read before"


@dataclass(slots=True)
class Span:
    """Something that was asked for, and perhaps answered."""

    asked: int
    answered: int = NEVER

    def must_hold(self, at: int) -> bool:
        """Tell whether it had been answered."""
        return self.answered <= at

    def may_hold(self, at: int) -> bool:
        """Tell whether it had been asked for."""
        return self.asked < at


@dataclass(slots=True)
class Lifetime:
    """When a volume or a snapshot came, and went."""

    made: Span
    removed: Span | None = None

    def must_be(self, at: int) -> bool:
        """Tell whether it has to be there."""
        return self.made.must_hold(at) and not (self.removed is not None and self.removed.may_hold(at))

    def may_be(self, at: int) -> bool:
        """Tell whether it can be there."""
        return self.made.may_hold(at) and not (self.removed is not None and self.removed.must_hold(at))


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment of a volume: everything numbered below ``number`` has been replied to, but for ``unanswered``."""

    number: int
    unanswered: frozenset[int] = frozenset()

    def covers(self, number: int) -> bool:
        """Tell whether a write had been replied to."""
        return number < self.number and number not in self.unanswered


class VolumeModel:
    """One volume: what was written to it, and what was flushed. Writes in flight never overlap."""

    def __init__(self, name: str, base: Allowed, life: Lifetime) -> None:
        self.name = name
        self.life = life
        self._base = base
        self._chains: list[list[tuple[int, int]]] = [[] for _ in base]
        self._unanswered: set[int] = set()
        self._flushed: list[tuple[int, Mark]] = []
        self._known: dict[Mark | None, Allowed] = {}

    @property
    def sectors(self) -> int:
        """Its size."""
        return len(self._base)

    def begin(self, number: int, first: int, values: Iterable[int]) -> None:
        """Note that a write was sent: one value for each sector from ``first`` on."""
        for sector, value in enumerate(values, first):
            self._chains[sector].append((number, value))
        self._unanswered.add(number)
        self._known.clear()

    def answered(self, number: int) -> None:
        """Note that it was replied to."""
        self._unanswered.discard(number)

    def mark(self, number: int) -> Mark:
        """Return this moment; ``number`` is the next write's."""
        return Mark(number, frozenset(self._unanswered))

    def flushed(self, mark: Mark, at: int) -> None:
        """Note that a flush that was asked for at ``mark`` was acknowledged."""
        self._flushed.append((at, mark))

    def promises(self) -> list[int]:
        """Return when flushes were acknowledged."""
        return [at for at, _ in self._flushed]

    def promised(self, at: int) -> Mark | None:
        """Return up to where everything was promised."""
        marks = [mark for flushed_at, mark in self._flushed if flushed_at <= at]
        return max(marks, key=lambda mark: mark.number, default=None)

    def allowed(self, at: int) -> Allowed:
        """Return what each sector may hold in a state of the disk."""
        mark = self.promised(at)
        if mark not in self._known:
            self._known[mark] = self.window(mark)
        return self._known[mark]

    def window(self, mark: Mark | None, until: int = NEVER) -> Allowed:
        """Return what each sector may hold that has all that ``mark`` covers and perhaps what came up to ``until``."""
        allowed: Allowed = []
        for base, chain in zip(self._base, self._chains, strict=True):
            values = base
            for number, value in chain:
                if number >= until:
                    break
                values = (value,) if mark is not None and mark.covers(number) else (*values, value)
            allowed.append(values)
        return allowed

    def found(self, values: Sequence[int]) -> None:
        """Note what it holds after a restart: the past is settled."""
        self._base = [(value,) for value in values]
        self._chains = [[] for _ in values]
        self._unanswered.clear()
        self._flushed.clear()
        self._known.clear()


@dataclass(slots=True)
class SnapshotModel:
    """One snapshot."""

    volume: VolumeModel
    name: str
    mark: Mark
    """When it was asked for."""
    life: Lifetime
    until: int = NEVER
    """The number of the first write after its answer."""
    holds: Allowed = field(default_factory=list)
    """What each of its sectors may hold, once it was answered."""

    @property
    def export(self) -> str:
        """Its name as NBD and the API know it."""
        return f"{self.volume.name}@{self.name}"

    def allowed(self) -> Allowed:
        """Return what each of its sectors may hold."""
        return self.holds or self.volume.window(self.mark, self.until)

    def answered(self, number: int) -> None:
        """Note that it was taken before write ``number`` was sent."""
        self.until = number
        self.holds = self.volume.window(self.mark, number)

    def found(self, values: Sequence[int]) -> None:
        """Note what it holds: that never changes again."""
        self.holds = [(value,) for value in values]


class PoolModel:
    """All volumes and snapshots of a pool. ``clock`` tells the time."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self.clock = clock
        self.volumes: dict[str, VolumeModel] = {}
        self.snapshots: dict[str, SnapshotModel] = {}
        """By export name."""
        self._number = 0

    def number(self) -> int:
        """Return the number of the next write, or part of a name: never the same twice."""
        self._number += 1
        return self._number

    def add_volume(self, name: str, base: Allowed) -> VolumeModel:
        """Note that a volume was asked for; its ``life.made.answered`` is the caller's to set."""
        volume = self.volumes[name] = VolumeModel(name, base, Lifetime(Span(self.clock())))
        return volume

    def add_snapshot(self, volume: VolumeModel, name: str) -> SnapshotModel:
        """Note that a snapshot was asked for; the caller notes the answer."""
        made = SnapshotModel(volume, name, volume.mark(self.number()), Lifetime(Span(self.clock())))
        self.snapshots[made.export] = made
        return made

    def misses(self, volumes: Iterable[str], snapshots: Iterable[str], at: int) -> Iterator[str]:
        """Tell what should be among what there is and is not, and what is and should not."""
        for kind, here, known in (
            ("volume", set(volumes), {name: each.life for name, each in self.volumes.items()}),
            ("snapshot", set(snapshots), {name: each.life for name, each in self.snapshots.items()}),
        ):
            for name, life in known.items():
                if name not in here and life.must_be(at):
                    yield f"{kind} {name} was acknowledged and is gone"
            for name in sorted(here):
                if name not in known or not known[name].may_be(at):
                    yield f"{kind} {name} is there, and was deleted or never asked for"

    def settle(self, volumes: dict[str, list[int]], snapshots: dict[str, list[int]], now: int) -> None:
        """Note what was found after a restart: the past is settled, and was answered by ``now``."""
        self.snapshots = {name: each for name, each in self.snapshots.items() if name in snapshots}
        self.volumes = {name: each for name, each in self.volumes.items() if name in volumes}
        for name, snapshot in self.snapshots.items():
            snapshot.found(snapshots[name])
            snapshot.life = Lifetime(Span(snapshot.life.made.asked, min(snapshot.life.made.answered, now)))
        for name, volume in self.volumes.items():
            volume.found(volumes[name])
            volume.life = Lifetime(Span(volume.life.made.asked, min(volume.life.made.answered, now)))
