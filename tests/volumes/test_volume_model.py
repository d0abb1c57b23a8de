"""An open volume against a bytearray: reads, writes, zeroes, trims, flushes, checkpoints, closing and opening again."""

import random
from pathlib import Path

import pytest

from tests.volumes.conftest import Pool, findings, read, write

SIZE = 600 * 4096  # two leaves: one whole, one part


@pytest.mark.parametrize("seed", range(12))
async def test_random_operations_match_a_byte_model(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    pool = await Pool(tmp_path).start()
    volume_id = await pool.volume(SIZE)
    handle = await pool.open(volume_id)
    model = bytearray(SIZE)
    for step in range(150):
        action = dice.random()
        offset = dice.randrange(SIZE)
        length = min(SIZE - offset, dice.choice([1, 511, 512, 4096, 5000, 12288, 70_000, 1_000_000]))
        if dice.random() < 0.5:
            offset = offset // 4096 * 4096
        if action < 0.40:
            data = dice.randbytes(length)
            await write(handle, offset, data)
            model[offset : offset + length] = data
        elif action < 0.55:
            await handle.zero(offset, length, punch=dice.random() < 0.6)
            model[offset : offset + length] = bytes(length)
        elif action < 0.62:
            await handle.flush()
        elif action < 0.66:
            await handle._opened.checkpointer.run()
        elif action < 0.70:
            await handle.close()
            handle = await pool.open(volume_id)
        elif action < 0.72:
            await handle.close()
            await pool.close()
            await pool.start()
            handle = await pool.open(volume_id)
        else:
            got = await read(handle, offset, length)
            assert got == bytes(model[offset : offset + length]), f"seed {seed} step {step}: {offset}+{length}"
    assert await read(handle, 0, SIZE) == bytes(model), f"seed {seed}"
    await handle.close()
    assert not findings(pool, leaks=True), f"seed {seed}"
    await pool.close()
