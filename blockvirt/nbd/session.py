"""One connection in the transmission phase: when it works, when it rests, and how it ends.

The session owns its non-blocking socket. In one turn it receives, works through every complete request in the buffer
(``dispatch``), settles once and replies with one ``sendmsg``; there is no task, future or copy per request unless the
volume cannot answer on the spot (``slow``). A turn ends after ``batch_requests`` requests or ``batch_s``, so that
neighbours get theirs.
"""

import asyncio
import logging
import socket
from collections.abc import Sequence
from time import perf_counter

from blockvirt.device import VolumeHandle
from blockvirt.nbd.budget import ConnectionBudget
from blockvirt.nbd.buffers import Buffer
from blockvirt.nbd.dispatch import Dispatcher
from blockvirt.nbd.handshake import Negotiated
from blockvirt.nbd.incoming import Incoming
from blockvirt.nbd.outgoing import Outgoing, Part
from blockvirt.nbd.shared import SharedResources
from blockvirt.nbd.slow import SlowLane
from blockvirt.nbd.stats import Traffic
from blockvirt.nbd.transmission import ExportView, SimpleReplies, StructuredReplies

log = logging.getLogger("blockvirt.nbd")

_ALONE_TURNS = 8
"""A session may spin, and rest with its buffers, once so many turns in a row, over all sessions, were its own."""
_COLD_TURNS = 16
"""Where spinning never paid, it is tried again every so many turns."""


class Session:
    """A client that has passed NBD_OPT_GO. It works from ``start`` until ``ended`` is done; then ``close`` it."""

    def __init__(
        self,
        session_id: str,
        sock: socket.socket,
        handle: VolumeHandle,
        negotiated: Negotiated,
        shared: SharedResources,
        leftover: bytes = b"",
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._fd = sock.fileno()
        self._handle = handle
        self._stats = shared.stats
        self._turns = shared.turns
        self._limits = limits = shared.limits
        self._budget = ConnectionBudget(shared.budget, limits.connection_budget_bytes, self._budget_free)
        self._incoming = Incoming(sock, shared.pool, self._budget, leftover)
        self._outgoing = Outgoing(
            self._loop,
            sock,
            shared.pool,
            self._budget,
            patience_s=limits.slow_reader_s,
            on_drained=self._wake,
            on_broken=self._broken,
        )
        replies = StructuredReplies() if negotiated.structured else SimpleReplies()
        self._slow = SlowLane(
            session_id,
            handle,
            replies,
            shared.pool,
            self._budget,
            shared.stats,
            self,
            contexts=negotiated.contexts,
            most=limits.inflight_requests,
        )
        capabilities = handle.capabilities
        self._dispatch = Dispatcher(
            session_id,
            handle,
            ExportView(
                handle.size_bytes,
                capabilities.read_only,
                capabilities.fast_zero,
                negotiated.structured,
                bool(negotiated.contexts),
            ),
            replies,
            self._incoming,
            self._outgoing,
            self._slow,
            shared.stats,
            finish=self._finish,
            abandon=self.abandon,
        )
        self._dispatch.backlog = bool(leftover)
        self._scheduled = False
        self._reading = False
        self._ending = ""
        self._over = False
        self._spins = limits.spins
        self._cold_turns = 0
        self._stall: asyncio.TimerHandle | None = None
        self._stalled_at = 0
        self.ended: asyncio.Future[str] = self._loop.create_future()
        """Done with the reason when the connection is closed; slow requests may still run."""

    @property
    def traffic(self) -> Traffic:
        """What this session has carried."""
        return self._dispatch.traffic

    @property
    def held_bytes(self) -> int:
        """Bytes of buffers that this session holds now, slow requests apart."""
        return self._incoming.held_bytes + len(self._outgoing.arena)

    @property
    def in_flight(self) -> int:
        """Slow requests that have not ended."""
        return self._slow.count

    def start(self) -> None:
        """Begin to serve."""
        self._handle.lost.add_done_callback(self._lost)
        self._wake()

    # --- when to work ----------------------------------------------------------------------------------------------

    def _may_read(self) -> bool:
        return not (self._ending or self._over or self._dispatch.starved or self._outgoing.pending)

    def _wake(self) -> None:
        """Output was sent, or a slow request ended: there may be room for what was refused it. See what can go on."""
        self._dispatch.starved = False
        if self._over:
            return
        if self._ending:
            self._end_if_done()
        elif self._may_read():
            if self._dispatch.backlog:
                self._schedule()
                self._watch(True)
            elif not self._reading:  # it has paused, perhaps with much in its hands
                self._rest(False)

    def _watch(self, wanted: bool) -> None:
        if wanted is not self._reading:
            self._reading = wanted
            if wanted:
                self._loop.add_reader(self._fd, self._readable)
            else:
                self._loop.remove_reader(self._fd)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._turns.wait(self)

    def scheduled_turn(self) -> None:
        """Have the turn that was waited for."""
        self._scheduled = False
        try:
            self._turn(perf_counter())
        except Exception as error:
            self._mistaken(error)

    def _readable(self) -> None:
        if self._scheduled:
            return
        now, turns = perf_counter(), self._turns
        if now > turns.pause_at_s and turns.must_wait(now):
            self._schedule()
            return
        try:
            self._turn(now)
        except Exception as error:
            self._mistaken(error)

    def _mistaken(self, error: Exception) -> None:
        # our own mistake: it may cost this connection, not the others
        log.error("nbd: a session failed", exc_info=error)
        self.abandon("internal error")

    def _budget_free(self) -> None:
        self._dispatch.starved = False
        if self._may_read():
            self._schedule()
        else:
            self._budget.stop_waiting()

    def _turn(self, now: float) -> None:
        """Serve what has arrived, up to one batch."""
        if not self._may_read():  # a slow reply that the socket did not take may have come while the reader was on
            self._pause()
            return
        dispatch, limits = self._dispatch, self._limits
        may_spin = self._may_spin()
        looks = self._spins if may_spin else 0
        left, deadline = limits.batch_requests, now + limits.batch_s
        while True:
            if not dispatch.backlog and not self._receive():
                if self._over:
                    return
                if looks > 0 and perf_counter() < deadline:
                    looks -= 1
                    continue
                if looks > 0 and left < limits.batch_requests:  # the time was up before the looks were in vain
                    self._schedule()
                else:
                    self._rest(may_spin)
                return
            if may_spin:
                if looks < self._spins:  # looking again paid
                    self._spins = limits.spins
                looks = self._spins
                now = perf_counter()
            left -= dispatch.serve(left)
            self._turns.last_s = finished = perf_counter()
            dispatch.observe(finished - now)
            if self._budget.waits and not dispatch.refused:
                self._budget.stop_waiting()  # what it was to be for needed none: the page cache has it now
            if not self._may_read():
                self._pause()
                return
            if left <= 0 or finished > deadline:
                self._schedule()  # not only for what is left in the buffer: the socket may hold more
                return
            if self._stats.in_flight:  # what this turn started waits for the loop, its reply for a thread
                looks, may_spin = 0, False
            # uvloop calls the reader only once after a reset, perhaps for this turn. So nobody rests before a look in
            # vain; or after one that brought less than it could and a reply since, which no socket takes after a reset.
            if not may_spin and dispatch.replied and self._incoming.emptied and not dispatch.backlog:
                self._rest(False)
                return
            now = finished

    def _may_spin(self) -> bool:
        """Spin only while nobody else has had a turn lately and no thread's result is due."""
        turns = self._turns
        if turns.last is not self:
            if turns.last is not None and turns.in_a_row >= _ALONE_TURNS:
                turns.last.give_back()
            turns.last, turns.in_a_row = self, 0
            return False
        turns.in_a_row += 1
        return turns.in_a_row >= _ALONE_TURNS and not self._stats.in_flight

    def _rest(self, spun: bool) -> None:
        """Wait for the client to send more."""
        if spun:  # in vain: look half as often next time
            self._spins >>= 1
            if not self._spins:
                self._cold_turns += 1
                if self._cold_turns >= _COLD_TURNS:
                    self._cold_turns, self._spins = 0, self._limits.spins
        turns = self._turns
        if (
            turns.last is not self
            or turns.in_a_row < _ALONE_TURNS
            or not self._incoming.is_small
            or self._outgoing.charged
        ):
            self.give_back()
            if self._incoming.charged:
                self._watch_stall()
        if not self._reading:
            self._watch(True)

    def give_back(self) -> None:
        """See TurnTaker."""
        self._incoming.park()
        self._outgoing.rest()

    def _pause(self) -> None:
        """Stop reading until output is sent, a slow request ends, or there is budget again."""
        if self._outgoing.pending or not self._dispatch.starved:
            self._budget.stop_waiting()  # nobody shall wait behind who could not take
        if not self._over:
            self._watch(False)
            self._end_if_done()

    def _receive(self) -> bool:
        try:
            received = self._incoming.receive()
        except OSError as error:
            self.abandon(f"receiving failed: {error.strerror}")
            return False
        if received < 0:
            self.abandon("the client closed the connection")
            return False
        return received > 0

    def _watch_stall(self) -> None:
        """A client may not hold a charged buffer for ever with half a request in it."""
        if self._stall is None:
            self._stalled_at = self._incoming.total_bytes
            self._stall = self._loop.call_later(self._limits.slow_reader_s, self._check_stall)

    def _check_stall(self) -> None:
        self._stall = None
        if self._over or not self._incoming.charged:
            return
        if self._incoming.total_bytes == self._stalled_at and self._may_read():
            self._broken(f"slow writer: sent no byte of a request's payload for {self._limits.slow_reader_s:g} s")
        else:
            self._watch_stall()

    # --- what slow requests call -----------------------------------------------------------------------------------

    def slow_reply(self, parts: Sequence[Part], buffer: Buffer | None, *, alone: bool) -> None:
        """See ReplySink."""
        self._outgoing.send_soon(parts, buffer, alone=alone)

    def slow_done(self) -> None:
        """A slow request has ended: perhaps another can start, or the session can end."""
        self._wake()

    # --- the end ---------------------------------------------------------------------------------------------------

    def _lost(self, _lost: "asyncio.Future[None]") -> None:
        # EIO would make a guest remount read-only; a closed connection makes it come back
        self.abandon("the volume was fenced, moved or dropped")

    def _broken(self, reason: str) -> None:
        if reason.startswith("slow"):
            self._stats.stalled_clients_dropped_total += 1
        self.abandon(reason)

    def _finish(self, reason: str) -> None:
        self._ending = reason
        self._dispatch.backlog = False

    def _end_if_done(self) -> None:
        if self._ending and not self._slow.count and not self._outgoing.busy:
            self.abandon(self._ending)

    def drain(self, reason: str) -> None:
        """Read no more requests, answer those that have started, then close the connection."""
        if not self._over and not self._ending:
            self._finish(reason)
            self._watch(False)
            self._end_if_done()

    def abandon(self, reason: str) -> None:
        """Close the connection now, without a reply to anything. What has started goes on until its end."""
        if self._over:
            return
        self._over = True
        self._watch(False)
        self._handle.lost.remove_done_callback(self._lost)
        self._slow.abandon()
        self._dispatch.close()
        self._outgoing.close()
        self._incoming.close()
        self._budget.stop_waiting()
        if self._stall is not None:
            self._stall.cancel()
        self._sock.close()
        self.ended.set_result(reason)

    async def changes_done(self) -> None:
        """Return when the writes that have started have ended: no later session may pass NBD_OPT_GO before that."""
        await self._slow.changes_done()

    async def close(self) -> None:
        """Wait for what is in flight, then close the volume handle. The connection must have ended."""
        assert self._over
        await self._slow.finish()
        await self._handle.close()

    async def cancel(self) -> None:
        """Give up on what is in flight, so that ``close`` can end: when a shutdown has run out of time."""
        self.abandon("the shutdown ran out of time")
        await self._slow.cancel()
