"""Scrub on a running pool: damage is found and named, and nothing else is called so."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from blockvirt.errors import DeviceFault, InUse, InvalidRequest, NotFound
from blockvirt.lun.address import chunk_of
from blockvirt.meta.keys import Table, leaf_key, number_key
from blockvirt.meta.preread import ThroughFile, Unreadable
from blockvirt.meta.record_walk import Step, walk
from blockvirt.meta.records import ScrubRecord
from blockvirt.snapshots import scrub_run
from blockvirt.snapshots.scrub import Clocks, Scrubbing
from blockvirt.snapshots.scrub_records import find
from blockvirt.units import MIB
from blockvirt.volumes.requests import NewVolume
from tests.snapshots.conftest import SnapshotPool
from tests.volumes.conftest import until, write

CHUNK = 4096
CHUNKS = 100
BATCH_CHUNKS = 16
SIZE = CHUNKS * CHUNK


class Ground:
    """A pool with a volume of which 'a' saw all and 'b' half of it anew, and a clone of 'a'; everything sealed."""

    def __init__(self, pool: SnapshotPool, scrubbing: Scrubbing) -> None:
        self.pool = pool
        self.scrubbing = scrubbing

    async def begin(self) -> None:
        """Make the volumes."""
        handle = await self.pool.open(await self.pool.volume(SIZE, "v"))
        await write(handle, 0, os.urandom(SIZE))
        (first,) = await self.pool.snapshots.create({"v": "a"})
        await write(handle, 0, os.urandom(SIZE // 2))
        await self.pool.snapshots.create({"v": "b"})
        await handle.close()
        await self.pool.catalogue.create(NewVolume(size_bytes=SIZE, name="clone"), origin=first)
        await self.sealed()

    async def sealed(self) -> None:
        """Return when every chunk that a snapshot sealed has its checksum."""

        def done() -> bool:
            with self.pool.engine.store.read() as reader:
                return not reader.count(Table.SEALS)

        await until(done)

    def files(self) -> tuple[Path, Path]:
        """Return what was written before the first snapshot, and what after it."""
        before, after = sorted((self.pool.device / "files").iterdir())
        return before, after

    def result(self, job_id: str) -> ScrubRecord:
        """Return what a scrub has come to."""
        with self.pool.engine.store.read() as reader:
            return find(reader, job_id)

    async def scrub(self, *volumes: str) -> ScrubRecord:
        """Scrub and return the result."""
        job = await self.pool.engine.jobs.finished(await self.scrubbing.start(volumes))
        assert (job.state, job.error, job.percent) == ("done", "", 100)
        return self.result(job.id)


@pytest.fixture
async def ground(pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch) -> Ground:
    monkeypatch.setattr(scrub_run, "SCRUB_BATCH_BYTES", BATCH_CHUNKS * CHUNK)
    made = Ground(pool, Scrubbing(pool.engine))
    await made.begin()
    return made


def flip(path: Path, chunk: int) -> None:
    """Change a byte of a chunk behind the daemon's back."""
    with path.open("r+b") as file:
        file.seek(chunk * CHUNK + 5)
        (byte,) = file.read(1)
        file.seek(chunk * CHUNK + 5)
        file.write(bytes([byte ^ 1]))


async def test_a_clean_pool_is_read_whole_and_nothing_is_found(ground: Ground) -> None:
    found = await ground.scrub()
    assert (found.damaged, found.findings, found.unread_chunks) == (0, (), 0)
    assert found.chunks == CHUNKS + CHUNKS // 2
    used = ground.pool.engine.store.stats().used_bytes
    assert found.read_bytes - used <= (CHUNKS + CHUNKS // 2) * CHUNK < found.read_bytes
    assert found.records > 15
    assert found.ended_s >= found.begun_s >= found.created_s > 0
    assert ground.scrubbing.counters.chunks == found.chunks


async def test_damage_is_named_with_whom_it_concerns(ground: Ground) -> None:
    before, after = ground.files()
    flip(before, 3)  # seen by 'a' and the clone alone
    flip(before, CHUNKS - 1)  # by all
    flip(after, 7)  # by 'b' and the volume
    found = await ground.scrub()
    assert found.damaged == 3
    assert found.chunks == CHUNKS + CHUNKS // 2, "the rest is read as well"
    assert [each.concerns for each in found.findings] == [
        ("v@a", "clone"),
        ("v", "v@a", "v@b", "clone"),
        ("v", "v@b"),
    ]
    assert {each.kind for each in found.findings} == {"chunk"}
    assert [each.path for each in found.findings] == [str(before), str(before), str(after)]
    assert [each.offset_bytes for each in found.findings] == [3 * CHUNK, (CHUNKS - 1) * CHUNK, 7 * CHUNK]
    assert [each.volume_offset_bytes for each in found.findings] == [3 * CHUNK, (CHUNKS - 1) * CHUNK, 7 * CHUNK]
    assert {each.length_bytes for each in found.findings} == {CHUNK}
    assert [chunk_of(each.address) for each in found.findings] == [3, CHUNKS - 1, 7]
    assert ground.scrubbing.results().standing == found.findings


async def test_a_file_that_is_cut_is_damaged_chunk_by_chunk_and_one_that_is_gone_once(ground: Ground) -> None:
    before, after = ground.files()
    os.truncate(after, 10 * CHUNK)
    before.rename(before.with_suffix(".away"))
    found = await ground.scrub()
    assert [each.kind for each in found.findings] == ["file"] + ["chunk"] * (CHUNKS // 2 - 10)
    assert (found.findings[0].concerns, found.findings[0].path) == (("v", "v@a", "v@b", "clone"), str(before))
    assert "missing" in found.findings[0].problem
    assert "ends at" in found.findings[1].problem
    assert found.unread_chunks == CHUNKS
    before.with_suffix(".away").rename(before)


async def test_some_volumes_with_what_they_came_from(ground: Ground) -> None:
    handle = await ground.pool.open(await ground.pool.volume(SIZE, "other"))
    await write(handle, 0, os.urandom(10 * CHUNK))
    await ground.pool.snapshots.create({"other": "o"})
    await handle.close()
    await ground.sealed()
    assert (await ground.scrub("other")).chunks == 10
    assert (await ground.scrub("clone")).chunks == CHUNKS + CHUNKS // 2
    assert (await ground.scrub("other", "clone")).chunks == 10 + CHUNKS + CHUNKS // 2
    with pytest.raises(NotFound, match="nobody"):
        await ground.scrubbing.start(["nobody"])


async def test_what_stands_goes_with_its_chunk_or_with_the_next_scrub_of_everything(ground: Ground) -> None:
    before, after = ground.files()
    flip(before, 3)
    flip(after, 7)
    await ground.scrub("v")
    assert len(ground.scrubbing.results().standing) == 2
    flip(after, 7)  # as it was
    assert not (await ground.scrub("v")).findings[1:]
    assert len(ground.scrubbing.results().standing) == 2, "a part says nothing about the rest"
    assert (await ground.scrub()).damaged == 1
    assert [chunk_of(each.address) for each in ground.scrubbing.results().standing] == [3]
    await ground.pool.catalogue.delete("clone", purge=True)
    await ground.pool.snapshots.delete(["v@a"])
    await until(lambda: not ground.scrubbing.results().standing)


async def test_a_damaged_record_is_named_and_the_others_are_looked_at(ground: Ground) -> None:
    store = ground.pool.engine.store
    before, _ = ground.files()
    flip(before, CHUNKS - 1)

    def damage(key: bytes, stored: bytes, table: Table) -> None:
        store.commit_now(lambda writer: writer.put(table, key, stored[:-1] + bytes([stored[-1] ^ 1])))

    with store.read() as reader:
        leaf = next((key, stored) for key, stored in reader.scan(Table.LEAVES) if key == leaf_key(1, 0, 1))
        sums = next((key, stored) for key, stored in reader.scan(Table.CHECKSUMS) if key[:8] == number_key(2))
    damage(*leaf, Table.LEAVES)
    damage(*sums, Table.CHECKSUMS)
    found = await ground.scrub()
    rows = [each for each in found.findings if each.kind == "record"]
    assert [each.concerns for each in rows] == [("v@a", "clone"), ("v", "v@a", "v@b", "clone")]
    assert [each.problem.split(":")[0] for each in rows] == ["table leaves", "table checksums"]
    assert found.chunks == CHUNKS
    assert [chunk_of(each.address) for each in found.findings if each.kind == "chunk"] == [CHUNKS - 1]


async def test_one_at_a_time_and_the_same_joins(ground: Ground) -> None:
    jobs = ground.pool.engine.jobs
    gate = asyncio.Event()

    async def rest(seconds: float) -> None:
        await gate.wait()

    ground.scrubbing._clocks = Clocks(rest=rest)
    first = await ground.scrubbing.start()
    assert await ground.scrubbing.start() == first
    with pytest.raises(InUse, match="everything") as refused:
        await ground.scrubbing.start(["v"])
    assert first in refused.value.correction
    with pytest.raises(InUse):
        await ground.scrubbing.start(rate_bytes=2 * MIB)
    with pytest.raises(InvalidRequest, match="hardly end"):
        await ground.scrubbing.start(rate_bytes=MIB - 1)
    gate.set()
    await jobs.finished(first)
    assert await ground.scrubbing.start(["v"]) != first


async def test_a_metadata_file_that_cannot_be_read_ends_it_before_a_look_at_the_records(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the disk is stood in for: nothing but a broken one refuses to be read."""
    looked: list[object] = []
    is_cached = True
    monkeypatch.setattr(
        ThroughFile, "piece", lambda self, at: iter([Unreadable(at + CHUNK, "Input/output error", is_cached)])
    )

    def noted(*given: Any) -> Step:
        looked.append(given)
        return walk(*given)

    monkeypatch.setattr(scrub_run, "walk", noted)
    found = await ground.scrub()
    assert [(each.kind, each.offset_bytes) for each in found.findings] == [("metadata", CHUNK)]
    assert "the page cache has it still" in found.findings[0].problem
    assert looked
    looked.clear()
    is_cached = False
    job = await ground.pool.engine.jobs.finished(await ground.scrubbing.start())
    assert job.state == "failed"
    assert "cannot be read everywhere" in job.error
    assert (ground.result(job.id).damaged, ground.result(job.id).chunks) == (1, 0)
    await ground.pool.engine.jobs.resume(job.id)
    assert (await ground.pool.engine.jobs.finished(job.id)).state == "failed"
    assert not looked


async def test_what_it_read_does_not_stay_in_the_page_cache(ground: Ground) -> None:
    before, _ = ground.files()
    with before.open("r+b") as file:
        os.fsync(file.fileno())
        file.read()
        await ground.scrub()
        with pytest.raises(BlockingIOError):
            os.preadv(file.fileno(), [bytearray(CHUNK)], 5 * CHUNK, os.RWF_NOWAIT)


async def test_a_device_that_is_away_is_no_damage(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(ground.files()[0], 3)
    storage = ground.pool.engine.storage
    real, asked = storage.path_of, 0

    def path_of(device_id: str) -> Path:
        nonlocal asked
        asked += 1
        if asked > 2:  # the file was opened already: it goes while it is being read
            raise DeviceFault("device disk is missing")
        return real(device_id)

    monkeypatch.setattr(storage, "path_of", path_of)
    found = await ground.scrub()
    assert (found.damaged, found.chunks) == (0, 0)
    assert found.unread_chunks >= CHUNKS + CHUNKS // 2 - BATCH_CHUNKS
