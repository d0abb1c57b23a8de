"""Requests that cannot be answered on the spot: they run beside the turns, bounded in number and size, in any order."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from time import perf_counter
from typing import Protocol

from blockvirt.device import BASE_ALLOCATION, VolumeHandle
from blockvirt.errors import BlockvirtError, ShuttingDown
from blockvirt.limits import NBD_MAX_EXTENTS_PER_REPLY
from blockvirt.nbd import constants as c
from blockvirt.nbd.budget import ConnectionBudget
from blockvirt.nbd.buffers import SMALL_BYTES, Buffer, BufferPool, charge_for_slow
from blockvirt.nbd.messages import descriptors_of, status_chunk
from blockvirt.nbd.outgoing import Part
from blockvirt.nbd.stats import ServerStats
from blockvirt.nbd.transmission import Replies, done, explain
from blockvirt.tasks import TaskSet

log = logging.getLogger("blockvirt.nbd")

_STATUS_BYTES = 8 * NBD_MAX_EXTENTS_PER_REPLY
_READS_TOGETHER = 16
"""Reads that share a hand-over to a thread: the first one's reply waits for the last one."""
_CHANGES = frozenset({c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES})


class ReplySink(Protocol):
    """What a session does with the outcome of a slow request."""

    def slow_reply(self, parts: Sequence[Part], buffer: Buffer | None, *, alone: bool) -> None:
        """Send a reply; ``buffer`` is given back once it is sent. ``alone``: nothing else is in flight.

        ``slow_done`` follows.
        """

    def slow_done(self) -> None:
        """A slow request has ended, whatever became of it: there is room for another."""

    def abandon(self, reason: str) -> None:
        """Close the connection without a reply to anything."""


class SlowLane:
    """The slow requests of one session. A ``start_*`` that returns False has no room now: try after ``slow_done``."""

    def __init__(
        self,
        name: str,
        handle: VolumeHandle,
        replies: Replies,
        pool: BufferPool,
        budget: ConnectionBudget,
        stats: ServerStats,
        sink: ReplySink,
        *,
        contexts: Sequence[str],
        most: int,
    ) -> None:
        self._name = name
        self._handle = handle
        self._replies = replies
        self._pool = pool
        self._budget = budget
        self._stats = stats
        self._sink = sink
        self._contexts = contexts
        self._most = most
        self._tasks = TaskSet(f"nbd {name}")
        self._changing: set[asyncio.Task[None]] = set()
        self._flushes: dict[int, Callable[[BaseException | None], None]] = {}
        """Those in flight, by their numbers."""
        self._flush_number = 0
        self._all_flushed: asyncio.Future[None] | None = None
        self._abandoned = False
        self._added_bytes = 0
        self.added: list[tuple[int, int, int]] = []
        """Reads (cookie, offset, length) that wait for ``start_reads``."""
        self.count = 0
        """How many are in flight."""

    def add_read(self, cookie: int, offset: int, length: int) -> bool:
        """Keep a read for the next ``start_reads``, which the caller owes within its turn."""
        if self.full or not self._budget.take(charge_for_slow(length)):
            return False
        if self._added_bytes + length > SMALL_BYTES or len(self.added) >= _READS_TOGETHER:
            self.start_reads()
        self.added.append((cookie, offset, length))
        self._added_bytes += length
        return True

    def start_reads(self) -> None:
        """Have the volume do what was added, in one piece, into one buffer."""
        if self.added:
            added, self.added = self.added, []
            buffer, self._added_bytes = self._pool.take_for_slow(self._added_bytes), 0
            self._start_reads(added, buffer)

    def start_read(self, cookie: int, offset: int, length: int, buffer: Buffer) -> None:
        """Read into ``buffer``, which is given back when the reply was sent."""
        assert not self.full
        self._start_reads([(cookie, offset, length)], buffer)

    def _start_reads(self, requests: Sequence[tuple[int, int, int]], buffer: Buffer) -> None:
        async def work() -> Sequence[Part]:
            reads, at = [], 0
            for _, offset, length in requests:
                reads.append((offset, buffer.view[at : at + length]))
                at += length
            try:
                outcomes = await self._handle.read(reads)
            except ShuttingDown:
                raise
            except Exception as error:
                outcomes = [error] * len(reads)
            parts: list[Part] = []
            for (cookie, offset, length), (_, into), failure in zip(requests, reads, outcomes, strict=True):
                if isinstance(failure, ShuttingDown):
                    raise failure
                if failure is None:
                    parts += (self._replies.data(cookie, offset, length), into)
                else:
                    parts.append(self._error(c.CMD_READ, cookie, failure))
            return parts

        self._start(c.CMD_READ, requests[0][0], work, buffer, requests=len(requests))

    @property
    def full(self) -> bool:
        """Whether as many are in flight as may be."""
        return self.count + len(self.added) >= self._most

    def start_copied_write(self, cookie: int, offset: int, data: memoryview, *, fua: bool) -> bool:
        """Write a copy of ``data``, which is a part of the receive buffer."""
        if self.full or not self._budget.take(charge_for_slow(len(data))):
            return False
        buffer = self._pool.take_for_slow(len(data))
        buffer.view[:] = data
        self.start_write(cookie, offset, buffer.view, buffer, fua=fua)
        return True

    def start_write(self, cookie: int, offset: int, data: memoryview, buffer: Buffer, *, fua: bool) -> None:
        """Write ``data``, which lies in ``buffer``; that is given back in the end."""
        assert not self.full

        async def work() -> Sequence[Part]:
            await self._handle.write(offset, data, fua=fua)
            return (done(cookie),)

        self._start(c.CMD_WRITE, cookie, work, buffer)

    def start_other(self, flags: int, command: int, cookie: int, offset: int, length: int) -> bool:
        """Start FLUSH, TRIM, WRITE_ZEROES or BLOCK_STATUS."""
        if self.full:
            return False
        if command == c.CMD_FLUSH:
            return self.start_flush(cookie)
        fua = bool(flags & c.CMD_FLAG_FUA)
        handle = self._handle

        async def work() -> Sequence[Part]:
            if command == c.CMD_TRIM:
                await handle.zero(offset, length, punch=True, fua=fua)
            elif command == c.CMD_WRITE_ZEROES:
                punch = not flags & c.CMD_FLAG_NO_HOLE
                await handle.zero(offset, length, punch=punch, fast=bool(flags & c.CMD_FLAG_FAST_ZERO), fua=fua)
            else:
                return await self._status(flags, cookie, offset, length)
            return (done(cookie),)

        charge = _STATUS_BYTES if command == c.CMD_BLOCK_STATUS else 0
        if charge and not self._budget.take(charge):
            return False
        self._start(command, cookie, work, None, charge)
        return True

    def start_flush(self, cookie: int) -> bool:
        """Start FLUSH."""
        if self.count + len(self.added) >= self._most:
            return False
        self.count += 1
        self._stats.in_flight += 1
        number = self._flush_number = self._flush_number + 1
        then = self._flushes[number] = partial(self._flushed, number, cookie, perf_counter())
        try:
            self._handle.start_flush(then)
        except Exception as error:
            asyncio.get_running_loop().call_soon(then, error)
        return True

    def _flushed(self, number: int, cookie: int, began_s: float, failure: BaseException | None) -> None:
        if self._flushes.pop(number, None) is None:
            return  # it was given up
        if failure is None:
            self._sink.slow_reply((done(cookie),), None, alone=self.count == 1)
        elif isinstance(failure, ShuttingDown | asyncio.CancelledError):
            self._sink.abandon("the volume is shutting down")
        else:
            self._sink.slow_reply((self._error(c.CMD_FLUSH, cookie, failure),), None, alone=self.count == 1)
        self._ended(c.CMD_FLUSH, began_s, 1, 0)
        if self._all_flushed is not None and not self._flushes:
            self._all_flushed.set_result(None)
            self._all_flushed = None

    async def _status(self, flags: int, cookie: int, offset: int, length: int) -> Sequence[Part]:
        # "the server MAY return less data than requested": ask for no more than one reply can describe, so that a
        # request over 4 GiB of single blocks, in many contexts, stays bounded; the client goes on where the reply ends.
        share = NBD_MAX_EXTENTS_PER_REPLY // len(self._contexts)
        length = min(length, self._handle.block_bytes * share)
        most = 1 if flags & c.CMD_FLAG_REQ_ONE else share
        chunks = []  # "MUST have exactly one status chunk per negotiated metadata context ID"
        for number, context in enumerate(self._contexts):
            descriptors = descriptors_of(await self._describe(context, offset, length), most=most)
            if not descriptors:
                raise ValueError(f"the volume described no extent of {context} at {offset}")
            last = number == len(self._contexts) - 1
            chunks.append(status_chunk(cookie, c.FIRST_CONTEXT_ID + number, descriptors, last=last))
        return chunks

    async def _describe(self, context: str, offset: int, length: int) -> Iterable[tuple[int, int]]:
        if context == BASE_ALLOCATION:
            return ((one.length_bytes, int(one.state)) for one in await self._handle.extents(offset, length))
        return await self._handle.block_status(context, offset, length)

    def _start(
        self,
        command: int,
        cookie: int,
        work: Callable[[], Awaitable[Sequence[Part]]],
        buffer: Buffer | None,
        charge: int = 0,
        requests: int = 1,
    ) -> None:
        self.count += requests
        self._stats.in_flight += requests
        task = self._tasks.start(self._run(command, cookie, work, buffer, charge, requests), c.COMMAND_NAMES[command])
        if command in _CHANGES:
            self._changing.add(task)
            task.add_done_callback(self._changing.discard)

    async def _run(
        self,
        command: int,
        cookie: int,
        work: Callable[[], Awaitable[Sequence[Part]]],
        buffer: Buffer | None,
        charge: int,
        requests: int,
    ) -> None:
        began_s = perf_counter()
        try:
            if not self._abandoned:  # what had not started when the client vanished is not started any more
                parts = await self._outcome(command, cookie, work)
                sent_from = None
                if command == c.CMD_READ:
                    sent_from, buffer = buffer, None
                self._sink.slow_reply(parts, sent_from, alone=self.count == requests)
        except ShuttingDown:
            # ESHUTDOWN would be an I/O error in the guest; a closed connection makes the client come back and re-send
            self._sink.abandon("the volume is shutting down")
        except asyncio.CancelledError:
            if buffer is not None:  # a thread may still use it: let it go, but not to the next request
                self._pool.write_off(buffer)
                charge, buffer = charge + buffer.charge_bytes, None
            raise
        finally:
            if buffer is not None:
                self._pool.give(buffer)
                charge += buffer.charge_bytes
            self._ended(command, began_s, requests, charge)

    def _ended(self, command: int, began_s: float, requests: int, charge: int) -> None:
        self.count -= requests
        self._stats.in_flight -= requests
        self._stats.latency[command].observe(perf_counter() - began_s, requests)
        self._budget.give(charge)
        self._sink.slow_done()

    async def _outcome(
        self, command: int, cookie: int, work: Callable[[], Awaitable[Sequence[Part]]]
    ) -> Sequence[Part]:
        try:
            return await work()
        except ShuttingDown:
            raise
        except Exception as error:
            return (self._error(command, cookie, error),)

    def _error(self, command: int, cookie: int, error: BaseException) -> bytes:
        if not isinstance(error, BlockvirtError | OSError):
            log.exception("nbd %s: %s failed unexpectedly", self._name, c.COMMAND_NAMES[command], exc_info=error)
        code, text = explain(error)
        self._stats.error(code)
        return self._replies.error(cookie, code, text)

    async def changes_done(self) -> None:
        """Return when the writes, trims and zeroings now in flight have ended."""
        if self._changing:
            await asyncio.wait(set(self._changing))

    def abandon(self) -> None:
        """Do not start what has not started."""
        self._abandoned = True
        for _, _, length in self.added:
            self._budget.give(charge_for_slow(length))
        self.added, self._added_bytes = [], 0

    async def finish(self) -> None:
        """Return when nothing is in flight."""
        await self._tasks.wait()
        if self._flushes:
            if self._all_flushed is None:
                self._all_flushed = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._all_flushed)

    async def cancel(self) -> None:
        """Give up on what is still in flight: at a shutdown whose time is over."""
        for then in list(self._flushes.values()):
            then(asyncio.CancelledError())
        await self._tasks.close()
        await self.finish()
