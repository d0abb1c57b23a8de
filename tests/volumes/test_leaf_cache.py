"""The budget of resident leaves: unused ones leave, changed ones ask for a checkpoint and then leave."""

import gc
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path

from blockvirt.limits import LEAF_CHUNKS
from blockvirt.testing.fixtures import write_mapped_pool
from blockvirt.units import MIB
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.engine import Engine, EngineSettings
from blockvirt.volumes.leaf_map import LEAF_MEMORY_BYTES
from tests.volumes.conftest import SETTINGS, Pool, read, write

LEAF_BYTES = LEAF_CHUNKS * SETTINGS.chunk_bytes
LEAVES = 40
BUDGET = 8


async def test_the_budget_holds_for_read_and_for_changed_leaves(tmp_path: Path) -> None:
    settings = EngineSettings(
        chunk_bytes=SETTINGS.chunk_bytes,
        metadata_reserve_bytes=SETTINGS.metadata_reserve_bytes,
        checkpoint_age_s=3600.0,
        leaf_cache_bytes=BUDGET * LEAF_MEMORY_BYTES,
    )
    pool = await Pool(tmp_path, settings).start()
    handle = await pool.open(await pool.volume(2 * LEAVES * LEAF_BYTES))
    volume = handle._opened.volume
    for leaf in range(LEAVES):
        await write(handle, leaf * LEAF_BYTES, bytes([leaf + 1]))
    assert volume.checkpoint_due.is_set() or volume.stats.checkpoints, "nothing asked for a checkpoint"
    await handle._opened.checkpointer.run_all()
    for leaf in range(LEAVES):
        assert await read(handle, leaf * LEAF_BYTES, 2) == bytes([leaf + 1, 0])
    for leaf in range(LEAVES, 2 * LEAVES):  # what is loaded now takes the place of the others
        assert await read(handle, leaf * LEAF_BYTES, 1) == b"\0"
    assert len(volume.map.leaves) <= BUDGET + 1
    await handle.close()
    await pool.close()


async def test_the_smallest_budget_keeps_the_leaf_that_is_being_changed(tmp_path: Path) -> None:
    pool = await Pool(tmp_path, replace(SETTINGS, leaf_cache_bytes=1)).start()
    handle = await pool.open(await pool.volume(2 * LEAF_BYTES))
    await write(handle, 0, b"a" * 4096)
    await write(handle, LEAF_BYTES, b"b" * 4096)
    # Two entries of the second leaf, which is not in memory: the first loads it, the second must find what that did.
    await write(handle, LEAF_BYTES + 4096 + 512, b"c" * 4096)
    assert await read(handle, LEAF_BYTES, 8192) == b"b" * 4096 + bytes(512) + b"c" * 3584
    await handle.close()
    await pool.close()


async def test_a_leaf_that_is_loaded_again_stays_while_it_is_changed(tmp_path: Path) -> None:
    """Where the map was looked up anew the cache has a place of before for it, and sweeps that one."""
    pool = await Pool(tmp_path, replace(SETTINGS, leaf_cache_bytes=1)).start()
    handle = await pool.open(await pool.volume(2 * LEAF_BYTES))
    leaves = handle._opened.volume.map
    leaves.leaf(0)
    leaves.look_up_anew()
    leaves.put(0, 77)
    assert leaves.readable(0) == 77
    assert leaves.dirty == {0: leaves.leaves[0]}
    leaves.put(0, 0)
    await handle.close()
    await pool.close()


async def test_leaves_take_no_more_memory_than_the_budget(tmp_path: Path) -> None:
    """What the allocator hands out while a map four times the budget is read, hash tables and the cache's ring too."""
    leaves, budget_bytes = 1_800, 2 * MIB
    await write_mapped_pool(tmp_path / "state", tmp_path / "disk", volumes=1, mapped_chunks=leaves * LEAF_CHUNKS)
    engine = await Engine.start(tmp_path / "state", [tmp_path / "disk"], EngineSettings(leaf_cache_bytes=budget_bytes))
    volume = Catalogue(engine.store, engine.registry, engine.storage).get("v00000")
    handle = await engine.registry.open(volume.id, "test")
    read = handle._opened.volume.map.leaf
    numbers = random.Random(1).choices(range(leaves), k=2 * leaves)
    read(numbers[0])  # what a first load takes once
    gc.collect()
    tracemalloc.start()
    try:
        before_bytes, _ = tracemalloc.get_traced_memory()
        for number in numbers:
            read(number)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.9 * budget_bytes < most_bytes - before_bytes <= budget_bytes
    await handle.close()
    await engine.close()


async def test_the_budget_holds_while_all_leaves_are_in_use(tmp_path: Path) -> None:
    """A working set that grows a leaf at a time: all of it is used between two loads, so none has gone unused."""
    limit = 100
    settings = replace(SETTINGS, leaf_cache_bytes=limit * LEAF_MEMORY_BYTES)
    pool = await Pool(tmp_path, settings).start()
    handle = await pool.open(await pool.volume(2 * limit * LEAF_BYTES))
    leaf_map = handle._opened.volume.map
    for number in range(2 * limit):
        leaf_map.leaf(number)
        for leaf in leaf_map.leaves.values():
            leaf.touched = True
        assert len(leaf_map.leaves) <= limit
    await handle.close()
    await pool.close()
