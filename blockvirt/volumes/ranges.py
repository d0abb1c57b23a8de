"""The per-chunk rule: who works on which chunks in a thread, and who waits behind them in order.

An operation in a thread that writes or stages anything enters its chunks here in one step; any other write, zero or
trim that touches one of them queues behind it. Reads never enter.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class _Hold:
    __slots__ = ("first", "last", "released")

    def __init__(self, first: int, last: int) -> None:
        self.first = first
        self.last = last
        self.released: asyncio.Future[None] | None = None


class RangeLock:
    """A lock over ranges of chunk numbers; overlapping holders get it in the order in which they asked."""

    __slots__ = ("holds",)

    def __init__(self) -> None:
        self.holds: list[_Hold] = []
        """In order of arrival, granted or not. Bounded by the sessions' bound on slow requests."""

    def touches(self, first: int, last: int) -> bool:
        """Tell whether chunks ``first`` to ``last`` (inclusive) touch a range that is held or waited for."""
        return any(hold.first <= last and first <= hold.last for hold in self.holds)

    async def released(self) -> None:
        """Return when nobody holds or waits for anything."""
        while self.holds:
            await self._end_of(self.holds[-1])

    async def _end_of(self, hold: _Hold) -> None:
        if hold.released is None:
            hold.released = asyncio.get_running_loop().create_future()
        # Several may wait for one hold: a cancelled waiter must not cancel the others' future.
        await asyncio.shield(hold.released)

    @asynccontextmanager
    async def hold(self, first: int, last: int) -> AsyncIterator[None]:
        """Hold chunks ``first`` to ``last`` (inclusive) after everybody who asked for one of them earlier."""
        before = [hold for hold in self.holds if hold.first <= last and first <= hold.last]
        mine = _Hold(first, last)
        self.holds.append(mine)
        try:
            for hold in before:
                if hold in self.holds:
                    await self._end_of(hold)
            yield
        finally:
            self.holds.remove(mine)
            if mine.released is not None and not mine.released.done():
                mine.released.set_result(None)


class Inflight:
    """Operations in threads, numbered: they may still use addresses that the map has dropped since."""

    __slots__ = ("_next", "_running", "_waiters")

    def __init__(self) -> None:
        self._next = 0
        self._running: set[int] = set()
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []

    def enter(self) -> int:
        """Note that an operation starts; returns its number for ``leave``."""
        self._next += 1
        self._running.add(self._next)
        return self._next

    def leave(self, number: int) -> None:
        """Note that the operation's thread is done with its addresses."""
        self._running.discard(number)
        oldest = min(self._running, default=self._next + 1)
        for upto, waiter in self._waiters:
            if upto < oldest and not waiter.done():
                waiter.set_result(None)
        self._waiters = [(upto, waiter) for upto, waiter in self._waiters if not waiter.done()]

    async def drained(self) -> None:
        """Return when every operation that runs now has left; later ones are not waited for."""
        if not self._running:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((self._next, waiter))
        await waiter


class InPlace:
    """Overwrites in place that run in threads: a freeze must not fall between their plan and their end.

    What they overwrite belongs to a snapshot from the freeze on. Before one they are waited for, and none begins
    meanwhile; those on the event loop go on.
    """

    __slots__ = ("_running", "_stops", "_woken")

    def __init__(self) -> None:
        self._running = 0
        self._stops = 0
        self._woken = asyncio.Event()

    @property
    def open(self) -> bool:
        """Whether an overwrite in a thread may be planned now; else wait for ``opened`` and plan anew."""
        return not self._stops

    async def opened(self) -> None:
        """Return when overwrites in threads may be planned again."""
        while self._stops:
            await self._change()

    def enter(self) -> None:
        """Note that an overwrite goes to a thread: in the same piece as its plan."""
        assert not self._stops
        self._running += 1

    def leave(self) -> None:
        """Note that its thread is done."""
        self._running -= 1
        self._wake()

    @asynccontextmanager
    async def stopped(self) -> AsyncIterator[None]:
        """Keep overwrites out of threads, and wait for those that are in one."""
        self._stops += 1
        try:
            while self._running:
                await self._change()
            yield
        finally:
            self._stops -= 1
            self._wake()

    async def _change(self) -> None:
        self._woken.clear()
        await self._woken.wait()

    def _wake(self) -> None:
        self._woken.set()
