"""Reclaim, one case at a time: exactly what nobody sees any more becomes free, at a cost that fits it."""

import pytest

from blockvirt.meta.keys import Table
from blockvirt.meta.records import BranchRecord
from blockvirt.volumes import reclaim
from blockvirt.volumes.gaps import gap_around
from blockvirt.volumes.versions import branch_record
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


@pytest.mark.parametrize("batch", [1, 2, 64])
async def test_steps_of_any_size_and_a_restart_in_between_come_to_the_same(
    pool: SnapshotPool, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reclaim, "RECLAIM_BATCH_LEAVES", batch)
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
