"""What the catalogue tells of a volume: one frozen view per volume, read from several records at once.

Read with a ``Reader`` of the metadata store: a few microseconds per record, so a caller on the event loop reads at most
``READ_BATCH`` volumes before it lets others run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from blockvirt.errors import DamagedRecord
from blockvirt.meta.keys import Table, number_key, split_pair, split_volume_branch
from blockvirt.meta.records import BranchRecord, DeviceRecord, FileRecord, HostRecord, VolumeRecord
from blockvirt.meta.store import Reader
from blockvirt.volumes.ports import OpenVolumes

READ_BATCH = 25  # volumes; about 1 ms of decoding


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume as users see it. Sizes are bytes."""

    id: str
    name: str
    size_bytes: int
    mapped_bytes: int
    chunk_bytes: int
    state: str
    """'available', 'in-use' (a session is open), 'stopped' (a sync failed: it waits to be reopened, whether sessions
    are open or not), 'importing' (a snapshot stream is, and nobody else may use it) or 'damaged' (a record of it is;
    its other figures mean nothing)."""
    created_s: float
    revision: int
    sessions: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    placement_devices: tuple[str, ...] = ()
    placement_labels: dict[str, str] = field(default_factory=dict)
    units: tuple[str, ...] = ()
    """Export names of the logical units that show it to hosts, such as 'web1/lun0'."""
    damage: str = ""
    """What is damaged, or why it stopped."""


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """How much of a volume lies on one device."""

    device: str
    files: int
    live_bytes: int
    """As of the last checkpoint."""


def read_volume(reader: Reader, volume_id: str, name: str, chunk_bytes: int, open_volumes: OpenVolumes) -> Volume:
    """Return the view of a volume; a damaged record makes a view in the state 'damaged', not an error."""
    try:
        record = reader.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
        if record is None:
            return damaged_view(volume_id, name, chunk_bytes, "its name is in the index, its record is missing")
        return view(reader, record, chunk_bytes, open_volumes)
    except DamagedRecord as error:
        return damaged_view(volume_id, name, chunk_bytes, error.message)


def carries_labels(reader: Reader, volume_id: str, labels: Mapping[str, str]) -> bool:
    """Tell whether a volume carries all of ``labels``; a damaged one carries none that can be known."""
    try:
        record = reader.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
    except DamagedRecord:
        return False
    return record is not None and labels.items() <= record.labels.items()


def view(reader: Reader, record: VolumeRecord, chunk_bytes: int, open_volumes: OpenVolumes) -> Volume:
    """Return the view of a volume whose own record is at hand; raises DamagedRecord for those around it."""
    mapped_chunks = open_volumes.mapped_chunks(record.id)
    stopped = open_volumes.stopped_reason(record.id)
    if mapped_chunks is None:
        branch = reader.record(BranchRecord, Table.BRANCHES, number_key(record.branch))
        if branch is None:
            raise DamagedRecord(
                f"volume {record.name!r} names branch {record.branch}, which does not exist",
                correction="run 'blockvirt check'; 'blockvirt check --restore-metadata' brings back an intact copy",
            )
        mapped_chunks, stopped = branch.mapped_chunks, stopped or branch.stopped
    sessions = open_volumes.sessions_of(record.id)
    return Volume(
        id=record.id,
        name=record.name,
        size_bytes=record.size_bytes,
        # The last chunk may reach beyond the end: nobody can have mapped more than the volume is large.
        mapped_bytes=min(mapped_chunks * chunk_bytes, record.size_bytes),
        chunk_bytes=chunk_bytes,
        state=_state(record, stopped, sessions),
        created_s=record.created_s,
        revision=record.revision,
        sessions=sessions,
        labels=dict(record.labels),
        placement_devices=record.placement_devices,
        placement_labels=dict(record.placement_labels),
        units=unit_names(reader, record.id),
        damage=stopped,
    )


def _state(record: VolumeRecord, stopped: str, sessions: int) -> str:
    if stopped:
        return "stopped"
    if record.importing:
        return "importing"
    return "in-use" if sessions else "available"


def damaged_view(volume_id: str, name: str, chunk_bytes: int, damage: str) -> Volume:
    """Return the view of a volume that cannot be read: it is quarantined, the others go on."""
    return Volume(volume_id, name, 0, 0, chunk_bytes, "damaged", 0.0, 0, damage=damage)


def unit_names(reader: Reader, volume_id: str) -> tuple[str, ...]:
    """Return the export names under which hosts see a volume."""
    names = []
    for key, _ in reader.scan(Table.VOLUME_UNITS, prefix=f"{volume_id}/".encode()):
        _, host_id, number = key.decode().split("/")
        host = reader.record(HostRecord, Table.HOSTS, host_id.encode())
        names.append(f"{host.name if host else host_id}/lun{int(number)}")
    return tuple(names)


def files_of_volume(reader: Reader, volume_id: str) -> list[FileRecord]:
    """Return the backing files of all branches of a volume."""
    rows = reader.scan(Table.VOLUME_BRANCHES, prefix=f"{volume_id}/".encode())
    prefixes = [number_key(split_volume_branch(key)[1]) for key, _ in rows]
    numbers = [split_pair(key)[1] for prefix in prefixes for key, _ in reader.scan(Table.BRANCH_FILES, prefix=prefix)]
    files = [reader.record(FileRecord, Table.FILES, number_key(number)) for number in numbers]
    return [file for file in files if file is not None]


def read_shares(reader: Reader, volume_id: str, chunk_bytes: int) -> tuple[DeviceShare, ...]:
    """Return where the data of a volume lies, its snapshots' included, by device name."""
    files: dict[str, int] = {}
    chunks: dict[str, int] = {}
    for file in files_of_volume(reader, volume_id):
        files[file.device_id] = files.get(file.device_id, 0) + 1
        chunks[file.device_id] = chunks.get(file.device_id, 0) + file.live_chunks
    shares = []
    for device_id, count in files.items():
        device = reader.record(DeviceRecord, Table.DEVICES, device_id.encode())
        name = device.name if device else device_id
        shares.append(DeviceShare(name, count, chunks[device_id] * chunk_bytes))
    return tuple(sorted(shares, key=lambda share: share.device))
