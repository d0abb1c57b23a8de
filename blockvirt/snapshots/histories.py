"""What a volume's history adds to its view: snapshots, the origin of a clone, and the bytes that both hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from blockvirt.errors import BlockvirtError, DamagedRecord
from blockvirt.meta.keys import Table, number_key, pair_key, split_point
from blockvirt.meta.records import BranchRecord, SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Reader
from blockvirt.snapshots.freed import freed_with_snapshots, freed_with_volume, freed_with_volumes
from blockvirt.volumes.context import VolumeContext
from blockvirt.volumes.versions import branch_record


@dataclass(frozen=True, slots=True)
class History:
    """Where a volume comes from and what it keeps."""

    snapshots: int = 0
    origin: str = ""
    """What it was cloned from and still needs, see ``origin_name``; empty: nothing."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """Bytes that come back when something of a volume goes, exact as of its last checkpoint."""

    exclusive_bytes: int
    """When it goes for good, with its snapshots."""
    snapshot_bytes: int
    """When all of its snapshots go, and it stays."""


class Histories:
    """Reads the histories of volumes, in threads. One per process; call it on the event loop."""

    def __init__(self, context: VolumeContext) -> None:
        self._context = context

    async def of(self, volume_ids: Sequence[str]) -> Mapping[str, History]:
        """Return the history of each volume; one that is damaged or gone has none."""
        return await self._context.threads.run(partial(self._read, volume_ids))

    def _read(self, volume_ids: Sequence[str]) -> Mapping[str, History]:
        found = {}
        with self._context.store.read() as reader:
            for volume_id in volume_ids:
                snapshots = sum(1 for _ in reader.scan(Table.SNAPSHOT_NAMES, prefix=f"{volume_id}/".encode()))
                try:
                    found[volume_id] = History(snapshots, origin_name(reader, volume_id))
                except BlockvirtError:  # what is damaged is said where its volume is shown
                    found[volume_id] = History(snapshots)
        return found

    async def holdings(self, volume_id: str) -> Holdings | None:
        """Return what a volume holds, in the trash or not; None where its metadata is damaged.

        Cost: what changed between the points of its branches, not its size.
        """
        return await self._context.threads.run(partial(self._holdings, volume_id))

    async def freed_bytes(self, volume_ids: Sequence[str]) -> int:
        """Return what comes back when all of these volumes go for good, with their snapshots; raises DamagedRecord."""
        return await self._context.threads.run(partial(self._freed_bytes, volume_ids))

    def _freed_bytes(self, volume_ids: Sequence[str]) -> int:
        with self._context.store.read() as reader:
            return freed_with_volumes(reader, volume_ids) << self._context.chunk_shift

    def _holdings(self, volume_id: str) -> Holdings | None:
        shift = self._context.chunk_shift
        with self._context.store.read() as reader:
            try:
                exclusive, snapshots = freed_with_volume(reader, volume_id), freed_with_snapshots(reader, volume_id)
            except DamagedRecord:
                return None
        return Holdings(exclusive << shift, snapshots << shift)


def origin_name(reader: Reader, volume_id: str) -> str:
    """Return what a volume was cloned from and still needs: 'VOLUME@SNAPSHOT'; empty: nothing. Raises DamagedRecord.

    'VOLUME' alone where the snapshot was deleted, an id for the name of a volume that is gone.
    """
    point = _origin_point(reader, volume_id)
    if point is None:
        return ""
    branch = reader.record(BranchRecord, Table.BRANCHES, number_key(point[0]))
    if branch is None:
        return ""
    volume = reader.record(VolumeRecord, Table.VOLUMES, branch.volume_id.encode())
    name = volume.name if volume is not None else branch.volume_id
    snapshot = _snapshot_at(reader, *point)
    return f"{name}@{snapshot.name}" if snapshot is not None else name


def origin_of(reader: Reader, volume_id: str) -> SnapshotRecord | None:
    """Return the snapshot that a volume was cloned from and still needs; raises DamagedRecord.

    None: it is no clone, was flattened, or the snapshot was deleted.
    """
    point = _origin_point(reader, volume_id)
    return _snapshot_at(reader, *point) if point is not None else None


def _origin_point(reader: Reader, volume_id: str) -> tuple[int, int] | None:
    """Return the (branch, epoch) of another volume that a volume's head comes from."""
    record = reader.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
    if record is None:
        return None
    branch = branch_record(reader, record.branch)
    while branch.origin_branch:
        point = branch.origin_branch, branch.origin_epoch
        origin = reader.record(BranchRecord, Table.BRANCHES, number_key(branch.origin_branch))
        if origin is None or origin.volume_id != volume_id:
            return point
        branch = origin  # of an earlier head: it was reverted
    return None


def _snapshot_at(reader: Reader, branch: int, epoch: int) -> SnapshotRecord | None:
    for key, _ in reader.scan(Table.POINTS, prefix=pair_key(branch, epoch) + b"s"):
        return reader.record(SnapshotRecord, Table.SNAPSHOTS, str(split_point(key)[2]).encode())
    return None
