"""What volumes and snapshots must hold, and what is asked of them next. Pure: a seed in, operations out."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from blockvirt.limits import LEAF_CHUNKS, SECTOR_BYTES
from blockvirt.nbd.constants import CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE

CHUNK_BYTES = 4096  # the smallest: so that ranges cross many chunks and leaves
LEAF_BYTES = LEAF_CHUNKS * CHUNK_BYTES
_SMALLEST_BYTES, _LARGEST_BYTES = LEAF_BYTES + LEAF_BYTES // 4, 3 * LEAF_BYTES
_FULL_BYTES = 4 * LEAF_BYTES  # nothing grows beyond


class Kind(StrEnum):
    """What a request asks for."""

    READ = "reads"
    WRITE = "writes"
    ZERO = "zeroes"
    TRIM = "trims"
    FLUSH = "flushes"
    STATUS = "block statuses"


@dataclass(frozen=True, slots=True)
class Op:
    """One request to a volume."""

    volume: str
    kind: Kind
    offset: int
    length: int
    flags: int = 0
    data: bytes = b""
    """What is written, or must be read; for a block status what the range holds."""
    under: bytes = b""
    """What its range held before, if it changes anything."""

    def overlaps(self, other: "Op") -> bool:
        """Tell whether the order of the two matters."""
        if self.volume != other.volume or (self.reads and other.reads):
            return False
        return self.offset < other.offset + other.length and other.offset < self.offset + self.length

    @property
    def reads(self) -> bool:
        """Whether it changes nothing."""
        return self.kind in (Kind.READ, Kind.STATUS, Kind.FLUSH) or self.refused

    @property
    def refused(self) -> bool:
        """Whether the server must answer that this is not supported: zeroes that allocate are never fast."""
        fast = CMD_FLAG_FAST_ZERO | CMD_FLAG_NO_HOLE
        return self.kind is Kind.ZERO and self.flags & fast == fast

    @property
    def after(self) -> bytes:
        """What its range holds afterwards, if it changes anything."""
        return self.data if self.kind is Kind.WRITE else bytes(self.length)


@dataclass(slots=True)
class World:
    """The volumes and snapshots of a history, with their bytes."""

    volumes: dict[str, bytearray] = field(default_factory=dict)
    snapshots: dict[str, bytes] = field(default_factory=dict)
    """By VOLUME@NAME."""

    def snapshots_of(self, volume: str) -> list[str]:
        """Return the names, with their volume's, in the order in which they were taken."""
        return [name for name in self.snapshots if name.startswith(f"{volume}@")]


def new_size(chance: random.Random) -> int:
    """Return a size of a volume: some leaves, never whole ones, rarely whole chunks."""
    return chance.randrange(_SMALLEST_BYTES, _LARGEST_BYTES) // SECTOR_BYTES * SECTOR_BYTES


def grown(chance: random.Random, size_bytes: int) -> int:
    """Return a larger size, or the same where it is large enough."""
    more = chance.choice((SECTOR_BYTES, CHUNK_BYTES, chance.randrange(LEAF_BYTES) // SECTOR_BYTES * SECTOR_BYTES))
    return min(_FULL_BYTES, size_bytes + more)


def next_op(chance: random.Random, world: World) -> Op:
    """Return a request to one of the volumes, and change the model as it changes the volume."""
    volume = chance.choice(list(world.volumes))
    content = world.volumes[volume]
    kind = chance.choices(list(Kind), (24, 42, 15, 12, 3, 4))[0]
    if kind is Kind.FLUSH:
        return Op(volume, kind, 0, 0)
    offset, length = a_range(chance, len(content))
    stop = offset + length
    if kind in (Kind.READ, Kind.STATUS):
        return Op(volume, kind, offset, length, data=bytes(content[offset:stop]))
    flags = CMD_FLAG_FUA if chance.random() < 0.04 else 0
    if kind is Kind.ZERO:
        flags |= chance.choice((0, CMD_FLAG_NO_HOLE)) | chance.choice((0, 0, CMD_FLAG_FAST_ZERO))
    data = chance.randbytes(length) if kind is Kind.WRITE else b""
    op = Op(volume, kind, offset, length, flags, data, bytes(content[offset:stop]))
    if not op.refused:
        content[offset:stop] = op.after
    return op


def a_range(chance: random.Random, size_bytes: int) -> tuple[int, int]:
    """Return (offset, length): odd ones mostly, and often where something ends or begins."""
    offset, length = chance.choices(_RANGES, (30, 30, 15, 15, 8, 2))[0](chance, size_bytes)
    offset = min(max(0, offset), size_bytes - 1)
    return offset, max(1, min(length, size_bytes - offset))


def _hot(chance: random.Random, size_bytes: int) -> tuple[int, int]:
    return chance.randrange(16 * CHUNK_BYTES), chance.randrange(1, 3 * CHUNK_BYTES)


def _anywhere(chance: random.Random, size_bytes: int) -> tuple[int, int]:
    return chance.randrange(size_bytes), chance.randrange(1, 6 * CHUNK_BYTES)


def _whole_chunks(chance: random.Random, size_bytes: int) -> tuple[int, int]:
    return chance.randrange(size_bytes // CHUNK_BYTES) * CHUNK_BYTES, chance.randrange(1, 12) * CHUNK_BYTES


def _over_a_leaf(chance: random.Random, size_bytes: int) -> tuple[int, int]:
    border = chance.randrange(1, size_bytes // LEAF_BYTES + 1) * LEAF_BYTES
    before = chance.choice((1, CHUNK_BYTES, chance.randrange(1, 4 * CHUNK_BYTES)))
    return border - before, before + chance.choice((1, CHUNK_BYTES, chance.randrange(1, 8 * CHUNK_BYTES)))


def _at_the_end(chance: random.Random, size_bytes: int) -> tuple[int, int]:
    length = chance.randrange(1, 3 * CHUNK_BYTES)
    return size_bytes - length, length - chance.choice((0, 0, 1, chance.randrange(length)))


def _long(chance: random.Random, size_bytes: int) -> tuple[int, int]:
    return chance.randrange(size_bytes), chance.randrange(1, LEAF_BYTES // 2)


_RANGES: tuple[Callable[[random.Random, int], tuple[int, int]], ...] = (
    _hot,
    _anywhere,
    _whole_chunks,
    _over_a_leaf,
    _at_the_end,
    _long,
)


def first_difference(expected: "bytes | bytearray", found: "bytes | bytearray", offset: int = 0) -> str:
    """Say where two contents differ first; empty: nowhere."""
    if expected == found:
        return ""
    if len(expected) != len(found):
        return f"{len(found)} bytes instead of {len(expected)}"
    at = next(place for place in range(len(expected)) if expected[place] != found[place])
    byte = offset + at
    differing = sum(left != right for left, right in zip(expected, found, strict=True))
    return (
        f"byte {byte} (leaf {byte // LEAF_BYTES}, chunk {byte // CHUNK_BYTES}, byte {byte % CHUNK_BYTES} of it) is "
        f"{found[at : at + 8].hex()}, must be {expected[at : at + 8].hex()}; {differing} bytes differ"
    )


def outside(changes: "list[tuple[int, int, bool]]", old: bytes, new: "bytes | bytearray") -> str:
    """Say what two images differ in that a list of changed blocks leaves out, or calls zero; empty: nothing.

    ``changes`` are (offset, length, reads as zeros now). An image that is smaller goes on with zeros.
    """
    was = old.ljust(len(new), b"\0")
    at = 0
    for offset, length, zero in [*changes, (len(new), 0, False)]:
        if different := first_difference(was[at:offset], new[at:offset], at):
            return f"is not listed as changed: {different} (expected: as before)"
        if zero and any(new[offset : offset + length]):
            return f"bytes {offset} to {offset + length} are listed as zeros and are none"
        at = offset + length
    return ""


@dataclass(slots=True)
class Instant:
    """What a snapshot may hold that is taken while requests are in flight."""

    before: bytes
    """What was replied to when it was asked for, with nothing of what was in flight."""
    open_ops: list[Op]
    """What was in flight then or was sent before the answer, in order: each is in it or not, chunk by chunk."""

    def difference(self, found: bytes) -> str:
        """Say what a snapshot holds that it may not; empty: nothing."""
        if len(found) != len(self.before):
            return f"{len(found)} bytes instead of {len(self.before)}"
        cuts = {0, len(found)}
        for op in self.open_ops:
            cuts |= {op.offset, op.offset + op.length}
            cuts |= set(range(op.offset // CHUNK_BYTES * CHUNK_BYTES, op.offset + op.length, CHUNK_BYTES))
        places = sorted(cut for cut in cuts if cut <= len(found))
        for start, stop in pairwise(places):
            allowed = [self.before[start:stop]]
            allowed += [
                op.after[start - op.offset : stop - op.offset]
                for op in self.open_ops
                if op.offset <= start and stop <= op.offset + op.length
            ]
            if found[start:stop] not in allowed:
                return first_difference(allowed[0], found[start:stop], start) + f"; {len(allowed)} contents are allowed"
        return ""
