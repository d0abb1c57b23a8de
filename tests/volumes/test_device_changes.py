"""Devices that come and go at the same time, and requests for it that nobody waits for any more."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from blockvirt.errors import Exists, InUse, LimitReached, NotFound
from blockvirt.ids import new_id
from blockvirt.meta.keys import Table
from blockvirt.meta.records import DeviceRecord
from blockvirt.pool import membership
from blockvirt.pool.labels import LABEL_FILE, read_label
from blockvirt.volumes import device_records, storage
from blockvirt.volumes.device_records import enter_device, leave_device
from blockvirt.volumes.engine import members_of
from blockvirt.volumes.ports import DeviceStatus
from tests.volumes.conftest import Pool, until


def folders(parent: Path, *names: str) -> list[str]:
    """Make directories and return their paths."""
    for name in names:
        (parent / name).mkdir()
    return [str(parent / name) for name in names]


async def add(pool: Pool, path: str, name: str | None = None) -> DeviceStatus:
    return await pool.engine.storage.add(path, name, None, 0, {})


async def at_once(*changes: Any) -> list[str]:
    """Run changes together; what they came to: a device's name, or what its error is called. Sorted."""
    results = await asyncio.gather(*changes, return_exceptions=True)
    return sorted(each.name if isinstance(each, DeviceStatus) else type(each).__name__ for each in results)


def records(pool: Pool) -> dict[str, DeviceRecord]:
    """The devices by name, as they are stored; each one's directory has its label, and nobody has more of them."""
    with pool.engine.store.read() as reader:
        members = members_of(reader)
    for member in members:
        label = read_label(Path(member.path))
        assert label is not None, member
        assert label.device == member.id, member
    stored = {member.name: member for member in members}
    assert len(stored) == len(members)
    assert sorted(stored) == [status.name for status in pool.engine.storage.list()]
    return stored


@pytest.mark.parametrize("name", [None, "fast"])
async def test_one_directory_given_twice_at_once_is_one_device(pool: Pool, tmp_path: Path, name: str | None) -> None:
    (path,) = folders(tmp_path, "new")
    assert await at_once(*(add(pool, path, name) for _ in range(3))) == ["Exists", "Exists", name or "disk2"]
    assert len(records(pool)) == 2
    await pool.close()
    await pool.start()
    assert {status.state for status in pool.engine.storage.list()} == {"online"}


async def test_directories_given_at_once_without_a_name_get_different_ones(pool: Pool, tmp_path: Path) -> None:
    paths = folders(tmp_path, "a", "b", "c")
    assert await at_once(*(add(pool, path) for path in paths)) == ["disk2", "disk3", "disk4"]
    assert len(records(pool)) == 4


async def test_no_more_devices_at_once_than_there_may_be(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "MAX_DEVICES", 2)
    paths = folders(tmp_path, "a", "b")
    assert await at_once(*(add(pool, path) for path in paths)) == ["LimitReached", "disk2"]
    assert len(records(pool)) == 2


async def test_one_device_removed_twice_at_once(pool: Pool, tmp_path: Path) -> None:
    await add(pool, folders(tmp_path, "new")[0], "new")
    storage = pool.engine.storage
    assert await at_once(storage.remove("new"), storage.remove("new")) == ["NotFound", "new"]
    assert list(records(pool)) == ["disk1"]


async def test_all_devices_removed_at_once_leave_one(pool: Pool, tmp_path: Path) -> None:
    await add(pool, folders(tmp_path, "new")[0], "new")
    storage = pool.engine.storage
    assert await at_once(storage.remove("disk1"), storage.remove("new")) == ["InUse", "disk1"]
    assert list(records(pool)) == ["new"]


async def test_a_device_that_is_given_while_it_is_removed(pool: Pool, tmp_path: Path) -> None:
    (path,) = folders(tmp_path, "new")
    first = await add(pool, path, "new")
    assert await at_once(pool.engine.storage.remove("new"), add(pool, path, "new")) == ["new", "new"]
    assert records(pool)["new"].id != first.id


async def test_the_transaction_itself_refuses_what_would_break_the_pool(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = pool.engine.store
    (one,) = records(pool).values()
    same_name = DeviceRecord(new_id(), one.name, "/elsewhere", 1.0)
    same_path = DeviceRecord(new_id(), "other", one.path, 1.0)
    for wanted in (same_name, same_path, DeviceRecord(one.id, "other", "/elsewhere", 1.0)):
        with pytest.raises(Exists):
            await store.commit(lambda writer, wanted=wanted: enter_device(writer, wanted))  # type: ignore[misc]
    monkeypatch.setattr(device_records, "MAX_DEVICES", 1)
    with pytest.raises(LimitReached):
        await store.commit(lambda writer: enter_device(writer, DeviceRecord(new_id(), "other", "/elsewhere", 1.0)))
    with pytest.raises(InUse, match="last"):
        await store.commit(lambda writer: leave_device(writer, one))
    with pytest.raises(NotFound):
        await store.commit(lambda writer: leave_device(writer, same_path))
    assert list(records(pool).values()) == [one]


async def test_what_the_transaction_refuses_leaves_no_label(pool: Pool, tmp_path: Path) -> None:
    unseen = DeviceRecord(new_id(), "new", "/elsewhere", 1.0)
    (path,) = folders(tmp_path, "new")
    await pool.engine.store.commit(lambda writer: writer.put_record(Table.DEVICES, unseen.id.encode(), unseen))
    with pytest.raises(Exists):
        await add(pool, path, "new")
    assert list(Path(path).iterdir()) == []
    await pool.engine.store.commit(lambda writer: writer.delete(Table.DEVICES, unseen.id.encode()))
    await add(pool, path, "new")  # nothing holds it


@pytest.mark.parametrize("stopped", [False, True])
async def test_an_add_that_nobody_waits_for_is_done_as_a_whole(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """Its directory is labelled in a thread, which cannot be called back."""
    loop = asyncio.get_running_loop()
    entered, go_on = asyncio.Event(), threading.Event()
    real = membership.add_device

    def slow(*given: Any, **more: Any) -> Any:
        device = real(*given, **more)
        loop.call_soon_threadsafe(entered.set)
        go_on.wait()
        return device

    (path,) = folders(tmp_path, "new")
    monkeypatch.setattr(storage, "add_device", slow)
    asking = asyncio.ensure_future(add(pool, path, "new"))
    await entered.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    if stopped:
        loop.call_later(0, go_on.set)
        await pool.close()
        await pool.start()
    else:
        go_on.set()
        await until(lambda: "new" in [status.name for status in pool.engine.storage.list()])
    assert "new" in records(pool)
    assert {status.state for status in pool.engine.storage.list()} == {"online"}
    with pytest.raises(Exists):
        await add(pool, path, "new")


async def test_a_removal_that_nobody_waits_for_is_done_as_a_whole(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    entered, go_on = asyncio.Event(), threading.Event()
    real = membership.check_removable

    def slow(*given: Any) -> None:
        loop.call_soon_threadsafe(entered.set)
        go_on.wait()
        real(*given)

    (path,) = folders(tmp_path, "new")
    await add(pool, path, "new")
    monkeypatch.setattr(storage, "check_removable", slow)
    asking = asyncio.ensure_future(pool.engine.storage.remove("new"))
    await entered.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    go_on.set()
    await until(lambda: not (Path(path) / LABEL_FILE).exists())
    await add(pool, path, "again")  # comes behind the end of the removal
    assert sorted(records(pool)) == ["again", "disk1"]


async def test_a_removal_that_cannot_clear_the_disk_lets_go_of_it(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_device: object) -> None:
        raise OSError(5, "Input/output error")

    (path,) = folders(tmp_path, "new")
    await add(pool, path, "new")
    with monkeypatch.context() as broken:
        broken.setattr(storage, "erase_device", fail)
        assert (await pool.engine.storage.remove("new")).name == "new"
    assert list(records(pool)) == ["disk1"]
    await add(pool, path, "again")
    assert sorted(records(pool)) == ["again", "disk1"]
