"""The tree of a volume's snapshots: which one each came from, and where the head stands. Pure."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blockvirt.meta.records import BranchRecord, SnapshotRecord


@dataclass(frozen=True, slots=True)
class Tree:
    """Parents by snapshot id (empty: it begins the history), and the head's."""

    parents: Mapping[str, str]
    head_parent: str


def tree(snapshots: Sequence[SnapshotRecord], branches: Mapping[int, BranchRecord], head_branch: int) -> Tree:
    """Return the tree of one volume. Snapshots of other volumes, which a clone comes from, are no part of it."""
    by_branch: dict[int, list[SnapshotRecord]] = {}
    for snapshot in sorted(snapshots, key=lambda each: each.epoch):
        by_branch.setdefault(snapshot.branch, []).append(snapshot)

    def newest(branch: int, before_epoch: float) -> str:
        """Return the newest snapshot that a point just before ``before_epoch`` comes from."""
        while True:
            line = by_branch.get(branch, [])
            older = bisect_left(line, before_epoch, key=lambda each: each.epoch)
            if older:
                return line[older - 1].id
            record = branches.get(branch)
            if record is None or not record.origin_branch:
                return ""
            branch, before_epoch = record.origin_branch, record.origin_epoch + 1

    parents = {snapshot.id: newest(snapshot.branch, snapshot.epoch) for snapshot in snapshots}
    return Tree(parents, newest(head_branch, float("inf")))
