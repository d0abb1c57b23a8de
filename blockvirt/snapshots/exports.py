"""What NBD clients may name: a volume, a host's logical unit ('web1/lun0'), or a snapshot ('VOLUME@SNAPSHOT')."""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from blockvirt.device import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    DIRTY_SINCE,
    Capabilities,
    ExportInfo,
    VolumeHandle,
    context_matches,
)
from blockvirt.errors import DamagedRecord, NotFound
from blockvirt.limits import NBD_MAX_LISTED_CONTEXTS
from blockvirt.meta.keys import Table, number_key, pair_key, split_point
from blockvirt.meta.records import SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Reader, Store
from blockvirt.snapshots.catalogue import find
from blockvirt.snapshots.readers import SnapshotReaders, are_related, find_base
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.registry import VolumeRegistry
from blockvirt.volumes.versions import branch_record
from blockvirt.volumes.views import Volume

log = logging.getLogger("blockvirt.exports")

MAX_LISTED = 1_000  # names in one answer to NBD_OPT_LIST: each is a reply of its own, and clients show them to people


class Exports:
    """Satisfies device.ExportDirectory for the whole pool (local mode: no masking). Call it on the event loop."""

    def __init__(
        self,
        store: Store,
        catalogue: Catalogue,
        registry: VolumeRegistry,
        readers: SnapshotReaders,
        resolve_unit: Callable[[str], str],
        unit_exports: Callable[[], Sequence[str]],
    ) -> None:
        """``resolve_unit`` gives the volume id behind 'HOST/lunN'; ``unit_exports`` lists such names."""
        self._store = store
        self._catalogue = catalogue
        self._registry = registry
        self._readers = readers
        self._resolve_unit = resolve_unit
        self._unit_exports = unit_exports

    def names(self) -> Sequence[str]:
        """See ExportDirectory: volumes in the order of names, then units; the first MAX_LISTED of them.

        Snapshots are not listed: a volume may have thousands, and a client that lists opens each to describe it.
        """
        return (*self._catalogue.names(MAX_LISTED), *self._unit_exports())[:MAX_LISTED]

    async def describe(self, name: str) -> ExportInfo:
        """See ExportDirectory."""
        if "@" in name:
            volume, snapshot = self._snapshot(name)
            return ExportInfo(
                # Its own name, not the volume's: nothing that a session of the volume writes concerns it.
                name=f"{volume.name}@{snapshot.name}",
                description=f"a snapshot of {volume.name}",
                size_bytes=snapshot.size_bytes,
                block_bytes=self._readers.chunk_bytes,
                capabilities=Capabilities(read_only=True),
            )
        found = self._volume(name)
        return ExportInfo(
            # The same under all of its export names: sessions of one volume must know of one another.
            name=found.name,
            description="",
            size_bytes=found.size_bytes,
            block_bytes=found.chunk_bytes,
            capabilities=Capabilities(),
        )

    def contexts(self, name: str, query: str) -> Sequence[str]:
        """See ExportDirectory. Of a snapshot's bitmaps the list has those since its ancestors, nearest first.

        By its full name the bitmap since any other snapshot of the same volume is found, younger ones included; and
        since one of another volume, such as a clone's origin, as VOLUME@SNAPSHOT.
        """
        fixed = [context for context in (BASE_ALLOCATION, ALLOCATION_DEPTH) if context_matches(context, query)]
        if "@" not in name:
            self._volume(name)
            return fixed
        with self._store.read() as reader:
            _, snapshot = _readable(reader, name)
            if query.startswith(DIRTY_SINCE):
                try:
                    other = find_base(reader, snapshot.volume_id, query.removeprefix(DIRTY_SINCE))
                except NotFound:
                    return []
                return [query] if other.id != snapshot.id and are_related(reader, snapshot, other) else []
            if context_matches(DIRTY_SINCE, query):
                room = NBD_MAX_LISTED_CONTEXTS - len(fixed)
                fixed += [DIRTY_SINCE + each.name for each in islice(ancestors(reader, snapshot), room)]
        return fixed

    async def open(self, name: str, session_id: str, contexts: Sequence[str] = ()) -> VolumeHandle:
        """See ExportDirectory."""
        if "@" in name:
            return self._readers.open(self._snapshot(name)[1], session_id, contexts)
        return await self._registry.open(self._volume(name).id, session_id)

    def _volume(self, name: str) -> Volume:
        if not name:
            raise NotFound("no export was named", correction="name a volume: nbd+unix:///NAME?socket=...")
        return self._catalogue.get(self._resolve_unit(name) if "/" in name else name)

    def _snapshot(self, name: str) -> tuple[VolumeRecord, SnapshotRecord]:
        with self._store.read() as reader:
            return _readable(reader, name)


def _readable(reader: Reader, name: str) -> tuple[VolumeRecord, SnapshotRecord]:
    """Return a volume and the snapshot of it that 'VOLUME@SNAPSHOT' names; raises NotFound, DamagedRecord."""
    snapshot = find(reader, name)
    volume = reader.record(VolumeRecord, Table.VOLUMES, snapshot.volume_id.encode())
    if volume is None:
        raise NotFound(f"the volume of snapshot {name!r} was deleted", correction="see 'blockvirt trash list'")
    return volume, snapshot


def ancestors(reader: Reader, snapshot: SnapshotRecord) -> Iterator[SnapshotRecord]:
    """Yield the snapshots of the same volume that a snapshot's history went through, nearest first.

    Cost: theirs, whatever the volume holds beside them. Damaged ones are left out; raises DamagedRecord for a branch.
    """
    branch, epoch = snapshot.branch, snapshot.epoch
    while True:
        rows = reader.scan(Table.POINTS, start=pair_key(branch, epoch + 1), prefix=number_key(branch), reverse=True)
        for key, _ in rows:
            who = split_point(key)[2]
            found = _found(reader, who) if isinstance(who, str) and who != snapshot.id else None
            if found is not None:
                yield found
        record = branch_record(reader, branch)
        if not record.origin_branch or branch_record(reader, record.origin_branch).volume_id != snapshot.volume_id:
            return
        branch, epoch = record.origin_branch, record.origin_epoch


def _found(reader: Reader, snapshot_id: str) -> SnapshotRecord | None:
    try:
        return reader.record(SnapshotRecord, Table.SNAPSHOTS, snapshot_id.encode())
    except DamagedRecord as error:
        log.error("snapshot %s: %s", snapshot_id, error)
        return None
