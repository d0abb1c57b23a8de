"""What goes over the wire, as pydantic models: the OpenAPI document is generated from them.

Those of snapshots, schedules and jobs have modules of their own; what all requests and answers are made of is in
``wire``.
"""

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from blockvirt.api.wire import Answer, DeleteQuery, Labels, Query, Request, Size
from blockvirt.limits import MAX_UNITS_PER_HOST

# --- requests ------------------------------------------------------------------------------------------------------


class Placement(Request):
    """Which devices may hold a volume's data; all of them where nothing is said."""

    devices: list[str] = Field(default_factory=list, description="Names of devices.")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels that a device must carry, all of them.")


class VolumeCreate(Request):
    """A volume to create: a size is enough."""

    size: Size
    name: str | None = Field(None, description="1 to 63 of a-z 0-9 . _ -; made up where it is missing.")
    labels: Labels = Field(default_factory=dict)
    placement: Placement = Field(default_factory=lambda: Placement.model_validate({}))


class VolumePatch(Request):
    """What to change of a volume. Sizes only grow; labels are replaced as a whole."""

    name: str | None = None
    size: Size | None = None
    labels: Labels | None = None
    reconnect: bool = Field(
        False, description="Drop the volume's sessions after it grew, so that clients that reconnect see the new size."
    )


class HostCreate(Request):
    """A host to create."""

    name: str
    labels: Labels = Field(default_factory=dict)


class UnitCreate(Request):
    """A volume to show to a host as a logical unit."""

    volume: str = Field(description="Name or id of the volume.")
    number: int | None = Field(None, ge=0, lt=MAX_UNITS_PER_HOST, description="The next free one where it is missing.")


class DeviceCreate(Request):
    """A directory to take into the pool as a device."""

    path: str = Field(max_length=4096, pattern=r"^/[^\x00]*$", description="An absolute path on the daemon's machine.")
    name: str | None = Field(None, description="Made from the path where it is missing.")
    limit: Size | None = Field(None, description="Use at most so much of its filesystem.")
    reserve: Size | None = Field(None, description="Leave so much of its filesystem free; by default 1 %.")
    labels: Labels = Field(default_factory=dict)


class PoolPatch(Request):
    """What to change of the pool's policy."""

    overcommit_ratio: float | None = Field(None, ge=1, le=1000, description="Promised bytes / capacity, at most.")
    near_ratio: float | None = Field(None, gt=0, le=1, description="Used / capacity at which the level is 'near'.")
    brake_ratio: float | None = Field(
        None, gt=0, le=1, description="Used / capacity at which no volume is created or grown any more."
    )


class VolumeDeleteQuery(DeleteQuery):
    """How hard to try, for how long, or only to say what would go."""

    purge: bool = Field(False, description="For good, at once: not into the trash.")


class TrashRestore(Request):
    """How to take a volume out of the trash."""

    name: str | None = Field(None, description="Its new name; the one that it had, where it is missing.")


class SessionQuery(Query):
    """Which sessions."""

    volume: str | None = Field(None, description="Name or id of a volume: only its sessions.")


# --- answers -------------------------------------------------------------------------------------------------------


class DeviceShare(Answer):
    """How much of a volume lies on one device, as of its last checkpoint."""

    device: str
    files: int
    live_bytes: int


class Volume(Answer):
    """A volume."""

    id: str
    name: str
    state: Literal["available", "in-use", "stopped", "importing", "damaged"]
    size_bytes: int
    mapped_bytes: int = Field(description="What it occupies; the rest was never written, or was trimmed.")
    chunk_bytes: int
    labels: Labels
    placement: Placement
    nbd_uris: list[str]
    units: list[str] = Field(description="Logical units that show it to hosts, such as 'web1/lun0'.")
    sessions: int
    revision: int = Field(description="Also the ETag.")
    created_at: datetime
    requested_size_bytes: int | None = Field(None, description="Only where the size was rounded up to whole sectors.")
    located: list[DeviceShare] | None = Field(None, description="Where its data lies; only when one volume is shown.")
    damage: str | None = Field(None, description="What is damaged, or why it stopped; only in those states.")
    snapshots: int = Field(0, description="How many it has.")
    origin: str | None = Field(
        None,
        description="The VOLUME@SNAPSHOT that it was cloned from and still needs; VOLUME alone where the snapshot was "
        "deleted. Missing: it shares nothing with other volumes.",
    )
    exclusive_bytes: int | None = Field(
        None, description="What deleting it with its snapshots would free; only when one volume is shown."
    )
    snapshot_bytes: int | None = Field(
        None, description="What deleting all of its snapshots would free; only when one volume is shown."
    )


class VolumeList(Answer):
    """A page of volumes in the order of their names."""

    volumes: list[Volume]
    next_page_token: str | None = Field(None, description="Missing on the last page.")


class VolumeDeletion(Answer):
    """What a delete took away, or would take away."""

    deleted: bool
    volume: Volume
    obstacles: list[str] = Field(description="Why it is refused without force.")
    freed_bytes: int = Field(description="What comes back when it is gone for good, with its snapshots.")
    snapshots: int = Field(description="How many go with it.")
    purge_at: datetime | None = Field(None, description="When the trash lets go of it; missing: it goes at once.")
    job_id: str | None = Field(None, description="The job that takes it apart; missing: it is in the trash.")


class VolumesNamed(Request):
    """Volumes that something is asked about."""

    volumes: list[str] = Field(min_length=1, description="Names or ids.")


class VolumesSpace(Answer):
    """What volumes hold together."""

    volumes: list[str] = Field(description="Their names.")
    freed_bytes: int = Field(description="What comes back when all of them are gone for good, with their snapshots.")


class TrashedVolume(Answer):
    """A volume in the trash: its name is free, its bytes stay promised."""

    id: str
    name: str = Field(description="Its name when it was deleted; several may have had the same.")
    size_bytes: int
    snapshots: int
    trashed_at: datetime
    purge_at: datetime


class TrashList(Answer):
    """A page of the trash: what goes first comes first."""

    volumes: list[TrashedVolume]
    next_page_token: str | None = None


class TrashPurge(Answer):
    """What a purge would take away."""

    volume: TrashedVolume
    freed_bytes: int


class Unit(Answer):
    """A logical unit: a volume as one host sees it."""

    id: str
    export: str = Field(description="What an NBD client opens: 'web1/lun0'.")
    host: str
    number: int
    volume: str
    volume_id: str
    size_bytes: int
    state: Literal["active", "deleting"]
    nbd_uris: list[str]
    created_at: datetime


class UnitList(Answer):
    """The logical units of a host in the order of their numbers."""

    luns: list[Unit]


class Host(Answer):
    """A consumer of logical units."""

    id: str
    name: str
    state: Literal["active", "deleting"]
    labels: Labels
    luns: list[Unit]
    revision: int
    created_at: datetime


class HostList(Answer):
    """A page of hosts in the order of their names."""

    hosts: list[Host]
    next_page_token: str | None = None


class AttachInfo(Answer):
    """How to attach an export, ready to paste."""

    export: str
    volume_id: str
    nbd_uris: list[str]
    qemu: str = Field(description="QEMU options as shell words: -blockdev and -device.")
    qemu_blockdev: str
    qemu_device: str
    libvirt_xml: str
    nbd_client: str
    nbdcopy_in: str
    nbdcopy_out: str


class Device(Answer):
    """A device of the pool."""

    id: str
    name: str
    path: str
    state: str
    capacity_bytes: int
    used_bytes: int
    reserved_bytes: int
    free_bytes: int
    limit_bytes: int | None = None
    reserve_bytes: int
    labels: Labels
    problem: str | None = None


class DeviceList(Answer):
    """The devices of the pool."""

    devices: list[Device]


class Pool(Answer):
    """The pool and its space."""

    id: str
    level: Literal["ok", "near", "brake", "stop"]
    capacity_bytes: int
    used_bytes: int
    promised_bytes: int = Field(description="The sum of the sizes of all volumes.")
    reserved_bytes: int
    free_bytes: int
    chunk_bytes: int
    volumes: int
    overcommit_ratio: float
    near_ratio: float
    brake_ratio: float
    devices: list[Device]


class SizeInfo(Answer):
    """The largest volume that one could get now."""

    largest_bytes: int
    limited_by: Literal["volume-maximum", "overcommit", "pool-full"]
    explanation: str


class Session(Answer):
    """A client's session on an export."""

    id: str
    export: str
    volume_id: str
    volume: str
    peer: str
    mode: Literal["rw", "ro"]
    since: datetime
    bytes_read: int
    bytes_written: int
    requests: int


class SessionList(Answer):
    """The sessions that are open."""

    sessions: list[Session]


class SessionsDropped(Answer):
    """How many sessions were dropped."""

    dropped: int


class Health(Answer):
    """Whether the daemon lives, or is ready to serve."""

    status: Literal["ok", "starting", "stopping", "failed"]
    reason: str | None = None


class FieldProblem(Answer):
    """What is wrong with one field of a request."""

    pointer: str = Field(description="RFC 6901 JSON pointer into the body, or the name of a parameter.")
    detail: str


class Problem(Answer):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str = Field(description="What happened, and to what.")
    instance: str | None = Field(None, description="The path asked for; missing where the request has none.")
    code: str = Field(description="Stable, for programs.")
    cause: str | None = Field(None, description="Why, where the detail alone does not say it.")
    correction: str | None = Field(None, description="What to do about it.")
    retryable: bool = Field(description="Whether the same request may succeed later.")
    request_id: str
    details: dict[str, Any] | None = Field(None, description="Facts for programs: sizes in bytes, names, ids.")
    errors: list[FieldProblem] | None = None
