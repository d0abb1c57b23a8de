"""What goes over the wire, as pydantic models: the OpenAPI document is generated from them.

Requests refuse unknown fields. Sizes come in as bytes or as strings with a unit (``blockvirt.units``) and go out as
bytes only; times go out as RFC 3339 in UTC.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from blockvirt.limits import API_MAX_PAGE_ITEMS, API_PAGE_ITEMS, MAX_UNITS_PER_HOST
from blockvirt.units import parse_size

SIZE_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": "^[0-9]{1,20} ?(B|[KMGTP]i?B)$", "examples": ["10GiB", "512MiB", "2TB"]},
    ],
    "description": "Bytes, or a number with one of the units KiB MiB GiB TiB PiB (powers of 1024) or KB MB GB TB PB "
    "(powers of 1000). A bare 10G is refused: it means different sizes to different tools.",
}
Size = Annotated[int, BeforeValidator(parse_size), WithJsonSchema(SIZE_SCHEMA)]
Labels = Annotated[dict[str, str], Field(description="Free key-value pairs.", examples=[{"team": "web"}])]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


def timestamp(seconds: float) -> datetime:
    """Return a time of the records (seconds since the epoch) as the API shows it."""
    return datetime.fromtimestamp(seconds, UTC)


# --- requests ------------------------------------------------------------------------------------------------------


class Placement(_Request):
    """Which devices may hold a volume's data; all of them where nothing is said."""

    devices: list[str] = Field(default_factory=list, description="Names of devices.")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels that a device must carry, all of them.")


class VolumeCreate(_Request):
    """A volume to create: a size is enough."""

    size: Size
    name: str | None = Field(None, description="1 to 63 of a-z 0-9 . _ -; made up where it is missing.")
    labels: Labels = Field(default_factory=dict)
    placement: Placement = Field(default_factory=lambda: Placement.model_validate({}))


class VolumePatch(_Request):
    """What to change of a volume. Sizes only grow; labels are replaced as a whole."""

    name: str | None = None
    size: Size | None = None
    labels: Labels | None = None
    reconnect: bool = Field(
        False, description="Drop the volume's sessions after it grew, so that clients that reconnect see the new size."
    )


class HostCreate(_Request):
    """A host to create."""

    name: str
    labels: Labels = Field(default_factory=dict)


class UnitCreate(_Request):
    """A volume to show to a host as a logical unit."""

    volume: str = Field(description="Name or id of the volume.")
    number: int | None = Field(None, ge=0, lt=MAX_UNITS_PER_HOST, description="The next free one where it is missing.")


class DeviceCreate(_Request):
    """A directory to take into the pool as a device."""

    path: str = Field(max_length=4096, pattern=r"^/[^\x00]*$", description="An absolute path on the daemon's machine.")
    name: str | None = Field(None, description="Made from the path where it is missing.")
    limit: Size | None = Field(None, description="Use at most so much of its filesystem.")
    reserve: Size | None = Field(None, description="Leave so much of its filesystem free; by default 1 %.")
    labels: Labels = Field(default_factory=dict)


class PoolPatch(_Request):
    """What to change of the pool's policy."""

    overcommit_ratio: float | None = Field(None, ge=1, le=1000, description="Promised bytes / capacity, at most.")
    near_ratio: float | None = Field(None, gt=0, le=1, description="Used / capacity at which the level is 'near'.")
    brake_ratio: float | None = Field(
        None, gt=0, le=1, description="Used / capacity at which no volume is created or grown any more."
    )


class ListQuery(_Request):
    """Which page of a list."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    limit: int = Field(API_PAGE_ITEMS, ge=1, le=API_MAX_PAGE_ITEMS, description="Items on a page.")
    page_token: str | None = Field(
        None, max_length=512, description="The next_page_token of the page before, not changed in any way."
    )


class VolumeListQuery(ListQuery):
    """Which volumes, and which page of them."""

    label: list[str] = Field(default_factory=list, description="KEY=VALUE; may be repeated, all of them must match.")


class ForceQuery(_Request):
    """How hard to try."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    force: bool = Field(False, description="Also where it is in use: sessions are dropped, mappings removed.")


class DeleteQuery(ForceQuery):
    """How hard to try, or only to say what would happen."""

    dry_run: bool = Field(False, description="Change nothing, say what would go.")


class SessionQuery(_Request):
    """Which sessions."""

    volume: str | None = Field(None, description="Name or id of a volume: only its sessions.")


# --- answers -------------------------------------------------------------------------------------------------------


class DeviceShare(_Answer):
    """How much of a volume lies on one device, as of its last checkpoint."""

    device: str
    files: int
    live_bytes: int


class Volume(_Answer):
    """A volume."""

    id: str
    name: str
    state: Literal["available", "in-use", "stopped", "damaged"]
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


class VolumeList(_Answer):
    """A page of volumes in the order of their names."""

    volumes: list[Volume]
    next_page_token: str | None = Field(None, description="Missing on the last page.")


class VolumeDeletion(_Answer):
    """What a delete took away, or would take away."""

    deleted: bool
    volume: Volume
    obstacles: list[str] = Field(description="Why it is refused without force.")
    freed_bytes: int


class Unit(_Answer):
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


class UnitList(_Answer):
    """The logical units of a host in the order of their numbers."""

    luns: list[Unit]


class Host(_Answer):
    """A consumer of logical units."""

    id: str
    name: str
    state: Literal["active", "deleting"]
    labels: Labels
    luns: list[Unit]
    revision: int
    created_at: datetime


class HostList(_Answer):
    """A page of hosts in the order of their names."""

    hosts: list[Host]
    next_page_token: str | None = None


class AttachInfo(_Answer):
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


class Device(_Answer):
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


class DeviceList(_Answer):
    """The devices of the pool."""

    devices: list[Device]


class Pool(_Answer):
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


class SizeInfo(_Answer):
    """The largest volume that one could get now."""

    largest_bytes: int
    limited_by: Literal["volume-maximum", "overcommit", "pool-full"]
    explanation: str


class Session(_Answer):
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


class SessionList(_Answer):
    """The sessions that are open."""

    sessions: list[Session]


class SessionsDropped(_Answer):
    """How many sessions were dropped."""

    dropped: int


class Health(_Answer):
    """Whether the daemon lives, or is ready to serve."""

    status: Literal["ok", "starting", "stopping", "failed"]
    reason: str | None = None


class FieldProblem(_Answer):
    """What is wrong with one field of a request."""

    pointer: str = Field(description="RFC 6901 JSON pointer into the body, or the name of a parameter.")
    detail: str


class Problem(_Answer):
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
