"""The sending side of a session: replies go out in one ``sendmsg``, and a client that does not read them costs little.

While output is pending the session reads no further requests, so what can pile up here is one batch and the slow
requests already started, both bounded by the budget. Fast reads fill the arena, slow ones bring their own buffer.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence

from blockvirt.nbd.budget import ConnectionBudget
from blockvirt.nbd.buffers import SMALL_BYTES, Buffer, BufferPool, charge_for

Part = bytes | memoryview
_NOTHING = memoryview(b"")
_IOV_MAX = 1024
"""What Linux takes in one sendmsg (UIO_MAXIOV)."""


class Outgoing:
    """Replies on their way out."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        pool: BufferPool,
        budget: ConnectionBudget,
        *,
        patience_s: float,
        on_drained: Callable[[], None],
        on_broken: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._fd = sock.fileno()
        self._sendmsg = sock.sendmsg
        self._pool = pool
        self._budget = budget
        self._patience_s = patience_s
        self._on_drained = on_drained
        self._on_broken = on_broken
        self._arena: Buffer | None = None
        self._late: list[Part] = []
        self._late_owed: list[Buffer] = []
        self._owed: list[Buffer] = []
        self._timer: asyncio.TimerHandle | None = None
        self._progress_s = 0.0
        self._closed = False
        self.pending: list[Part] = []
        """What the socket did not take yet."""
        self.arena = _NOTHING
        self.used = 0
        """Bytes of the arena that wait to be sent."""

    @property
    def busy(self) -> bool:
        """Whether replies are on their way."""
        return bool(self.pending or self._late)

    @property
    def charged(self) -> bool:
        """Whether an arena that counts in the budget is held with nothing in it."""
        return self._arena is not None and self._arena.charge_bytes > 0 and not self.used

    @property
    def pending_bytes(self) -> int:
        """How many reply bytes are held for the client."""
        return sum(map(len, self.pending)) + sum(map(len, self._late))

    def open_arena(self, length_bytes: int = SMALL_BYTES) -> bool:
        """Have an arena of at least ``length_bytes``. False: the budget is spent for now. Nothing may be in it."""
        assert self.used == 0
        if len(self.arena) < length_bytes:
            if self._arena is not None:
                self._drop_arena()
            if length_bytes > SMALL_BYTES and not self._budget.take(charge_for(length_bytes)):
                return False
            self._arena = self._pool.take(length_bytes)
            self.arena = self._arena.view
        return True

    def _drop_arena(self) -> None:
        arena = self._arena
        if arena is not None:
            self._arena, self.arena, self.used = None, _NOTHING, 0
            self._pool.give(arena)
            if arena.charge_bytes:
                self._budget.give(arena.charge_bytes)

    def detach_arena(self) -> Buffer:
        """Give the empty arena away, charge and all."""
        assert self._arena is not None
        assert not self.used
        given, self._arena = self._arena, None
        self.arena = _NOTHING
        return given

    def rest(self) -> None:
        """Give the arena back, if nothing of it is still to be sent."""
        if not self.pending:
            self._drop_arena()

    def send(self, parts: list[Part]) -> bool:
        """Send a batch of replies, or keep what the socket does not take. True if all of it went out."""
        if self._closed:
            return False
        if self.pending:
            self.pending.extend(parts)
            return False
        if self._push(parts):
            return True
        if not self._closed:
            self._loop.add_writer(self._fd, self._writable)
            self._progress_s = self._loop.time()
            self._timer = self._loop.call_later(self._patience_s, self._check_patience)
        return False

    def send_soon(self, parts: Sequence[Part], buffer: Buffer | None, *, alone: bool) -> None:
        """Send a slow request's reply: at once if it is ``alone``, else with others that this pass of the loop brings.

        ``buffer`` is what ``parts`` lies in: given back, and its charge with it, once it was sent. ``on_drained`` is
        not called for what is sent at once.
        """
        if self._closed:
            self._settle_debt([buffer] if buffer else [])
            return
        if alone and not self._late:
            if buffer is not None:
                self._owed.append(buffer)
            self.send(list(parts))
            return
        is_first = not self._late
        self._late.extend(parts)
        if buffer is not None:
            self._late_owed.append(buffer)
        if is_first:
            self._loop.call_soon(self._send_late)

    def _send_late(self) -> None:
        late, self._late = self._late, []
        self._owed += self._late_owed
        self._late_owed = []
        if late and self.send(late):
            self._on_drained()

    def _push(self, parts: list[Part]) -> bool:
        while parts:
            some = parts if len(parts) <= _IOV_MAX else parts[:_IOV_MAX]
            try:
                sent = self._sendmsg(some)
            except (BlockingIOError, InterruptedError):
                self.pending = parts
                return False
            except OSError as error:
                self._on_broken(f"sending failed: {error.strerror}")
                return False
            if sent != (sum(map(len, some)) if len(some) > 1 else len(some[0])):
                parts = _without(parts, sent)
            else:
                parts = [] if some is parts else parts[_IOV_MAX:]
            self._progress_s = 0.0
        self.pending = []
        self.used = 0
        if self._owed:
            self._settle_debt(self._owed)
            self._owed = []
        return True

    def _settle_debt(self, buffers: list[Buffer]) -> None:
        for buffer in buffers:
            self._pool.give(buffer)
            self._budget.give(buffer.charge_bytes)

    def _writable(self) -> None:
        if self._push(self.pending):
            self._stop_waiting()
            self._on_drained()
        elif self._progress_s == 0.0:
            self._progress_s = self._loop.time()

    def _stop_waiting(self) -> None:
        self._loop.remove_writer(self._fd)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_patience(self) -> None:
        left = self._progress_s + self._patience_s - self._loop.time()
        if left <= 0:
            self._timer = None
            self._on_broken(f"slow reader: took no reply bytes for {self._patience_s:g} s")
        else:
            self._timer = self._loop.call_later(left, self._check_patience)

    def close(self) -> None:
        """Discard what was not sent and give everything back; before the socket is closed."""
        if self._closed:
            return
        self._closed = True
        self._stop_waiting()
        self.pending = []
        self._late = []
        self._settle_debt(self._owed + self._late_owed)
        self._owed, self._late_owed = [], []
        self._drop_arena()


def _without(parts: list[Part], sent: int) -> list[Part]:
    """Return what is left of ``parts`` when ``sent`` bytes are gone."""
    for number, part in enumerate(parts):
        if sent < len(part):
            return [memoryview(part)[sent:], *parts[number + 1 :]]
        sent -= len(part)
    return []
