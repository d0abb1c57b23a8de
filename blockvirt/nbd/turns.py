"""When sessions work: together they hold the event loop for some milliseconds, then everybody else has a look in.

A pass of the loop calls every session whose client has sent something. With hundreds of busy ones that takes many
milliseconds, and whatever needs several passes, such as an answer of the API, would wait for all of them each time.
"""

import asyncio
from collections import deque
from time import perf_counter
from typing import Protocol

from blockvirt.limits import NBD_PASS_S

_GAP_S = 1e-3
"""A turn that begins so long after the end of the last one kept the loop from nothing."""


class TurnTaker(Protocol):
    """A session, as ``Turns`` sees it."""

    def scheduled_turn(self) -> None:
        """Work now. Raises nothing."""

    def give_back(self) -> None:
        """Hold no buffers that are not needed: others are at work."""


class Turns:
    """Who had the last turns and who waits for the next. ``Session`` keeps it up to date: it is in the hot path."""

    def __init__(self, pass_s: float = NBD_PASS_S) -> None:
        self.pass_s = pass_s
        """How long all sessions together may go on in one pass, give or take a turn."""
        self.pause_at_s = 0.0
        """A turn that begins later than this must ask ``must_wait``."""
        self.last_s = 0.0
        """When requests were last answered."""
        self.last: TurnTaker | None = None
        """Whose turn was the last. If it is alone it may rest with its buffers: until somebody else has a turn."""
        self.in_a_row = 0
        """How many before it were the same session's: decides whether spinning would take time from somebody."""
        self._waiting: deque[TurnTaker] = deque()
        self._called = False

    def must_wait(self, now_s: float) -> bool:
        """Whether a turn that begins at ``now_s``, later than ``pause_at_s``, has to ``wait`` for the next pass."""
        if self._waiting or now_s - self.last_s < _GAP_S:
            return True
        self.pause_at_s = now_s + self.pass_s
        return False

    def wait(self, session: TurnTaker) -> None:
        """Have ``session`` take a turn in the next pass, or in a later one if there is no time in that."""
        self._waiting.append(session)
        self._call()

    def _call(self) -> None:
        if not self._called:
            self._called = True
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        self._called = False
        self.pause_at_s = perf_counter() + self.pass_s
        try:
            for _ in range(len(self._waiting)):  # who waits again meanwhile waits for the next pass
                self._waiting.popleft().scheduled_turn()
                if perf_counter() > self.pause_at_s:
                    break
        finally:
            if self._waiting:
                self._call()
