"""What volumes and snapshots may hold: the promises as a pure model, without a disk or a clock.

A volume is cells of one sector. Each cell keeps the writes that may still be seen in it, with the ticks at which each
began and was answered. A write is out of sight once a later one, which began after it had ended, was answered; it can
come back by a power cut as long as no flush covers that later one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

CELL = 512


class Broken(Exception):
    """A promise was broken: which, and what was found."""


@dataclass(slots=True, eq=False)
class Write:
    """Something that was written to a range: ``stamp`` is in every cell of it, 0 for zeros."""

    stamp: int
    began: int
    ended: int | None = None
    """When it was answered, failed, or its server died; None: it is under way."""
    is_sure: bool = False
    """It was answered: it hides what had ended before it began."""

    def answered(self, tick: int) -> None:
        """Note the reply."""
        self.ended, self.is_sure = tick, True

    def hides(self, other: "Write") -> bool:
        """Tell whether whoever sees this one cannot see ``other`` any more."""
        return self.is_sure and other.ended is not None and other.ended < self.began


ORIGIN = Write(0, -1, -1, True)
"""What a cell holds that was never written to."""


def seen(writes: Iterable[Write], upto: int) -> list[Write]:
    """Return which of a cell's writes may be seen, if those that were answered up to the tick ``upto`` are in force."""
    found = list(writes)
    hidden = max((w.began for w in found if w.is_sure and w.ended is not None and w.ended <= upto), default=-1)
    return [w for w in found if w.ended is None or w.ended >= hidden]


@dataclass(slots=True, eq=False)
class Volume:
    """One volume."""

    name: str
    id: str = ""
    size_cells: int = 0
    cells: dict[int, list[Write]] = field(default_factory=dict)
    flushed: int = 0
    """Everything answered up to this tick survives a power cut."""
    lost_power: bool = False
    """There was a power cut, or a fault that counts as one, since somebody looked."""
    snapshots: dict[str, "Snapshot"] = field(default_factory=dict)
    under_way: dict[Write, None] = field(default_factory=dict)
    looks: list[int] = field(default_factory=list)
    """When those began who look at it now: they may see what was hidden since."""

    def of(self, cell: int) -> list[Write]:
        """Return the writes of a cell."""
        return self.cells.setdefault(cell, [ORIGIN])

    def begin(self, stamp: int, cells: Iterable[int], tick: int) -> Write:
        """Note that a write begins."""
        write = Write(stamp, tick)
        for cell in cells:
            self.of(cell).append(write)
        self.under_way[write] = None
        return write

    def end(self, write: Write, tick: int, *, answered: bool) -> None:
        """Note how a write ended."""
        self.under_way.pop(write, None)
        if answered:
            write.answered(tick)
        else:
            write.ended = tick

    def now(self, cell: int, since: int) -> list[Write]:
        """Return what a read may return that began at the tick ``since`` and ends now."""
        return seen(self.of(cell), since)

    def flush(self, began: int) -> None:
        """Note that a flush was answered that began at a tick."""
        self.flushed = max(self.flushed, began)
        upto = min([self.flushed, *self.looks])
        for cell, writes in self.cells.items():
            if len(writes) > 1:
                self.cells[cell] = seen(writes, upto)

    def died(self, tick: int, *, power: bool) -> None:
        """Note that its server died, with the power or without."""
        for write in self.under_way:
            write.ended = tick
        self.under_way.clear()
        self.looks.clear()
        self.lost_power |= power

    def found(self, content: Mapping[int, int], tick: int) -> None:
        """Compare with what a look shows after the server came back, and go on from there; raises Broken."""
        upto = self.flushed if self.lost_power else tick
        for cell, stamp in content.items():
            may = seen(self.of(cell), upto)
            if all(write.stamp != stamp for write in may):
                why = "what was flushed" if self.lost_power else "what was answered"
                legal = sorted({write.stamp for write in may})
                raise Broken(f"{why} is gone: {self.name} cell {cell} holds {stamp}, may hold {legal}")
            now = Write(stamp, tick, tick, True)
            self.cells[cell] = [now] if self.lost_power else [*seen(self.of(cell), self.flushed), now]
        self.lost_power = False

    def content(self, snapshot: "Snapshot", tick: int) -> None:
        """Become what a snapshot holds (it has been looked at): by a clone or a revert."""
        self.cells = {cell: [Write(stamp, tick, tick, True)] for cell, stamp in snapshot.fixed.items()}
        self.size_cells, self.flushed, self.lost_power = snapshot.size_cells, tick, False


@dataclass(slots=True, eq=False)
class Snapshot:
    """One snapshot: what each cell may hold until somebody looks, and what it holds for ever from then on."""

    name: str
    size_cells: int
    may: dict[int, list[Write]]
    group: "Group"
    fixed: dict[int, int] = field(default_factory=dict)
    is_looked_at: bool = False
    is_going: bool = False
    """Somebody deletes it."""

    def found(self, volume: str, content: Mapping[int, int]) -> None:
        """Compare with what a look shows; raises Broken."""
        if self.is_looked_at:
            for cell, stamp in content.items():
                if self.fixed[cell] != stamp:
                    raise Broken(
                        f"a snapshot changed: {volume}@{self.name} cell {cell} held {self.fixed[cell]}, holds {stamp}"
                    )
            return
        for cell, stamp in content.items():
            writes = self.may.get(cell, [ORIGIN])
            mine = [write for write in seen(writes, self.group.began) if write.stamp == stamp]
            if not mine:
                legal = sorted({write.stamp for write in seen(writes, self.group.began)})
                raise Broken(f"a snapshot is wrong: {volume}@{self.name} cell {cell} holds {stamp}, may hold {legal}")
            if len(mine) == 1:
                self.group.saw(f"{volume}@{self.name} cell {cell}", mine[0], writes)
        self.fixed = dict(content)
        self.is_looked_at = True
        self.may = {}


@dataclass(slots=True, eq=False)
class Group:
    """Snapshots that were asked for together: all of one instant, between ``began`` and the end of the request."""

    began: int
    _newest: tuple[int, str] = (-1, "")
    """The latest beginning of a write that is in it."""
    _oldest: tuple[int, str] = (1 << 62, "")
    """The earliest end of a write that is not."""

    def saw(self, where: str, write: Write, writes: Iterable[Write]) -> None:
        """Note which of a cell's writes is in it; raises Broken where one is missing that had ended before another."""
        self._newest = max(self._newest, (write.began, where))
        missing = [(each.ended, where) for each in writes if each.hides(write) and each.ended is not None]
        self._oldest = min([self._oldest, *missing])
        if self._newest[0] > self._oldest[0]:
            raise Broken(
                f"a snapshot is not of one instant: {self._newest[1]} has a write that began at {self._newest[0]}, "
                f"{self._oldest[1]} lacks one that was answered at {self._oldest[0]}"
            )


def taken(volume: Volume, name: str, group: Group) -> Snapshot:
    """Return the model of a snapshot whose request ends now."""
    may = {cell: seen(writes, group.began) for cell, writes in volume.cells.items()}
    return Snapshot(name, volume.size_cells, may, group)


def packed(stamp: int) -> bytes:
    """Return the content of a cell."""
    return stamp.to_bytes(8, "little") * (CELL // 8)


def unpacked(where: str, content: bytes) -> int:
    """Return what is in a cell; raises Broken where it is not one write's."""
    stamp = int.from_bytes(content[:8], "little")
    if content != packed(stamp):
        raise Broken(f"half a sector of one write and half of another: {where}")
    return stamp
