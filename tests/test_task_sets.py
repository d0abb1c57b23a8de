"""Background tasks: whose failure is whose."""

import asyncio
import gc

import pytest

from blockvirt.tasks import TaskSet


async def fail(after: asyncio.Event) -> None:
    await after.wait()
    raise ValueError("planted")


async def test_a_failure_that_is_awaited_is_the_awaiters() -> None:
    tasks, now = TaskSet("test", on_failure=lambda error: pytest.fail(str(error))), asyncio.Event()
    task = tasks.start(fail(now), "fails", awaited=True)
    now.set()
    with pytest.raises(ValueError, match="planted"):
        await asyncio.shield(task)
    assert not len(tasks)


async def test_a_failure_whose_awaiter_is_gone_is_no_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    tasks, now = TaskSet("test"), asyncio.Event()
    tasks.start(fail(now), "fails", awaited=True)
    now.set()
    await tasks.wait()
    gc.collect()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_failure_that_nobody_awaits_is_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    told: list[BaseException] = []
    tasks, now = TaskSet("test", on_failure=told.append), asyncio.Event()
    tasks.start(fail(now), "fails")
    now.set()
    await tasks.wait()
    await asyncio.sleep(0)
    assert [str(error) for error in told] == ["planted"]
    assert "task test:fails failed" in caplog.text
