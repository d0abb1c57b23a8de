"""What the figures say becomes free is what does; what one point's parent is agrees with the whole tree."""

import random

import pytest

from blockvirt.meta.keys import Table, number_key
from blockvirt.meta.records import BranchRecord, FileRecord, SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Reader
from blockvirt.snapshots.freed import freed_by, freed_with_snapshots, freed_with_volume, freed_with_volumes
from blockvirt.snapshots.views import parent_of, volume_snapshots
from blockvirt.volumes.deletion import branches_of
from blockvirt.volumes.gaps import MAX_EPOCH
from tests.snapshots.conftest import SnapshotPool
from tests.snapshots.test_histories import History, settled


def live_chunks(pool: SnapshotPool) -> int:
    """Chunks that some version of a leaf names, in all files."""
    total = 0
    with pool.engine.store.read() as reader:
        for key, _ in reader.scan(Table.FILES):
            file = reader.record(FileRecord, Table.FILES, key)
            assert file is not None
            total += file.live_chunks
    return total


async def at_rest(pool: SnapshotPool, history: History) -> None:
    """Close everything, and let the background end."""
    for volume in history.volumes:
        await history.shut(volume)
    await settled(pool)


@pytest.mark.parametrize("seed", range(8))
async def test_the_figures_are_exact(pool: SnapshotPool, seed: int) -> None:
    history = History(pool, seed)
    await history.new_volume()
    for _ in range(60):
        if len(history.volumes) < 2:
            await history.new_volume()
        await history.step()
    await at_rest(pool, history)
    dice = random.Random(seed)
    while history.volumes:
        volume = dice.choice(history.volumes)
        before = live_chunks(pool)
        kind = dice.choice(["snapshots", "some", "volume", "volumes"])
        with pool.engine.store.read() as reader:
            records = volume_snapshots(reader, volume.id)
            some = dice.sample(records, dice.randrange(len(records) + 1))
            several = dice.sample(history.volumes, dice.randrange(1, len(history.volumes) + 1))
            expected = {
                "snapshots": freed_with_snapshots(reader, volume.id),
                "some": freed_by(reader, some),
                "volume": freed_with_volume(reader, volume.id),
                "volumes": freed_with_volumes(reader, [each.id for each in several]),
            }[kind]
        if kind == "volume":
            await history.delete(volume)
        elif kind == "volumes":
            for one in several:
                await history.delete(one)
        else:
            going = records if kind == "snapshots" else some
            await pool.snapshots.delete([each.id for each in going])
            for each in going:
                del volume.snapshots[each.name]
        await settled(pool)
        assert before - live_chunks(pool) == expected, (kind, volume.name)
    assert live_chunks(pool) == 0


def nearest(reader: Reader, records: list[SnapshotRecord], branch: int, epoch: float) -> str:
    """The newest of a volume's snapshots that a point comes from, found by a look at all of them; empty: none."""
    branches: dict[int, BranchRecord] = {}
    for number in branches_of(reader, records[0].volume_id) if records else ():
        record = reader.record(BranchRecord, Table.BRANCHES, number_key(number))
        assert record is not None
        branches[number] = record
    while branch in branches:
        older = [each for each in records if each.branch == branch and each.epoch < epoch]
        if older:
            return max(older, key=lambda each: each.epoch).id
        branch, epoch = branches[branch].origin_branch, branches[branch].origin_epoch + 1
    return ""


def parents(pool: SnapshotPool, history: History) -> int:
    """Compare every volume's parents, one by one, with its tree; return how many snapshots had one."""
    found = 0
    with pool.engine.store.read() as reader:
        for volume in history.volumes:
            record = reader.record(VolumeRecord, Table.VOLUMES, volume.id.encode())
            assert record is not None
            records = volume_snapshots(reader, volume.id)
            told = {each.id: parent_of(reader, each.branch, each.epoch) for each in records}
            assert told == {each.id: nearest(reader, records, each.branch, each.epoch) for each in records}
            assert parent_of(reader, record.branch, MAX_EPOCH) == nearest(reader, records, record.branch, MAX_EPOCH + 1)
            found += len([parent for parent in told.values() if parent])
    return found


async def test_one_parent_is_that_of_the_tree(pool: SnapshotPool) -> None:
    history = History(pool, 1)
    await history.new_volume()
    found = 0
    for _ in range(150):
        if len(history.volumes) < 2:
            await history.new_volume()
        await history.step()
        found += parents(pool, history)
    await at_rest(pool, history)
    assert found > 100
