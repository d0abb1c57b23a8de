"""The threads for what would block the loop: cold reads, syncs, copies, file creation.

``concurrent.futures`` makes two futures, a condition and a wake-up of the loop for each call; here it is one future,
and results that become ready together wake the loop once.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class IoThreads:
    """A bounded set of threads, started as needed. Used on one event loop; ``close`` ends them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._threads: list[threading.Thread] = []
        self._work: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = SimpleQueue()
        self._results: deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = deque()
        self._announced = False
        """The loop was told that there are results, and has not looked yet."""
        self._outstanding = 0

    def submit(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """Run ``work`` in a thread and return the future of its result. Cancelling that does not stop the work."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._outstanding += 1
        if len(self._threads) < min(self._outstanding, self._most):
            thread = threading.Thread(target=self._serve, name=f"blockvirt-io-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._work.put((work, future))
        return future

    async def run(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread and return its result. Who is cancelled does not wait for its end."""
        return await self.submit(work)

    async def run_to_end(self, work: Callable[[], T], at_end: Callable[[], None]) -> T:
        """Run ``work`` in a thread and return its result. Who is cancelled waits for its end too.

        ``at_end`` is called on the loop when the thread is done, whatever became of who waited.
        """
        future = self.submit(work)
        future.add_done_callback(lambda _: at_end())
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            future.exception()  # nobody else will ask
            raise

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            work, future = item
            try:
                self._results.append((future, work(), None))
            except BaseException as error:
                self._results.append((future, None, error))
            if not self._announced:
                self._announced = True
                try:
                    future.get_loop().call_soon_threadsafe(self._deliver)
                except RuntimeError:
                    return  # the loop is closed: nobody waits any more
            del item, work, future  # nothing of it may live on while this thread waits for more

    def _deliver(self) -> None:
        # First: a result that is appended behind the last look below is announced anew.
        self._announced = False
        while self._results:
            future, value, error = self._results.popleft()
            self._outstanding -= 1
            if future.cancelled():
                continue
            if error is None:
                future.set_result(value)
            elif isinstance(error, StopIteration):  # no future takes one
                future.set_exception(RuntimeError("work in a thread raised StopIteration"))
            else:
                future.set_exception(error)

    def close(self) -> None:
        """Wait for what was submitted and end the threads. Blocks. Idempotent."""
        threads, self._threads = self._threads, []
        for _ in threads:
            self._work.put(None)
        for thread in threads:
            thread.join()
