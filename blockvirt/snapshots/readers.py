"""Which snapshots are open for reading: opened for the first session, shared by all, closed after the last."""

from collections.abc import Mapping, Sequence

from blockvirt.device import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_SINCE
from blockvirt.errors import NotFound
from blockvirt.meta.keys import Table, snapshot_name_key
from blockvirt.meta.records import SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Reader
from blockvirt.snapshots.changes import Point, chain_of
from blockvirt.snapshots.reader import OpenSnapshot, SnapshotHandle
from blockvirt.volumes.context import VolumeContext
from blockvirt.volumes.transactions import locate
from blockvirt.volumes.versions import branch_record


class SnapshotReaders:
    """The open snapshots of the pool. One per process; call it on the event loop."""

    def __init__(self, context: VolumeContext) -> None:
        self.chunk_bytes = 1 << context.chunk_shift
        self._context = context
        self._handles: dict[str, set[SnapshotHandle]] = {}
        self._opened: dict[str, OpenSnapshot] = {}
        self._of_session: dict[str, str] = {}

    def open(self, record: SnapshotRecord, session_id: str, contexts: Sequence[str] = ()) -> SnapshotHandle:
        """Open a snapshot for a session that may ask for ``contexts``; raises NotFound, DamagedRecord.

        The snapshots that dirty-bitmap contexts compare with count as in use as long as the handle is open.
        """
        opened = self._opened.get(record.id)
        with self._context.store.read() as reader:
            if reader.get(Table.SNAPSHOTS, record.id.encode()) is None:
                raise NotFound(f"snapshot {record.name!r} was deleted meanwhile")
            bases = _bases(reader, record.volume_id, contexts)
            branch = branch_record(reader, record.branch)
        if opened is None:
            opened = self._opened[record.id] = OpenSnapshot(self._context, record, branch)
        handle = SnapshotHandle(opened, session_id, bases, self._close)
        for snapshot_id in {record.id, *(base.id for base in bases.values())}:
            self._handles.setdefault(snapshot_id, set()).add(handle)
        self._of_session[session_id] = record.volume_id
        return handle

    async def _close(self, handle: SnapshotHandle) -> None:
        self._of_session.pop(handle.session_id, None)
        record = handle.opened.record
        for snapshot_id in {record.id, *(base.id for base in handle.bases.values())}:
            users = self._handles[snapshot_id]
            users.discard(handle)
            if not users:
                del self._handles[snapshot_id]
        if all(other.opened is not handle.opened for other in self._handles.get(record.id, ())):
            self._opened.pop(record.id, None)
            await handle.opened.close()

    def sessions_of(self, snapshot_id: str) -> int:
        """Return how many sessions read a snapshot, or compare with it."""
        return len(self._handles.get(snapshot_id, ()))

    def volume_of(self, session_id: str) -> str | None:
        """Return the id of the volume whose snapshot a session reads."""
        return self._of_session.get(session_id)

    def drop(self, snapshot_id: str) -> None:
        """End the sessions that use a snapshot, without a reply."""
        for handle in list(self._handles.get(snapshot_id, ())):
            handle.lose()

    def drop_volume(self, volume_id: str) -> None:
        """End the sessions that read a volume's snapshots, without a reply."""
        for opened in list(self._opened.values()):
            if opened.record.volume_id == volume_id:
                self.drop(opened.record.id)

    def opened(self) -> Sequence[OpenSnapshot]:
        """Return the snapshots that are open now."""
        return tuple(self._opened.values())

    async def close(self) -> None:
        """Close everything: sessions must be gone or are dropped."""
        for handles in list(self._handles.values()):
            for handle in list(handles):
                handle.lose()
                await handle.close()


def _bases(reader: Reader, volume_id: str, contexts: Sequence[str]) -> Mapping[str, SnapshotRecord]:
    bases = {}
    for context in contexts:
        if context.startswith(DIRTY_SINCE):
            bases[context] = find_base(reader, volume_id, context.removeprefix(DIRTY_SINCE))
        elif context not in (BASE_ALLOCATION, ALLOCATION_DEPTH):
            raise NotFound(f"a snapshot has no metadata context {context!r}", correction="list them first")
    return bases


def find_base(reader: Reader, volume_id: str, name: str) -> SnapshotRecord:
    """Return what a bitmap since ``name`` compares with: a snapshot of the volume, or of another as 'VOLUME@SNAPSHOT'.

    Raises NotFound, DamagedRecord.
    """
    volume, at, snapshot = name.partition("@")
    return find_snapshot(reader, locate(reader, volume)[0], snapshot) if at else find_snapshot(reader, volume_id, name)


def are_related(reader: Reader, one: SnapshotRecord, other: SnapshotRecord) -> bool:
    """Tell whether two snapshots have history in common, so that a bitmap says more than that all differs."""
    first, second = (chain_of(reader, Point(each.branch, each.epoch)) for each in (one, other))
    return not {branch for branch, _ in first}.isdisjoint(branch for branch, _ in second)


def find_snapshot(reader: Reader, volume_id: str, name: str) -> SnapshotRecord:
    """Return a snapshot by its volume and name; raises NotFound, DamagedRecord."""
    stored = reader.get(Table.SNAPSHOT_NAMES, snapshot_name_key(volume_id, name))
    record = reader.record(SnapshotRecord, Table.SNAPSHOTS, stored) if stored is not None else None
    if record is None:
        volume = reader.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
        raise NotFound(
            f"volume {volume.name if volume is not None else volume_id!r} has no snapshot {name[:80]!r}",
            correction="'blockvirt snapshot list' shows what there is",
        )
    return record
