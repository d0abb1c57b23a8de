"""What a volume may hold after faults: of each block every value that is allowed, by what was answered. Pure.

Blocks are of 512 bytes. What is written into one says which write it was and where it belongs, so that a block in a
wrong place, an old one or half of one is seen as such.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BLOCK_BYTES = 512
_STAMP = struct.Struct("<II")
_REPEATS = BLOCK_BYTES // _STAMP.size
ZEROS = 0
TORN = -1

Allowed = list[tuple[int, ...]]
"""For each block the values that it may have."""


def content(value: int, first: int, count: int) -> bytes:
    """Return what the write ``value`` puts into ``count`` blocks from ``first`` on; 0 is zeros."""
    if value == ZEROS:
        return bytes(count * BLOCK_BYTES)
    return b"".join(_STAMP.pack(value, block) * _REPEATS for block in range(first, first + count))


def values(data: bytes | bytearray) -> list[int]:
    """Return which write each block of a whole volume is from; TORN where it is no whole block, or a misplaced one."""
    found = []
    for block in range(len(data) // BLOCK_BYTES):
        piece = bytes(data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])
        value, where = _STAMP.unpack_from(piece)
        is_zero = not value and not where and not any(piece)
        whole = is_zero or (value and where == block and piece == piece[: _STAMP.size] * _REPEATS)
        found.append(value if whole else TORN)
    return found


@dataclass(slots=True)
class Blocks:
    """One volume: of each block what was tried since it was last known for sure, in order."""

    tries: list[list[tuple[int, bool]]]
    """(value, it was answered); the first is what the block had for sure."""

    @classmethod
    def zeros(cls, count: int) -> "Blocks":
        """A new volume."""
        return cls([[(ZEROS, True)] for _ in range(count)])

    @classmethod
    def of(cls, allowed: Allowed) -> "Blocks":
        """A clone of what a snapshot may hold."""
        return cls([[(value, place == 0) for place, value in enumerate(each)] for each in allowed])

    def wrote(self, first: int, count: int, value: int, *, answered: bool) -> None:
        """Note a write, answered or refused: what was refused may be there or not, in any part."""
        for block in range(first, first + count):
            self.tries[block].append((value, answered))

    def flushed(self) -> None:
        """Note that what was answered is durable."""
        self.tries = [each[_last_answered(each) :] for each in self.tries]

    def allowed(self) -> Allowed:
        """What may be read: the last that was answered, and what was refused since."""
        return [tuple(dict.fromkeys(value for value, _ in each[_last_answered(each) :])) for each in self.tries]

    def allowed_after_cut(self) -> Allowed:
        """What may be read after a power cut, or when a stopped volume was reopened: all since the last flush."""
        return [tuple(dict.fromkeys(value for value, _ in each)) for each in self.tries]

    def settle(self, found: Sequence[int]) -> None:
        """Note what is there for sure."""
        self.tries = [[(value, True)] for value in found]


def _last_answered(tries: Sequence[tuple[int, bool]]) -> int:
    return max(place for place, (_, answered) in enumerate(tries) if answered)


def differences(found: Iterable[int], allowed: Allowed) -> str:
    """Say which blocks hold what they may not; nothing if none does."""
    wrong = [
        f"block {block} has {'a torn one' if value == TORN else value}, not one of {may}"
        for block, (value, may) in enumerate(zip(found, allowed, strict=True))
        if value not in may
    ]
    return f"{len(wrong)} blocks: {wrong[0]}" if wrong else ""


@dataclass(slots=True)
class Expected:
    """What a pool must hold."""

    volumes: dict[str, Blocks] = field(default_factory=dict)
    snapshots: dict[str, Allowed] = field(default_factory=dict)
    """By VOLUME@NAME."""
    uncertain: set[str] = field(default_factory=set)
    """Volumes and snapshots that may be there or not: what made or deleted them was refused."""
    stopped: set[str] = field(default_factory=set)
    """Volumes that refuse everything until they are reopened."""
    copies: dict[Path, int] = field(default_factory=dict)
    """Of the metadata: for each folder when the newest that was answered was made, in milliseconds."""
    copy_folders: list[Path] = field(default_factory=list)
    """What was noted last, and answered, of where they lie."""
    flushes: int = 0
    """That were answered."""
    last_value: int = 0

    def next_value(self) -> int:
        """Return a value that no write had before."""
        self.last_value += 1
        return self.last_value
