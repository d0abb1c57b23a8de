"""/v1/volumes: allocate, list, show, change, delete, and how to attach."""

from asyncio import sleep
from urllib.parse import quote

from blockvirt.api import answers, models
from blockvirt.api.job_models import Job
from blockvirt.api.operations import Call, Operations, Reply, etag
from blockvirt.api.paging import page_after, page_token
from blockvirt.api.wire import LabelListQuery, timestamp
from blockvirt.errors import Exists
from blockvirt.lun.attach import attach_info
from blockvirt.meta.records import SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Writer
from blockvirt.snapshots.histories import History, origin_name
from blockvirt.volumes.requests import NewVolume, VolumeChange
from blockvirt.volumes.views import READ_BATCH, Volume

operations = Operations("volumes")


@operations.add(
    "POST",
    "/v1/volumes",
    {201: models.Volume, 200: models.Volume},
    errors=(404, 409, 507),
    idempotent=True,
)
async def create_volume(call: Call, body: models.VolumeCreate) -> Reply:
    """Create a volume.

    A size is enough. The same request under the same name again answers 200 with the volume that is there; another
    one under that name is refused. Sizes are rounded up to whole sectors of 512 bytes; the answer says so.
    """
    wanted = NewVolume(
        size_bytes=body.size,
        name=body.name,
        labels=body.labels,
        placement_devices=tuple(body.placement.devices),
        placement_labels=body.placement.labels,
    )

    def keep(writer: Writer, record: VolumeRecord) -> None:
        keep_answer(call, writer, record, body.size)

    made = await call.services.catalogue.create(wanted, also=keep)
    if not made.created and (origin := (await call.services.histories.of([made.volume.id]))[made.volume.id].origin):
        raise Exists(
            f"a volume {made.volume.name!r} exists already and is a clone of {origin}",
            cause="an empty one was asked for",
            correction="choose another name",
            volume_id=made.volume.id,
        )
    return await created(call, made.volume, is_new=made.created, requested_bytes=body.size)


def keep_answer(
    call: Call, writer: Writer, record: VolumeRecord, requested_bytes: int | None, origin: SnapshotRecord | None = None
) -> None:
    """Keep the answer to a create under its Idempotency-Key, if it has one, in the transaction that creates it."""
    if call.idempotency_key is None:
        return
    services = call.services
    chunk_bytes = services.space.status().chunk_bytes
    view = Volume(
        id=record.id,
        name=record.name,
        size_bytes=record.size_bytes,
        mapped_bytes=min(origin.mapped_chunks * chunk_bytes, record.size_bytes) if origin is not None else 0,
        chunk_bytes=chunk_bytes,
        state="available",
        created_s=record.created_s,
        revision=record.revision,
        labels=record.labels,
        placement_devices=record.placement_devices,
        placement_labels=record.placement_labels,
    )
    history = History(origin=origin_name(writer, record.id))
    new = answers.volume(view, services.endpoints(), history, requested_bytes=requested_bytes)
    text = new.model_dump_json(exclude_none=True)
    kept = services.idempotency.answer(call.idempotency_key, call.request_sha256, 201, text, _location(record.id))
    services.idempotency.keep(writer, kept)


async def created(call: Call, view: Volume, *, is_new: bool, requested_bytes: int | None) -> Reply:
    """Return the answer to a create."""
    answer = await shown(call, view, requested_bytes=requested_bytes)
    return Reply(answer, 201 if is_new else 200, etag(view.revision) | {"Location": _location(view.id)})


async def shown(call: Call, view: Volume, *, requested_bytes: int | None = None) -> models.Volume:
    """Return a volume for the wire, with its history."""
    history = (await call.services.histories.of([view.id]))[view.id]
    return answers.volume(view, call.services.endpoints(), history, requested_bytes=requested_bytes)


def _location(volume_id: str) -> str:
    return f"/v1/volumes/{volume_id}"


@operations.add("GET", "/v1/volumes", {200: models.VolumeList})
async def list_volumes(call: Call, query: LabelListQuery) -> Reply:
    """List volumes in the order of their names, a page at a time."""
    labels = query.labels()
    listing = "volumes" + "".join(f"&{quote(key)}={quote(value)}" for key, value in sorted(labels.items()))
    page = await call.services.catalogue.list(
        labels=labels, after=page_after(query.page_token, listing), limit=query.limit
    )
    histories = await call.services.histories.of([view.id for view in page.volumes])
    endpoints = call.services.endpoints()
    shown = []
    for number, view in enumerate(page.volumes):
        shown.append(answers.volume(view, endpoints, histories[view.id]))
        if number % READ_BATCH == READ_BATCH - 1:
            await sleep(0)  # others run between batches
    token = page_token(listing, page.next_after) if page.next_after is not None else None
    return Reply(models.VolumeList(volumes=shown, next_page_token=token))


@operations.add("GET", "/v1/volumes/{volume}", {200: models.Volume}, errors=(404,))
async def show_volume(call: Call, volume: str) -> Reply:
    """Show a volume, by name or id, where its data lies, and what deleting it would free."""
    services = call.services
    found = services.catalogue.get(volume)
    histories = await services.histories.of([found.id])
    holdings = await services.histories.holdings(found.id)
    shares = services.catalogue.shares(found.id)
    answer = answers.volume(found, services.endpoints(), histories[found.id], holdings=holdings, shares=shares)
    return Reply(answer, headers=etag(found.revision))


@operations.add(
    "PATCH",
    "/v1/volumes/{volume}",
    {200: models.Volume},
    errors=(404, 409, 412, 503, 507),
    conditional=True,
)
async def change_volume(call: Call, volume: str, body: models.VolumePatch) -> Reply:
    """Rename, relabel or grow a volume, also while it is in use.

    New sessions see the new size. With ``reconnect`` the sessions there are get dropped, without a reply to what they
    have in flight: QEMU with a reconnect-delay comes back and sends it again.
    """
    services = call.services
    change = VolumeChange(name=body.name, size_bytes=body.size, labels=body.labels)
    changed = await services.catalogue.change(volume, change, expected_revision=call.expected_revision)
    if body.reconnect:
        await services.sessions.drop_volume(changed.id)
        changed = services.catalogue.get(changed.id)
    return Reply(await shown(call, changed, requested_bytes=body.size), headers=etag(changed.revision))


@operations.add(
    "DELETE",
    "/v1/volumes/{volume}",
    {200: models.VolumeDeletion},
    errors=(404, 409, 412, 503),
    conditional=True,
)
async def delete_volume(call: Call, volume: str, query: models.VolumeDeleteQuery) -> Reply:
    """Put a volume with its snapshots into the trash, delete it for good, or say what would go.

    Refused while a host has it mapped, a session uses it or the record of a snapshot is damaged (it might be held),
    unless forced, and while one of its snapshots is held. Its name is free at once. Its bytes stay promised until the
    trash lets go of it, and come back in the background then.
    """
    services = call.services
    found = services.catalogue.get(volume)
    history = (await services.histories.of([found.id]))[found.id]
    holdings = await services.histories.holdings(found.id)
    gone = await services.catalogue.delete(
        found.id,
        force=query.force,
        dry_run=query.dry_run,
        purge=query.purge,
        expected_revision=call.expected_revision,
    )
    return Reply(
        models.VolumeDeletion(
            deleted=gone.deleted,
            volume=answers.volume(gone.volume, services.endpoints(), history, holdings=holdings, shares=gone.shares),
            obstacles=list(gone.obstacles),
            freed_bytes=holdings.exclusive_bytes if holdings is not None else gone.volume.mapped_bytes,
            snapshots=history.snapshots,
            purge_at=timestamp(gone.purge_at_s) if gone.purge_at_s else None,
            job_id=gone.job_id or None,
        )
    )


@operations.add("POST", "/v1/volumes/space", {200: models.VolumesSpace}, errors=(404,))
async def space_of_volumes(call: Call, body: models.VolumesNamed) -> Reply:
    """Say what deleting volumes together would free; a clone and its origin hold more together than each alone."""
    found = [call.services.catalogue.get(volume) for volume in body.volumes]
    freed_bytes = await call.services.histories.freed_bytes([each.id for each in found])
    return Reply(models.VolumesSpace(volumes=[each.name for each in found], freed_bytes=freed_bytes))


@operations.add("POST", "/v1/volumes/{volume}/reopen", {200: models.Volume}, errors=(404, 409))
async def reopen_volume(call: Call, volume: str) -> Reply:
    """Bring a volume that has stopped back as after a power cut.

    A volume stops when a sync or a metadata commit of it fails. What was flushed before is there; what was written
    since may not be.
    """
    found = await call.services.catalogue.reopen(volume)
    return Reply(await shown(call, found), headers=etag(found.revision))


@operations.add("GET", "/v1/volumes/{volume}/attach-info", {200: models.AttachInfo}, errors=(404,))
async def attach_volume(call: Call, volume: str) -> Reply:
    """Say how to attach a volume under its own name: URIs, and lines to paste."""
    found = call.services.catalogue.get(volume)
    endpoints = call.services.endpoints()
    info = attach_info(found.name, found.id, endpoints.nbd_socket, endpoints.nbd_host, endpoints.nbd_port)
    return Reply(answers.attach(info))


@operations.add("POST", "/v1/volumes/{volume}/flatten", {202: Job}, errors=(404,))
async def flatten_volume(call: Call, volume: str) -> Reply:
    """Give a clone, or a reverted volume, copies of all that it shares with others, as a job; a second one joins it."""
    job_id = await call.services.flattening.start(volume)
    return Reply(answers.job(call.services.jobs.get(job_id)), 202, {"Location": f"/v1/jobs/{job_id}"})
