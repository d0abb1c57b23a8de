"""Random histories of volumes, snapshots, clones, reverts and deletions, against plain bytes and the offline proof."""

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blockvirt.device import read_one
from blockvirt.errors import InvalidRequest
from blockvirt.meta.keys import Table
from blockvirt.snapshots.flatten import FLATTEN
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.requests import NewVolume
from tests.snapshots.conftest import SnapshotPool
from tests.volumes.conftest import abandon, findings, read, until, until_punched, write

CHUNK = 4096
CHUNKS = 1040  # two leaves and a bit
SIZE = CHUNK * CHUNKS
SEEDS = range(int(os.environ.get("BLOCKVIRT_SEEDS", "12")))
if one := os.environ.get("BLOCKVIRT_SEED"):
    SEEDS = range(int(one), int(one) + 1)


@dataclass
class Model:
    """One volume as plain bytes, and its snapshots."""

    id: str
    name: str
    content: bytearray
    snapshots: dict[str, bytes] = field(default_factory=dict)
    handle: Handle | None = None


class History:
    """One random history."""

    def __init__(self, pool: SnapshotPool, seed: int) -> None:
        self.pool = pool
        self.dice = random.Random(seed)
        self.volumes: list[Model] = []
        self.made = 0
        self.may_leak = False
        """A flatten was killed: copies that it had not brought into the map may be left over."""

    def name(self, kind: str) -> str:
        self.made += 1
        return f"{kind}{self.made}"

    async def new_volume(self) -> None:
        name = self.name("v")
        self.volumes.append(Model(await self.pool.volume(SIZE, name), name, bytearray(SIZE)))

    async def opened(self, volume: Model) -> Handle:
        if volume.handle is None:
            volume.handle = await self.pool.open(volume.id)
        return volume.handle

    async def shut(self, volume: Model) -> None:
        if volume.handle is not None:
            await volume.handle.close()
            volume.handle = None

    async def write(self, volume: Model) -> None:
        handle = await self.opened(volume)
        for _ in range(self.dice.randrange(1, 8)):
            offset = self.dice.choice([0, 511, 512, 1030]) * CHUNK + self.dice.randrange(4 * CHUNK)
            length = min(self.dice.choice([1, 100, CHUNK, 3 * CHUNK]), SIZE - offset)
            if self.dice.random() < 0.75:
                data = self.dice.randbytes(length)
                await write(handle, offset, data)
            else:
                data = bytes(length)
                await handle.zero(offset, length, punch=self.dice.random() < 0.7)
            volume.content[offset : offset + length] = data

    async def snapshot(self, *volumes: Model) -> None:
        names = {volume.id: self.name("s") for volume in volumes}
        await self.pool.snapshots.create(names)
        for volume in volumes:
            volume.snapshots[names[volume.id]] = bytes(volume.content)

    async def clone(self, volume: Model) -> None:
        snapshot = self.dice.choice(list(volume.snapshots))
        origin = self.pool.snapshots.find(f"{volume.name}@{snapshot}")
        name = self.name("c")
        made = await self.pool.catalogue.create(NewVolume(size_bytes=SIZE, name=name), origin=origin)
        self.volumes.append(Model(made.volume.id, name, bytearray(volume.snapshots[snapshot])))

    async def revert(self, volume: Model) -> None:
        snapshot = self.dice.choice(list(volume.snapshots))
        await self.shut(volume)
        safety = self.dice.random() < 0.5
        done = await self.pool.reverts.revert(f"{volume.name}@{snapshot}", safety=safety)
        if done.safety is not None:
            volume.snapshots[done.safety.name] = bytes(volume.content)
        volume.content = bytearray(volume.snapshots[snapshot])

    async def flatten(self, volume: Model) -> None:
        try:
            job_id = await self.pool.flattening.start(volume.id)
        except InvalidRequest:
            return
        if self.dice.random() < 0.7:
            assert (await self.pool.engine.jobs.finished(job_id)).state == "done"

    async def delete_snapshots(self, volume: Model) -> None:
        count = self.dice.randrange(1, 1 + min(3, len(volume.snapshots)))
        names = self.dice.sample(list(volume.snapshots), count)
        exact = self.dice.random() < 0.4
        before = await self.used_bytes() if exact else 0
        done = await self.pool.snapshots.delete([f"{volume.name}@{name}" for name in names])
        if exact:
            assert before - await self.used_bytes() == done.freed_bytes, names
        for name in names:
            del volume.snapshots[name]

    async def used_bytes(self) -> int:
        """Return what the pool uses once nothing is on its way."""
        for opened in self.pool.engine.registry.opened():
            await opened.checkpointer.run_all()
        await settled(self.pool)
        return self.pool.engine.storage.status().used_bytes

    async def delete(self, volume: Model) -> None:
        await self.shut(volume)
        await self.pool.catalogue.delete(volume.id)
        self.volumes.remove(volume)

    async def crash(self) -> None:
        self.may_leak |= any(job.state in ("queued", "running") for job in self.pool.engine.jobs.list(kind=FLATTEN))
        self.pool.sealer.cancel()
        await abandon(self.pool, power_cut=False)
        for volume in self.volumes:
            volume.handle = None
        await self.pool.start()

    async def check(self) -> None:
        for volume in self.volumes:
            assert await read(await self.opened(volume), 0, SIZE) == bytes(volume.content), volume.name
            for name, content in volume.snapshots.items():
                handle = self.pool.readers.open(self.pool.snapshots.find(f"{volume.name}@{name}"), f"r{name}")
                try:
                    into = bytearray(SIZE)
                    await read_one(handle, 0, memoryview(into))
                    assert bytes(into) == content, f"{volume.name}@{name}"
                finally:
                    await handle.close()

    async def step(self) -> None:
        dice, volume = self.dice.random(), self.dice.choice(self.volumes)
        if dice < 0.5:
            await self.write(volume)
        elif dice < 0.64:
            await self.snapshot(volume)
        elif dice < 0.68:
            await self.snapshot(*self.dice.sample(self.volumes, min(2, len(self.volumes))))
        elif dice < 0.76 and volume.snapshots:
            await self.delete_snapshots(volume)
        elif dice < 0.81 and volume.snapshots:
            await self.clone(volume)
        elif dice < 0.87 and volume.snapshots:
            await self.revert(volume)
        elif dice < 0.90 and len(self.volumes) > 1:
            await self.delete(volume)
        elif dice < 0.93:
            await self.flatten(volume)
        elif dice < 0.95:
            await self.shut(volume)
        elif dice < 0.97:
            await self.crash()
        else:
            await self.check()


async def settled(pool: SnapshotPool) -> None:
    """Return when the background has nothing left to do."""

    def idle() -> bool:
        assert not pool.engine.jobs.list(state="failed")
        with pool.engine.store.read() as reader:
            at_work = [*pool.engine.jobs.list(state="running"), *pool.engine.jobs.list(state="queued")]
            return not reader.count(Table.RECLAIM) and not at_work

    await until(idle)
    await until_punched(pool)


@pytest.mark.parametrize("seed", SEEDS)
async def test_nothing_is_lost_and_nothing_leaks(tmp_path: Path, seed: int) -> None:
    pool = await SnapshotPool(tmp_path).start()
    history = History(pool, seed)
    await history.new_volume()
    for _ in range(70):
        if len(history.volumes) < 2:
            await history.new_volume()
        await history.step()
    await history.check()
    for volume in history.volumes:
        await history.shut(volume)
    await settled(pool)
    assert findings(pool, leaks=not history.may_leak) == [], f"BLOCKVIRT_SEED={seed}"
    await pool.close()
