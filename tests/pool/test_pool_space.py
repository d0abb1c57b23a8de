"""Space arithmetic: limits, reserves, filesystems that devices share, and the levels of fullness."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockvirt.pool.space import (
    DeviceFigures,
    Level,
    PoolTotals,
    default_reserve_bytes,
    device_space,
    level,
    pool_totals,
)
from blockvirt.units import GIB, MIB, TIB

PLAIN = DeviceFigures("a", 1, free_bytes=1000, used_bytes=200, ahead_bytes=50)


@pytest.mark.parametrize(
    ("figures", "free_bytes"),
    [
        (PLAIN, 1000),
        (replace(PLAIN, reserve_bytes=300), 700),
        (replace(PLAIN, reserve_bytes=3000), 0),
        (replace(PLAIN, limit_bytes=500), 250),
        (replace(PLAIN, limit_bytes=100), 0),
        (replace(PLAIN, limit_bytes=900, reserve_bytes=600), 400),
    ],
)
def test_a_device_offers_what_limit_and_reserve_leave(figures: DeviceFigures, free_bytes: int) -> None:
    space = device_space(figures)
    assert space.free_bytes == free_bytes
    assert space.capacity_bytes == 250 + free_bytes
    assert (space.used_bytes, space.reserved_bytes) == (200, 50)


def test_a_shared_filesystem_counts_once() -> None:
    second = replace(PLAIN, id="b", used_bytes=10, ahead_bytes=0)
    assert pool_totals([PLAIN, second]) == PoolTotals(1260, 210, 50, 1000)
    assert pool_totals([PLAIN, replace(second, filesystem=2)]) == PoolTotals(2260, 210, 50, 2000)
    assert pool_totals([replace(PLAIN, limit_bytes=300), replace(second, limit_bytes=110)]).free_bytes == 150
    assert pool_totals([]) == PoolTotals(0, 0, 0, 0)


FIGURES = st.builds(
    DeviceFigures,
    st.just("x"),
    st.integers(1, 2),
    st.integers(0, 100),
    st.integers(0, 100),
    st.integers(0, 100),
    st.none() | st.integers(0, 300),
    st.integers(0, 100),
)


@given(st.lists(FIGURES, max_size=5))
def test_the_pool_never_offers_more_than_there_is(devices: list[DeviceFigures]) -> None:
    totals = pool_totals(devices)
    assert totals.capacity_bytes == totals.used_bytes + totals.reserved_bytes + totals.free_bytes
    assert totals.free_bytes <= sum(device_space(figures).free_bytes for figures in devices)
    most = {number: max((f.free_bytes for f in devices if f.filesystem == number), default=0) for number in (1, 2)}
    assert totals.free_bytes <= sum(most.values())
    assert totals.free_bytes >= max((device_space(figures).free_bytes for figures in devices), default=0)


@pytest.mark.parametrize(
    ("used_bytes", "free_bytes", "metadata_ok", "expected"),
    [
        (0, 1000, True, Level.OK),
        (799, 201, True, Level.OK),
        (800, 200, True, Level.NEAR),
        (899, 101, True, Level.NEAR),
        (900, 100, True, Level.BRAKE),
        (990, 10, True, Level.BRAKE),
        (991, 9, True, Level.STOP),
        (0, 1000, False, Level.STOP),
        (0, 0, True, Level.STOP),
    ],
)
def test_levels(used_bytes: int, free_bytes: int, metadata_ok: bool, expected: Level) -> None:
    totals = PoolTotals(used_bytes + free_bytes, used_bytes, 0, free_bytes)
    assert level(totals, near_ratio=0.8, brake_ratio=0.9, least_bytes=10, metadata_ok=metadata_ok) is expected


def test_the_default_reserve_is_a_hundredth_within_bounds() -> None:
    assert default_reserve_bytes(TIB) == GIB
    assert default_reserve_bytes(10 * GIB) == 10 * GIB // 100
    assert default_reserve_bytes(GIB) == 16 * MIB
    assert default_reserve_bytes(64 * MIB) == 8 * MIB
