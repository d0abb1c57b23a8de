"""Devices of the pool as people see them."""

from blockvirt.errors import BlockvirtError
from blockvirt.meta.records import DeviceRecord
from blockvirt.pool.devices import Device
from blockvirt.pool.space import DeviceSpace
from blockvirt.volumes.ports import DeviceStatus


def in_use(device: Device, space: DeviceSpace, copy_problem: str = "") -> DeviceStatus:
    """Return the view of a device that works; ``copy_problem``: why it holds no copy of the metadata, if so."""
    record = device.record
    return DeviceStatus(
        id=record.id,
        name=record.name,
        path=str(device.path),
        state="online",
        capacity_bytes=space.capacity_bytes,
        used_bytes=space.used_bytes,
        reserved_bytes=space.reserved_bytes,
        free_bytes=space.free_bytes,
        limit_bytes=record.limit_bytes,
        reserve_bytes=record.reserve_bytes,
        labels=record.labels,
        problem="; ".join(filter(None, (*device.warnings, copy_problem))),
    )


def out_of_use(record: DeviceRecord, error: BlockvirtError, used_bytes: int) -> DeviceStatus:
    """Return the view of a device that cannot be used, because of ``error``."""
    return DeviceStatus(
        id=record.id,
        name=record.name,
        path=record.path,
        state=str(error.details.get("reason", "failed")),
        capacity_bytes=0,
        used_bytes=used_bytes,
        reserved_bytes=0,
        free_bytes=0,
        limit_bytes=record.limit_bytes,
        reserve_bytes=record.reserve_bytes,
        labels=record.labels,
        problem=f"{error.message}; {error.correction}",
    )
