"""Changed blocks: two visible versions of a leaf compared slot by slot. Pure.

Addresses are never reused and what a snapshot sees never changes, so two points that hold the same address in a slot
hold the same bytes there. The other way round is not certain: a chunk that was copied, or written with what it held,
counts as changed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blockvirt.lun.address import ADDRESS_MASK


@dataclass(frozen=True, slots=True)
class Change:
    """A run of chunks that differ, alike in whether they read as zeros now."""

    chunk: int
    count: int
    zero: bool


def compare(first_chunk: int, old: Sequence[int], new: Sequence[int]) -> Iterator[Change]:
    """Yield the runs in which two versions of a leaf differ; ``first_chunk`` is the number of slot 0's chunk."""
    start = count = 0
    zero = False
    differing = [slot for slot, (before, after) in enumerate(zip(old, new, strict=True)) if before != after]
    for slot in differing:
        if (old[slot] ^ new[slot]) & ADDRESS_MASK == 0:
            continue  # the same chunk, with other flags
        is_zero = not new[slot] & ADDRESS_MASK
        if count and slot == start + count and is_zero == zero:
            count += 1
            continue
        if count:
            yield Change(first_chunk + start, count, zero)
        start, count, zero = slot, 1, is_zero
    if count:
        yield Change(first_chunk + start, count, zero)
