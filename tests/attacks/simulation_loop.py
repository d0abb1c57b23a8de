"""An event loop with virtual time whose order of callbacks comes from a seed, and threads that take turns with it.

Nothing waits for real: time jumps to the next timer. Work for a thread runs on the loop, at a later moment; between two
of its system calls it may rest, for a while that comes from the seed, in which the loop and other work go on. What
began to rest later goes on first. So the same seed makes the same history, down to the order of system calls.
"""

import asyncio
import heapq
import inspect
import random
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from blockvirt.volumes.io_threads import IoThreads

T = TypeVar("T")
_LONGEST_S = 20_000.0  # of virtual time in one life: what is not done by then waits for something that never comes
_MOST_RESTING = 12  # at a time: each is a call of the loop within the other
_UNWINDINGS = 20  # looks at the tasks of a dead process: the end of one may begin another


class Killed(BaseException):
    """The simulated process is dead: nothing it calls has an effect any more."""


class Hanging(Exception):
    """Nothing will ever wake what is waited for."""


class SimTask(asyncio.Task[Any]):
    """A task that comes in the order of its creation out of every set: addresses differ from run to run."""

    number = 0

    def __hash__(self) -> int:
        return self.number


class SimLoop(asyncio.BaseEventLoop):
    """One life of the simulated process. ``run`` drives it; it is good for one run."""

    def __init__(self, dice: random.Random, *, in_order: bool) -> None:
        """``in_order``: ready callbacks run first come, first served, as asyncio has them; else in any order."""
        super().__init__()
        self.now_s = 0.0
        self.dice = dice
        self.is_dead = False
        self.faults: list[str] = []
        """What tasks and callbacks raised that nobody took."""
        self._in_order = in_order
        self._in_thread = False
        """What runs now is work for a thread."""
        self._resting = 0
        self._tasks: list[SimTask] = []
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]
        self.set_exception_handler(self._note_fault)

    # --- what asyncio asks of a loop -----------------------------------------------------------------------------

    def time(self) -> float:
        return self.now_s

    def _write_to_self(self) -> None:
        pass  # nobody sleeps in a selector

    def _make_task(self, loop: Any, coroutine: Coroutine[Any, Any, Any], **more: Any) -> SimTask:
        task = SimTask(coroutine, loop=loop, **more)
        task.number = len(self._tasks)
        self._tasks.append(task)
        return task

    def _note_fault(self, _: Any, context: dict[str, Any]) -> None:
        if not self.is_dead:
            self.faults.append(f"{context.get('message')}: {context.get('exception')!r}")

    def call_soon(self, *arguments: Any, **more: Any) -> Any:  # type: ignore[override]
        """See asyncio; a dead process calls nothing any more."""
        return super().call_soon(*arguments, **more) if not self.is_dead else _nothing(self)

    def call_at(self, *arguments: Any, **more: Any) -> Any:  # type: ignore[override]
        """See asyncio; a dead process calls nothing any more."""
        return super().call_at(*arguments, **more) if not self.is_dead else _nothing(self)

    def run_in_executor(self, executor: Any, function: Any, *arguments: Any) -> Any:  # type: ignore[override]
        """See asyncio: a thread like the others."""
        return self.submit(lambda: function(*arguments))

    # --- running -------------------------------------------------------------------------------------------------

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run ``main`` to its end; raises what it raises, Killed if the process dies before, Hanging."""
        asyncio.events._set_running_loop(self)
        try:
            task = self.create_task(main)
            while not task.done():
                self._step()
                if self.is_dead:
                    raise Killed
            result: T = task.result()
            return result
        finally:
            asyncio.events._set_running_loop(None)

    def _step(self) -> None:
        ready, scheduled = self._ready, self._scheduled  # type: ignore[attr-defined]
        while scheduled and (not ready or scheduled[0].when() <= self.now_s or scheduled[0].cancelled()):
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            if not handle.cancelled():
                self.now_s = max(self.now_s, handle.when())
                ready.append(handle)
        if not ready or self.now_s > _LONGEST_S:
            raise Hanging
        place = 0 if self._in_order or len(ready) == 1 else self.dice.randrange(len(ready))
        handle = ready[place]
        del ready[place]
        if not handle.cancelled():
            handle._run()

    # --- threads -------------------------------------------------------------------------------------------------

    def submit(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """Have ``work`` done in a thread, later; returns the future of its result."""
        future: asyncio.Future[T] = self.create_future()
        self.call(work, partial(_deliver, future))
        return future

    def call(self, work: Callable[[], Any], then: Callable[[Any, BaseException | None], None]) -> None:
        """Have ``work`` done in a thread, later, and ``then`` told of its end, later still."""
        self.call_later(self.delay_s(), self._begin, work, then)

    def delay_s(self) -> float:
        """Return how long something takes: mostly next to nothing, now and then an age."""
        return self.dice.choice((0.0, 0.0, 0.0, 1e-5, 1e-4, 1e-4, 1e-3, 1e-3, 2e-2, 0.2))

    def _begin(self, work: Callable[[], Any], then: Callable[[Any, BaseException | None], None]) -> None:
        value, error = None, None
        self._in_thread = True
        try:
            value = work()
        except BaseException as raised:
            error = raised
        self._in_thread = False
        if not self.is_dead:
            self.call_later(self.delay_s(), then, value, error)

    def rest(self, probability: float = 0.5) -> None:
        """Let others run for a while, if this is work for a thread; raises Killed if the process dies meanwhile."""
        if not self._in_thread or self._resting == _MOST_RESTING or self.dice.random() >= probability:
            return
        self._in_thread = False
        self._resting += 1
        is_over: list[bool] = []
        self.call_later(self.delay_s(), is_over.append, True)
        while not is_over and not self.is_dead:
            self._step()
        self._resting -= 1
        self._in_thread = True
        if self.is_dead:
            raise Killed

    # --- the end -------------------------------------------------------------------------------------------------

    def bury(self) -> None:
        """End what is left of the process: every coroutine unwinds, without any effect."""
        self.is_dead = True
        asyncio.events._set_running_loop(self)
        try:
            for _ in range(_UNWINDINGS):
                left = [task for task in self._tasks if inspect.getcoroutinestate(_coroutine(task)) != "CORO_CLOSED"]
                if not left:
                    break
                for task in left:
                    with suppress(BaseException):
                        _coroutine(task).close()
        finally:
            asyncio.events._set_running_loop(None)
        for task in self._tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._tasks.clear()
        self.close()


class SimThreads(IoThreads):
    """``IoThreads`` whose threads are those of the simulation's loop."""

    def call(self, work: Callable[[], Any], then: Callable[[Any, BaseException | None], None]) -> None:
        """See IoThreads."""
        _loop().call(work, then)


class SimWriter:
    """Stands for ``meta.group_commit.WriterThread``: commits groups, a while after they were asked for."""

    def __init__(self, transact: Callable[[Any], Any]) -> None:
        self._transact = transact
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._is_due = False
        self._heard_s = 0.0

    async def run(self, change: Any) -> Any:
        """See WriterThread."""
        loop = _loop()
        reply: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((change, reply))
        if not self._is_due:
            self._is_due = True
            loop.call_later(loop.delay_s(), self._commit)
        return await reply

    def _commit(self) -> None:
        self._is_due = False
        group, self._waiting = self._waiting[:64], self._waiting[64:]
        if self._waiting:
            self._is_due = True
            _loop().call_soon(self._commit)
        if group:
            outcomes = self._transact([change for change, _ in group])
            # Commits are heard of in their order.
            self._heard_s = max(self._heard_s + 1e-9, _loop().time() + _loop().delay_s())
            _loop().call_at(self._heard_s, _deliver_all, [reply for _, reply in group], outcomes)

    def on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        """See WriterThread."""
        _loop().call_soon(function, *arguments)

    def close(self) -> None:
        """See WriterThread: what waits is done first."""
        while self._waiting and not _loop().is_dead:
            self._commit()


def _loop() -> SimLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimLoop)
    return loop


def _nothing(loop: SimLoop) -> asyncio.TimerHandle:
    return asyncio.TimerHandle(0.0, lambda: None, (), loop)


def _deliver(future: "asyncio.Future[Any]", value: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


def _deliver_all(replies: "Sequence[asyncio.Future[Any]]", outcomes: Sequence[Any]) -> None:
    for reply, outcome in zip(replies, outcomes, strict=True):
        _deliver(reply, outcome.value, outcome.error)


def _coroutine(task: SimTask) -> Coroutine[Any, Any, Any]:
    coroutine = task.get_coro()
    assert inspect.iscoroutine(coroutine)
    return coroutine
