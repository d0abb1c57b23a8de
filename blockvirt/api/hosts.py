"""/v1/hosts and /v1/luns: who sees which volume under which number."""

from asyncio import sleep

from blockvirt.api import answers, models
from blockvirt.api.operations import Call, Operations, Reply, etag
from blockvirt.api.paging import page_after, page_token
from blockvirt.api.wire import ForceQuery, ListQuery
from blockvirt.lun.attach import attach_info
from blockvirt.lun.presentation import READ_BATCH
from blockvirt.lun.units import Unit
from blockvirt.meta.store import Writer
from blockvirt.volumes.requests import check_labels

operations = Operations("hosts")


@operations.add("POST", "/v1/hosts", {201: models.Host, 200: models.Host}, errors=(409,), idempotent=True)
async def create_host(call: Call, body: models.HostCreate) -> Reply:
    """Create a host; the same request again answers 200 with the host that is there."""
    check_labels(body.labels)
    host, created = await call.services.presentation.create_host(body.name, body.labels)
    headers = etag(host.revision) | {"Location": f"/v1/hosts/{host.id}"}
    return Reply(answers.host(host, call.services.endpoints()), 201 if created else 200, headers)


@operations.add("GET", "/v1/hosts", {200: models.HostList})
async def list_hosts(call: Call, query: ListQuery) -> Reply:
    """List hosts with their logical units, in the order of their names, a page at a time."""
    page = await call.services.presentation.hosts(after=page_after(query.page_token, "hosts"), limit=query.limit)
    endpoints = call.services.endpoints()
    shown = []
    for number, view in enumerate(page.hosts):
        shown.append(answers.host(view, endpoints))
        if number % READ_BATCH == READ_BATCH - 1:
            await sleep(0)  # others run between batches
    token = page_token("hosts", page.next_after) if page.next_after is not None else None
    return Reply(models.HostList(hosts=shown, next_page_token=token))


@operations.add("GET", "/v1/hosts/{host}", {200: models.Host}, errors=(404,))
async def show_host(call: Call, host: str) -> Reply:
    """Show a host, by name or id, with its logical units."""
    found = call.services.presentation.host(host)
    return Reply(answers.host(found, call.services.endpoints()), headers=etag(found.revision))


@operations.add("DELETE", "/v1/hosts/{host}", {200: models.Host}, errors=(404, 409))
async def delete_host(call: Call, host: str, query: ForceQuery) -> Reply:
    """Delete a host; refused while it has logical units, unless forced."""
    gone = await call.services.presentation.delete_host(host, force=query.force)
    return Reply(answers.host(gone, call.services.endpoints()))


@operations.add("GET", "/v1/hosts/{host}/luns", {200: models.UnitList}, errors=(404,))
async def list_luns(call: Call, host: str) -> Reply:
    """List a host's logical units in the order of their numbers."""
    found = call.services.presentation.host(host)
    endpoints = call.services.endpoints()
    return Reply(models.UnitList(luns=[answers.unit(unit, endpoints) for unit in found.units]))


@operations.add(
    "POST",
    "/v1/hosts/{host}/luns",
    {201: models.Unit, 200: models.Unit},
    errors=(404, 409),
    idempotent=True,
)
async def map_lun(call: Call, host: str, body: models.UnitCreate) -> Reply:
    """Show a volume to a host under a number, by default the next free one.

    The same volume under the same number again answers 200 with the unit that is there. Refused where the number is
    taken, and where the host has the volume already and no number, or another one, is asked for.
    """
    services = call.services
    endpoints = services.endpoints()
    volume = services.catalogue.get(body.volume)

    def keep_answer(writer: Writer, unit: Unit) -> None:
        assert call.idempotency_key is not None, "only a request with a key keeps its answer"
        text = answers.unit(unit, endpoints).model_dump_json(exclude_none=True)
        kept = services.idempotency.answer(call.idempotency_key, call.request_sha256, 201, text, _location(unit))
        services.idempotency.keep(writer, kept)

    also = keep_answer if call.idempotency_key is not None else None
    unit, created = await services.presentation.map(host, volume.id, body.number, also=also)
    return Reply(answers.unit(unit, endpoints), 201 if created else 200, {"Location": _location(unit)})


def _location(unit: Unit) -> str:
    return f"/v1/hosts/{unit.host}/luns/{unit.number}"


@operations.add("GET", "/v1/hosts/{host}/luns/{number}", {200: models.Unit}, errors=(404,))
async def show_lun(call: Call, host: str, number: int) -> Reply:
    """Show a logical unit."""
    unit = call.services.presentation.unit(f"{host}/lun{number}")
    return Reply(answers.unit(unit, call.services.endpoints()))


@operations.add("DELETE", "/v1/hosts/{host}/luns/{number}", {200: models.Unit}, errors=(404, 409))
async def unmap_lun(call: Call, host: str, number: int, query: ForceQuery) -> Reply:
    """Take a logical unit away from a host; refused while a session is open on it, unless forced."""
    unit = await call.services.presentation.unmap(host, number, force=query.force)
    return Reply(answers.unit(unit, call.services.endpoints()))


@operations.add("GET", "/v1/luns/{host}/{lun}/attach-info", {200: models.AttachInfo}, errors=(404, 409))
async def attach_lun(call: Call, host: str, lun: str) -> Reply:
    """Say how to attach a logical unit such as web1/lun0: URIs, and lines to paste."""
    unit = call.services.presentation.unit(f"{host}/{lun}")
    endpoints = call.services.endpoints()
    info = attach_info(unit.export, unit.volume_id, endpoints.nbd_socket, endpoints.nbd_host, endpoints.nbd_port)
    return Reply(answers.attach(info))
