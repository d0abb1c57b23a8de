"""Removing rows that nothing refers to: what the proof of the records reports as orphans.

Only after a proof that found nothing worse: what is somebody's would be missed there, and that is corruption.
"""

from collections.abc import Callable

from blockvirt.meta.keys import Table, number_key, pair_key, split_pair
from blockvirt.meta.records import BranchRecord, FileRecord, JobRecord, VolumeRecord
from blockvirt.meta.store import Reader, Writer
from blockvirt.meta.verify_catalogue import is_unfinished_purge

_OF_BRANCHES = (Table.LEAVES, Table.BORN, Table.RECLAIM, Table.SEALS)
_OF_FILES = (Table.PUNCH, Table.CHECKSUMS)
_NUMBER_BYTES = len(number_key(0))


def remove_orphans(writer: Writer, purge: Callable[[Writer, VolumeRecord], object]) -> None:
    """Remove rows of branches and files that do not exist, and have what is half deleted deleted for good.

    ``purge`` queues the deletion of a volume that is flagged for it and that no job deletes.
    """
    for key, _ in writer.scan(Table.FILES):
        file = writer.record(FileRecord, Table.FILES, key)
        if file is not None and not _is_there(writer, Table.BRANCHES, file.branch):
            writer.delete(Table.FILES, key)  # on its device the file is a stray one then
            writer.delete(Table.BRANCH_FILES, pair_key(file.branch, file.number))
    for tables, owners in ((_OF_BRANCHES, Table.BRANCHES), (_OF_FILES, Table.FILES)):
        for table in tables:
            for key, _ in writer.scan(table):
                if not _is_there(writer, owners, int.from_bytes(key[:_NUMBER_BYTES], "big")):
                    writer.delete(table, key)
    reclaimed = {split_pair(key)[0] for key, _ in writer.scan(Table.RECLAIM)}
    for key, _ in writer.scan(Table.BRANCHES):
        branch = writer.record(BranchRecord, Table.BRANCHES, key)
        assert branch is not None
        if not branch.head_epoch and branch.number not in reclaimed and not _has_points(writer, branch.number):
            writer.put(Table.RECLAIM, pair_key(branch.number, branch.first_epoch), b"")
    jobs = [writer.record(JobRecord, Table.JOBS, key) for key, _ in writer.scan(Table.JOBS)]
    purged = {job.volume_id for job in jobs if job is not None and is_unfinished_purge(job)}
    for key, _ in writer.scan(Table.VOLUMES):
        volume = writer.record(VolumeRecord, Table.VOLUMES, key)
        if volume is not None and volume.deleting and volume.id not in purged:
            purge(writer, volume)


def _is_there(writer: Writer, table: Table, number: int) -> bool:
    return writer.get(table, number_key(number)) is not None


def _has_points(writer: Writer, branch: int) -> bool:
    return any(True for _ in Reader.scan(writer, Table.POINTS, prefix=number_key(branch)))
