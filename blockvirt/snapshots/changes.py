"""What changed between two points of the pool's history: two snapshots, or a snapshot and a volume's last checkpoint.

Works wherever the two have a branch in common: within a volume, across its reverts, between a clone and its origin.
Only leaves that got a version between the two are looked at, so the cost grows with what changed.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import starmap

from blockvirt.lun.leaf import SLOT_BITS
from blockvirt.lun.leaf_diff import differing
from blockvirt.meta.store import Reader
from blockvirt.snapshots.diff import Change
from blockvirt.volumes.gaps import born_between
from blockvirt.volumes.versions import branch_record, lineage, planes_through

Chain = Sequence[tuple[int, int]]
"""Where a point's map is looked up, nearest first: (branch, newest epoch visible there)."""


@dataclass(frozen=True, slots=True)
class Point:
    """A moment in the history of a branch."""

    branch: int
    epoch: int


def chain_of(reader: Reader, point: Point) -> Chain:
    """Return where a point's map is looked up; raises DamagedRecord."""
    return lineage(reader, branch_record(reader, point.branch), point.epoch)


def changed_leaves(reader: Reader, old: Chain, new: Chain) -> list[int]:
    """Return the numbers of the leaves that may differ between two points, in order. ``old`` may be empty: nothing."""
    epochs = dict(old)
    leaves: set[int] = set()
    shared = 0
    for branch, epoch in new:
        if branch in epochs:
            shared = branch
            low, high = sorted((epochs[branch], epoch))
            leaves.update(leaf for _, leaf, _ in born_between(reader, branch, low + 1, high))
            break
        leaves.update(leaf for _, leaf, _ in born_between(reader, branch, 0, epoch))
    for branch, epoch in old:
        if branch == shared:
            break
        leaves.update(leaf for _, leaf, _ in born_between(reader, branch, 0, epoch))
    return sorted(leaves)


def changed_runs(
    reader: Reader,
    old: Chain,
    new: Chain,
    first_chunk: int = 0,
    end_chunk: int = 1 << 40,
    leaves: Sequence[int] | None = None,
) -> Iterator[tuple[int, int, bool]]:
    """Yield what of the chunks from ``first_chunk`` on, below ``end_chunk``, differs; neighbours merged, in order.

    As (first chunk, count, reads as zeros now): a large volume has too many for an object each. ``leaves`` are the
    ``changed_leaves``, where they are known already. Raises DamagedRecord.
    """
    if leaves is None:
        leaves = changed_leaves(reader, old, new)
    start = end = first_chunk  # of the run that may go on
    zero = False
    for place in range(bisect_left(leaves, first_chunk >> SLOT_BITS), len(leaves)):
        leaf = leaves[place]
        base = leaf << SLOT_BITS
        if base >= end_chunk:
            break
        for slot, count, is_zero in differing(planes_through(reader, old, leaf), planes_through(reader, new, leaf)):
            chunk, behind = max(base + slot, first_chunk), min(base + slot + count, end_chunk)
            if chunk >= behind:
                continue
            if chunk == end and is_zero == zero:
                end = behind
                continue
            if start < end:
                yield start, end - start, zero
            start, end, zero = chunk, behind, is_zero
    if start < end:
        yield start, end - start, zero


def changes(reader: Reader, old: Chain, new: Chain, first_chunk: int = 0, end_chunk: int = 1 << 40) -> Iterator[Change]:
    """Yield the same as objects; raises DamagedRecord."""
    return starmap(Change, changed_runs(reader, old, new, first_chunk, end_chunk))
