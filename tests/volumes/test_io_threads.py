"""Work in threads: every result arrives, failures too, together where they are ready together, and the end is clean."""

import asyncio
import random
import threading
from collections import deque
from typing import Any

import pytest

from blockvirt.volumes.io_threads import IoThreads
from tests.attacks.simulation_loop import SimLoop, SimThreads

PATIENCE_S = 20.0


async def test_results_and_failures_arrive() -> None:
    threads = IoThreads(3)

    def fail() -> None:
        raise OSError(5, "planted")

    def stop() -> None:
        raise StopIteration

    futures = [threads.submit(lambda number=number: number * 2) for number in range(500)]  # type: ignore[misc]
    assert [await future for future in futures] == [number * 2 for number in range(500)]
    with pytest.raises(OSError, match="planted"):
        await threads.run(fail)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await threads.run(stop)
    assert await threads.run(lambda: "still here") == "still here"
    threads.close()


async def test_no_more_threads_than_allowed_and_none_without_work() -> None:
    threads = IoThreads(2)
    assert not threads._threads
    await threads.run(lambda: None)
    await threads.run(lambda: None)
    assert len(threads._threads) == 1
    gate = threading.Event()
    futures = [threads.submit(gate.wait) for _ in range(6)]
    assert len(threads._threads) == 2
    gate.set()
    await asyncio.wait(futures)
    threads.close()


async def test_a_cancelled_caller_costs_nobody_a_result_and_close_waits_for_the_work() -> None:
    threads = IoThreads(1)
    started, gate, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        gate.wait()
        done.set()

    running = asyncio.ensure_future(threads.run(work))
    await asyncio.sleep(0)
    behind = threads.submit(lambda: 7)
    started.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    gate.set()
    assert await behind == 7
    assert done.is_set()
    last = threads.submit(lambda: 8)
    mine = list(threads._threads)
    threads.close()
    assert await last == 8
    assert mine
    assert not any(each.thread.is_alive() for each in mine)


async def test_threads_that_sleep_and_threads_on_their_way_to_it_all_end() -> None:
    for _ in range(50):
        threads = IoThreads(4)
        gate = threading.Barrier(4)
        await asyncio.wait([threads.submit(gate.wait) for _ in range(4)])
        mine = list(threads._threads)
        threads.close()
        assert [each.thread.is_alive() for each in mine] == [False] * 4


class _Late(deque[Any]):
    """Something comes right after a thread has found nothing, and before anybody can see that it is idle."""

    coming: Any = None

    def popleft(self) -> Any:
        try:
            return super().popleft()
        except IndexError:
            if self.coming is not None:
                self.append(self.coming)
                self.coming = None
            raise


async def test_work_that_comes_as_a_thread_goes_to_sleep_is_done() -> None:
    threads = IoThreads(1)
    late = threads._work = _Late()
    assert await threads.run(lambda: "first") == "first"
    future = asyncio.get_running_loop().create_future()
    late.coming = (lambda: "late", lambda value, _: future.set_result(value))
    assert await threads.run(lambda: "second") == "second"
    async with asyncio.timeout(PATIENCE_S):
        assert await future == "late"
    threads.close()


async def test_one_after_the_other_and_a_few_at_once() -> None:
    threads = IoThreads(3)
    for count in [1, 2, 3, 1] * 500:
        futures = [threads.submit(lambda: 1) for _ in range(count)]
        async with asyncio.timeout(PATIENCE_S):
            assert sum([await future for future in futures]) == count
    threads.close()


async def test_work_after_the_end_is_done() -> None:
    """A straggler at a shutdown must not wait for ever."""
    threads = IoThreads(2)
    for _ in range(50):
        async with asyncio.timeout(PATIENCE_S):
            assert await threads.run(lambda: 9) == 9
        threads.close()


async def test_who_is_called_is_told_of_the_end_and_his_mistake_is_his_own() -> None:
    threads, told, mistakes = IoThreads(1), list[object](), list[dict[str, Any]]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: mistakes.append(context))
    failure = OSError(5, "planted")

    def fail() -> None:
        raise failure

    def mistaken(value: object, error: BaseException | None) -> None:
        told.append((value, error))
        raise ZeroDivisionError

    threads.call(lambda: "done", mistaken)
    threads.call(fail, mistaken)
    async with asyncio.timeout(PATIENCE_S):
        assert await threads.run(lambda: "behind them") == "behind them"
    assert told == [("done", None), (None, failure)]
    assert [type(mistake["exception"]) for mistake in mistakes] == [ZeroDivisionError] * 2
    threads.close()


async def test_where_no_more_threads_can_be_had_those_that_there_are_do_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = IoThreads(3)

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError):
            threads.submit(lambda: 0)
        assert not threads._outstanding
    assert await threads.run(lambda: 1) == 1
    monkeypatch.setattr(threading.Thread, "start", fail)
    futures = [threads.submit(lambda number=number: number) for number in range(50)]  # type: ignore[misc]
    async with asyncio.timeout(PATIENCE_S):
        assert [await future for future in futures] == list(range(50))
    threads.close()


@pytest.mark.parametrize("seed", range(20))
def test_the_end_of_work_is_noted_before_its_caller_goes_on_in_whatever_order_callbacks_run(seed: int) -> None:
    noted: list[str] = []

    async def work() -> None:
        assert await SimThreads(1).run_to_end(lambda: 7, lambda: noted.append("end")) == 7
        assert noted == ["end"]

    async def beside() -> None:
        await asyncio.gather(work(), *(asyncio.sleep(0) for _ in range(8)))

    loop = SimLoop(random.Random(seed), in_order=False)
    try:
        loop.run(beside())
    finally:
        loop.bury()
