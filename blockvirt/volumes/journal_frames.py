"""The journal's frames: how map changes and flush marks are laid out, packed and read back. Pure.

A frame is one batch of map changes, one mark, or one mark with data, little-endian:

    crc u32 | kind u8, 3 bytes 0 | body length u32 | 0 u32 | generation u64 | sequence u64 | body

``crc`` is a CRC-32C over everything behind it, seeded with the crc of the frame before (across generations too): a
frame proves that all frames before it are whole. Sequences count up by one, through all generations, so a frame that is
left from an older one in the same file never fits. (Only what a recovery has covered is counted again, and it begins a
chain at random.) They start at a random number of 62 bits, which no guest knows: nor do bytes fit that a guest laid out
as frames.

    MAP body:   n x (chunk u32, count u32, entry u64)   chunk + i now has entry + i; entry 0: count chunks are unmapped
    MARK body:  sequence u64                            every frame up to it, and the data it names, was synced before
    DATA body:  sequence u64, n u64, n x (file u64, position u64, length u64), the bytes
                a mark whose data may lie here alone: after a power cut the bytes go home, unless a MARK follows
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from blockvirt.checksum import crc32c
from blockvirt.errors import DamagedRecord

HEADER = struct.Struct("<IB3xIIQQ")
CHANGE = struct.Struct("<IIQ")
_MARK = struct.Struct("<Q")
_DATA = struct.Struct("<QQ")
_RANGE = struct.Struct("<QQQ")
_CRC = struct.Struct("<I")
_NUMBER = struct.Struct("<QQ")  # generation and sequence, the end of a header
_NUMBER_AT = HEADER.size - _NUMBER.size
MARK_FRAME_BYTES = HEADER.size + _MARK.size


def add_change(changes: list[tuple[int, int, int]], chunk: int, count: int, entry: int) -> None:
    """Add a change (chunk, count, entry) of a MAP body; what continues the last one becomes part of it."""
    if changes:
        last_chunk, last_count, last_entry = changes[-1]
        if chunk == last_chunk + last_count and (
            entry == last_entry + last_count if entry and last_entry else entry == last_entry
        ):
            changes[-1] = (last_chunk, last_count + count, last_entry)
            return
    changes.append((chunk, count, entry))


class Kind(IntEnum):
    """What a frame holds."""

    MAP = 1
    MARK = 2
    DATA = 3


_KINDS = frozenset(Kind)


@dataclass(frozen=True, slots=True)
class Change:
    """A run of map changes: ``chunk + i`` has ``entry + i`` from now on, or nothing where ``entry`` is 0."""

    chunk: int
    count: int
    entry: int


@dataclass(frozen=True, slots=True)
class Frame:
    """One intact frame, as read back."""

    kind: Kind
    generation: int
    sequence: int
    crc: int
    body: bytes

    def changes(self) -> Iterator[Change]:
        """Yield the map changes of a MAP frame in order; raises DamagedRecord."""
        assert self.kind is Kind.MAP
        self._check(not len(self.body) % CHANGE.size)
        for chunk, count, entry in CHANGE.iter_unpack(self.body):
            yield Change(chunk, count, entry)

    def marked(self) -> int:
        """Return the sequence that a MARK or DATA frame speaks for; raises DamagedRecord."""
        assert self.kind in (Kind.MARK, Kind.DATA)
        self._check(len(self.body) >= _MARK.size)
        return int(_MARK.unpack_from(self.body)[0])

    def data(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield (file, position, bytes) of a DATA frame in order; raises DamagedRecord before the first."""
        assert self.kind is Kind.DATA
        self._check(len(self.body) >= _DATA.size)
        _, count = _DATA.unpack_from(self.body)
        at = _DATA.size + count * _RANGE.size
        self._check(at <= len(self.body))
        ranges = list(_RANGE.iter_unpack(self.body[_DATA.size : at]))
        self._check(at + sum(length for _, _, length in ranges) == len(self.body))
        for file, position, length in ranges:
            yield file, position, self.body[at : at + length]
            at += length

    def _check(self, is_sound: bool) -> None:
        """Raise DamagedRecord, which keeps one volume closed; a struct.error would keep the whole pool closed."""
        if not is_sound:
            raise DamagedRecord(
                f"frame {self.sequence} of a journal is none that blockvirt writes, although its checksum fits",
                correction="run 'blockvirt check'; the journal is kept",
            )


def frame_bytes(changes: int) -> int:
    """Return the size of a MAP frame with so many changes."""
    return HEADER.size + changes * CHANGE.size


def pack(kind: Kind, generation: int, sequence: int, body: bytes, chain: int) -> tuple[bytes, int]:
    """Return a frame and its crc, which seeds the next; ``chain`` is the crc of the frame before."""
    rest = HEADER.pack(0, kind, len(body), 0, generation, sequence)[4:] + body
    crc = crc32c(rest, chain)
    return _CRC.pack(crc) + rest, crc


def pack_mark(generation: int, sequence: int, upto: int, chain: int) -> tuple[bytes, int]:
    """Return a MARK frame for ``upto`` and its crc."""
    return pack(Kind.MARK, generation, sequence, _MARK.pack(upto), chain)


def pack_data(
    generation: int, sequence: int, upto: int, parts: Sequence[tuple[int, int, bytes]], chain: int
) -> tuple[bytes, int]:
    """Return a DATA frame for ``upto`` with (file, position, bytes) parts, and its crc."""
    ranges = [_RANGE.pack(file, position, len(data)) for file, position, data in parts]
    body = b"".join([_DATA.pack(upto, len(parts)), *ranges, *(data for _, _, data in parts)])
    return pack(Kind.DATA, generation, sequence, body, chain)


def data_frame_bytes(ranges: int, data_bytes: int) -> int:
    """Return the size of a DATA frame with so many parts that hold so much together."""
    return HEADER.size + _DATA.size + ranges * _RANGE.size + data_bytes


def first_generation(log: bytes) -> int:
    """Return the generation that the frame at the start of ``log`` claims; 0 where there is none."""
    return int(HEADER.unpack_from(log)[4]) if len(log) >= HEADER.size else 0


def read_frames(log: bytes, generation: int, sequence: int, chain: int) -> Iterator[Frame]:
    """Yield the intact frames of ``generation`` at the start of ``log``, the first being number ``sequence``.

    Ends at the first frame that is torn, stale or foreign: what lies behind it cannot be trusted.
    """
    at = 0
    while at + HEADER.size <= len(log):
        crc, kind, body_bytes, _, found, number = HEADER.unpack_from(log, at)
        end = at + HEADER.size + body_bytes
        if found != generation or number != sequence or end > len(log) or kind not in _KINDS:
            return
        if crc32c(bytes(log[at + 4 : end]), chain) != crc:
            return
        yield Frame(Kind(kind), found, number, crc, bytes(log[at + HEADER.size : end]))
        at, chain, sequence = end, crc, sequence + 1


def is_followed(log: bytes, at: int, generation: int, sequence: int, chain: int, later: bytes) -> bool:
    """Tell whether a frame was whole once that is not intact now: frame ``sequence``, at ``at``, where the log ends.

    Then the next one is intact, behind it in ``log`` or first in ``later``, the next generation's. Its crc goes on from
    the damaged frame's, which is as it was written, unless it is itself what was damaged. The last frame of all cannot
    be judged so: it may be a torn one.
    """
    written = log[at : at + _CRC.size]
    number = _NUMBER.pack(generation, sequence + 1)
    place = log.find(number, at)
    while place >= 0:
        start = place - _NUMBER_AT
        seeds = _seeds(written, log[at + _CRC.size : start], chain)
        if start > at and any(any(read_frames(log[start:], generation, sequence + 1, seed)) for seed in seeds):
            return True
        place = log.find(number, place + 1)
    end = at + HEADER.size + HEADER.unpack_from(log, at)[2] if at + HEADER.size <= len(log) else at
    seeds = _seeds(written, log[at + _CRC.size : end], chain)
    return any(any(read_frames(later, generation + 1, sequence + 1, seed)) for seed in seeds)


def _seeds(written: bytes, rest: bytes, chain: int) -> list[int]:
    """Return what the crc of a damaged frame may have been: as it stands there, or as the rest of it has it."""
    return [int.from_bytes(written, "little"), crc32c(rest, chain)]
