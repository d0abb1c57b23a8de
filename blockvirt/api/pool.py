"""/v1/pool, /v1/devices and /v1/size-info: the space that volumes come from."""

import asyncio
import os

from blockvirt.api import answers, models
from blockvirt.api.operations import Call, Operations, Reply
from blockvirt.errors import Exists, InvalidRequest, LimitReached
from blockvirt.volumes.ports import DeviceStatus
from blockvirt.volumes.requests import check_labels

operations = Operations("pool")


@operations.add("GET", "/v1/pool", {200: models.Pool})
async def show_pool(call: Call) -> Reply:
    """Show the pool: its space, what is promised of it, its policy and its devices."""
    services = call.services
    status = services.space.status()
    return Reply(
        models.Pool(
            id=status.id,
            level=status.level,
            capacity_bytes=status.capacity_bytes,
            used_bytes=status.used_bytes,
            promised_bytes=services.catalogue.promised_bytes,
            reserved_bytes=status.reserved_bytes,
            free_bytes=status.free_bytes,
            chunk_bytes=status.chunk_bytes,
            volumes=services.catalogue.count(),
            overcommit_ratio=status.overcommit_ratio,
            near_ratio=status.near_ratio,
            brake_ratio=status.brake_ratio,
            devices=[answers.device(device) for device in sorted(status.devices, key=lambda device: device.name)],
        )
    )


@operations.add("PATCH", "/v1/pool", {200: models.Pool})
async def set_pool(call: Call, body: models.PoolPatch) -> Reply:
    """Set the pool's policy. What is promised already stays promised."""
    status = call.services.space.status()
    near = status.near_ratio if body.near_ratio is None else body.near_ratio
    brake = status.brake_ratio if body.brake_ratio is None else body.brake_ratio
    if near > brake:
        raise InvalidRequest(
            f"the level 'near' ({near:g}) would come after 'brake' ({brake:g})",
            correction="give a near_ratio that is not above the brake_ratio",
        )
    await call.services.catalogue.set_policy(
        overcommit_ratio=body.overcommit_ratio, near_ratio=body.near_ratio, brake_ratio=body.brake_ratio
    )
    return await show_pool(call)


@operations.add("GET", "/v1/size-info", {200: models.SizeInfo})
async def size_info(call: Call) -> Reply:
    """Say how large a volume one could get now, and why not more."""
    room = call.services.catalogue.allowance()
    return Reply(
        models.SizeInfo(
            largest_bytes=room.largest_bytes,
            limited_by=room.limited_by,
            explanation=room.explanation,
        )
    )


@operations.add("GET", "/v1/devices", {200: models.DeviceList})
async def list_devices(call: Call) -> Reply:
    """List the devices of the pool in the order of their names, usable or not."""
    devices = sorted(call.services.devices.list(), key=lambda device: device.name)
    return Reply(models.DeviceList(devices=[answers.device(device) for device in devices]))


@operations.add("POST", "/v1/devices", {201: models.Device, 200: models.Device}, errors=(409, 503), idempotent=True)
async def add_device(call: Call, body: models.DeviceCreate) -> Reply:
    """Take a directory into the pool as a device: it gets a label file, and volumes may be placed on it.

    The same request again answers 200 with the device that is there; another one for that directory is refused.
    """
    check_labels(body.labels)
    status = 201
    try:
        device = await call.services.devices.add(body.path, body.name, body.limit, body.reserve, body.labels)
    except (Exists, LimitReached):
        path = await asyncio.to_thread(os.path.realpath, body.path)
        same = next((each for each in call.services.devices.list() if _is_same(each, path, body)), None)
        if same is None:
            raise
        device, status = same, 200
    return Reply(answers.device(device), status, {"Location": f"/v1/devices/{device.name}"})


def _is_same(device: DeviceStatus, path: str, body: models.DeviceCreate) -> bool:
    """Tell whether a device is what is wanted; a name and a reserve that are left to the daemon are as it made them."""
    return (
        device.path == path
        and body.name in (None, device.name)
        and body.limit == device.limit_bytes
        and body.reserve in (None, device.reserve_bytes)
        and body.labels == device.labels
    )


@operations.add("DELETE", "/v1/devices/{device}", {200: models.Device}, errors=(404, 409))
async def remove_device(call: Call, device: str) -> Reply:
    """Take an empty device out of the pool, by name or id."""
    return Reply(answers.device(await call.services.devices.remove(device)))
