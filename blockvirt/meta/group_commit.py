"""Group commit: changes that wait together share one synced transaction, each in a child transaction of its own."""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lmdb

from blockvirt.errors import ShuttingDown
from blockvirt.limits import STORE_GROUP_CHANGES, STORE_WAITING_CHANGES
from blockvirt.meta.faults import errno_of
from blockvirt.meta.keys import Table
from blockvirt.meta.transactions import Writer

log = logging.getLogger("blockvirt.meta")
Change = Callable[[Writer], Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one change: a value, or the exception its caller gets."""

    value: Any = None
    error: BaseException | None = None


def run_group(env: Any, tables: Mapping[Table, Any], changes: Sequence[Change]) -> tuple[list[Outcome], bool]:
    """Run ``changes`` in one transaction; returns what became of each, and whether anything was committed.

    A change that raises is undone alone. Raises lmdb.Error where the transaction as a whole failed: nothing of it is
    in the store then.
    """
    transaction = env.begin(write=True)
    outcomes: list[Outcome] = []
    large: set[tuple[Table, bytes]] = set()
    try:
        for change in changes:
            if len(changes) == 1:
                outcomes.append(_run(change, Writer(transaction, tables, large)))
                continue
            child = env.begin(write=True, parent=transaction)
            outcome = _run(change, Writer(child, tables, large))
            if outcome.error is None:
                child.commit()
            else:
                child.abort()
            outcomes.append(outcome)
        if all(outcome.error is not None for outcome in outcomes):
            transaction.abort()
            return outcomes, False
        transaction.commit()
    except BaseException:
        with contextlib.suppress(lmdb.Error):
            transaction.abort()
        raise
    return outcomes, True


def _run(change: Change, writer: Writer) -> Outcome:
    """Run one change. LMDB's own errors concern the whole group and are raised."""
    try:
        return Outcome(value=change(writer))
    except lmdb.Error as error:
        if isinstance(error, lmdb.MapFullError | lmdb.PanicError) or errno_of(error) is not None:
            raise
        return Outcome(error=error)
    except StopIteration as error:  # no future takes one
        failure = RuntimeError("a metadata change raised StopIteration")
        failure.__cause__ = error
        return Outcome(error=failure)
    except BaseException as error:
        return Outcome(error=error)


@dataclass(frozen=True, slots=True)
class _Waiting:
    change: Change
    reply: "asyncio.Future[Any]"


class WriterThread:
    """The one thread that commits for an event loop. Started by the first change."""

    def __init__(self, transact: Callable[[Sequence[Change]], Sequence[Outcome]]) -> None:
        """``transact`` is called in the thread with a group of changes and answers each."""
        self._transact = transact
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._slots = asyncio.Semaphore(STORE_WAITING_CHANGES)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def run(self, change: Change) -> Any:
        """Hand ``change`` to the thread and return its value, or raise its error, once its transaction has ended."""
        loop = self._loop = asyncio.get_running_loop()
        async with self._slots:
            if self._closed:
                raise ShuttingDown("the metadata store was closed", correction="wait for the daemon to start again")
            reply: asyncio.Future[Any] = loop.create_future()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="blockvirt-metadata", daemon=True)
                self._thread.start()
            self._waiting.put(_Waiting(change, reply))
            return await reply

    def on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call ``function`` on the event loop that commits; right here if none has yet."""
        if self._loop is None:
            function(*arguments)
            return
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody waits any more
            log.debug("the event loop ended before a commit's result")

    def close(self) -> None:
        """Finish what the thread has been given and end it. Blocks for as long as that takes."""
        self._closed = True
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        last = False
        while not last and (first := self._waiting.get()) is not None:
            group = [first]
            while len(group) < STORE_GROUP_CHANGES and not last:
                try:
                    more = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    last = True
                else:
                    group.append(more)
            try:
                outcomes = self._transact([waiting.change for waiting in group])
            except BaseException as error:  # our own mistake; without an answer the callers would wait for ever
                log.exception("the metadata writer met an unexpected error")
                outcomes = [Outcome(error=error) for _ in group]
            self.on_loop(_deliver, group, outcomes)


def _deliver(group: Sequence[_Waiting], outcomes: Sequence[Outcome]) -> None:
    for waiting, outcome in zip(group, outcomes, strict=True):
        if waiting.reply.done():  # cancelled: nobody asks any more
            continue
        if outcome.error is None:
            waiting.reply.set_result(outcome.value)
        else:
            waiting.reply.set_exception(outcome.error)
