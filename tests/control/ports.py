"""Small honest stand-ins for the rooms around the control plane: they keep what they are told and answer from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blockvirt.errors import Exists, InUse, NotFound
from blockvirt.ids import new_id
from blockvirt.meta.keys import POOL_KEY, Table
from blockvirt.meta.records import DeviceRecord, PoolRecord
from blockvirt.meta.store import Store
from blockvirt.units import GIB, MIB
from blockvirt.volumes.ports import DeviceStatus, PoolStatus, SessionInfo

CHUNK_BYTES = 64 << 10


def new_store(path: Path, *, overcommit_ratio: float = 10.0) -> Store:
    """Return a new metadata store that holds a pool."""
    path.mkdir(parents=True, exist_ok=True)
    store = Store.open(path, create=True, map_bytes=64 * MIB, reserve_bytes=MIB)
    pool = PoolRecord(
        id=new_id(),
        format_version=1,
        chunk_bytes=CHUNK_BYTES,
        created_s=1.0,
        epoch=0,
        next_branch=1,
        next_file=1,
        overcommit_ratio=overcommit_ratio,
    )
    store.commit_now(lambda writer: writer.put_record(Table.POOL, POOL_KEY, pool))
    return store


@dataclass
class Sessions:
    """Sessions that tests open; dropping one takes it off the list."""

    open: list[SessionInfo] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def add(self, export: str, volume_id: str) -> SessionInfo:
        """Open a session."""
        session = SessionInfo(f"s{len(self.open) + len(self.dropped)}", export, volume_id, "unix:1", 5.0, 1, 2, 3, "rw")
        self.open.append(session)
        return session

    def sessions(self) -> Sequence[SessionInfo]:
        """The open sessions."""
        return list(self.open)

    async def drop(self, session_id: str) -> bool:
        """Close one."""
        kept = [session for session in self.open if session.id != session_id]
        found = len(kept) < len(self.open)
        self.open = kept
        if found:
            self.dropped.append(session_id)
        return found

    async def drop_volume(self, volume_id: str) -> int:
        """Close those of a volume."""
        ids = [session.id for session in self.open if session.volume_id == volume_id]
        for session_id in ids:
            await self.drop(session_id)
        return len(ids)


@dataclass
class OpenVolumes:
    """Volumes are open while they have sessions."""

    server: Sessions
    sizes: dict[str, int] = field(default_factory=dict)
    live_chunks: dict[str, int] = field(default_factory=dict)
    discarded: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    woken: int = 0

    def is_open(self, volume_id: str) -> bool:
        """Whether it has sessions."""
        return self.sessions_of(volume_id) > 0

    def sessions_of(self, volume_id: str) -> int:
        """How many."""
        return sum(session.volume_id == volume_id for session in self.server.open)

    def mapped_chunks(self, volume_id: str) -> int | None:
        """What a test said."""
        return self.live_chunks.get(volume_id)

    def stopped_reason(self, volume_id: str) -> str:
        """What a test stopped."""
        return "a test" if volume_id in self.stopped else ""

    async def resize(self, volume_id: str, size_bytes: int) -> None:
        """Remember the size."""
        self.sizes[volume_id] = size_bytes

    async def reopen(self, volume_id: str) -> None:
        """Only what a test stopped."""
        if volume_id not in self.stopped:
            raise InUse("the volume has not stopped")
        self.stopped.remove(volume_id)

    async def discard(self, volume_id: str) -> None:
        """Drop the sessions."""
        await self.server.drop_volume(volume_id)
        self.discarded.append(volume_id)

    async def retire(self, volume_id: str) -> None:
        """Drop the sessions."""
        await self.server.drop_volume(volume_id)

    def wake_jobs(self, *ids: str) -> None:
        """Count."""
        self.woken += 1


@dataclass
class Space:
    """A pool of one device whose figures tests set; the policy is the pool record's."""

    store: Store
    capacity_bytes: int = 100 * GIB
    used_bytes: int = 0
    level: str = "ok"

    def status(self) -> PoolStatus:
        """The figures."""
        with self.store.read() as reader:
            pool = reader.record(PoolRecord, Table.POOL, POOL_KEY)
            assert pool is not None
            devices = []
            for key, _ in reader.scan(Table.DEVICES):
                record = reader.record(DeviceRecord, Table.DEVICES, key)
                assert record is not None
                devices.append(_device_status(record, self.capacity_bytes))
        return PoolStatus(
            id=pool.id,
            chunk_bytes=pool.chunk_bytes,
            capacity_bytes=self.capacity_bytes,
            used_bytes=self.used_bytes,
            reserved_bytes=0,
            free_bytes=self.capacity_bytes - self.used_bytes,
            level=self.level,
            overcommit_ratio=pool.overcommit_ratio,
            near_ratio=pool.near_ratio,
            brake_ratio=pool.brake_ratio,
            devices=tuple(devices),
        )

    def policy_changed(self) -> None:
        """Nothing is kept."""


def _device_status(record: DeviceRecord, capacity_bytes: int) -> DeviceStatus:
    return DeviceStatus(
        record.id,
        record.name,
        record.path,
        "online",
        capacity_bytes,
        0,
        0,
        capacity_bytes,
        record.limit_bytes,
        record.reserve_bytes,
        record.labels,
    )


@dataclass
class Devices:
    """Device records without directories; a device named 'full' counts as holding data."""

    store: Store
    space: Space

    async def add(
        self, path: str, name: str | None, limit_bytes: int | None, reserve_bytes: int | None, labels: Mapping[str, str]
    ) -> DeviceStatus:
        """Store a record."""
        name = name or Path(path).name
        record = DeviceRecord(new_id(), name, path, 1.0, limit_bytes, reserve_bytes or 0, dict(labels))
        if any(device.name == record.name for device in self.list()):
            raise Exists(f"there is a device {record.name!r} already", correction="choose another name")
        await self.store.commit(lambda writer: writer.put_record(Table.DEVICES, record.id.encode(), record))
        return _device_status(record, self.space.capacity_bytes)

    def list(self) -> Sequence[DeviceStatus]:
        """All records."""
        return self.space.status().devices

    async def remove(self, name_or_id: str) -> DeviceStatus:
        """Delete a record."""
        for device in self.list():
            if name_or_id in (device.name, device.id):
                if device.name == "full":
                    raise InUse("device 'full' holds data", correction="delete what lies on it")
                key = device.id.encode()
                break
        else:
            raise NotFound(f"there is no device {name_or_id!r}")
        await self.store.commit(lambda writer: writer.delete(Table.DEVICES, key))
        return device


@dataclass
class Clock:
    """A clock that tests set."""

    now_s: float = 1_000_000.0

    def __call__(self) -> float:
        """The time."""
        return self.now_s
