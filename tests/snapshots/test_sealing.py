"""Checksums of sealed chunks: computed in the background, compared where a sealed chunk is copied."""

import asyncio
import os
import random
from functools import partial
from pathlib import Path

import pytest

from blockvirt.checksum import crc32c
from blockvirt.errors import DataDamaged
from blockvirt.limits import CHECKSUM_ROWS
from blockvirt.lun.address import address, chunk_of, file_of
from blockvirt.meta.keys import Table
from blockvirt.meta.store import Store
from blockvirt.volumes.checksums import GROUP_CHUNKS, SealedChecksums, find_checksum, forget_checksums, put_checksums
from blockvirt.volumes.requests import NewVolume, VolumeChange
from blockvirt.volumes.volume import Volume
from tests.snapshots.conftest import SnapshotPool
from tests.volumes.conftest import findings, read, until, until_punched, write

CHUNK = 4096
SIZE = 64 * CHUNK


async def sealed(pool: SnapshotPool) -> None:
    def done() -> bool:
        with pool.engine.store.read() as reader:
            return not reader.count(Table.SEALS)

    await until(done)


def flip(volume: Volume, chunk: int) -> None:
    """Change a byte of a chunk behind the daemon's back."""
    place = volume.map.readable(chunk)
    with volume.files.get(file_of(place)).path.open("r+b") as file:
        file.seek(chunk_of(place) * CHUNK + 77)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


async def test_what_a_snapshot_sealed_gets_checksums_and_what_is_written_later_does_not(pool: SnapshotPool) -> None:
    handle = await pool.open(await pool.volume(SIZE, "v"))
    volume = handle._opened.volume
    content = os.urandom(SIZE)
    await write(handle, 0, content)
    await pool.snapshots.create({"v": "a"})
    await write(handle, 0, b"x" * CHUNK)
    await sealed(pool)
    with pool.engine.store.read() as reader:
        for chunk in range(1, SIZE // CHUNK):
            wanted = crc32c(content[chunk * CHUNK : (chunk + 1) * CHUNK])
            assert find_checksum(reader, volume.map.readable(chunk)) == wanted
        assert find_checksum(reader, volume.map.readable(0)) is None
    await handle.close()


@pytest.mark.parametrize("cold", [False, True])
async def test_a_damaged_chunk_is_not_copied(pool: SnapshotPool, cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = await pool.open(await pool.volume(SIZE, "v"))
    volume = handle._opened.volume
    await write(handle, 0, b"a" * SIZE)
    await pool.snapshots.create({"v": "a"})
    await sealed(pool)
    flip(volume, 3)
    if cold:
        monkeypatch.setattr(volume, "_fill_old", lambda entry, content: False)
    with pytest.raises(DataDamaged, match="CRC-32C"):
        await write(handle, 3 * CHUNK + 1, b"b")
    await write(handle, 4 * CHUNK + 1, b"b")
    await write(handle, 3 * CHUNK, b"c" * CHUNK)  # a whole chunk copies nothing
    assert await read(handle, 3 * CHUNK, 2 * CHUNK) == b"c" * CHUNK + b"ab" + b"a" * (CHUNK - 2)
    await handle.close()
    assert not findings(pool)


@pytest.mark.parametrize("general", [False, True], ids=["at once", "in steps"])
async def test_the_chunk_that_a_volume_ends_in_is_written_whole_up_to_there(pool: SnapshotPool, general: bool) -> None:
    """What is damaged is mended so, and a copy would have to be intact."""
    handle = await pool.open(await pool.volume(3 * CHUNK + 512, "v"))
    volume = handle._opened.volume
    await write(handle, 0, b"a" * (3 * CHUNK + 512))
    await pool.snapshots.create({"v": "a"})
    await sealed(pool)
    for chunk in (2, 3):
        flip(volume, chunk)
    first = 2 * CHUNK if general else 3 * CHUNK
    await write(handle, first, b"b" * (3 * CHUNK + 512 - first))
    assert await read(handle, 3 * CHUNK, 512) == b"b" * 512
    await handle.close()
    await pool.catalogue.change("v", VolumeChange(size_bytes=4 * CHUNK))
    handle = await pool.open(volume.record.id)
    assert await read(handle, 3 * CHUNK, CHUNK) == b"b" * 512 + bytes(CHUNK - 512)
    await handle.close()


async def test_a_damaged_chunk_keeps_a_flatten_from_hiding_it(pool: SnapshotPool) -> None:
    handle = await pool.open(await pool.volume(SIZE, "v"))
    await write(handle, 0, b"a" * SIZE)
    (snapshot,) = await pool.snapshots.create({"v": "a"})
    await sealed(pool)
    flip(handle._opened.volume, 5)
    await handle.close()
    await pool.catalogue.create(NewVolume(size_bytes=SIZE, name="clone"), origin=snapshot)
    job = await pool.engine.jobs.finished(await pool.flattening.start("clone"))
    assert (job.state, "CRC-32C" in job.error) == ("failed", True)


async def test_checksums_go_with_their_chunks(pool: SnapshotPool) -> None:
    handle = await pool.open(await pool.volume(SIZE, "v"))
    await write(handle, 0, b"a" * SIZE)
    await pool.snapshots.create({"v": "a"})
    await sealed(pool)
    await handle.zero(0, SIZE, punch=True)
    await handle.close()
    await pool.snapshots.delete(["v@a"])
    await until_punched(pool)

    def no_rows() -> bool:
        with pool.engine.store.read() as reader:
            return not reader.count(Table.CHECKSUMS)

    await until(no_rows)


def test_rows_of_checksums_hold_what_is_put(tmp_path: Path) -> None:

    store = Store.open(tmp_path / "m", create=True)
    wanted = {address(3, chunk): chunk * 7919 for chunk in (0, 1, 511, 512, 1500)}
    store.commit_now(lambda writer: put_checksums(writer, wanted))
    store.commit_now(lambda writer: forget_checksums(writer, 3, 1, 511))
    with store.read() as reader:
        found = {each: find_checksum(reader, each) for each in wanted}
    assert found == {**wanted, address(3, 1): None, address(3, 511): None}
    store.commit_now(lambda writer: forget_checksums(writer, 3, 0, 2000))
    with store.read() as reader:
        assert not reader.count(Table.CHECKSUMS)
    store.close()


def test_checksums_for_copies_are_those_of_the_table(tmp_path: Path) -> None:
    """Whatever was looked up before: rows come, and get more."""
    store = Store.open(tmp_path / "m", create=True)
    checksums = SealedChecksums(store)
    groups, dice = CHECKSUM_ROWS + 3, random.Random(1)
    wanted = {address(1 + group % 3, group * GROUP_CHUNKS + dice.randrange(512)): group for group in range(groups)}
    more = {each ^ 1: value + groups for each, value in wanted.items()}
    for rows in ({}, wanted, wanted | more):
        store.commit_now(partial(put_checksums, checksums=rows))
        for each in [*wanted, *more, *wanted]:
            assert checksums.find(each) == rows.get(each)
    store.close()


async def test_a_chunk_that_was_sealed_since_the_last_copy_is_compared(pool: SnapshotPool) -> None:
    handle = await pool.open(await pool.volume(SIZE, "v"))
    await write(handle, 0, b"a" * SIZE)
    await pool.snapshots.create({"v": "a"})
    await write(handle, 1, b"b")
    await sealed(pool)
    flip(handle._opened.volume, 3)
    with pytest.raises(DataDamaged, match="CRC-32C"):
        await write(handle, 3 * CHUNK + 1, b"b")
    await handle.close()


async def test_what_a_revert_keeps_is_sealed_without_another_snapshot(pool: SnapshotPool) -> None:
    volume_id = await pool.volume(SIZE, "v")
    handle = await pool.open(volume_id)
    await write(handle, 0, b"a" * CHUNK)
    await pool.snapshots.create({"v": "a"})
    await sealed(pool)
    await write(handle, 0, b"b" * CHUNK)
    await handle.close()
    await pool.reverts.revert("v@a")
    await asyncio.wait_for(sealed(pool), 5)
