"""Reads of every size, alone and together: which share a buffer with others, and which have one of their own."""

import asyncio
import random

import pytest

from blockvirt.nbd import constants as c
from blockvirt.nbd.buffers import SIZES_BYTES, SMALL_BYTES
from blockvirt.nbd.client import RequestFailed
from blockvirt.nbd.shared import SharedResources
from blockvirt.units import KIB, MIB
from tests.nbd.conftest import PATIENCE_S, Bench, both_kinds, both_paths, noise

AROUND_SMALL = [SMALL_BYTES + near for near in (-93, -92, -91, -64, -29, -28, -27, -16, -15, -1, 0, 1)]
"""On either side of what shares a buffer, for all that a reply's header and its alignment take."""


@both_kinds
@both_paths
@pytest.mark.parametrize("size", AROUND_SMALL)
async def test_a_read_around_the_small_buffers_size(bench: Bench, structured: bool, now: bool, size: int) -> None:
    bench.disk.now = now
    client = await bench.enter(structured=structured)
    bench.disk.data[12345 : 12345 + size] = noise(size)
    assert await client.read(12345, size) == noise(size)


@both_kinds
@both_paths
async def test_reads_of_all_sizes_together(bench: Bench, structured: bool, now: bool) -> None:
    bench.disk.now = now
    client = await bench.enter(structured=structured)
    bench.disk.data[:] = noise(bench.disk.size_bytes)
    chance = random.Random(5)
    sizes = [1, 28, 512, 4096, 4097, 16 * KIB, 64 * KIB, 128 * KIB, *AROUND_SMALL, 256 * KIB, MIB - 1, MIB]
    for _round in range(20):
        wanted = [(chance.randrange(MIB), size) for size in chance.choices(sizes, k=30)]
        reads = [client.start(c.CMD_READ, offset, size) for offset, size in wanted]
        for (offset, size), read in zip(wanted, reads, strict=True):
            assert (await read).data == bench.disk.data[offset : offset + size], f"{size} bytes at {offset}"


@pytest.mark.parametrize("length", [4096, MIB])
async def test_a_failed_read_is_counted_once(bench: Bench, length: int) -> None:
    client = await bench.enter()
    bench.disk.fail("read_now", OSError(5, "no"))
    with pytest.raises(RequestFailed):
        await client.read(0, length)
    assert bench.server.stats().total.requests[c.CMD_READ] == 1
    assert bench.server.stats().errors == {5: 1}
    bench.disk.fail("read_now", None)
    assert await client.read(0, length) == bytes(length)


@both_kinds
async def test_a_read_just_too_large_for_company_needs_one_buffer(
    bench: Bench, shared: SharedResources, structured: bool
) -> None:
    """With its header it does not fit the buffer that small reads share; without it, it would."""
    bench.disk.now = False
    shared.budget.limit_bytes = SIZES_BYTES[1]
    client = await bench.enter(structured=structured)
    async with asyncio.timeout(PATIENCE_S):
        for length in range(SMALL_BYTES - 100, SMALL_BYTES + 2):
            assert await client.read(0, length) == bytes(length)
