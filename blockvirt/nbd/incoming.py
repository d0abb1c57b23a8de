"""The receiving side of a session: where request bytes lie, and how much room they get.

Requests are parsed where they were received. A request whose payload does not fit gets a larger buffer, charged to the
budget before any of its payload is read; into such a buffer no more is received than that request's own bytes, so that
it can be given away whole, and nobody waits for memory while holding much of it.
"""

import socket

from blockvirt.nbd import constants as c
from blockvirt.nbd.budget import ConnectionBudget
from blockvirt.nbd.buffers import SMALL_BYTES, Buffer, BufferPool, charge_for
from blockvirt.nbd.messages import REQUEST
from blockvirt.units import KIB

_NOTHING = memoryview(b"")
_HEADER_BYTES = REQUEST.size
_TYPE_AT = 7
"""Where the low byte of a request's type lies ("Request message": magic 4, flags 2, type 2)."""
_PARKED_BYTES = 16 * KIB
"""A partial request up to this size is copied out when the connection rests, and the buffer given back."""
_REMEMBER_TURNS = 64
"""For so many turns after a large request the next one finds a large buffer ready (saves a copy)."""


class Incoming:
    """Bytes received and not yet worked on: ``view[low:high]``."""

    def __init__(self, sock: socket.socket, pool: BufferPool, budget: ConnectionBudget, leftover: bytes) -> None:
        self._recv_into = sock.recv_into
        self._pool = pool
        self._budget = budget
        self._buffer: Buffer | None = None
        self._parked = leftover
        self._limit = 0
        self._expected_bytes = 0
        self._expected_turns = 0
        self.view = _NOTHING
        self.low = 0
        self.high = 0
        self.total_bytes = 0
        """Bytes received since the beginning."""
        self.skip_bytes = 0
        """Payload bytes of a refused write that are still to be thrown away."""
        self.emptied = False
        """The last ``receive`` found less than there was room for."""

    @property
    def held_bytes(self) -> int:
        """Bytes of buffer held."""
        return self._buffer.capacity_bytes if self._buffer else len(self._parked)

    @property
    def charged(self) -> bool:
        """Whether the buffer counts in the budget."""
        return self._buffer is not None and self._buffer.charge_bytes > 0

    @property
    def is_small(self) -> bool:
        """Whether a small buffer is held, and will do for what is expected."""
        return self._buffer is not None and not self._buffer.charge_bytes and not self._expected_turns

    def receive(self) -> int:
        """Receive what is there. Returns its size; 0 if nothing is there, -1 at the end. Raises OSError."""
        if self._buffer is None:
            self.unpark()
        elif self.low == self.high:
            self.low = self.high = 0
            self._limit = SMALL_BYTES
        assert self.high < self._limit, "no room to receive: expect() was not asked for it"
        begin, limit = self.high, self._limit
        self.emptied = True
        try:
            received = self._recv_into(self.view[begin:limit])
            if received == 0:
                return -1
            self.high += received
            if received == _HEADER_BYTES and self.view[begin + _TYPE_AT] == c.CMD_WRITE:
                # Clients send the payload by itself, a microsecond later: one more look is less than a pass in vain.
                self.high += self._recv_into(self.view[self.high : limit])
            self.emptied = self.high < limit
        except BlockingIOError:
            pass  # nothing was there, or no payload yet
        received = self.high - begin
        self.total_bytes += received
        return received

    def unpark(self) -> None:
        """Take a buffer, if there is none, and put back what was parked."""
        if self._buffer is not None:
            return
        size = SMALL_BYTES
        if self._expected_turns:
            self._expected_turns -= 1
            if self._budget.take(charge_for(self._expected_bytes)):
                size = self._expected_bytes
            else:
                self._budget.stop_waiting()  # it would only have saved a copy
        parked = self._parked
        if parked:
            self._hold(max(size, len(parked)))
            self._put(parked)
            self._parked = b""
        else:
            self._hold(size)

    def _hold(self, size_bytes: int) -> None:
        self._buffer = buffer = self._pool.take(size_bytes)
        self.view, self.low, self.high, self._limit = buffer.view, 0, 0, SMALL_BYTES

    def _put(self, content: bytes | memoryview) -> None:
        """Have ``content`` at the beginning of a buffer that was empty."""
        self.high = len(content)
        self.view[: self.high] = content

    def expect(self, need_bytes: int) -> bool:
        """Make room for the request at ``low``, which has ``need_bytes`` in all. False: the budget is spent for now."""
        assert self._buffer is not None
        capacity = self._buffer.capacity_bytes
        if need_bytes > SMALL_BYTES:
            self._expected_bytes, self._expected_turns = need_bytes, _REMEMBER_TURNS
        if need_bytes > capacity and not self._grow(need_bytes):
            return False
        if self.low + need_bytes > self._buffer.capacity_bytes:
            kept = self.high - self.low
            self.view[:kept] = self.view[self.low : self.high]
            self.low, self.high = 0, kept
        self._limit = self.low + need_bytes if self._buffer.charge_bytes else SMALL_BYTES
        return True

    def _grow(self, need_bytes: int) -> bool:
        if not self._budget.take(charge_for(need_bytes)):
            return False
        kept = self.view[self.low : self.high]
        self._drop_buffer()  # its content is there until somebody else takes it
        self._hold(need_bytes)
        self._put(kept)
        return True

    def detach(self, request_bytes: int) -> Buffer | None:
        """Give away the buffer with the complete request at ``low``, charge and all; None if it is small: copy it."""
        if request_bytes <= SMALL_BYTES:
            return None
        given, self._buffer = self._buffer, None
        assert given is not None
        assert given.charge_bytes, "a large request in a small buffer"
        assert self.high - self.low == request_bytes, "a charged buffer received more than its request"
        self._hold(SMALL_BYTES)
        return given

    def park(self) -> None:
        """Rest: give the buffer back unless it holds much of an unfinished request."""
        kept = self.high - self.low
        buffer = self._buffer
        if buffer is None or kept > _PARKED_BYTES:
            return
        if kept or buffer.charge_bytes:
            self._parked = bytes(self.view[self.low : self.high])
            self._drop_buffer()
        else:  # after nearly every turn
            self._buffer, self.view, self.low, self.high = None, _NOTHING, 0, 0
            self._pool.give(buffer)

    def shrink(self) -> bool:
        """Exchange a charged buffer for a small one where what it holds fits: before waiting for more of the budget."""
        if not self.charged or self.high - self.low > SMALL_BYTES:
            return False
        kept = bytes(self.view[self.low : self.high])
        self._drop_buffer()
        self._hold(SMALL_BYTES)
        self._put(kept)
        return True

    def close(self) -> None:
        """Give everything back."""
        self._parked = b""
        self._drop_buffer()

    def _drop_buffer(self) -> None:
        buffer = self._buffer
        if buffer is not None:
            self._buffer, self.view, self.low, self.high = None, _NOTHING, 0, 0
            self._pool.give(buffer)
            if buffer.charge_bytes:
                self._budget.give(buffer.charge_bytes)
