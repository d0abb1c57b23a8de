"""Bounds on the bytes in flight: per connection, and over all connections (I9). Pure.

``NBD_CONNECTION_BUDGET_BYTES`` and ``NBD_GLOBAL_BUDGET_BYTES`` cover what requests hold: buffers for large payloads and
replies, and what slow requests keep. The one small buffer in each direction that a busy connection holds
(``buffers.SMALL_BYTES``) is outside of it, so that a spent budget never keeps a small request from being served.
"""

from collections.abc import Callable, Hashable


class Budget:
    """A number of bytes shared by many, first come first served: who was refused is called when it is their turn."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._waiting: dict[Hashable, Callable[[], None]] = {}
        self._waking = False

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._waiting)

    def take(self, owner: Hashable, amount_bytes: int, when_free: Callable[[], None]) -> bool:
        """Take ``amount_bytes``; if they are not there, or others wait, return False and call ``when_free`` later.

        A request is never refused when nothing is in use, however large it is. ``when_free`` tells its owner to try
        again: it must then take, or ``forget``.
        """
        first = next(iter(self._waiting), owner)
        fits = self.used_bytes == 0 or self.used_bytes + amount_bytes <= self.limit_bytes
        if first != owner or not fits:
            self._waiting.setdefault(owner, when_free)
            return False
        self._waiting.pop(owner, None)
        self.used_bytes += amount_bytes
        self._wake()
        return True

    def give(self, amount_bytes: int) -> None:
        """Return bytes taken before."""
        assert 0 <= amount_bytes <= self.used_bytes, "more given back than was taken"
        self.used_bytes -= amount_bytes
        self._wake()

    def forget(self, owner: Hashable) -> None:
        """Stop waiting. No harm if ``owner`` does not wait."""
        if self._waiting.pop(owner, None) is not None:
            self._wake()

    def _wake(self) -> None:
        """Call the first who waits; where that one leaves at once, the next. In a loop: hundreds may leave."""
        if self._waking:
            return
        self._waking = True
        try:
            while self._waiting and self.used_bytes < self.limit_bytes:
                first, when_free = next(iter(self._waiting.items()))
                when_free()
                if next(iter(self._waiting), None) is first:
                    return
        finally:
            self._waking = False


class ConnectionBudget:
    """One connection's share: bounded by its own limit and by the global budget."""

    def __init__(self, total: Budget, limit_bytes: int, when_free: Callable[[], None]) -> None:
        self._total = total
        self._limit_bytes = limit_bytes
        self._when_free = when_free
        self.used_bytes = 0
        self.waits = False
        """It stands in the queue for the global budget, and others behind it."""

    def take(self, amount_bytes: int) -> bool:
        """Take bytes for one more request in flight. False: ``when_free`` is called, or something is given back here.

        Refused at the connection's own limit only while the connection has something in flight, whose end comes
        with a ``give``; so one request of the largest size always gets through.
        """
        if not amount_bytes:
            return True
        if self.used_bytes and self.used_bytes + amount_bytes > self._limit_bytes:
            self.stop_waiting()  # not to stand first in a queue without being able to take
            return False
        self.waits = not self._total.take(self, amount_bytes, self._when_free)
        if self.waits:
            return False
        self.used_bytes += amount_bytes
        return True

    def give(self, amount_bytes: int) -> None:
        """Return bytes taken before."""
        assert amount_bytes <= self.used_bytes, "more given back than was taken"
        if amount_bytes:
            self.used_bytes -= amount_bytes
            self._total.give(amount_bytes)

    def stop_waiting(self) -> None:
        """Leave the queue for the global budget: who is unable to take or needs nothing any more, and at the end."""
        self.waits = False
        self._total.forget(self)
