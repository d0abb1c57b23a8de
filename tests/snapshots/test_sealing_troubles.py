"""Sealing where a device is missing, or cannot be read: nothing is lost, and nothing is tried again and again."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from blockvirt.limits import SEAL_RETRY_S
from blockvirt.meta.keys import Table, split_pair
from blockvirt.snapshots import sealing
from blockvirt.snapshots.sealing import Sealer
from blockvirt.volumes.gaps import born_between
from blockvirt.volumes.requests import NewVolume
from tests.snapshots.conftest import SnapshotPool
from tests.volumes.conftest import findings, until, write

CHUNK = 4096
SIZE = 64 * CHUNK
ON_THE_SECOND = 3
"""Snapshots whose data lies on the device that goes away."""


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> "Counter[int]":
    """By branch: how often the sealer set about a snapshot of it."""
    counted: Counter[int] = Counter()

    def counting(reader: Any, branch: int, *more: Any) -> Any:
        counted[branch] += 1
        return born_between(reader, branch, *more)

    monkeypatch.setattr(sealing, "born_between", counting)
    return counted


def unsealed(pool: SnapshotPool) -> "Counter[int]":
    """By branch: how many snapshots wait for checksums."""
    with pool.engine.store.read() as reader:
        return Counter(split_pair(key)[0] for key, _ in reader.scan(Table.SEALS))


async def sealer_ended(pool: SnapshotPool) -> None:
    pool.sealer.cancel()
    await asyncio.gather(pool.sealer, return_exceptions=True)


async def written(pool: SnapshotPool, name: str, device: str) -> None:
    """Make a volume with one chunk on a device."""
    wanted = NewVolume(size_bytes=SIZE, name=name, placement_devices=(device,))
    handle = await pool.open((await pool.catalogue.create(wanted)).volume.id)
    await write(handle, 0, name.encode() * CHUNK)
    await handle.close()


async def a_branch_on_the_second_device(pool: SnapshotPool, folder: Path) -> int:
    """Let snapshots wait for their checksums whose data lies on a device that has gone; returns their branch."""
    await pool.engine.storage.add(str(folder / "two"), "two", None, 0, {}, create=True)
    await sealer_ended(pool)
    wanted = NewVolume(size_bytes=SIZE, name="far", placement_devices=("two",))
    volume_id = (await pool.catalogue.create(wanted)).volume.id
    for number in range(ON_THE_SECOND):
        handle = await pool.open(volume_id)
        await write(handle, number * CHUNK, b"f" * CHUNK)
        await handle.close()
        await pool.snapshots.create({"far": f"s{number}"})
    (branch,) = unsealed(pool)
    (folder / "two").rename(folder / "away")
    return branch


async def test_a_missing_device_is_not_asked_for_at_every_snapshot(
    pool: SnapshotPool, tmp_path: Path, tries: "Counter[int]", caplog: pytest.LogCaptureFixture
) -> None:
    far = await a_branch_on_the_second_device(pool, tmp_path)
    pool.sealer = asyncio.create_task(Sealer(pool.engine).run())
    await written(pool, "near", "disk1")
    for number in range(4):
        await pool.snapshots.create({"near": f"s{number}"})
        await until(lambda: len(unsealed(pool)) == 1)  # those of the far branch come first: it is the older one
        assert unsealed(pool)[far] == ON_THE_SECOND, "none is forgotten"
    assert tries[far] == ON_THE_SECOND
    assert len([each for each in caplog.messages if "two" in each]) == 1, "one line for a device, not for a snapshot"
    (tmp_path / "away").rename(tmp_path / "two")
    assert not findings(pool)


async def test_a_device_that_comes_back_gets_its_checksums(
    pool: SnapshotPool, tmp_path: Path, tries: "Counter[int]", monkeypatch: pytest.MonkeyPatch
) -> None:
    far = await a_branch_on_the_second_device(pool, tmp_path)
    looks = Counter[str]()
    there = pool.engine.storage.path_of

    def looked(device_id: str) -> Path:
        looks[device_id] += 1
        return there(device_id)

    monkeypatch.setattr(pool.engine.storage, "path_of", looked)
    monkeypatch.setattr(sealing, "SEAL_RETRY_S", 0.005)
    pool.sealer = asyncio.create_task(Sealer(pool.engine).run())
    await until(lambda: looks.total() > 20)
    assert tries[far] == ON_THE_SECOND, "it is looked for, its snapshots are not looked through"
    (tmp_path / "away").rename(tmp_path / "two")
    await until(lambda: not unsealed(pool))
    assert tries[far] == 2 * ON_THE_SECOND


async def test_what_fails_is_tried_again_by_one_timer(
    pool: SnapshotPool, tmp_path: Path, tries: "Counter[int]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timer for each failure would make for a pass of each timer, and those for ever more timers."""
    await sealer_ended(pool)
    volume_id = await pool.volume(SIZE, "v")
    for number in range(3):
        handle = await pool.open(volume_id)
        await write(handle, number * CHUNK, b"v" * CHUNK)
        await handle.close()
        await pool.snapshots.create({"v": f"s{number}"})
    (branch,) = unsealed(pool)
    (file,) = (pool.device / "files").iterdir()
    file.rename(tmp_path / "file")
    timers: list[Any] = []
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def kept(delay_s: float, callback: Any, *arguments: Any, **more: Any) -> Any:
        if delay_s == SEAL_RETRY_S:
            timers.append(callback)
            delay_s = 3600.0
        return call_later(delay_s, callback, *arguments, **more)

    monkeypatch.setattr(loop, "call_later", kept)
    pool.sealer = asyncio.create_task(Sealer(pool.engine).run())
    await until(lambda: tries[branch] == 3 and len(timers) > 0)
    await written(pool, "near", "disk1")
    for number in range(2):
        await pool.snapshots.create({"near": f"s{number}"})
        await until(lambda: len(unsealed(pool)) == 1)
    assert (tries[branch], len(timers)) == (3, 1)
    (tmp_path / "file").rename(file)
    timers.pop()()
    await until(lambda: not unsealed(pool))
    assert not timers
