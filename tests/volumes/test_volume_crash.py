"""A daemon that dies: what was answered is there (I3b); after a power cut, what was flushed (I3). Random histories."""

import random
from pathlib import Path

import pytest

from tests.volumes.conftest import Pool, abandon, read, write

BLOCK = 1024
BLOCKS = 1500  # of 4 KiB chunks: a little less than one leaf
SIZE = BLOCK * BLOCKS


@pytest.mark.parametrize("power_cut", [False, True])
@pytest.mark.parametrize("seed", range(10))
async def test_random_history_survives_the_daemon(tmp_path: Path, seed: int, power_cut: bool) -> None:
    dice = random.Random(seed)
    pool = await Pool(tmp_path).start()
    volume_id = await pool.volume(SIZE)
    handle = await pool.open(volume_id)
    now = [0] * BLOCKS
    since_flush: list[set[int]] = [{0} for _ in range(BLOCKS)]  # what each block may hold after a power cut
    stamp = 0
    for _round in range(4):
        for _step in range(60):
            action = dice.random()
            first = dice.randrange(BLOCKS)
            count = min(BLOCKS - first, dice.choice([1, 1, 3, 4, 8, 40, 400]))
            if action < 0.6:
                stamp += 1
                await write(handle, first * BLOCK, stamp.to_bytes(4, "little") * (BLOCK // 4) * count)
                value = stamp
            elif action < 0.75:
                await handle.zero(first * BLOCK, count * BLOCK, punch=dice.random() < 0.7)
                value = 0
            else:
                if action < 0.9:
                    await handle.flush()
                else:
                    await handle._opened.checkpointer.run()
                since_flush = [{value} for value in now]
                continue
            for block in range(first, first + count):
                now[block] = value
                since_flush[block].add(value)
        await abandon(pool, power_cut=power_cut)
        await pool.start()
        handle = await pool.open(volume_id)
        content = await read(handle, 0, SIZE)
        for block in range(BLOCKS):
            got = int.from_bytes(content[block * BLOCK : block * BLOCK + 4], "little")
            assert content[block * BLOCK : (block + 1) * BLOCK] == got.to_bytes(4, "little") * (BLOCK // 4)
            may = since_flush[block] if power_cut else {now[block]}
            assert got in may, f"seed {seed}: block {block} holds {got}, may hold {sorted(may)}"
            now[block] = got
        since_flush = [{value} for value in now]
    await handle.close()
    await pool.close()
