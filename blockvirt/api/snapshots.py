"""/v1/snapshots: take, list, show, hold, delete, revert and clone."""

import secrets
from asyncio import sleep
from collections.abc import Callable, Sequence
from urllib.parse import quote

from blockvirt.api import answers
from blockvirt.api import snapshot_models as models
from blockvirt.api.models import Volume
from blockvirt.api.operations import Call, Operations, Reply, etag
from blockvirt.api.paging import page_after, page_token
from blockvirt.api.volumes import created, keep_answer, shown
from blockvirt.api.wire import DeleteQuery
from blockvirt.errors import InvalidRequest
from blockvirt.meta.records import SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Writer
from blockvirt.snapshots.catalogue import Deletion
from blockvirt.snapshots.cloning import NewClone
from blockvirt.volumes.views import READ_BATCH

operations = Operations("snapshots")


# --- taking --------------------------------------------------------------------------------------------------------


@operations.add("POST", "/v1/snapshots", {201: models.Snapshot}, errors=(404, 409, 507), idempotent=True)
async def create_snapshot(call: Call, body: models.SnapshotCreate) -> Reply:
    """Take a snapshot of a volume, in use or not: it holds exactly the writes replied to before."""

    def reply(snapshots: list[models.Snapshot]) -> Reply:
        (one,) = snapshots
        return Reply(one, 201, etag(one.revision) | {"Location": f"/v1/snapshots/{one.id}"})

    return await _take(call, [body.volume], body.name, body.labels, reply)


@operations.add("POST", "/v1/snapshots/group", {201: models.SnapshotGroup}, errors=(404, 409, 507), idempotent=True)
async def create_snapshot_group(call: Call, body: models.SnapshotGroupCreate) -> Reply:
    """Take snapshots of several volumes in one instant, all or none."""

    def reply(snapshots: list[models.Snapshot]) -> Reply:
        return Reply(models.SnapshotGroup(group_id=snapshots[0].group_id, snapshots=snapshots), 201)

    return await _take(call, body.volumes, body.name, body.labels, reply)


async def _take(
    call: Call,
    volumes: Sequence[str],
    name: str | None,
    labels: dict[str, str],
    reply: Callable[[list[models.Snapshot]], Reply],
) -> Reply:
    """Take snapshots; the answer is made, and kept under an Idempotency-Key, in their own transaction."""
    services, endpoints = call.services, call.services.endpoints()
    if len(set(volumes)) < len(volumes):
        raise InvalidRequest("one volume is named twice", correction="name each once, by name or by id")
    name = f"snap-{secrets.token_hex(4)}" if name is None else name
    made: list[Reply] = []

    def answer(writer: Writer, records: Sequence[SnapshotRecord]) -> None:
        by_volume = {view.volume_id: view for view in services.snapshots.as_new(writer, records)}
        new = reply([answers.snapshot(view, endpoints) for view in by_volume.values()])
        if call.idempotency_key is not None:
            text, location = new.json(), new.headers.get("Location", "")
            kept = services.idempotency.answer(call.idempotency_key, call.request_sha256, new.status, text, location)
            services.idempotency.keep(writer, kept)
        made.append(new)

    await services.snapshots.create(dict.fromkeys(volumes, name), labels=labels, also=answer)
    return made[-1]


# --- reading -------------------------------------------------------------------------------------------------------


@operations.add("GET", "/v1/snapshots", {200: models.SnapshotList}, errors=(404,))
async def list_snapshots(call: Call, query: models.SnapshotListQuery) -> Reply:
    """List snapshots, of one volume or of all, a page at a time; those of a volume oldest first."""
    services, labels = call.services, query.labels()
    volume_id = None if query.volume is None else services.catalogue.get(query.volume).id
    listing = f"snapshots&{volume_id or ''}" + "".join(f"&{quote(k)}={quote(v)}" for k, v in sorted(labels.items()))
    found: list[models.Snapshot] = []
    damaged: list[str] = []
    after = page_after(query.page_token, listing)
    endpoints = services.endpoints()
    while True:
        page = await services.snapshots.list(volume_id, labels=labels, after=after, limit=query.limit - len(found))
        after = page.next_after
        damaged += page.damaged
        for number, view in enumerate(page.snapshots):
            found.append(answers.snapshot(view, endpoints))
            if number % READ_BATCH == READ_BATCH - 1:
                await sleep(0)  # others run between batches
        if not after or len(found) == query.limit:
            break
    return Reply(
        models.SnapshotList(
            snapshots=found,
            next_page_token=page_token(listing, after) if after else None,
            head_parent_id=services.snapshots.head_parent(volume_id) or None if volume_id is not None else None,
            damaged=damaged,
        )
    )


@operations.add("GET", "/v1/snapshots/{snapshot}", {200: models.Snapshot}, errors=(404,))
async def show_snapshot(call: Call, snapshot: str) -> Reply:
    """Show a snapshot, by its id or as VOLUME@SNAPSHOT."""
    return await _shown(call, snapshot)


async def _shown(call: Call, name_or_id: str) -> Reply:
    view = await call.services.snapshots.get(name_or_id)
    return Reply(answers.snapshot(view, call.services.endpoints()), headers=etag(view.revision))


# --- holding and deleting ------------------------------------------------------------------------------------------


@operations.add("POST", "/v1/snapshots/{snapshot}/hold", {200: models.Snapshot}, errors=(404, 409))
async def hold_snapshot(call: Call, snapshot: str, body: models.HoldRequest) -> Reply:
    """Keep a snapshot, and its volume, from being deleted until the tag is released."""
    record = await call.services.snapshots.hold(snapshot, body.tag)
    return await _shown(call, record.id)


@operations.add("POST", "/v1/snapshots/{snapshot}/release", {200: models.Snapshot}, errors=(404,))
async def release_snapshot(call: Call, snapshot: str, body: models.HoldRequest) -> Reply:
    """Take a hold away; one that is not there is no error."""
    record = await call.services.snapshots.release(snapshot, body.tag)
    return await _shown(call, record.id)


@operations.add(
    "DELETE",
    "/v1/snapshots/{snapshot}",
    {200: models.SnapshotDeletion},
    errors=(404, 409, 412, 503),
    conditional=True,
)
async def delete_snapshot(call: Call, snapshot: str, query: DeleteQuery) -> Reply:
    """Delete a snapshot, or say what that would free. Clones and younger snapshots are no obstacle."""
    gone = await call.services.snapshots.delete(
        [snapshot], force=query.force, dry_run=query.dry_run, expected_revision=call.expected_revision
    )
    return _deletion(call, gone)


@operations.add("POST", "/v1/snapshots/delete", {200: models.SnapshotDeletion}, errors=(404, 409, 503))
async def delete_snapshots(call: Call, body: models.SnapshotsDelete) -> Reply:
    """Delete several snapshots, all or none, or say what that would free."""
    gone = await call.services.snapshots.delete(body.snapshots, force=body.force, dry_run=body.dry_run)
    return _deletion(call, gone)


def _deletion(call: Call, gone: Deletion) -> Reply:
    endpoints = call.services.endpoints()
    return Reply(
        models.SnapshotDeletion(
            deleted=gone.deleted,
            snapshots=[answers.snapshot(view, endpoints) for view in gone.snapshots],
            freed_bytes=gone.freed_bytes,
            obstacles=list(gone.obstacles),
            job_ids=list(gone.job_ids),
        )
    )


# --- going back, and going on from one -----------------------------------------------------------------------------


@operations.add("POST", "/v1/snapshots/{snapshot}/revert", {200: models.Revert}, errors=(404, 409, 507))
async def revert_snapshot(call: Call, snapshot: str, body: models.RevertRequest) -> Reply:
    """Take a volume back to a snapshot, in place; younger snapshots stay.

    What it held becomes a snapshot itself unless told otherwise. Refused while a session has it open. Forced, the
    sessions are dropped and NBD refuses the volume until it is reopened: guests with old caches would corrupt it.
    """
    services, endpoints = call.services, call.services.endpoints()
    target = await services.snapshots.get(snapshot)
    done = await services.reverts.revert(
        target.id,
        force=body.force,
        safety=body.safety,
        safety_name=body.safety_name or "",
        dry_run=body.dry_run,
    )
    safety = await services.snapshots.get(done.safety.id) if done.safety is not None else None
    return Reply(
        models.Revert(
            reverted=done.reverted,
            volume=await shown(call, services.catalogue.get(done.volume_id)),
            snapshot=answers.snapshot(target, endpoints),
            safety=answers.snapshot(safety, endpoints) if safety is not None else None,
            obstacles=list(done.obstacles),
            needs_reopen=done.needs_reopen,
        )
    )


@operations.add(
    "POST",
    "/v1/snapshots/{snapshot}/clone",
    {201: Volume, 200: Volume},
    errors=(404, 409, 507),
    idempotent=True,
)
async def clone_snapshot(call: Call, snapshot: str, body: models.CloneRequest) -> Reply:
    """Make a volume from a snapshot, writable at once, which shares its data.

    The same request under the same name again answers 200 with the clone that is there.
    """
    wanted = NewClone(
        size_bytes=body.size,
        name=body.name,
        labels=body.labels,
        placement_devices=tuple(body.placement.devices),
        placement_labels=body.placement.labels,
    )

    def keep(writer: Writer, record: VolumeRecord, origin: SnapshotRecord) -> None:
        keep_answer(call, writer, record, body.size, origin)

    made = await call.services.cloning.clone(snapshot, wanted, also=keep)
    return await created(call, made.volume, is_new=made.created, requested_bytes=body.size)
