"""Snapshots, reverts, clones and changed blocks on the wire."""

from datetime import datetime

from pydantic import Field

from blockvirt.api.models import Placement, Volume
from blockvirt.api.wire import Answer, Change, LabelListQuery, Labels, Query, Request, Size
from blockvirt.limits import API_CHANGES, API_MAX_CHANGES

# --- requests ------------------------------------------------------------------------------------------------------

_NAME = "1 to 63 of a-z 0-9 . _ -; made up where it is missing."


class SnapshotCreate(Request):
    """A snapshot to take."""

    volume: str = Field(description="Name or id of the volume.")
    name: str | None = Field(None, description=_NAME)
    labels: Labels = Field(default_factory=dict)


class SnapshotGroupCreate(Request):
    """Snapshots of several volumes to take in one instant, all or none."""

    volumes: list[str] = Field(description="Names or ids of the volumes, each once.")
    name: str | None = Field(None, description="The same for each. " + _NAME)
    labels: Labels = Field(default_factory=dict)


class SnapshotListQuery(LabelListQuery):
    """Which snapshots, and which page of them."""

    volume: str | None = Field(None, description="Name or id of a volume: only its snapshots.")


class SnapshotsDelete(Change):
    """Snapshots to delete, all or none."""

    snapshots: list[str] = Field(min_length=1, description="Ids, or VOLUME@SNAPSHOT.")
    force: bool = Field(False, description="Also while sessions read one: they are dropped. Also if one is damaged.")


class HoldRequest(Request):
    """A reason to keep a snapshot."""

    tag: str = Field("manual", description="Each tag holds by itself: 1 to 63 of a-z 0-9 . _ -.")


class RevertRequest(Change):
    """How to take a volume back to a snapshot."""

    force: bool = Field(
        False, description="Also while sessions have it open: they are dropped, and NBD refuses it until a reopen."
    )
    safety: bool = Field(True, description="Keep what the volume holds as a snapshot.")
    safety_name: str | None = Field(None, description="The name of that; 'before-revert-' and the time where missing.")


class CloneRequest(Request):
    """A volume to make from a snapshot."""

    name: str | None = Field(None, description=_NAME)
    size: Size | None = Field(None, description="The snapshot's where it is missing; never less.")
    labels: Labels = Field(default_factory=dict)
    placement: Placement = Field(default_factory=lambda: Placement.model_validate({}))


class ChangesQuery(Query):
    """Compared with what, and which part of it."""

    since: str | None = Field(
        None, description="The snapshot to compare with (id, or VOLUME@SNAPSHOT); missing: with nothing, so all data."
    )
    offset: int = Field(0, ge=0, description="Where to begin: 0, or the next_offset_bytes of the answer before.")
    limit: int = Field(API_CHANGES, ge=1, le=API_MAX_CHANGES, description="Ranges in one answer.")


# --- answers -------------------------------------------------------------------------------------------------------


class Snapshot(Answer):
    """A snapshot of a volume."""

    id: str
    volume_id: str
    volume: str = Field(description="Name of its volume.")
    name: str
    created_at: datetime
    size_bytes: int
    mapped_bytes: int
    exclusive_bytes: int = Field(description="What deleting it, and nothing else, would free.")
    revision: int = Field(description="Also the ETag.")
    parent_id: str | None = Field(
        None, description="The snapshot that its history went on from; missing: none of this volume."
    )
    labels: Labels
    holds: list[str] = Field(description="Tags that keep it from being deleted.")
    clones: list[str] = Field(description="Volumes that were cloned from it and still need it.")
    sessions: int = Field(description="How many read it, or compare with it.")
    group_id: str | None = Field(None, description="Shared by those taken in one instant; missing: taken alone.")
    schedule_id: str | None = Field(None, description="The schedule that took it; missing: somebody did.")
    nbd_uris: list[str] = Field(description="Of its read-only export, VOLUME@SNAPSHOT.")


class SnapshotList(Answer):
    """A page of snapshots: those of a volume together, oldest first."""

    snapshots: list[Snapshot]
    next_page_token: str | None = Field(None, description="Missing on the last page.")
    damaged: list[str] = Field(description="VOLUME@NAME of those of this page that cannot be shown.")
    head_parent_id: str | None = Field(
        None, description="Where one volume is listed: the snapshot that it went on from; missing: none."
    )


class SnapshotGroup(Answer):
    """Snapshots of one instant."""

    group_id: str | None = Field(None, description="Missing where it is only one.")
    snapshots: list[Snapshot]


class SnapshotDeletion(Answer):
    """What deleting snapshots took away, or would take away."""

    deleted: bool
    snapshots: list[Snapshot]
    freed_bytes: int = Field(description="By all of them together: more than the sum of what each alone would free.")
    obstacles: list[str] = Field(description="Why it is refused: holds, and sessions and damage unless forced.")
    job_ids: list[str] = Field(description="The jobs that give the space back.")


class Revert(Answer):
    """What a revert did, or would do."""

    reverted: bool
    volume: Volume
    snapshot: Snapshot = Field(description="What the volume goes back to.")
    safety: Snapshot | None = Field(None, description="What the volume held before; missing: not kept.")
    obstacles: list[str] = Field(description="Why it is refused without force.")
    needs_reopen: bool = Field(description="NBD refuses the volume until it is reopened: its guests' caches are old.")


class ChangedRange(Answer):
    """A range that may differ."""

    offset_bytes: int
    length_bytes: int
    zero: bool = Field(description="It reads as zeros now.")


class Changes(Answer):
    """What differs, in order; whole chunks, cut only at the end of the volume and where a page begins."""

    changes: list[ChangedRange]
    next_offset_bytes: int | None = Field(None, description="Where the next page begins; missing: that was all.")
    size_bytes: int
    chunk_bytes: int


class SnapshotsImported(Answer):
    """The snapshots that streams have brought, in their order."""

    snapshots: list[Snapshot]
