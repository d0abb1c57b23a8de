"""Gaps in a branch's history: what lies between two neighbouring points once those between them have gone.

A version that nobody sees any more has a later one before the next point. So both the leaves changed before the points
that went and those changed after them hold all of the candidates, and the smaller set is walked: what it costs to
delete a snapshot grows with what it alone holds, not with its volume.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass

from blockvirt.meta.keys import Table, born_key, number_key, split_born
from blockvirt.meta.records import BranchRecord
from blockvirt.meta.store import Reader
from blockvirt.volumes.versions import dead_in_gap, next_point, previous_point

MAX_EPOCH = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Gap:
    """The epochs between two neighbouring points of a branch, and where to look for versions nobody sees."""

    branch: int
    after_epoch: int
    """The earlier point; 0: there is none."""
    upto_epoch: int | None
    """The later point; None: there is none, so nothing later is seen either."""
    first_epoch: int
    """Candidates are the leaves that got a version in these epochs."""
    last_epoch: int
    leaves: int
    """How many rows that is."""


def gap_around(reader: Reader, branch: BranchRecord, epoch: int) -> Gap:
    """Return the gap that a point at ``epoch`` has left; an empty one where something still keeps it."""
    upto = next_point(reader, branch, epoch)
    return _gap(reader, branch.number, previous_point(reader, branch.number, epoch), upto, epoch, epoch)


def _gap(reader: Reader, branch: int, after_epoch: int, upto: int | None, first_gone: int, last_gone: int) -> Gap:
    """Return the gap between two points, given the first and the last of those that went between them."""
    if upto == first_gone:
        return Gap(branch, after_epoch, upto, 1, 0, 0)
    if upto is None:
        everything = sum(1 for _ in born_between(reader, branch, after_epoch + 1, MAX_EPOCH))
        return Gap(branch, after_epoch, None, after_epoch + 1, MAX_EPOCH, everything)
    before = born_between(reader, branch, after_epoch + 1, last_gone)
    after = born_between(reader, branch, first_gone + 1, upto)
    count = 0
    while True:  # side by side, so that the smaller set bounds the time
        if next(before, None) is None:
            return Gap(branch, after_epoch, upto, after_epoch + 1, last_gone, count)
        if next(after, None) is None:
            return Gap(branch, after_epoch, upto, first_gone + 1, upto, count)
        count += 1


def born_between(
    reader: Reader, branch: int, first_epoch: int, last_epoch: int, start: bytes = b""
) -> Iterator[tuple[int, int, bytes]]:
    """Yield (birth, leaf number, key) of the versions born in these epochs, in order, from the key ``start`` on."""
    begin = max(start, born_key(branch, first_epoch, 0))
    for key, _ in Reader.scan(reader, Table.BORN, start=begin, prefix=number_key(branch)):
        _, birth, leaf = split_born(key)
        if birth > last_epoch:
            return
        yield birth, leaf, key


def chunks_freed(reader: Reader, branch: BranchRecord, gone: Set[int], *, head: bool = False) -> int:
    """Return how many chunks become free when the points at the epochs ``gone`` go; with ``head`` also the head.

    Every row at those epochs is taken to go: the caller leaves out epochs that something else keeps. Exact as of the
    last checkpoint. Cost: see above. Raises DamagedRecord.
    """
    going = sorted(gone | {branch.head_epoch} if head else gone)
    freed = at = 0
    while at < len(going):
        first = at
        upto = _next_kept(reader, branch, going[at], head=head)
        while upto in gone:
            at += 1
            upto = _next_kept(reader, branch, going[at], head=head)
        if head and upto is None:
            at = len(going) - 1
        after = previous_point(reader, branch.number, going[first])
        freed += _chunks_in(reader, _gap(reader, branch.number, after, upto, going[first], going[at]))
        at += 1
    return freed


def _next_kept(reader: Reader, branch: BranchRecord, epoch: int, *, head: bool) -> int | None:
    """Return the point after ``epoch``; None where there is none, or only a head that goes too."""
    upto = next_point(reader, branch, epoch + 1)
    return None if upto is None or upto <= epoch or (head and upto == branch.head_epoch) else upto


def _chunks_in(reader: Reader, gap: Gap) -> int:
    leaves = {leaf for _, leaf, _ in born_between(reader, gap.branch, gap.first_epoch, gap.last_epoch)}
    return sum(len(dead_in_gap(reader, gap.branch, leaf, gap.after_epoch, gap.upto_epoch)[1]) for leaf in leaves)
