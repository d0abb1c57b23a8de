"""Pages of snapshots: what a page costs, and that all of them together are everything, once, in order."""

import pytest

from blockvirt.meta import transactions
from blockvirt.meta.records import Record, SnapshotRecord, decode
from blockvirt.snapshots.views import Snapshot
from tests.snapshots.conftest import SnapshotPool

SIZE = 64 * 4096


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The kinds of records that are decoded, one by one."""
    kinds: list[type] = []

    def counted(cls: type[Record], key: bytes, stored: bytes) -> Record:
        kinds.append(cls)
        return decode(cls, key, stored)

    monkeypatch.setattr(transactions, "decode", counted)
    return kinds


async def all_pages(pool: SnapshotPool, volume: str | None, limit: int) -> list[Snapshot]:
    found: list[Snapshot] = []
    after = ""
    while True:
        page = await pool.snapshots.list(volume, after=after, limit=limit)
        assert len(page.snapshots) <= limit
        found += page.snapshots
        after = page.next_after
        if not after:
            return found


async def test_a_page_costs_its_own_length(pool: SnapshotPool, decoded: list[type]) -> None:
    await pool.volume(SIZE, "v")
    for number in range(120):
        await pool.snapshots.create({"v": f"s{number}"})
    first = await pool.snapshots.list("v", limit=60)
    for after in ("", first.next_after):
        decoded.clear()
        page = await pool.snapshots.list("v", after=after, limit=5)
        assert len(page.snapshots) == 5
        assert 5 <= decoded.count(SnapshotRecord) <= 4 * 5
        assert len(decoded) <= 10 * 5
    assert [each.name for each in page.snapshots] == [f"s{number}" for number in range(60, 65)]


async def test_what_labels_leave_out_is_only_looked_at(pool: SnapshotPool, decoded: list[type]) -> None:
    await pool.volume(SIZE, "v")
    for number in range(40):
        await pool.snapshots.create({"v": f"s{number}"}, labels={"seventh": str(number % 7 == 0)})
    decoded.clear()
    page = await pool.snapshots.list("v", labels={"seventh": "True"}, limit=3)
    assert [each.name for each in page.snapshots] == ["s0", "s7", "s14"]
    assert decoded.count(SnapshotRecord) <= 15 + 3 * 3


async def test_the_order_is_that_of_their_creation_through_reverts(pool: SnapshotPool) -> None:
    for volume in ("v", "w"):
        await pool.volume(SIZE, volume)
    expected: dict[str, list[str]] = {"v": [], "w": []}
    for number in range(24):
        volume = "vw"[number % 2]
        if number % 6 == 5:
            await pool.reverts.revert(f"{volume}@{expected[volume][0]}", safety_name=f"safe{number}")
            expected[volume].append(f"safe{number}")
        await pool.snapshots.create({volume: f"s{number}"})
        expected[volume].append(f"s{number}")
    for limit in (1, 2, 3, 100):
        for volume, names in expected.items():
            assert [each.name for each in await all_pages(pool, volume, limit)] == names
        everything = await all_pages(pool, None, limit)
        assert len({each.id for each in everything}) == len(everything) == sum(map(len, expected.values()))
        ids = [each.volume_id for each in everything]
        assert ids == sorted(ids), "volume by volume"


async def test_a_page_goes_on_where_everything_around_its_place_went(pool: SnapshotPool) -> None:
    await pool.volume(SIZE, "v")
    for name in ("a", "b", "c", "d"):
        await pool.snapshots.create({"v": name})
    await pool.reverts.revert("v@b", safety=False)
    await pool.snapshots.create({"v": "e"})
    page = await pool.snapshots.list("v", limit=3)
    assert [each.name for each in page.snapshots] == ["a", "b", "c"]
    await pool.snapshots.delete(["v@a", "v@b", "v@c", "v@d"])
    rest = await pool.snapshots.list("v", after=page.next_after)
    assert [each.name for each in rest.snapshots] == ["e"]


async def test_the_parent_is_the_nearest_that_is_left(pool: SnapshotPool) -> None:
    """Through a revert to one that was deleted since, too; with nothing left, there is none."""
    await pool.volume(SIZE, "v")
    for name in ("a", "b", "c"):
        await pool.snapshots.create({"v": name})
    await pool.reverts.revert("v@b", safety=False)
    await pool.snapshots.create({"v": "d"})
    await pool.snapshots.delete(["v@b"])
    assert await parents(pool) == {"a": "", "c": "a", "d": "a"}
    await pool.snapshots.delete(["v@a"])
    assert await parents(pool) == {"c": "", "d": ""}


async def parents(pool: SnapshotPool) -> dict[str, str]:
    """The names of all snapshots, each with its parent's."""
    found = await all_pages(pool, None, 2)
    names = {each.id: each.name for each in found} | {"": ""}
    return {each.name: names[each.parent_id] for each in found}
