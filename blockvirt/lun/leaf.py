"""Leaves: the map of 512 consecutive chunks, in memory and as stored. Pure.

A stored leaf is ``form byte | body``, sealed with a CRC over key and value by the metadata store's record rules. Two
forms, the shorter one is used; both stay under 4,076 bytes, so that a version takes one LMDB page:

    form 1, runs:    n x (slot u16, count u16, first entry u56)  entry of slot + i is first + i; the rest is unmapped
    form 2, packed:  512 x entry u56, as seven planes of 512 bytes (byte 0 of every entry, then byte 1, ...)
"""

import struct
import sys
from array import array

from blockvirt.errors import DamagedRecord
from blockvirt.limits import LEAF_CHUNKS
from blockvirt.lun.address import ADDRESS_MASK, ENTRY_BYTES

_RUN = struct.Struct("<HHQ")
_RUN_BYTES = _RUN.size - 1  # the entry's eighth byte is always 0 and is not stored
_STORED_RUN = struct.Struct("<HHIHB")  # the same, read from bytes that follow one another
_PACKED_BYTES = LEAF_CHUNKS * ENTRY_BYTES
_ENTRIES = 1 << 8 * ENTRY_BYTES
_MAX_RUNS = _PACKED_BYTES // _RUN_BYTES
SLOT_MASK = LEAF_CHUNKS - 1
SLOT_BITS = LEAF_CHUNKS.bit_length() - 1

assert 1 << SLOT_BITS == LEAF_CHUNKS

NO_ENTRIES: "array[int]" = array("Q", bytes(8 * LEAF_CHUNKS))
"""The entries of every leaf that maps nothing. Shared: never written to."""


class Leaf:
    """One leaf of a branch's head, resident in memory.

    ``entries`` may be shared (with a checkpoint that is being written, or with NO_ENTRIES): call ``own`` before the
    first change. ``birth`` is the epoch of the version; an older one than the head's means that no FRESH counts.
    """

    __slots__ = ("birth", "dirty", "entries", "frozen", "shared", "touched")

    def __init__(self, entries: "array[int]", birth: int, *, shared: bool = False) -> None:
        self.entries = entries
        self.birth = birth
        self.shared = shared
        self.dirty = False
        """Differs from what the metadata store holds."""
        self.frozen = False
        """Part of a checkpoint that is not committed yet."""
        self.touched = True
        """Used since the cache last looked."""

    def own(self, epoch: int) -> None:
        """Make the entries writable for the head's ``epoch``: unshared, and FRESH only where this epoch allocated."""
        if self.birth != epoch:
            self.entries = array("Q", [entry & ADDRESS_MASK for entry in self.entries])
            self.birth = epoch
            self.shared = False
        elif self.shared:
            self.entries = self.entries[:]
            self.shared = False


_ONES = sum(1 << 64 * place for place in range(LEAF_CHUNKS))
"""1, 1, 1 ... as numbers of 64 bits beside one another, one for each slot."""
_STEPS = sum(place << 64 * place for place in range(LEAF_CHUNKS))
"""0, 1, 2 ... likewise."""


def is_run(entries: "array[int]", first: int, end: int) -> bool:
    """Tell whether slots ``first`` to ``end`` - 1 hold an entry, the one behind it and so on, flags alike.

    All of them are compared as one integer: for 64 slots in a half, for 512 in a quarter of the time.
    """
    all_bits = (1 << 64 * (end - first)) - 1
    return int.from_bytes(entries[first:end], sys.byteorder) - (_STEPS & all_bits) == entries[first] * (
        _ONES & all_bits
    )


def _runs(entries: "array[int]") -> list[tuple[int, int, int]] | None:
    """Return the runs (slot, count, first entry) of ``entries``, or None where the packed form is shorter."""
    runs: list[tuple[int, int, int]] = []
    start, first, expected = 0, 0, 0
    for slot, entry in enumerate(entries):
        if entry == expected and first:
            expected += 1
            continue
        if first:
            runs.append((start, slot - start, first))
            if len(runs) >= _MAX_RUNS:
                return None
        start, first, expected = slot, entry, entry + 1
    if first:
        runs.append((start, LEAF_CHUNKS - start, first))
    return runs


def encode(entries: "array[int]") -> bytes:
    """Return the stored form of ``entries``."""
    assert len(entries) == LEAF_CHUNKS
    runs = _runs(entries)
    if runs is not None:
        return b"\x01" + b"".join(_RUN.pack(*run)[:_RUN_BYTES] for run in runs)
    raw = entries.tobytes()
    return b"\x02" + b"".join(raw[plane::8] for plane in range(ENTRY_BYTES))


def decode(payload: bytes) -> "array[int]":
    """Return the entries that ``payload`` stores; raises DamagedRecord where it is no leaf."""
    form, body = payload[:1], payload[1:]
    if form == b"\x02" and len(body) == _PACKED_BYTES:
        raw = bytearray(8 * LEAF_CHUNKS)
        for plane in range(ENTRY_BYTES):
            raw[plane::8] = body[plane * LEAF_CHUNKS : (plane + 1) * LEAF_CHUNKS]
        entries = NO_ENTRIES[:]  # an array made from bytes takes a sixteenth more than they are, for what may follow
        memoryview(entries).cast("B")[:] = raw
        return entries
    if form == b"\x01" and len(body) % _RUN_BYTES == 0:
        entries = NO_ENTRIES[:]
        for slot, count, low, middle, high in _STORED_RUN.iter_unpack(body):
            first = low | middle << 32 | high << 48
            if not count or slot + count > LEAF_CHUNKS or not first:
                raise DamagedRecord("a leaf names slots outside itself", correction="run 'blockvirt check'")
            if count == 1:  # most are, where a guest writes at random
                entries[slot] = first
            elif first + count > _ENTRIES:
                raise DamagedRecord("a leaf has entries beyond 56 bits", correction="run 'blockvirt check'")
            else:
                entries[slot : slot + count] = array("Q", range(first, first + count))
        return entries
    raise DamagedRecord("a leaf has an unknown form or a wrong length", correction="run 'blockvirt check'")


def packed_planes(payload: bytes) -> bytes | None:
    """Return the planes of a stored leaf in the packed form; None where it has the other one, or none that is known."""
    return payload[1:] if payload[:1] == b"\x02" and len(payload) == 1 + _PACKED_BYTES else None


def mapped(entries: "array[int]") -> int:
    """Return how many slots are mapped."""
    return LEAF_CHUNKS - entries.count(0)
