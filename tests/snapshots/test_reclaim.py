"""Reclaim, one case at a time: exactly what nobody sees any more becomes free, at a cost that fits it."""

import pytest

from blockvirt.meta.keys import Table, number_key, pair_key
from blockvirt.meta.records import BranchRecord
from blockvirt.meta.store import Writer
from blockvirt.volumes import reclaim
from blockvirt.volumes.gaps import gap_around
from blockvirt.volumes.versions import branch_record, free_gap
from tests.snapshots.conftest import SnapshotPool
from tests.snapshots.test_histories import settled
from tests.volumes.conftest import findings, write

CHUNK = 4096
LEAF = 512 * CHUNK
LEAVES = 6
SIZE = LEAVES * LEAF


async def test_an_old_snapshot_of_a_large_volume_costs_what_changed_after_it(pool: SnapshotPool) -> None:
    handle = await pool.open(await pool.volume(SIZE, "v"))
    for leaf in range(LEAVES):
        await write(handle, leaf * LEAF, b"a" * CHUNK)
    (old,) = await pool.snapshots.create({"v": "old"})
    await write(handle, 2 * LEAF, b"b" * CHUNK)
    await handle.close()
    with pool.engine.store.read() as reader:
        assert gap_around(reader, branch_record(reader, old.branch), old.epoch).leaves == 0, "it is still kept"
    deletion = await pool.snapshots.delete(["v@old"])
    assert deletion.freed_bytes == CHUNK
    with pool.engine.store.read() as reader:
        gap = gap_around(reader, branch_record(reader, old.branch), old.epoch)
    assert gap.leaves == 1, "the one leaf that changed after it is looked at, not the six before"
    await settled(pool)
    assert pool.engine.storage.status().used_bytes == LEAVES * CHUNK
    assert not findings(pool, leaks=True)


async def test_a_young_snapshot_of_a_busy_volume_costs_what_changed_before_it(pool: SnapshotPool) -> None:
    handle = await pool.open(await pool.volume(SIZE, "v"))
    for leaf in range(LEAVES):
        await write(handle, leaf * LEAF, b"a" * CHUNK)
    await pool.snapshots.create({"v": "first"})
    await write(handle, 3 * LEAF, b"b" * CHUNK)
    (second,) = await pool.snapshots.create({"v": "second"})
    for leaf in range(LEAVES):
        await write(handle, leaf * LEAF, b"c" * CHUNK)
    await handle.close()
    deletion = await pool.snapshots.delete(["v@second"])
    assert deletion.freed_bytes == CHUNK
    with pool.engine.store.read() as reader:
        assert gap_around(reader, branch_record(reader, second.branch), second.epoch).leaves == 1
    await settled(pool)
    assert pool.engine.storage.status().used_bytes == 2 * LEAVES * CHUNK
    assert not findings(pool, leaks=True)


@pytest.mark.parametrize("versions", [1, 128])
@pytest.mark.parametrize("batch", [1, 2, 64])
async def test_steps_of_any_size_and_a_restart_in_between_come_to_the_same(
    pool: SnapshotPool, batch: int, versions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reclaim, "RECLAIM_BATCH_LEAVES", batch)
    monkeypatch.setattr(reclaim, "RECLAIM_BATCH_VERSIONS", versions)
    handle = await pool.open(await pool.volume(SIZE, "v"))
    for name in ("a", "b", "c"):
        for leaf in range(LEAVES):
            await write(handle, leaf * LEAF, name.encode() * CHUNK)
        await pool.snapshots.create({"v": name})
    await handle.close()
    deletion = await pool.snapshots.delete(["v@b", "v@a"])
    assert deletion.freed_bytes == 2 * LEAVES * CHUNK
    await pool.close()
    await pool.start()
    await settled(pool)
    assert pool.engine.storage.status().used_bytes == LEAVES * CHUNK
    assert not findings(pool, leaks=True)


async def test_the_last_snapshot_of_a_deleted_origin_takes_the_branch_with_it(pool: SnapshotPool) -> None:
    handle = await pool.open(await pool.volume(SIZE, "v"))
    await write(handle, 0, b"a" * CHUNK)
    await pool.snapshots.create({"v": "a"})
    await handle.close()
    await pool.reverts.revert("v@a", safety=False)
    await settled(pool)
    with pool.engine.store.read() as reader:
        numbers = [key for key, _ in reader.scan(Table.BRANCHES)]
        heads = [branch.head_epoch for key in numbers if (branch := reader.record(BranchRecord, Table.BRANCHES, key))]
    assert [bool(head) for head in heads] == [False, True]
    await pool.snapshots.delete(["v@a"])
    await settled(pool)
    with pool.engine.store.read() as reader:
        assert reader.count(Table.BRANCHES) == 2, "the volume's head still comes from it"
    await pool.catalogue.delete("v")
    await settled(pool)
    with pool.engine.store.read() as reader:
        left = {table: reader.count(table) for table in Table if table not in (Table.POOL, Table.DEVICES, Table.JOBS)}
    assert not any(left.values()), left
    assert not list((pool.device / "files").iterdir())
    assert pool.engine.storage.status().used_bytes == 0


@pytest.mark.parametrize("reverted", [False, True])
@pytest.mark.parametrize("most", [1, 3, 128])
async def test_a_step_removes_few_versions_however_many_snapshots_went(
    pool: SnapshotPool, most: int, reverted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one leaf: all commits of the pool wait for a step. What a run of versions held is freed with its last.

    With a point behind those that went, or (``reverted``) with none.
    """
    monkeypatch.setattr(reclaim, "RECLAIM_BATCH_VERSIONS", most)
    removed = []

    def counted(*arguments: object) -> tuple[int, list[int]]:
        found: tuple[int, list[int]] = free_gap(*arguments)  # type: ignore[arg-type]
        removed.append(found[0])
        return found

    monkeypatch.setattr(reclaim, "free_gap", counted)
    handle = await pool.open(await pool.volume(SIZE, "v"))
    for number in range(8):
        for leaf in range(2):
            await write(handle, leaf * LEAF + (number // 3) * CHUNK, bytes([number + 1]) * CHUNK)
        await pool.snapshots.create({"v": f"s{number}"})
    await handle.close()
    if reverted:
        await pool.reverts.revert("v@s0", safety=False)
    deletion = await pool.snapshots.delete([f"v@s{number}" for number in range(1, 8 if reverted else 7)])
    await settled(pool)
    assert max(removed) <= most
    # Of each leaf s0 keeps its chunk, and s7 the last one of each place.
    assert sum(removed) == 2 * (7 if reverted else 6)
    assert pool.engine.storage.status().used_bytes == 2 * (1 if reverted else 4) * CHUNK
    assert deletion.freed_bytes == 2 * (7 if reverted else 4) * CHUNK
    assert not findings(pool, leaks=True)


async def test_a_damaged_branch_keeps_nobody_from_starting(pool: SnapshotPool) -> None:
    """Its rows of what went are left for when it is mended; the rest of the pool is served."""
    await pool.volume(SIZE, "v")
    other = await pool.volume(SIZE, "other")
    (record,) = await pool.snapshots.create({"v": "a"})
    key = number_key(record.branch)
    with pool.engine.store.read() as reader:
        intact = reader.get(Table.BRANCHES, key)
    assert intact is not None

    def damage(writer: Writer) -> None:
        writer.put(Table.BRANCHES, key, intact[:-1] + bytes([intact[-1] ^ 1]))
        writer.put(Table.RECLAIM, pair_key(record.branch, record.epoch), b"")

    await pool.engine.store.commit(damage)
    await pool.close()
    await pool.start()
    handle = await pool.open(other)
    await write(handle, 0, b"x" * CHUNK)
    await handle.close()
    with pool.engine.store.read() as reader:
        assert reader.count(Table.RECLAIM) == 1
