"""What the control plane needs from the rooms around it, as protocols and plain figures.

The catalogue, the HTTP handlers and the metrics are written against these; the volume registry, the NBD server and the
pool satisfy them in ``daemon.py``. Everything here is called on the event loop. Sizes are bytes, times are seconds
since the epoch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class OpenVolumes(Protocol):
    """The volumes that are open right now, and the board whose jobs take deleted ones apart."""

    def is_open(self, volume_id: str) -> bool:
        """Tell whether the volume holds memory and a journal at the moment."""

    def sessions_of(self, volume_id: str) -> int:
        """Return how many sessions use the volume, under whatever export name."""

    def mapped_chunks(self, volume_id: str) -> int | None:
        """Return the live number of mapped chunks of an open volume; None when it is closed: ask its branch record."""

    def stopped_reason(self, volume_id: str) -> str:
        """Return why an open volume, or one that is being closed, has stopped (I7).

        Empty where it has not, and when it is closed: ask its branch record.
        """

    async def resize(self, volume_id: str, size_bytes: int) -> None:
        """Tell an open volume its new size, which is already durable; nothing to do for a closed one."""

    async def discard(self, volume_id: str) -> None:
        """Drop the sessions of a volume and close it without a checkpoint; it is flagged ``deleting`` already."""

    async def reopen(self, volume_id: str) -> None:
        """Bring a volume that has stopped (I7) back as after a power cut; raises InUse where it has not stopped."""

    async def retire(self, volume_id: str) -> None:
        """Drop the sessions of a volume that is in the trash now, and close it with a checkpoint."""

    def wake_jobs(self, *ids: str) -> None:
        """Say that jobs were queued, and which: a deleted volume's chunks, files and records go in the background."""


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One client's session on one export."""

    id: str
    export: str
    volume_id: str
    peer: str
    """'unix:PID', or 'HOST:PORT'."""
    since_s: float
    bytes_read: int
    bytes_written: int
    requests: int
    mode: str
    """'rw' or 'ro'."""


class SessionControl(Protocol):
    """The NBD server's sessions, as an administrator sees them."""

    def sessions(self) -> Sequence[SessionInfo]:
        """Return the sessions that are past the handshake."""

    async def drop(self, session_id: str) -> bool:
        """Close a session's connection without a reply; False: there is no such session (any more)."""

    async def drop_volume(self, volume_id: str) -> int:
        """Close every session on a volume; returns how many."""


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """A device's share of the pool's space."""

    id: str
    name: str
    path: str
    state: str
    """'online', or what keeps it from being used: 'missing', 'foreign', 'read-only', 'failed' ..."""
    capacity_bytes: int
    used_bytes: int
    reserved_bytes: int
    free_bytes: int
    limit_bytes: int | None = None
    reserve_bytes: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""
    """What is wrong with it and what to do, for people; empty when nothing is."""


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """The pool's space at one moment."""

    id: str
    chunk_bytes: int
    capacity_bytes: int
    used_bytes: int
    reserved_bytes: int
    free_bytes: int
    level: str
    """'ok', 'near', 'brake' or 'stop'."""
    overcommit_ratio: float
    near_ratio: float
    brake_ratio: float
    devices: tuple[DeviceStatus, ...] = ()


class PoolSpace(Protocol):
    """Where the figures of the pool come from; cheap enough to ask on each request."""

    def status(self) -> PoolStatus:
        """Return the figures as they are now (statvfs of each device at most once a second)."""

    def policy_changed(self) -> None:
        """Say that the overcommit policy in the pool record was changed."""


class DeviceAdmin(Protocol):
    """Adding devices to the pool and taking empty ones away."""

    async def add(
        self,
        path: str,
        name: str | None,
        limit_bytes: int | None,
        reserve_bytes: int | None,
        labels: Mapping[str, str],
    ) -> DeviceStatus:
        """Label a directory and take it into the pool; ``reserve_bytes`` None: a share of the disk.

        Cancelling the await does not withdraw it. Raises DeviceFault, Exists, LimitReached, InvalidName.
        """

    def list(self) -> Sequence[DeviceStatus]:
        """Return all devices of the pool, usable or not."""

    async def remove(self, name_or_id: str) -> DeviceStatus:
        """Take an empty device out of the pool and return what it was; raises NotFound, InUse, DeviceFault.

        Cancelling the await does not withdraw it.
        """


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the daemon listens: what goes into URIs and into the greeting."""

    state_dir: str
    http_socket: str
    nbd_socket: str
    http_host: str | None = None
    http_port: int = 0
    nbd_host: str | None = None
    nbd_port: int = 0
