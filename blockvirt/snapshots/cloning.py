"""Clones: volumes that begin as what a snapshot holds, at once, whatever the size."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from blockvirt.errors import Exists, InvalidSize
from blockvirt.meta.records import SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Store, Writer
from blockvirt.snapshots.catalogue import Snapshots
from blockvirt.snapshots.histories import origin_of
from blockvirt.volumes.catalogue import Catalogue, Created
from blockvirt.volumes.requests import NewVolume


@dataclass(frozen=True, slots=True)
class NewClone:
    """A clone to create; nothing has to be given."""

    size_bytes: int | None = None
    """None: the snapshot's."""
    name: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    placement_devices: tuple[str, ...] = ()
    placement_labels: Mapping[str, str] = field(default_factory=dict)


class Cloning:
    """Makes clones. One per process; call it on the event loop."""

    def __init__(self, store: Store, catalogue: Catalogue, snapshots: Snapshots) -> None:
        self._store = store
        self._catalogue = catalogue
        self._snapshots = snapshots

    async def clone(
        self,
        name_or_id: str,
        wanted: NewClone,
        *,
        also: Callable[[Writer, VolumeRecord, SnapshotRecord], None] | None = None,
    ) -> Created:
        """Create a volume from the snapshot 'VOLUME@NAME' (or its id); the same request again returns what is there.

        ``also`` runs in the transaction that creates it, with the new record and its origin. Raises NotFound,
        InvalidSize (less than the snapshot's), and what creating a volume raises.
        """
        origin = self._snapshots.find(name_or_id)
        size_bytes = origin.size_bytes if wanted.size_bytes is None else wanted.size_bytes
        if size_bytes < origin.size_bytes:
            raise InvalidSize(
                f"a clone of {origin.name!r} cannot have {size_bytes} bytes",
                cause=f"the snapshot has {origin.size_bytes}",
                correction="leave the size out, or ask for more",
                size_bytes=origin.size_bytes,
            )
        volume = NewVolume(
            size_bytes=size_bytes,
            name=wanted.name,
            labels=wanted.labels,
            placement_devices=wanted.placement_devices,
            placement_labels=wanted.placement_labels,
        )

        def join(writer: Writer, record: VolumeRecord) -> None:
            if also is not None:
                also(writer, record, origin)

        made = await self._catalogue.create(volume, also=join, origin=origin)
        if not made.created:
            self._check_same(made, origin)
        return made

    def _check_same(self, made: Created, origin: SnapshotRecord) -> None:
        with self._store.read() as reader:
            found = origin_of(reader, made.volume.id)
        if found is None or found.id != origin.id:
            raise Exists(
                f"a volume {made.volume.name!r} exists already and is no clone of {origin.name!r}",
                correction="choose another name",
                volume_id=made.volume.id,
            )
