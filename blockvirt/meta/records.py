"""Catalogue records: what they hold, and how they are stored.

A stored record is ``version byte | JSON | CRC-32C``; the CRC covers the key as well as the value, so that a record
that turns up under another's key is found out. Map records (leaves) have a binary form of their own in
``lun.leaf``. Pure: no I/O.
"""

import json
import struct
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar, get_args

from blockvirt.checksum import crc32c
from blockvirt.errors import DamagedRecord, MetadataFault
from blockvirt.meta.keys import shown

RECORD_VERSION = 1
REVERTED = "it was reverted to snapshot "
"""How ``BranchRecord.stopped`` begins where it was a revert that stopped a volume, and not a failure."""
_CRC = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """The pool itself: one record."""

    id: str
    format_version: int
    chunk_bytes: int
    created_s: float
    epoch: int
    """The last epoch handed out; the next branch head or snapshot takes epoch + 1."""
    next_branch: int
    next_file: int
    overcommit_ratio: float = 10.0
    near_ratio: float = 0.80
    """Used / capacity at which health turns to "near"."""
    brake_ratio: float = 0.90
    """Used / capacity at which no new volume is created and none grown."""


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """A directory on a disk, given to the pool."""

    id: str
    name: str
    path: str
    added_s: float
    limit_bytes: int | None = None
    """Use at most so much of the filesystem; None: all of it."""
    reserve_bytes: int = 0
    """Leave so much of the filesystem free."""
    labels: dict[str, str] = field(default_factory=dict)
    """What volumes can ask for in their placement."""


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """A volume: what a consumer allocated."""

    id: str
    name: str
    size_bytes: int
    branch: int
    created_s: float
    revision: int = 1
    labels: dict[str, str] = field(default_factory=dict)
    placement_devices: tuple[str, ...] = ()
    """Names of devices that may hold its data; empty: any."""
    placement_labels: dict[str, str] = field(default_factory=dict)
    """Only devices that carry all of these labels may hold its data; empty: any."""
    deleting: bool = False
    trashed_s: float = 0.0
    """When it was put into the trash; 0: it is not there."""
    purge_at_s: float = 0.0
    """When the trash lets go of it."""
    importing: str = ""
    """A snapshot stream is being imported: 'new' into a volume made for it, else the id of its base here."""


@dataclass(frozen=True, slots=True)
class BranchRecord:
    """One linear history of a volume's map."""

    number: int
    volume_id: str
    head_epoch: int
    """Epoch that the head writes in; 0: the branch has no head."""
    origin_branch: int = 0
    """0: no origin."""
    origin_epoch: int = 0
    first_epoch: int = 0
    """Epoch that the branch began in: no version of a leaf is older."""
    pins: tuple[tuple[int, int], ...] = ()
    """Further (branch, epoch) whose addresses its versions may hold: origins that its origin has let go of."""
    covered_generation: int = 0
    """Journal generations up to this one are in the map."""
    covered_sequence: int = 0
    """Number of the last frame of the covered generations. It starts at random: the journal holds bytes of the guest's
    choice too, and what lies there from older generations must not look like the frame that comes next."""
    journal_chain: int = 0
    """CRC that the next generation's first frame continues from."""
    mapped_chunks: int = 0
    """What the head sees, origins included."""
    inherited_chunks: int = 0
    """How many of these lie in files of other branches."""
    stopped: str = ""
    """Why the volume answers nothing (I7, or reverted under a guest), until an administrator reopens it."""

    @property
    def awaits_guests(self) -> bool:
        """Whether it is stopped for its guests' sake alone, reverted under them: what it holds is whole."""
        return self.stopped.startswith(REVERTED)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A backing file: chunks are appended to it, addresses in it are never reused."""

    number: int
    branch: int
    device_id: str
    used_chunks: int = 0
    """High-water mark: chunk numbers below it have been handed out."""
    live_chunks: int = 0
    """How many of them some version of a leaf names."""
    sealed: bool = False
    """No chunk is appended any more (rotated)."""


@dataclass(frozen=True, slots=True)
class HostRecord:
    """A consumer of logical units: a VM or a hypervisor."""

    id: str
    name: str
    created_s: float
    revision: int = 1
    labels: dict[str, str] = field(default_factory=dict)
    deleting: bool = False


@dataclass(frozen=True, slots=True)
class UnitRecord:
    """A logical unit: a volume as one host sees it, under a number."""

    id: str
    host_id: str
    number: int
    volume_id: str
    created_s: float
    deleting: bool = False


@dataclass(frozen=True, slots=True)
class IdempotencyRecord:
    """What was answered to a request with an Idempotency-Key."""

    key: str
    request_sha256: str
    status: int
    body: str
    location: str
    created_s: float


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """A snapshot: what its volume's head saw when ``epoch`` of ``branch`` was closed."""

    id: str
    volume_id: str
    name: str
    branch: int
    epoch: int
    size_bytes: int
    """Of the volume at that time."""
    created_s: float
    mapped_chunks: int = 0
    """What it sees, origins included."""
    revision: int = 1
    labels: dict[str, str] = field(default_factory=dict)
    holds: tuple[str, ...] = ()
    """Tags that each keep it from being deleted."""
    group_id: str = ""
    """Shared by the snapshots that were taken in one instant; empty: taken alone."""
    schedule_id: str = ""
    """The schedule that took it; empty: somebody asked for it."""
    source_id: str = ""
    """The snapshot that it is a copy of, imported from a stream; empty: it was taken here."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """Something that takes time, and goes on after a restart."""

    id: str
    kind: str
    """'flatten', 'reclaim', 'purge' or 'scrub'."""
    state: str
    """'queued', 'running', 'paused', 'done', 'failed' or 'cancelled'."""
    subject: str
    """What it works on, for people: the name of a volume or a snapshot."""
    created_s: float
    volume_id: str = ""
    branch: int = 0
    started_s: float = 0.0
    finished_s: float = 0.0
    done_units: int = 0
    total_units: int = 0
    """0: not known yet. What a unit is depends on the kind."""
    position: int = 0
    """Where to go on after a restart; its meaning depends on the kind."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class ScheduleRecord:
    """When snapshots are taken by themselves, of which volumes, and how many are kept."""

    id: str
    name: str
    cron: str
    """Five fields as in crontab(5), in UTC."""
    created_s: float
    volume_id: str = ""
    """One volume; empty: those that carry ``labels``."""
    labels: dict[str, str] = field(default_factory=dict)
    keep: dict[str, int] = field(default_factory=dict)
    """Rule ('last', 'hourly' ...) -> how many; empty: nothing is ever pruned."""
    paused: bool = False
    revision: int = 1
    due_after_s: float = 0.0
    """The next run is the first one due after this: later than the last run, the last change of ``cron``, a pause."""
    last_run_s: float = 0.0
    """When it last ran, whatever came of it; 0: never."""
    last_error: str = ""
    """What went wrong in the last run; empty: nothing."""
    missed_runs: int = 0
    """Runs that did not take place because the daemon was down, or a volume could not be snapshotted."""


@dataclass(frozen=True, slots=True)
class ScrubFinding:
    """One piece of damage that a scrub found; a part of its record."""

    kind: str
    """'chunk', 'file' (a whole backing file), 'record' (a row of the metadata) or 'metadata' (its file)."""
    problem: str
    """What is wrong, in words."""
    concerns: tuple[str, ...] = ()
    """Volumes, and snapshots as VOLUME@SNAPSHOT, that see it; only the first few."""
    path: str = ""
    """The backing file, or that of the metadata."""
    offset_bytes: int = 0
    """Where in that file."""
    length_bytes: int = 0
    """How much of it; 0: all of the file, or a row."""
    volume_offset_bytes: int = 0
    """Of a chunk: where in the volumes that see it."""
    address: int = 0
    """Of a chunk: its address; of a file: its number."""


@dataclass(frozen=True, slots=True)
class ScrubRecord:
    """A scrub: what it is to read, how far it has come, and what it found. The job of the same id does it."""

    id: str
    created_s: float
    volumes: tuple[str, ...] = ()
    """Ids of the volumes that it is about, in order; empty: everything."""
    names: tuple[str, ...] = ()
    """What they were called at the beginning."""
    rate_bytes: int = 0
    """Bytes per second that it may read; 0: as configured."""
    scheduled_for_s: float = 0.0
    """The scheduled run that it does; 0: somebody asked for it."""
    begun_s: float = 0.0
    ended_s: float = 0.0
    """When it was through with everything; 0: it was not yet, or never will be."""
    cursor: str = ""
    """Where to go on: a step, a colon, a key in hexadecimal digits; empty: from the beginning."""
    read_bytes: int = 0
    """Of the metadata's file and of chunks."""
    records: int = 0
    """Rows of the metadata that were decoded."""
    chunks: int = 0
    """Sealed chunks that were compared with their checksums."""
    unread_chunks: int = 0
    """Sealed chunks that could not be looked at: their device is away."""
    damaged: int = 0
    """How much damage was found."""
    findings: tuple[ScrubFinding, ...] = ()
    """What was found, in detail; only the first ones."""

    def __post_init__(self) -> None:
        """Make findings of what JSON has for them."""
        if any(isinstance(each, dict) for each in self.findings):
            made = tuple(_finding(each) for each in self.findings)
            object.__setattr__(self, "findings", made)


def _finding(stored: Any) -> ScrubFinding:
    return ScrubFinding(**(stored | {"concerns": tuple(stored["concerns"])}))


Record = (
    PoolRecord
    | DeviceRecord
    | VolumeRecord
    | BranchRecord
    | FileRecord
    | HostRecord
    | UnitRecord
    | IdempotencyRecord
    | SnapshotRecord
    | JobRecord
    | ScheduleRecord
    | ScrubRecord
)
R = TypeVar("R", bound=Record)


def seal(key: bytes, payload: bytes) -> bytes:
    """Return ``payload`` with the CRC-32C over ``key`` and ``payload`` behind it."""
    return payload + _CRC.pack(crc32c(payload, crc32c(key)))


def unseal(key: bytes, stored: bytes, *, what: str) -> bytes:
    """Return the payload of a sealed value; raises DamagedRecord if its checksum does not fit its key and bytes."""
    payload = stored[:-4]
    if len(stored) < 5 or crc32c(payload, crc32c(key)) != _CRC.unpack(stored[-4:])[0]:
        by_key = "" if what.endswith(f" {shown(key)}") else f" (key {shown(key)})"
        raise _damaged(what, by_key, "its CRC-32C does not match")
    return payload


def _damaged(what: str, by_key: str, cause: str) -> DamagedRecord:
    return DamagedRecord(
        f"the metadata record of {what} is damaged{by_key}",
        cause=cause,
        correction="run 'blockvirt check'; 'blockvirt check --restore-metadata' brings back the newest intact copy",
        what=what,
    )


def punch_count(key: bytes, stored: bytes) -> int:
    """Return how many chunks a row of the punch table frees; raises DamagedRecord."""
    return int.from_bytes(unseal(key, stored, what="a punch row"), "little")


def encode(key: bytes, record: Record) -> bytes:
    """Return the stored form of a catalogue record under ``key``."""
    body = json.dumps(asdict(record), separators=(",", ":"), sort_keys=True).encode()
    return seal(key, bytes([RECORD_VERSION]) + body)


_FIELD_NAMES: dict[type, frozenset[str]] = {
    kind: frozenset(each.name for each in fields(kind)) for kind in get_args(Record)
}


def decode(cls: type[R], key: bytes, stored: bytes) -> R:
    """Return the record stored under ``key``; raises DamagedRecord, or MetadataFault for a newer record version."""
    what = f"{cls.__name__.removesuffix('Record').lower()} {shown(key)}"
    payload = unseal(key, stored, what=what)
    if payload[0] != RECORD_VERSION:
        raise MetadataFault(
            f"{what} has record version {payload[0]}, this blockvirt reads {RECORD_VERSION}",
            correction="use the blockvirt version that wrote it, or a newer one",
        )
    try:
        return _record_of(cls, json.loads(payload[1:]), what)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise _damaged(what, "", f"its fields cannot be understood: {error}") from error


def _record_of(cls: type[R], values: object, what: str) -> R:
    if not isinstance(values, dict):
        raise TypeError("it is no object")
    if unknown := values.keys() - _FIELD_NAMES[cls]:
        raise MetadataFault(f"{what} has unknown fields {sorted(unknown)}", correction="use a newer blockvirt")
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(tuple(each) if isinstance(each, list) else each for each in value)
    return cls(**values)
