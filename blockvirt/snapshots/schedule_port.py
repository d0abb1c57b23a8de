"""What schedules ask of the snapshots: a narrow seam, so that the two are tested apart."""

from collections.abc import Mapping, Sequence, Set
from typing import Protocol

from blockvirt.meta.records import SnapshotRecord


class SnapshotPort(Protocol):
    """Taking, seeing and deleting snapshots, and finding the volumes that a schedule is for."""

    async def take(self, volume_ids: Sequence[str], name: str, *, schedule_id: str) -> Sequence[SnapshotRecord]:
        """Take one snapshot of each volume, all of one instant and called ``name``, or none; note who asked.

        Raises Exists if one of the volumes has a snapshot of that name, NotFound if one is gone, and whatever keeps a
        volume from being snapshotted.
        """

    def of_volume(self, volume_id: str) -> Sequence[SnapshotRecord]:
        """Return all snapshots of a volume, in any order; none for a volume that is gone."""

    async def delete(self, snapshot_ids: Sequence[str]) -> None:
        """Delete snapshots; one that is gone already is no error. Refuses with InUse what is held by now."""

    def bases(self) -> Set[str]:
        """Return the ids of the snapshots that an archive goes on from: they must stay."""

    def volumes_with(self, labels: Mapping[str, str]) -> Sequence[tuple[str, str]]:
        """Return (id, name) of the volumes that carry all of ``labels``, without those in the trash."""
