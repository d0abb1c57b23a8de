"""Stored forms of a leaf compared without decoding them: a few microseconds, where decoding both takes fifty. Pure.

The packed form is seven planes of 512 bytes, one byte of each entry in each. Planes that are not alike are taken as one
large integer each; the exclusive ors of all of them, folded together, leave one byte for each slot, 0 where nothing
differs.
"""

import re

from blockvirt.limits import LEAF_CHUNKS
from blockvirt.lun.address import ADDRESS_MASK, ENTRY_BYTES
from blockvirt.lun.leaf import decode, packed_planes

NOTHING = bytes(ENTRY_BYTES * LEAF_CHUNKS)
"""The planes of a leaf that maps nothing."""

_EVERY_SLOT = int.from_bytes(b"\x01" * LEAF_CHUNKS, "little")
_SET = bytes([0]) + bytes([1]) * 255


def _plane(number: int) -> tuple[slice, int, bytes]:
    bits = ADDRESS_MASK >> 8 * number & 255
    place = slice(number * LEAF_CHUNKS, (number + 1) * LEAF_CHUNKS)
    return place, bits * _EVERY_SLOT, bytes([not octet & bits for octet in range(256)])


_PLANES = tuple(_plane(number) for number in range(ENTRY_BYTES))
"""Of each plane: where it lies, which of its bits belong to addresses, and a table that gives 1 where none is set."""
# Written so that each begins with a literal: the engine looks for that many times faster than for "x+".
_ALIKE = re.compile(rb"\x01\x01*")
_RUNS = re.compile(rb"\x01\x01*|\x02\x02*")


def planes(payload: bytes) -> bytes:
    """Return a stored leaf as planes, whichever form it has; raises DamagedRecord."""
    packed = packed_planes(payload)
    if packed is not None:
        return packed
    raw = decode(payload).tobytes()
    return b"".join(raw[plane::8] for plane in range(ENTRY_BYTES))


def differing(old: bytes, new: bytes) -> list[tuple[int, int, bool]]:
    """Return (first slot, count, reads as zeros now) of the runs of slots whose address differs between two planes."""
    number = int.from_bytes
    folded = 0
    for place, address_bits, _ in _PLANES:
        before, after = old[place], new[place]
        if before != after:  # of addresses that lie near one another most planes are alike
            folded |= (number(before, "little") ^ number(after, "little")) & address_bits
    if not folded:
        return []
    marks = folded.to_bytes(LEAF_CHUNKS, "little").translate(_SET)
    changed = zero = number(marks, "little")
    for place, _, where_clear in _PLANES:
        zero &= number(new[place].translate(where_clear), "little")
        if not zero:  # mostly after a plane or two
            return [(run.start(), run.end() - run.start(), False) for run in _ALIKE.finditer(marks)]
    marks = (changed + zero).to_bytes(LEAF_CHUNKS, "little")  # 1: differs and is mapped, 2: differs and is not
    return [(run.start(), run.end() - run.start(), run[0][0] == 2) for run in _RUNS.finditer(marks)]
