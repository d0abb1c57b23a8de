"""Stored forms of a leaf compared without decoding them: a few microseconds, where decoding both takes fifty. Pure.

The packed form is seven planes of 512 bytes, one byte of each entry in each. As one large integer each, two of them are
compared by a single exclusive or; folding its planes together leaves one byte for each slot, 0 where nothing differs.
"""

import re
from collections.abc import Iterator

from blockvirt.limits import LEAF_CHUNKS
from blockvirt.lun.address import ADDRESS_MASK, ENTRY_BYTES
from blockvirt.lun.leaf import decode, packed_planes

NOTHING = bytes(ENTRY_BYTES * LEAF_CHUNKS)
"""The planes of a leaf that maps nothing."""

_PLANE_BITS = 8 * LEAF_CHUNKS
_ONE_PLANE = (1 << _PLANE_BITS) - 1
_EVERY_SLOT = _ONE_PLANE // 255  # a byte 1 for each slot
_ADDRESSES = sum((ADDRESS_MASK >> 8 * plane & 255) * _EVERY_SLOT << plane * _PLANE_BITS for plane in range(ENTRY_BYTES))
_SET = bytes([0]) + bytes([1]) * 255
_CLEAR = bytes([1]) + bytes([0]) * 255
_RUNS = re.compile(rb"\x01+|\x02+")


def planes(payload: bytes) -> bytes:
    """Return a stored leaf as planes, whichever form it has; raises DamagedRecord."""
    packed = packed_planes(payload)
    if packed is not None:
        return packed
    raw = decode(payload).tobytes()
    return b"".join(raw[plane::8] for plane in range(ENTRY_BYTES))


def differing(old: bytes, new: bytes) -> Iterator[tuple[int, int, bool]]:
    """Yield (first slot, count, reads as zeros now) of the runs of slots whose address differs between two planes."""
    after = int.from_bytes(new, "little") & _ADDRESSES
    changed = _slots((int.from_bytes(old, "little") & _ADDRESSES) ^ after, _SET)
    if not changed:
        return
    marks = changed + (changed & _slots(after, _CLEAR))  # 1: differs and is mapped, 2: differs and is not
    for run in _RUNS.finditer(marks.to_bytes(LEAF_CHUNKS, "little")):
        yield run.start(), run.end() - run.start(), run[0][0] == 2


def _slots(planes: int, table: bytes) -> int:
    """Return a byte for each slot: what ``table`` makes of 0 where all of its planes are 0, of others elsewhere."""
    folded = 0
    for _ in range(ENTRY_BYTES):
        folded |= planes & _ONE_PLANE
        planes >>= _PLANE_BITS
    return int.from_bytes(folded.to_bytes(LEAF_CHUNKS, "little").translate(table), "little")
