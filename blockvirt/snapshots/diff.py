"""Changed blocks: two visible versions of a leaf compared slot by slot. Pure.

Addresses are never reused and what a snapshot sees never changes, so two points that hold the same address in a slot
hold the same bytes there. The other way round is not certain: a chunk that was copied, or written with what it held,
counts as changed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from blockvirt.lun.leaf_diff import differing


@dataclass(frozen=True, slots=True)
class Change:
    """A run of chunks that differ, alike in whether they read as zeros now."""

    chunk: int
    count: int
    zero: bool


def compare(first_chunk: int, old: bytes, new: bytes) -> Iterator[Change]:
    """Yield the runs in which two versions of a leaf (its planes) differ; ``first_chunk`` is that of slot 0."""
    for slot, count, zero in differing(old, new):
        yield Change(first_chunk + slot, count, zero)
