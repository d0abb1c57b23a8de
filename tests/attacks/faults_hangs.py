"""How long things took: a step, and what kept the event loop from everything else."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

HANG_S = 5.0
_BEAT_S = 0.05


@contextmanager
def timed(what: str, problems: list[str]) -> Iterator[None]:
    """Have a step that took too long be a problem, whatever came of it: a timeout does not see a loop that is stuck."""
    began_s = time.monotonic()
    try:
        yield
    finally:
        took_s = time.monotonic() - began_s
        if took_s > HANG_S:
            problems.append(f"{what} took {took_s:.1f} s")


@contextmanager
def heartbeat(problems: list[str]) -> Iterator[None]:
    """Have it be a problem when the running event loop does nothing else for too long, also between steps."""
    heart = _Heart()
    beating = asyncio.get_running_loop().create_task(heart.beat())
    try:
        yield
    finally:
        beating.cancel()
        heart.note()
        if heart.longest_s > HANG_S:
            problems.append(f"the event loop stood still for {heart.longest_s:.1f} s")


class _Heart:
    def __init__(self) -> None:
        self.longest_s = 0.0
        self._last_s = time.monotonic()

    async def beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            self.note()

    def note(self) -> None:
        now_s = time.monotonic()
        self.longest_s = max(self.longest_s, now_s - self._last_s)
        self._last_s = now_s
