"""Snapshots carried from one pool into another: byte for byte, whole and as differences, and back again."""

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blockvirt.errors import Exists, InvalidRequest, InvalidSize, NotFound, WrongBase
from blockvirt.volumes.requests import VolumeChange
from tests.snapshots.stream_pools import CHUNK, StreamPool, names, pool_in
from tests.volumes.conftest import findings, write

SIZE = 1040 * CHUNK + 512  # two leaves and a bit, and a last chunk that is not whole


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[StreamPool]:
    pool = await pool_in(tmp_path / "here")
    yield pool
    await pool.close()


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[StreamPool]:
    pool = await pool_in(tmp_path / "there")
    yield pool
    await pool.close()


async def scribble(pool: StreamPool, volume: str, seed: int) -> None:
    """Write, zero and trim here and there."""
    dice = random.Random(seed)
    found = pool.catalogue.get(volume)
    handle = await pool.open(found.id)
    for _ in range(12):
        length = dice.choice((512, 700, CHUNK, 40 * CHUNK))
        offset = dice.randrange(found.size_bytes - length)
        what = dice.random()
        if what < 0.6:
            await write(handle, offset, dice.randbytes(length))
        elif what < 0.7:
            await write(handle, offset, bytes(length))
        else:
            await handle.zero(offset, length, punch=what < 0.9)
    await handle.close()


async def snapshot(pool: StreamPool, volume: str, name: str, **labels: str) -> None:
    await pool.snapshots.create({volume: name}, labels=labels)


async def test_a_chain_arrives_byte_for_byte(here: StreamPool, there: StreamPool) -> None:
    volume = await here.volume(SIZE, "web")
    await scribble(here, "web", 0)
    await snapshot(here, volume, "s0", team="web")
    assert names(await there.take_in("copy", await here.export("web@s0"))) == ["s0"]
    for number in range(1, 4):
        await scribble(here, "web", number)
        await snapshot(here, volume, f"s{number}")
        stream = await here.export(f"web@s{number}", f"web@s{number - 1}")
        assert len(stream) < len(await here.export(f"web@s{number}"))
        (record,) = await there.take_in("copy", stream, piece_bytes=1 + 997 * number)
        assert record.source_id == here.snapshots.find(f"web@s{number}").id
    for number in range(4):
        original, copy = here.snapshots.find(f"web@s{number}"), there.snapshots.find(f"copy@s{number}")
        assert await there.content(f"copy@s{number}") == await here.content(f"web@s{number}")
        assert (copy.created_s, copy.labels, copy.size_bytes) == (original.created_s, original.labels, SIZE)
    assert await there.head("copy") == await here.head("web")
    assert not findings(here, leaks=False)
    assert not findings(there, leaks=True)


async def test_several_streams_in_one_input(here: StreamPool, there: StreamPool) -> None:
    volume = await here.volume(SIZE, "web")
    await snapshot(here, volume, "empty")
    streams = await here.export("web@empty")
    for number in range(3):
        await scribble(here, "web", number)
        await snapshot(here, volume, f"s{number}")
        streams += await here.export(f"web@s{number}", f"web@{'empty' if not number else f's{number - 1}'}")
    assert names(await there.take_in("copy", streams)) == ["empty", "s0", "s1", "s2"]
    assert await there.content("copy@s1") == await here.content("web@s1")
    assert await there.content("copy@empty") == bytes(SIZE)


async def test_it_goes_on_at_the_other_side_and_comes_back(here: StreamPool, there: StreamPool) -> None:
    volume = await here.volume(SIZE, "web")
    await scribble(here, "web", 1)
    await snapshot(here, volume, "s1")
    await there.take_in("web", await here.export("web@s1"))
    await scribble(there, "web", 2)
    await snapshot(there, there.catalogue.get("web").id, "s2")
    (record,) = await here.take_in("web", await there.export("web@s2", "web@s1"))
    assert record.volume_id == volume
    assert await here.content("web@s2") == await there.content("web@s2") == await here.head("web")


async def test_a_third_pool_takes_what_comes_from_either(tmp_path: Path, here: StreamPool, there: StreamPool) -> None:
    volume = await here.volume(SIZE, "web")
    await scribble(here, "web", 1)
    await snapshot(here, volume, "s1")
    await there.take_in("web", await here.export("web@s1"))
    third = await pool_in(tmp_path / "third")
    try:
        await third.take_in("web", await there.export("web@s1"))
        await scribble(here, "web", 2)
        await snapshot(here, volume, "s2")
        await third.take_in("web", await here.export("web@s2", "web@s1"))
        assert await third.content("web@s2") == await here.content("web@s2")
    finally:
        await third.close()


async def test_the_volume_grows_with_its_snapshot(here: StreamPool, there: StreamPool) -> None:
    volume = await here.volume(10 * CHUNK + 512, "web")
    await scribble_whole(here, "web", 10 * CHUNK + 512)
    await snapshot(here, volume, "small")
    await here.catalogue.change("web", VolumeChange(size_bytes=20 * CHUNK))
    handle = await here.open(volume)
    await write(handle, 19 * CHUNK, b"z" * CHUNK)
    await handle.close()
    await snapshot(here, volume, "large")
    await there.take_in("web", await here.export("web@small"))
    before = there.catalogue.promised_bytes
    assert there.catalogue.get("web").size_bytes == 10 * CHUNK + 512
    await there.take_in("web", await here.export("web@large", "web@small"))
    assert there.catalogue.get("web").size_bytes == 20 * CHUNK
    assert there.catalogue.promised_bytes - before == 10 * CHUNK - 512
    assert await there.content("web@large") == await here.content("web@large")
    with pytest.raises(InvalidSize, match="larger"):
        await here.export("web@small", "web@large")


async def scribble_whole(pool: StreamPool, volume: str, size_bytes: int) -> None:
    handle = await pool.open(pool.catalogue.get(volume).id)
    await write(handle, 0, b"w" * size_bytes)
    await handle.close()


async def test_zeros_that_were_written_take_no_space_there(here: StreamPool, there: StreamPool) -> None:
    volume = await here.volume(64 * CHUNK, "web")
    handle = await here.open(volume)
    await write(handle, 0, b"a" * CHUNK + bytes(62 * CHUNK) + b"b" * CHUNK)
    await handle.close()
    await snapshot(here, volume, "s")
    await there.take_in("web", await here.export("web@s"))
    assert here.snapshots.find("web@s").mapped_chunks == 64
    assert there.snapshots.find("web@s").mapped_chunks == 2
    assert await there.content("web@s") == await here.content("web@s")


async def test_a_full_stream_needs_a_new_name(here: StreamPool, there: StreamPool) -> None:
    volume = await here.volume(SIZE, "web")
    await snapshot(here, volume, "s")
    await there.volume(SIZE, "web")  # as empty as what would be made
    with pytest.raises(Exists):
        await there.take_in("web", await here.export("web@s"))
    assert there.catalogue.count() == 1
    assert not there.catalogue.get("web").revision > 1


async def test_only_what_the_volume_holds_is_a_base(here: StreamPool, there: StreamPool) -> None:
    volume = await here.volume(SIZE, "web")
    await scribble(here, "web", 0)
    await snapshot(here, volume, "s0")
    await scribble(here, "web", 1)
    await snapshot(here, volume, "s1")
    await scribble(here, "web", 2)
    await snapshot(here, volume, "s2")
    later = await here.export("web@s2", "web@s1")
    with pytest.raises(NotFound, match="web"):
        await there.take_in("web", later)
    await there.take_in("web", await here.export("web@s0"))
    with pytest.raises(WrongBase, match="does not have the snapshot 's1'"):
        await there.take_in("web", later)
    await there.take_in("web", await here.export("web@s1", "web@s0"))
    copy = there.catalogue.get("web").id
    await scribble(there, "web", 7)
    written = await there.head("web")
    with pytest.raises(WrongBase, match="does not hold what snapshot 's1' does") as refusal:
        await there.take_in("web", later)
    assert "snapshot revert web@s1" in refusal.value.correction
    assert await there.head("web") == written
    assert there.catalogue.get("web").id == copy
    await there.reverts.revert("web@s1", safety=False)
    await there.take_in("web", later)
    assert await there.content("web@s2") == await here.content("web@s2")
    with pytest.raises(Exists, match="web@s2"):
        await there.take_in("web", later)


async def test_a_base_must_have_a_common_history(here: StreamPool) -> None:
    for name in ("a", "b"):
        await snapshot(here, await here.volume(SIZE, name), "s")
    with pytest.raises(InvalidRequest, match="no history in common"):
        await here.export("a@s", "b@s")
