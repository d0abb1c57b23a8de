"""Exports that do not come to their end, and how little of a snapshot one holds at a time."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blockvirt.errors import DataDamaged, InUse, NotFound, StreamDamaged
from blockvirt.limits import STREAM_MAX_DATA_BYTES
from blockvirt.meta.keys import Table
from blockvirt.snapshots.stream_reader import StreamDecoder
from tests.snapshots.stream_pools import CHUNK, MIB, StreamPool, chain, pool_in
from tests.volumes.conftest import until, write


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[StreamPool]:
    pool = await pool_in(tmp_path / "here")
    yield pool
    await pool.close()


async def test_an_export_whose_snapshot_goes_has_no_end(here: StreamPool) -> None:
    volume = await here.volume(16 * MIB, "web")
    handle = await here.open(volume)
    for at in range(0, 16 * MIB, MIB):
        await write(handle, at, os.urandom(MIB))
    await handle.close()
    await here.snapshots.create({volume: "s"})
    decoder = StreamDecoder()
    async with here.exports.export("web@s") as export:
        with pytest.raises(InUse, match="being read"):
            await here.snapshots.delete(["web@s"])
        blocks = export.blocks()
        list(decoder.feed(await anext(blocks)))
        await here.snapshots.delete(["web@s"], force=True)
        with pytest.raises(NotFound, match="deleted while"):
            await feed_all(decoder, blocks)
    with pytest.raises(StreamDamaged, match="cut off"):
        decoder.finish()


async def feed_all(decoder: StreamDecoder, blocks: AsyncIterator[bytes]) -> None:
    async for block in blocks:
        list(decoder.feed(block))


async def test_a_damaged_chunk_is_named_and_not_sent(here: StreamPool) -> None:
    sent = await chain(here)
    await until(lambda: not _unsealed(here))
    assert await here.export("web@s0") != sent.first, "another stream_id"
    chunk = sent.contents[0][3 * CHUNK : 4 * CHUNK]
    (path,) = [each for each in here.device.rglob("*") if each.is_file() and chunk in each.read_bytes()]
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(chunk) + 100)
        file.write(b"damage")
    with pytest.raises(DataDamaged, match="of snapshot 's0' is damaged"):
        await here.export("web@s0")


def _unsealed(pool: StreamPool) -> int:
    with pool.engine.store.read() as reader:
        return reader.count(Table.SEALS)


async def test_an_export_is_one_piece_ahead(here: StreamPool) -> None:
    volume = await here.volume(64 * MIB, "web")
    handle = await here.open(volume)
    for at in range(0, 12 * MIB, MIB):
        await write(handle, 4 * at, os.urandom(MIB))
    await handle.close()
    await here.snapshots.create({volume: "s"})
    decoder = StreamDecoder()
    async with here.exports.export("web@s") as export:
        async for block in export.blocks():
            assert len(block) < STREAM_MAX_DATA_BYTES + 64 * CHUNK
            list(decoder.feed(block))
            await export.close()  # the piece ahead is made
            if decoder.coverage is not None:
                assert export._encoder.coverage.covered_bytes - decoder.coverage.covered_bytes <= STREAM_MAX_DATA_BYTES
    decoder.finish()
