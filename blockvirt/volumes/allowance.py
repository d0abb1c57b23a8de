"""How much may still be promised: the overcommit policy applied to one request, with its refusal explained. Pure."""

from dataclasses import dataclass

from blockvirt.errors import OvercommitLimit, PoolFull
from blockvirt.limits import SECTOR_BYTES
from blockvirt.units import format_size
from blockvirt.volumes.ports import PoolStatus
from blockvirt.volumes.requests import max_volume_bytes


@dataclass(frozen=True, slots=True)
class Allowance:
    """The largest volume that could be created now, and what keeps it from being larger."""

    largest_bytes: int
    limited_by: str
    """'volume-maximum', 'overcommit' or 'pool-full'."""
    explanation: str


def allowance(pool: PoolStatus, promised_bytes: int) -> Allowance:
    """Return what may still be promised when ``promised_bytes`` are promised already."""
    if not pool.capacity_bytes:
        return Allowance(0, "pool-full", "no device of the pool can be used ('blockvirt device list' says why)")
    if pool.level in ("brake", "stop"):
        return Allowance(
            0,
            "pool-full",
            f"the pool is {_percent(pool.used_bytes, pool.capacity_bytes)} full; "
            f"from {pool.brake_ratio:.0%} on no volume is created or grown",
        )
    ceiling_bytes = int(pool.capacity_bytes * pool.overcommit_ratio)
    left_bytes = max(0, ceiling_bytes - promised_bytes) // SECTOR_BYTES * SECTOR_BYTES
    most_bytes = max_volume_bytes(pool.chunk_bytes)
    if left_bytes >= most_bytes:
        return Allowance(most_bytes, "volume-maximum", f"a volume has at most {format_size(most_bytes)}")
    return Allowance(
        left_bytes,
        "overcommit",
        f"the policy allows {pool.overcommit_ratio:g} x {format_size(pool.capacity_bytes)} of capacity = "
        f"{format_size(ceiling_bytes)} to be promised; {format_size(promised_bytes)} are promised already",
    )


def check_background(pool: PoolStatus, needed_bytes: int, what: str) -> None:
    """Return if background work may take so much more of the pool; raises PoolFull.

    It stops where guests still have room: at the level 'brake'.
    """
    room_bytes = max(0, min(pool.free_bytes, int(pool.capacity_bytes * pool.brake_ratio) - pool.used_bytes))
    if pool.level in ("brake", "stop") or needed_bytes > room_bytes:
        raise PoolFull(
            f"{what} would take the last of the pool's space from its guests",
            cause=f"it needs {format_size(needed_bytes)}, {format_size(room_bytes)} are left below the level 'brake'",
            correction="add a device ('blockvirt device add DIR'), or delete snapshots or volumes; then try again",
            requested_bytes=needed_bytes,
            would_fit_bytes=room_bytes,
        )


def check_grant(pool: PoolStatus, promised_bytes: int, extra_bytes: int) -> None:
    """Return if ``extra_bytes`` more may be promised; raises PoolFull or OvercommitLimit with what would fit."""
    room = allowance(pool, promised_bytes)
    if extra_bytes <= room.largest_bytes or room.limited_by == "volume-maximum":
        return
    facts = {
        "requested_bytes": extra_bytes,
        "would_fit_bytes": room.largest_bytes,
        "capacity_bytes": pool.capacity_bytes,
        "used_bytes": pool.used_bytes,
        "promised_bytes": promised_bytes,
    }
    if room.limited_by == "pool-full":
        raise PoolFull(
            f"{format_size(extra_bytes)} more cannot be promised now",
            cause=room.explanation,
            correction="add a device ('blockvirt device add DIR'), or delete or trim volumes",
            **facts,
        )
    raise OvercommitLimit(
        f"{format_size(extra_bytes)} more would promise too much",
        cause=room.explanation,
        correction=f"ask for at most {room.largest_bytes} bytes ({format_size(room.largest_bytes)}), add a device, "
        "or raise the ratio with 'blockvirt pool set --overcommit RATIO'",
        **facts,
    )


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "100%"
