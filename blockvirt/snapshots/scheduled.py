"""The snapshots as schedules see them: satisfies schedule_port.SnapshotPort."""

import logging
from collections.abc import Mapping, Sequence, Set

from blockvirt.errors import DamagedRecord
from blockvirt.meta.keys import Table
from blockvirt.meta.records import SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Store
from blockvirt.snapshots.catalogue import Snapshots
from blockvirt.snapshots.views import volume_snapshots

log = logging.getLogger("blockvirt.schedules")


class ScheduledSnapshots:
    """What schedules do to snapshots."""

    def __init__(self, store: Store, snapshots: Snapshots) -> None:
        self._store = store
        self._snapshots = snapshots

    async def take(self, volume_ids: Sequence[str], name: str, *, schedule_id: str) -> Sequence[SnapshotRecord]:
        """See SnapshotPort."""
        return await self._snapshots.create(dict.fromkeys(volume_ids, name), schedule_id=schedule_id)

    def of_volume(self, volume_id: str) -> Sequence[SnapshotRecord]:
        """See SnapshotPort."""
        with self._store.read() as reader:
            return volume_snapshots(reader, volume_id)

    async def delete(self, snapshot_ids: Sequence[str]) -> None:
        """See SnapshotPort."""
        await self._snapshots.delete_ids(snapshot_ids)

    def bases(self) -> Set[str]:
        """See SnapshotPort: no archive exists that goes on from one."""
        return frozenset()

    def volumes_with(self, labels: Mapping[str, str]) -> Sequence[tuple[str, str]]:
        """See SnapshotPort."""
        found = []
        with self._store.read() as reader:
            for key, _ in reader.scan(Table.VOLUMES):
                try:
                    record = reader.record(VolumeRecord, Table.VOLUMES, key)
                except DamagedRecord as error:
                    log.error("%s", error)
                    continue
                if record is None or record.deleting or record.trashed_s:
                    continue
                if labels.items() <= record.labels.items():
                    found.append((record.id, record.name))
        return found
