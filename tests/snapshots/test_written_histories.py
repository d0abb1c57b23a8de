"""The histories that benchmarks write are real ones: clean, and what they say changed is what the API would say."""

from pathlib import Path

from benchmarks.snapshots.fio import calls_in
from benchmarks.snapshots.history import History, write_checksums, write_histories
from benchmarks.snapshots.tables import percentile
from blockvirt.check import run
from blockvirt.meta.keys import Table
from blockvirt.snapshots.changes import Point, chain_of, changes
from blockvirt.snapshots.views import volume_snapshots
from blockvirt.testing.fixtures import write_mapped_pool
from blockvirt.volumes.engine import Engine
from blockvirt.volumes.transactions import locate

LEAVES = 3


async def test_written_snapshots_are_clean_and_differ_by_a_chunk_each(tmp_path: Path) -> None:
    state = tmp_path / "state"
    await write_mapped_pool(state, tmp_path / "disk", volumes=1, mapped_chunks=LEAVES * 512)
    first, wide_one = History("v00000", 1, 0, "first"), History("v00000", 1, LEAVES, "wide")
    await write_histories(state, [first, History("v00000", 10), wide_one])
    await write_checksums(state, "v00000", LEAVES * 512)
    assert run(state, repair=False, restore_metadata=False).findings == ()
    engine = await Engine.start(state, [])
    try:
        with engine.store.read() as reader:
            taken = volume_snapshots(reader, locate(reader, "v00000")[0])
            by_name = {each.name: chain_of(reader, Point(each.branch, each.epoch)) for each in taken}
            assert len(by_name) == 12
            assert not reader.count(Table.SEALS)
            last, wide = by_name["past00009"], by_name["wide00000"]
            assert sum(each.count for each in changes(reader, by_name["past00008"], last)) == 1
            assert sum(each.count for each in changes(reader, by_name["past00000"], last)) == 9
            assert sum(each.count for each in changes(reader, last, wide)) == LEAVES
    finally:
        await engine.close()


def test_a_count_of_system_calls_is_read() -> None:
    text = "# started on Sun Nov 22 05:33:48 2026\n\n1234,,raw_syscalls:sys_enter,406274067,100.00,,\n"
    assert calls_in(text) == 1234


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, percent) for percent in (0, 50, 99, 100)] == [1.0, 3.0, 5.0, 5.0]
    assert percentile([float(each) for each in range(1, 101)], 99) == 99.0
