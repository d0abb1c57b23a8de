"""Scrubs beside everything that gives chunks up: nothing is called damaged that nobody damaged."""

import asyncio
import errno
import os
from pathlib import Path

import pytest

from blockvirt.meta.keys import Table
from blockvirt.snapshots import scrub_chunks, sealing
from blockvirt.snapshots.scrub import Clocks, Scrubbing
from blockvirt.snapshots.scrub_chunks import ChunkProof
from blockvirt.syscalls import punch_hole
from blockvirt.volumes import punch
from tests.snapshots.conftest import SnapshotPool
from tests.snapshots.test_histories import History, settled
from tests.snapshots.test_scrub import CHUNK, CHUNKS, Ground, flip
from tests.volumes.conftest import until, until_punched

SEEDS = range(int(os.environ.get("BLOCKVIRT_SEEDS", "5")))
if one := os.environ.get("BLOCKVIRT_SEED"):
    SEEDS = range(int(one), int(one) + 1)
STEPS = 60


async def at_once(seconds: float) -> None:
    """Rest for no time."""
    await asyncio.sleep(0)


class ScrubbedPool(SnapshotPool):
    """A pool with scrubs that do not rest."""

    async def start(self) -> "ScrubbedPool":
        """See SnapshotPool."""
        await super().start()
        self.scrubbing = Scrubbing(self.engine, clocks=Clocks(rest=at_once))
        return self


@pytest.mark.parametrize("seed", SEEDS)
async def test_no_history_looks_like_damage(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "SEAL_REST_RATIO", 0)
    monkeypatch.setattr(sealing, "SEAL_PAUSE_S", 0)
    pool = await ScrubbedPool(tmp_path).start()
    history = History(pool, seed)
    await history.new_volume()
    for _ in range(STEPS):
        if len(history.volumes) < 2:
            await history.new_volume()
        await history.step()
        await pool.scrubbing.start()
    await settled(pool)
    found = pool.scrubbing.results().scrubs
    assert [each.findings for each in found if each.damaged] == [], f"BLOCKVIRT_SEED={seed}"
    assert sum(each.chunks for each in found) > 0
    await history.check()
    for volume in history.volumes:
        await history.shut(volume)
    await settled(pool)
    await pool.close()


async def test_what_is_punched_and_still_listed_is_no_damage(
    pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between a punch and the transaction that removes its row and its checksum, made to last."""

    def punched_and_failed(fd: int, offset: int, length: int) -> None:
        punch_hole(fd, offset, length)
        raise OSError(errno.EIO, "failed")

    ground = Ground(pool, Scrubbing(pool.engine))
    await ground.begin()
    await pool.catalogue.delete("clone", purge=True)
    await until(lambda: not pool.engine.jobs.list(state="running") and not pool.engine.jobs.list(state="queued"))
    monkeypatch.setattr(punch, "punch_hole", punched_and_failed)
    flip(ground.files()[0], 3)
    assert (await ground.scrub()).damaged == 1
    assert len(ground.scrubbing.results().standing) == 1
    await pool.snapshots.delete(["v@a"])
    before, _ = ground.files()

    def is_zero() -> bool:
        return before.read_bytes()[: CHUNKS // 2 * CHUNK] == bytes(CHUNKS // 2 * CHUNK)

    await until(is_zero)
    assert not ground.scrubbing.results().standing, "what is given up stands no more"
    found = await ground.scrub()
    with pool.engine.store.read() as reader:
        assert reader.count(Table.PUNCH)
    assert (found.damaged, found.chunks) == (0, CHUNKS + CHUNKS // 2), "they were read, and they do differ"
    flip(before, CHUNKS - 1)
    assert (await ground.scrub()).damaged == 1


async def test_what_only_a_deleted_snapshot_saw_concerns_nobody(
    pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between a deletion and the reclaim, made to last."""
    ground = Ground(pool, Scrubbing(pool.engine))
    await ground.begin()
    await pool.catalogue.delete("clone", purge=True)
    await until(lambda: not pool.engine.jobs.list(state="running") and not pool.engine.jobs.list(state="queued"))
    go_on = asyncio.Event()
    real = pool.engine.reclaimer.free

    async def free(*given: object) -> None:
        await go_on.wait()
        await real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(pool.engine.reclaimer, "free", free)
    flip(ground.files()[0], 3)
    await pool.snapshots.delete(["v@a"])
    found = await ground.scrub()
    assert (found.damaged, found.chunks) == (0, CHUNKS + CHUNKS // 2)
    go_on.set()
    await until_punched(pool)


async def test_files_that_are_gone_before_their_rows_are_no_damage(
    pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between the removal of a branch's files and that of its rows, made to last."""
    ground = Ground(pool, Scrubbing(pool.engine))
    await ground.begin()
    await pool.catalogue.delete("clone", purge=True)
    await settled(pool)
    go_on, real = asyncio.Event(), pool.engine.reclaimer._unlink

    async def unlink(*given: object) -> None:
        await real(*given)  # type: ignore[arg-type]
        await go_on.wait()

    monkeypatch.setattr(pool.engine.reclaimer, "_unlink", unlink)
    await pool.catalogue.delete("v", purge=True)
    await until(lambda: not list((pool.device / "files").iterdir()))
    found = await ground.scrub()
    assert (found.damaged, found.chunks, found.unread_chunks) == (0, 0, CHUNKS + CHUNKS // 2)
    go_on.set()
    await settled(pool)


async def test_chunks_that_go_while_their_damage_is_told(pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot is deleted and its space given back between the look for who sees a chunk, and the answer."""
    ground = Ground(pool, Scrubbing(pool.engine))
    await ground.begin()
    await pool.catalogue.delete("clone", purge=True)
    await settled(pool)
    flip(ground.files()[0], 3)
    loop, real = asyncio.get_running_loop(), ChunkProof._places

    async def delete() -> None:
        await pool.snapshots.delete(["v@a"])
        await settled_but_scrubs(pool)

    def places(self: ChunkProof, branch: int, addresses: list[int]) -> dict[int, tuple[int, int]]:
        found = real(self, branch, addresses)
        assert found
        asyncio.run_coroutine_threadsafe(delete(), loop).result(20)
        return found

    monkeypatch.setattr(scrub_chunks.ChunkProof, "_places", places)
    assert (await ground.scrub()).damaged == 0


async def settled_but_scrubs(pool: SnapshotPool) -> None:
    """Return when what was freed is given back."""

    def freed() -> bool:
        with pool.engine.store.read() as reader:
            return not reader.count(Table.RECLAIM) and not reader.count(Table.PUNCH)

    await until(freed)
