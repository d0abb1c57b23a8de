"""The threads for what would block the loop: cold reads, syncs, copies, file creation.

``concurrent.futures`` makes two futures, a condition and a wake-up of the loop for each call; here it is one future, or
none, and results that become ready together wake the loop once. Each thread sleeps on a lock of its own: threads that
share a queue's wake one another to find it empty, and take the processor from the one that has work.
"""

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
Then = Callable[[Any, BaseException | None], None]
"""Is told what work returned, or what it raised."""


class _Thread:
    """One of them, and what it waits on."""

    def __init__(self, serve: "Callable[[_Thread], None]", name: str) -> None:
        self.wake = threading.Lock()
        self.wake.acquire()
        self.thread = threading.Thread(target=serve, args=(self,), name=name, daemon=True)
        self.thread.start()


class IoThreads:
    """A bounded set of threads, started as needed. Used on one event loop; ``close`` ends them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._threads: list[_Thread] = []
        self._started = 0
        """How many there are: asked in each call."""
        self._idle: list[_Thread] = []
        """Who sleeps, or is about to: the last to come is the first to be woken, as its caches are the warmest."""
        self._work: deque[tuple[Callable[[], Any], Then]] = deque()
        self._ending = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bell = -1
        """An eventfd: what is called where the loop finds it readable comes sooner than by call_soon_threadsafe."""
        self._results: deque[tuple[Then, Any, BaseException | None]] = deque()
        self._announced = False
        """The loop was told that there are results, and has not looked yet."""
        self._outstanding = 0

    def submit(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """Run ``work`` in a thread and return the future of its result. Cancelling that does not stop the work."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.call(work, partial(_settle, future))
        return future

    def call(self, work: Callable[[], Any], then: Then) -> None:
        """Run ``work`` in a thread, then ``then`` on the loop, in the pass in which that hears of it.

        Raises RuntimeError where the system has no thread for it, and none was started before; OSError where the first
        call finds no descriptor.
        """
        if self._loop is None:
            self._hang_bell()
        self._outstanding += 1
        if self._started < self._outstanding and self._started < self._most:
            self._start_one()
        self._work.append((work, then))
        self._wake_one()

    def _hang_bell(self) -> None:
        loop = asyncio.get_running_loop()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        loop.add_reader(self._bell, self._rung)
        self._loop = loop

    def _start_one(self) -> None:
        try:
            self._threads.append(_Thread(self._serve, f"blockvirt-io-{self._started}"))
            self._started += 1
        except RuntimeError:
            if not self._threads:  # else those that there are do it, in their time
                self._outstanding -= 1
                raise

    def _wake_one(self) -> None:
        try:
            self._idle.pop().wake.release()
        except IndexError:
            pass  # all are at work, and look for more before they sleep

    async def run(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread and return its result. Who is cancelled does not wait for its end."""
        return await self.submit(work)

    async def run_to_end(self, work: Callable[[], T], at_end: Callable[[], None]) -> T:
        """Run ``work`` in a thread and return its result. Who is cancelled waits for its end too.

        ``at_end`` is called on the loop when the thread is done, whatever became of who waited, and before he goes on.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def then(value: T, error: BaseException | None) -> None:
            try:
                at_end()
            finally:
                _settle(future, value, error)

        self.call(work, then)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            future.exception()  # nobody else will ask
            raise

    def _next(self, me: _Thread) -> tuple[Callable[[], Any], Then] | None:
        """Sleep until there is work and return it; None at the end."""
        while True:
            try:
                return self._work.popleft()
            except IndexError:
                if self._ending:
                    return None
            self._idle.append(me)
            if self._work or self._ending:  # came before anybody could see that this thread is idle
                try:
                    self._idle.remove(me)
                    continue
                except ValueError:
                    pass  # somebody has seen it now
            me.wake.acquire()

    def _serve(self, me: _Thread) -> None:
        while (item := self._next(me)) is not None:
            work, then = item
            try:
                self._results.append((then, work(), None))
            except BaseException as error:
                self._results.append((then, None, error))
            if not self._announced:
                self._announced = True
                os.eventfd_write(self._bell, 1)
            del item, work, then  # nothing of it may live on while this thread waits for more

    def _rung(self) -> None:
        os.eventfd_read(self._bell)
        self._deliver()

    def _deliver(self) -> None:
        # First: a result that is appended behind the last look below is announced anew.
        self._announced = False
        while self._results:
            then, value, error = self._results.popleft()
            self._outstanding -= 1
            try:
                then(value, error)
            except Exception as failure:  # our own mistake: it may cost nobody else a result
                context = {"message": f"after work in a thread: {then}", "exception": failure}
                asyncio.get_running_loop().call_exception_handler(context)

    def close(self) -> None:
        """Wait for what was submitted and end the threads. Blocks. Idempotent."""
        threads, self._threads, self._started = self._threads, [], 0
        self._ending = True
        for _ in threads:
            self._wake_one()
        for each in threads:
            each.thread.join()
        self._ending = False  # work that comes even so gets a thread, as at the beginning
        loop, self._loop = self._loop, None
        if loop is not None:
            if not loop.is_closed():  # else nobody waits any more
                loop.remove_reader(self._bell)
                loop.call_soon(self._deliver)
            os.close(self._bell)


def _settle(future: "asyncio.Future[T]", value: T, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(value)
    elif isinstance(error, StopIteration):  # no future takes one
        future.set_exception(RuntimeError("work in a thread raised StopIteration"))
    else:
        future.set_exception(error)
