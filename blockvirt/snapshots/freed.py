"""What becomes free when a volume goes, or all of its snapshots do: exact, as of the last checkpoint.

What goes is followed through the branches: one that nothing keeps any more lets go of its origin, and of what it pins.
"""

from blockvirt.errors import DamagedRecord
from blockvirt.meta.keys import Table, number_key, split_pair
from blockvirt.meta.records import BranchRecord, FileRecord
from blockvirt.meta.store import Reader
from blockvirt.volumes.deletion import branches_of
from blockvirt.volumes.gaps import chunks_freed
from blockvirt.volumes.versions import points_of


def freed_with_volume(reader: Reader, volume_id: str) -> int:
    """Return how many chunks become free when a volume goes for good, with its snapshots; raises DamagedRecord.

    What its clones see stays. Cost: where nothing of a branch stays, its files are counted; otherwise what changed
    between the points that go.
    """
    return _freed(reader, volume_id, heads=True)


def freed_with_snapshots(reader: Reader, volume_id: str) -> int:
    """Return how many chunks become free when all snapshots of a volume go, and it stays; raises DamagedRecord."""
    return _freed(reader, volume_id, heads=False)


def _freed(reader: Reader, volume_id: str, *, heads: bool) -> int:
    own = set(branches_of(reader, volume_id))
    going: set[str | int] = {
        snapshot_id.decode() for _, snapshot_id in reader.scan(Table.SNAPSHOT_NAMES, prefix=f"{volume_id}/".encode())
    }
    pending, freed = set(own), 0
    while pending:
        number = max(pending)  # what comes from a branch has a higher number: it is judged before
        pending.remove(number)
        branch = reader.record(BranchRecord, Table.BRANCHES, number_key(number))
        if branch is None:
            raise DamagedRecord(f"branch {number} is missing from the metadata", correction="run 'blockvirt check'")
        points = points_of(reader, number)
        kept = {epoch for epoch, who in points if who not in going}
        head_goes = heads and number in own and branch.head_epoch > 0
        gone = {epoch for epoch, _ in points} - kept
        if branch.head_epoch and not head_goes:
            kept.add(branch.head_epoch)
        freed += chunks_freed(reader, branch, gone, head=head_goes) if kept else _live_chunks(reader, number)
        if not kept:
            going.add(number)
            pending |= {origin for origin, _ in ((branch.origin_branch, 0), *branch.pins) if origin}
    return freed


def _live_chunks(reader: Reader, branch: int) -> int:
    live = 0
    for key, _ in reader.scan(Table.BRANCH_FILES, prefix=number_key(branch)):
        file = reader.record(FileRecord, Table.FILES, number_key(split_pair(key)[1]))
        live += file.live_chunks if file is not None else 0
    return live
