"""A full pool with snapshots in it: clones read on, reclaim makes space, a flatten ends clearly and goes on later.

And that what the pool says it holds is what its filesystem has given: block for block.
"""

import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from blockvirt.errors import PoolFull
from blockvirt.meta.keys import Table
from blockvirt.meta.records import SnapshotRecord
from blockvirt.snapshots.scrub import Scrubbing
from blockvirt.units import KIB, MIB
from blockvirt.volumes.engine import EngineSettings
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.opened import OpenVolume
from blockvirt.volumes.requests import NewVolume
from tests.snapshots.conftest import SnapshotPool
from tests.snapshots.test_histories import settled
from tests.volumes.conftest import findings, mounted, read, until, until_punched, write
from tests.volumes.test_full_pool import fill

CHUNK = 64 * KIB
LEAF = 512 * CHUNK
SIZE = 2 * LEAF
PART = 16 * CHUNK
LIMIT = 24 * MIB
SETTINGS = EngineSettings(chunk_bytes=CHUNK, metadata_reserve_bytes=MIB, checkpoint_age_s=3600.0)


@pytest.fixture
async def limited(tmp_path: Path) -> AsyncIterator[SnapshotPool]:
    """A pool whose one device may hold 384 chunks."""
    pool = SnapshotPool(tmp_path, SETTINGS)
    await pool.start()
    await pool.engine.storage.add(str(tmp_path / "limited"), "limited", LIMIT, 0, {}, create=True)
    await pool.engine.storage.remove("disk1")
    yield pool
    await pool.close()


async def golden(pool: SnapshotPool) -> SnapshotRecord:
    """The snapshot of a volume with 16 chunks in its first leaf and 48 in its second."""
    handle = await pool.open(await pool.volume(SIZE, "golden"))
    await write(handle, 0, b"a" * PART)
    await write(handle, LEAF, b"b" * 3 * PART)
    (record,) = await pool.snapshots.create({"golden": "g"})
    await handle.close()
    return record


async def clone_of(pool: SnapshotPool, origin: SnapshotRecord) -> str:
    return (await pool.catalogue.create(NewVolume(size_bytes=SIZE, name="clone"), origin=origin)).volume.id


async def filled(pool: SnapshotPool) -> Handle:
    """An open volume that has taken all that was left."""
    handle = await pool.open(await pool.volume(32 * MIB, "filler"))
    await fill(handle)
    status = pool.engine.storage.status()
    assert (status.level, status.free_bytes) == ("stop", 0)
    assert status.used_bytes + status.reserved_bytes == LIMIT
    return handle


async def give_back(pool: SnapshotPool, handle: Handle, chunks: int) -> None:
    """Trim the first chunks of a volume, and wait until the pool has them."""
    await handle.zero(0, chunks * CHUNK, punch=True)
    await handle._opened.checkpointer.run_all()
    await until_punched(pool)


async def test_first_writes_to_a_clone_fail_and_it_reads_on(limited: SnapshotPool) -> None:
    clone = await limited.open(await clone_of(limited, await golden(limited)))
    filler = await filled(limited)
    for offset in (0, 3 * CHUNK + 100, LEAF + 3 * PART, SIZE - 512):  # whole, in part, and where its origin has nothing
        with pytest.raises(PoolFull, match="no device can take"):
            await write(clone, offset, b"x" * 512)
    await clone.zero(CHUNK, CHUNK, punch=True)
    assert await read(clone, 0, 3 * CHUNK) == b"a" * CHUNK + bytes(CHUNK) + b"a" * CHUNK
    assert await read(clone, LEAF, 3 * PART + CHUNK) == b"b" * 3 * PART + bytes(CHUNK)
    await clone.flush()
    await give_back(limited, filler, 2)
    await write(clone, 3 * CHUNK + 100, b"x" * 512)
    assert await read(clone, 3 * CHUNK, CHUNK) == b"a" * 100 + b"x" * 512 + b"a" * (CHUNK - 612)
    await clone.close()
    await filler.close()
    await settled(limited)
    assert limited.engine.storage.status().used_bytes == LIMIT - CHUNK
    assert not findings(limited, leaks=True)


async def test_a_reclaim_works_in_a_full_pool_and_makes_space(limited: SnapshotPool) -> None:
    await golden(limited)
    handle = await limited.open(limited.catalogue.get("golden").id)
    await write(handle, 0, b"c" * PART)
    filler = await filled(limited)
    before_bytes = limited.engine.storage.status().used_bytes
    with pytest.raises(PoolFull):
        await limited.snapshots.create({"golden": "another"})
    gone = await limited.snapshots.delete(["golden@g"])
    assert gone.freed_bytes == PART
    for job_id in gone.job_ids:
        assert (await limited.engine.jobs.finished(job_id)).state == "done"
    await settled(limited)
    assert limited.engine.storage.status().used_bytes == before_bytes - PART
    await write(handle, PART, b"d" * PART)
    assert await read(handle, 0, 2 * PART) == b"c" * PART + b"d" * PART
    await handle.close()
    await filler.close()
    assert limited.engine.storage.status().used_bytes == before_bytes
    assert not findings(limited, leaks=True)


@pytest.mark.parametrize("left_chunks", [0, 5])
async def test_a_flatten_ends_clearly_and_goes_on_when_there_is_space(
    limited: SnapshotPool, monkeypatch: pytest.MonkeyPatch, left_chunks: int
) -> None:
    """Guests take the last of it in the midst: with nothing left for the second leaf, or not enough."""
    clone = await clone_of(limited, await golden(limited))
    flattening, leaf, fillers, used_bytes = limited.flattening, limited.flattening._leaf, list[Handle](), list[int]()

    async def fill_behind_the_first(opened: OpenVolume, number: int) -> bool:
        if number and not fillers:
            fillers.append(await filled(limited))
            if left_chunks:
                await give_back(limited, fillers[0], left_chunks)
            used_bytes.append(limited.engine.storage.status().used_bytes)
        return await leaf(opened, number)

    monkeypatch.setattr(flattening, "_leaf", fill_behind_the_first)
    job = await limited.engine.jobs.finished(await flattening.start("clone"))
    assert job.state == "failed"
    assert "device limited has no room" in job.error
    assert "add a device" in job.error
    await settled_but_failed(limited)
    assert limited.engine.storage.status().used_bytes == used_bytes[0], "copies are given back"
    assert not findings(limited, leaks=True)
    await give_back(limited, fillers[0], 96 - left_chunks)  # the rest of the flatten must stay below the brake
    await limited.engine.jobs.resume(job.id)
    done = await limited.engine.jobs.finished(job.id)
    assert (done.state, done.error, done.percent) == ("done", "", 100)
    await limited.catalogue.delete("golden", purge=True)
    await settled(limited)
    handle = await limited.open(clone)
    assert await read(handle, 0, PART + CHUNK) == b"a" * PART + bytes(CHUNK)
    assert await read(handle, LEAF, 3 * PART + CHUNK) == b"b" * 3 * PART + bytes(CHUNK)
    await handle.close()
    await fillers[0].close()
    assert not findings(limited, leaks=True)


async def settled_but_failed(pool: SnapshotPool) -> None:
    """Return when what a failed flatten gave up is given back."""
    async with pool.engine.registry.pinned(pool.catalogue.get("clone").id) as opened:
        await opened.checkpointer.run_all()
    await until_punched(pool)


@pytest.fixture
def real_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 128 MiB (ext4 on a loop device)."""
    with mounted(tmp_path / "real", 128 * MIB) as folder:
        yield folder


def given_bytes(device: Path) -> int:
    """What the filesystem has given to the backing files, in whole chunks.

    ``st_blocks`` has the blocks that list the extents of a much divided file too: of one of these few MiB, less than
    a chunk.
    """
    return sum(path.stat().st_blocks * 512 // CHUNK * CHUNK for path in (device / "files").iterdir())


async def some_writes(handle: Handle, dice: random.Random) -> None:
    """Write here and there, and trim a little."""
    for _ in range(20):
        offset = dice.randrange(0, 16 * MIB - 4 * CHUNK, 512)
        length = dice.choice([512, 4096, CHUNK, 3 * CHUNK])
        if dice.random() < 0.8:
            await write(handle, offset, dice.randbytes(length))
        else:
            await handle.zero(offset, length, punch=True)


@pytest.mark.requires("root", "loop", "mkfs.ext4")
@pytest.mark.parametrize("seed", [1, 2])
async def test_the_pool_holds_what_the_filesystem_has_given(tmp_path: Path, real_disk: Path, seed: int) -> None:
    pool = SnapshotPool(tmp_path, SETTINGS)
    pool.device = real_disk / "device"
    await pool.start()
    dice, kept = random.Random(seed), list[str]()
    handles = [await pool.open(await pool.volume(16 * MIB, name)) for name in ("v", "w")]
    most_bytes = 0
    for number in range(12):
        for handle in handles:
            await some_writes(handle, dice)
        await pool.snapshots.create({"v": f"s{number}", "w": f"s{number}"})
        kept += [f"v@s{number}", f"w@s{number}"]
        most_bytes = max(most_bytes, pool.engine.storage.status().used_bytes)
        if number % 3 == 2:
            going = dice.sample(kept, len(kept) // 2)
            kept = [name for name in kept if name not in going]
            await pool.snapshots.delete(going)
            for handle in handles:
                await handle._opened.checkpointer.run_all()
            await settled(pool)
            status = pool.engine.storage.status()
            assert status.reserved_bytes > 0, "what open volumes were given ahead counts too"
            assert given_bytes(pool.device) == status.used_bytes + status.reserved_bytes
    for handle in handles:
        await handle.close()
    await pool.snapshots.delete(kept)
    await settled(pool)
    status = pool.engine.storage.status()
    assert 0 < status.used_bytes < most_bytes
    assert given_bytes(pool.device) == status.used_bytes + status.reserved_bytes
    assert not findings(pool, leaks=True)
    await pool.close()


async def test_a_scrub_needs_no_space(limited: SnapshotPool) -> None:
    scrubbing = Scrubbing(limited.engine)
    await golden(limited)

    def sealed() -> bool:
        with limited.engine.store.read() as reader:
            return not reader.count(Table.SEALS)

    await until(sealed)
    filler = await filled(limited)
    with min((limited.state_dir.parent / "limited" / "files").iterdir()).open("r+b") as file:
        file.write(b"!")
    job = await limited.engine.jobs.finished(await scrubbing.start())
    (found,) = scrubbing.results().scrubs
    assert (job.state, found.chunks, found.damaged) == ("done", 4 * PART // CHUNK, 1)
    assert found.findings[0].concerns == ("golden", "golden@g")
    await filler.close()
