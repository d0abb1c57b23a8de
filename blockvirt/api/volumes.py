"""/v1/volumes: allocate, list, show, change, delete, and how to attach."""

from asyncio import sleep
from urllib.parse import quote

from blockvirt.api import answers, models
from blockvirt.api.operations import Call, Operations, Reply, etag
from blockvirt.api.paging import page_after, page_token
from blockvirt.errors import InvalidRequest
from blockvirt.lun.attach import attach_info
from blockvirt.meta.records import VolumeRecord
from blockvirt.meta.store import Writer
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
    services = call.services
    endpoints = services.endpoints()
    wanted = NewVolume(
        size_bytes=body.size,
        name=body.name,
        labels=body.labels,
        placement_devices=tuple(body.placement.devices),
        placement_labels=body.placement.labels,
    )
    chunk_bytes = services.space.status().chunk_bytes

    def keep_answer(writer: Writer, record: VolumeRecord) -> None:
        assert call.idempotency_key is not None, "only a request with a key keeps its answer"
        new = answers.volume(_as_new(record, chunk_bytes), endpoints, requested_bytes=body.size)
        text = new.model_dump_json(exclude_none=True)
        kept = services.idempotency.answer(call.idempotency_key, call.request_sha256, 201, text, _location(record.id))
        services.idempotency.keep(writer, kept)

    made = await services.catalogue.create(wanted, also=keep_answer if call.idempotency_key is not None else None)
    answer = answers.volume(made.volume, endpoints, requested_bytes=body.size)
    headers = etag(made.volume.revision) | {"Location": _location(made.volume.id)}
    return Reply(answer, 201 if made.created else 200, headers)


def _as_new(record: VolumeRecord, chunk_bytes: int) -> Volume:
    return Volume(
        id=record.id,
        name=record.name,
        size_bytes=record.size_bytes,
        mapped_bytes=0,
        chunk_bytes=chunk_bytes,
        state="available",
        created_s=record.created_s,
        revision=record.revision,
        labels=record.labels,
        placement_devices=record.placement_devices,
        placement_labels=record.placement_labels,
    )


def _location(volume_id: str) -> str:
    return f"/v1/volumes/{volume_id}"


@operations.add("GET", "/v1/volumes", {200: models.VolumeList})
async def list_volumes(call: Call, query: models.VolumeListQuery) -> Reply:
    """List volumes in the order of their names, a page at a time."""
    labels = _labels(query.label)
    listing = "volumes" + "".join(f"&{quote(key)}={quote(value)}" for key, value in sorted(labels.items()))
    page = await call.services.catalogue.list(
        labels=labels, after=page_after(query.page_token, listing), limit=query.limit
    )
    endpoints = call.services.endpoints()
    shown = []
    for number, view in enumerate(page.volumes):
        shown.append(answers.volume(view, endpoints))
        if number % READ_BATCH == READ_BATCH - 1:
            await sleep(0)  # others run between batches
    token = page_token(listing, page.next_after) if page.next_after is not None else None
    return Reply(models.VolumeList(volumes=shown, next_page_token=token))


def _labels(given: list[str]) -> dict[str, str]:
    labels = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise InvalidRequest(f"{text[:80]!r} is not a label", correction="write label=KEY=VALUE")
        labels[key] = value
    return labels


@operations.add("GET", "/v1/volumes/{volume}", {200: models.Volume}, errors=(404,))
async def show_volume(call: Call, volume: str) -> Reply:
    """Show a volume, by name or id, and where its data lies."""
    found = call.services.catalogue.get(volume)
    shares = call.services.catalogue.shares(found.id)
    return Reply(answers.volume(found, call.services.endpoints(), shares=shares), headers=etag(found.revision))


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
    return Reply(
        answers.volume(changed, services.endpoints(), requested_bytes=body.size), headers=etag(changed.revision)
    )


@operations.add(
    "DELETE",
    "/v1/volumes/{volume}",
    {200: models.VolumeDeletion},
    errors=(404, 409, 412, 503),
    conditional=True,
)
async def delete_volume(call: Call, volume: str, query: models.DeleteQuery) -> Reply:
    """Delete a volume, or say what would go.

    Refused while a host has it mapped or a session uses it, unless forced. Its name is free at once, its space comes
    back in the background.
    """
    services = call.services
    gone = await services.catalogue.delete(
        volume, force=query.force, dry_run=query.dry_run, expected_revision=call.expected_revision
    )
    return Reply(
        models.VolumeDeletion(
            deleted=gone.deleted,
            volume=answers.volume(gone.volume, services.endpoints(), shares=gone.shares),
            obstacles=list(gone.obstacles),
            freed_bytes=gone.volume.mapped_bytes,
        )
    )


@operations.add("POST", "/v1/volumes/{volume}/reopen", {200: models.Volume}, errors=(404, 409))
async def reopen_volume(call: Call, volume: str) -> Reply:
    """Bring a volume that has stopped back as after a power cut.

    A volume stops when a sync or a metadata commit of it fails. What was flushed before is there; what was written
    since may not be.
    """
    found = await call.services.catalogue.reopen(volume)
    return Reply(answers.volume(found, call.services.endpoints()), headers=etag(found.revision))


@operations.add("GET", "/v1/volumes/{volume}/attach-info", {200: models.AttachInfo}, errors=(404,))
async def attach_volume(call: Call, volume: str) -> Reply:
    """Say how to attach a volume under its own name: URIs, and lines to paste."""
    found = call.services.catalogue.get(volume)
    endpoints = call.services.endpoints()
    info = attach_info(found.name, found.id, endpoints.nbd_socket, endpoints.nbd_host, endpoints.nbd_port)
    return Reply(answers.attach(info))
