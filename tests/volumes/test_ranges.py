"""The per-chunk rule: overlapping holders go one after the other in order, others at once; punches wait for threads."""

import asyncio

import pytest

from blockvirt.tasks import TaskSet
from blockvirt.volumes.ranges import Inflight, RangeLock


async def turn() -> None:
    """Let everything that is ready run."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_overlapping_holders_go_in_order_and_others_at_once() -> None:
    lock, tasks, order = RangeLock(), TaskSet("test"), []
    gates = {name: asyncio.Event() for name in "abcd"}

    async def hold(name: str, first: int, last: int) -> None:
        async with lock.hold(first, last):
            order.append(name)
            await gates[name].wait()

    for name, first, last in [("a", 0, 5), ("b", 5, 9), ("c", 9, 12), ("d", 20, 21)]:
        tasks.start(hold(name, first, last), name)
    await turn()
    assert order == ["a", "d"]  # c waits behind b, which waits behind a
    assert lock.touches(12, 12)
    assert not lock.touches(13, 19)
    gates["a"].set()
    await turn()
    assert order == ["a", "d", "b"]
    gates["b"].set()
    await turn()
    assert order == ["a", "d", "b", "c"]
    for gate in gates.values():
        gate.set()
    await tasks.wait()
    assert not lock.holds


async def test_a_cancelled_waiter_leaves_the_queue_and_wakes_nobody_early() -> None:
    lock, tasks, order = RangeLock(), TaskSet("test"), []
    release = asyncio.Event()

    async def hold(name: str) -> None:
        async with lock.hold(1, 1):
            order.append(name)
            await release.wait()

    tasks.start(hold("first"), "first")
    await turn()
    waiter = tasks.start(hold("cancelled"), "cancelled")
    tasks.start(hold("last"), "last")
    await turn()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    await turn()
    assert order == ["first"]
    release.set()
    await tasks.wait()
    assert order == ["first", "last"]


async def test_drained_waits_for_what_runs_now_only() -> None:
    inflight, tasks = Inflight(), TaskSet("test")
    first, second = inflight.enter(), inflight.enter()
    drained = tasks.start(inflight.drained(), "drained")
    await turn()
    later = inflight.enter()
    inflight.leave(second)
    await turn()
    assert not drained.done()
    inflight.leave(first)
    await turn()
    assert drained.done()
    inflight.leave(later)
    await inflight.drained()
