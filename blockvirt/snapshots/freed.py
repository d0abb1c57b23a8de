"""What becomes free when volumes go, or all snapshots of one do: exact, as of the last checkpoint.

What goes is followed through the branches: one that nothing keeps any more lets go of its origin, and of what it pins.
"""

from collections.abc import Sequence, Set

from blockvirt.errors import DamagedRecord
from blockvirt.meta.keys import Table, number_key, pair_key, split_pair, split_point
from blockvirt.meta.records import BranchRecord, FileRecord, SnapshotRecord
from blockvirt.meta.store import Reader
from blockvirt.volumes.deletion import branches_of
from blockvirt.volumes.gaps import chunks_freed
from blockvirt.volumes.versions import branch_record, points_of


def freed_with_volume(reader: Reader, volume_id: str) -> int:
    """Return how many chunks become free when a volume goes for good, with its snapshots; raises DamagedRecord.

    What its clones see stays. Cost: where nothing of a branch stays, its files are counted; otherwise what changed
    between the points that go.
    """
    return _freed(reader, [volume_id], heads=True)


def freed_with_volumes(reader: Reader, volume_ids: Sequence[str]) -> int:
    """As ``freed_with_volume``, when all of these go: what a clone keeps of another one of them goes too."""
    return _freed(reader, volume_ids, heads=True)


def freed_with_snapshots(reader: Reader, volume_id: str) -> int:
    """Return how many chunks become free when all snapshots of a volume go, and it stays; raises DamagedRecord."""
    return _freed(reader, [volume_id], heads=False)


def freed_by(reader: Reader, snapshots: Sequence[SnapshotRecord]) -> int:
    """Return how many chunks become free when these snapshots go, and nothing else; raises DamagedRecord.

    Cost: what changed around them, not the size of their volumes.
    """
    return _follow(reader, {snapshot.id for snapshot in snapshots}, {each.branch for each in snapshots}, heads=set())


def branches_judged(reader: Reader, snapshots: Sequence[SnapshotRecord]) -> set[int]:
    """Return the branches whose maps may say what becomes free when these snapshots go; raises DamagedRecord.

    Those without a head may go whole, and then what they come from is judged too.
    """
    judged = set[int]()
    pending = {snapshot.branch for snapshot in snapshots if snapshot.branch}
    while pending:
        number = pending.pop()
        judged.add(number)
        branch = branch_record(reader, number)
        if not branch.head_epoch:
            origins = {origin for origin, _ in ((branch.origin_branch, 0), *branch.pins) if origin}
            pending |= origins - judged
    return judged


def _freed(reader: Reader, volume_ids: Sequence[str], *, heads: bool) -> int:
    own, snapshots = set[int](), set[str]()
    for volume_id in volume_ids:
        own.update(branches_of(reader, volume_id))
        names = reader.scan(Table.SNAPSHOT_NAMES, prefix=f"{volume_id}/".encode())
        snapshots.update(snapshot_id.decode() for _, snapshot_id in names)
    return _follow(reader, snapshots, own, heads=own if heads else set())


def _follow(reader: Reader, snapshots: Set[str], branches: Set[int], *, heads: Set[int]) -> int:
    """Return what becomes free when ``snapshots`` and the heads of ``heads`` go, ``branches`` being where they are."""
    going: set[str | int] = set(snapshots)
    pending, freed = set(branches), 0
    while pending:
        number = max(pending)  # what comes from a branch has a higher number: it is judged before
        pending.remove(number)
        branch = reader.record(BranchRecord, Table.BRANCHES, number_key(number))
        if branch is None:
            raise DamagedRecord(f"branch {number} is missing from the metadata", correction="run 'blockvirt check'")
        head_goes = number in heads and branch.head_epoch > 0
        if branch.head_epoch and not head_goes:
            freed += chunks_freed(reader, branch, _epochs_gone(reader, branch, going))
            continue
        points = points_of(reader, number)
        kept = {epoch for epoch, who in points if who not in going}
        if kept:
            freed += chunks_freed(reader, branch, {epoch for epoch, _ in points} - kept, head=head_goes)
        else:
            freed += _live_chunks(reader, number)
            going.add(number)
            pending |= {origin for origin, _ in ((branch.origin_branch, 0), *branch.pins) if origin}
    return freed


def _epochs_gone(reader: Reader, branch: BranchRecord, going: Set[str | int]) -> set[int]:
    """Return the points of a branch that nothing keeps any more: found from what goes, which is little."""
    gone = set()
    for who in going:
        if isinstance(who, str):
            snapshot = reader.record(SnapshotRecord, Table.SNAPSHOTS, who.encode())
            epochs = {snapshot.epoch} if snapshot is not None and snapshot.branch == branch.number else set()
        else:
            child = reader.record(BranchRecord, Table.BRANCHES, number_key(who))
            origins = ((child.origin_branch, child.origin_epoch), *child.pins) if child is not None else ()
            epochs = {epoch for origin, epoch in origins if origin == branch.number}
        for epoch in epochs:
            rows = reader.scan(Table.POINTS, prefix=pair_key(branch.number, epoch))
            if all(split_point(key)[2] in going for key, _ in rows):
                gone.add(epoch)
    return gone


def _live_chunks(reader: Reader, branch: int) -> int:
    live = 0
    for key, _ in reader.scan(Table.BRANCH_FILES, prefix=number_key(branch)):
        file = reader.record(FileRecord, Table.FILES, number_key(split_pair(key)[1]))
        live += file.live_chunks if file is not None else 0
    return live
