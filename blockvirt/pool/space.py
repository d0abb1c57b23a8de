"""Space arithmetic: what a device and the pool can hold, what is used, how full that is. Pure. All figures in bytes.

Whether a size may be promised is decided elsewhere (``volumes.allowance``), from the figures here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from blockvirt.limits import DEVICE_RESERVE_MAX_BYTES, DEVICE_RESERVE_MIN_BYTES


class Level(Enum):
    """How full the pool is. Each level includes what the ones before it mean."""

    OK = "ok"
    NEAR = "near"
    """Worth a warning."""
    BRAKE = "brake"
    """No volume is created and none grown."""
    STOP = "stop"
    """No new space is given; reads, overwrites, trims and deletes go on (I10)."""


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """What is known of one device."""

    id: str
    filesystem: int
    """Devices with the same number share one filesystem, so their free space counts once."""
    free_bytes: int
    """Free on the filesystem."""
    used_bytes: int
    """In chunks that some map entry names, and in freed ones until they are punched out."""
    ahead_bytes: int = 0
    """Allocated by us beyond that: for chunks to come."""
    limit_bytes: int | None = None
    """Use at most so much of the filesystem."""
    reserve_bytes: int = 0
    """Leave so much of the filesystem free."""


@dataclass(frozen=True, slots=True)
class DeviceSpace:
    """What one device offers if it had its filesystem to itself."""

    id: str
    capacity_bytes: int
    used_bytes: int
    reserved_bytes: int
    """Allocated ahead."""
    free_bytes: int
    """What may still be allocated: limit and reserve applied. Space allocated ahead comes on top for its owner."""


@dataclass(frozen=True, slots=True)
class PoolTotals:
    """The sums, with shared filesystems counted once."""

    capacity_bytes: int
    used_bytes: int
    reserved_bytes: int
    free_bytes: int


def default_reserve_bytes(total_bytes: int) -> int:
    """Return what is left free on a filesystem of ``total_bytes`` unless somebody says otherwise.

    Journals, copies of the metadata and whatever else lives there must find room when the pool is full (I10).
    """
    share = min(max(total_bytes // 100, DEVICE_RESERVE_MIN_BYTES), DEVICE_RESERVE_MAX_BYTES)
    return min(share, total_bytes // 8)


def device_space(figures: DeviceFigures) -> DeviceSpace:
    """Return a device's share: capacity is what we hold plus what we may still take."""
    held_bytes = figures.used_bytes + figures.ahead_bytes
    free_bytes = max(0, figures.free_bytes - figures.reserve_bytes)
    if figures.limit_bytes is not None:
        free_bytes = min(free_bytes, max(0, figures.limit_bytes - held_bytes))
    return DeviceSpace(
        id=figures.id,
        capacity_bytes=held_bytes + free_bytes,
        used_bytes=figures.used_bytes,
        reserved_bytes=figures.ahead_bytes,
        free_bytes=free_bytes,
    )


def pool_totals(devices: Iterable[DeviceFigures]) -> PoolTotals:
    """Return the pool's sums. Of devices on one filesystem no more is free than the filesystem has."""
    shared: dict[int, list[DeviceFigures]] = {}
    for figures in devices:
        shared.setdefault(figures.filesystem, []).append(figures)
    used_bytes = reserved_bytes = free_bytes = 0
    for members in shared.values():
        used_bytes += sum(figures.used_bytes for figures in members)
        reserved_bytes += sum(figures.ahead_bytes for figures in members)
        free_bytes += _free_together(members)
    return PoolTotals(used_bytes + reserved_bytes + free_bytes, used_bytes, reserved_bytes, free_bytes)


def _free_together(members: Sequence[DeviceFigures]) -> int:
    """Return what may still be allocated on one filesystem: by all of them, and by the one that may take most."""
    each = [device_space(figures).free_bytes for figures in members]
    largest = max(max(0, figures.free_bytes - figures.reserve_bytes) for figures in members)
    return min(sum(each), largest)


def level(
    totals: PoolTotals, *, near_ratio: float, brake_ratio: float, least_bytes: int, metadata_ok: bool = True
) -> Level:
    """Return how full the pool is.

    ``least_bytes`` is the smallest step in which space is allocated (above 0): with less than that free, or without
    the metadata reserve, nothing new is given.
    """
    assert least_bytes > 0
    if totals.free_bytes < least_bytes or not metadata_ok:
        return Level.STOP
    used_ratio = totals.used_bytes / totals.capacity_bytes
    if used_ratio >= brake_ratio:
        return Level.BRAKE
    return Level.NEAR if used_ratio >= near_ratio else Level.OK
