"""Requests to the API without a pause, from a process of their own: no load of ours keeps them waiting."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path

from benchmarks.scale.load import Window
from blockvirt.cli.client import Client

Ask = Callable[[Client], None]


def shows(state: Path, volume: str, window: Window) -> list[float]:
    """Seconds of each `GET /v1/volumes/VOLUME` in the window."""
    return _timed(state, cycle([lambda client: client.call("GET", f"/v1/volumes/{volume}")]), window)


def changes(state: Path, host: str, window: Window) -> list[float]:
    """Seconds of each `POST /v1/hosts` and of the `DELETE` that takes it back."""
    steps: list[Callable[[Client], object]] = [
        lambda client: client.call("POST", "/v1/hosts", {"name": host}),
        lambda client: client.call("DELETE", f"/v1/hosts/{host}"),
    ]
    return _timed(state, cycle(steps), window)


def _timed(state: Path, steps: Iterator[Callable[[Client], object]], window: Window) -> list[float]:
    client = Client(str(state))
    seconds = []
    try:
        time.sleep(max(0.0, window.begins_s - time.monotonic()))
        while (began_s := time.monotonic()) < window.ends_s:
            next(steps)(client)
            seconds.append(time.monotonic() - began_s)
    finally:
        client.close()
    return seconds


@contextmanager
def askers() -> Iterator["Askers"]:
    """Two processes that are ready to ask."""
    with get_context("spawn").Pool(2) as pool:
        pool.map(time.sleep, [0.2, 0.2], chunksize=1)  # both have started and imported
        yield Askers(pool)


class Askers:
    """One that looks and one that changes something."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def begin(self, state: Path, volume: str, window: Window) -> "tuple[AsyncResult[list[float]], ...]":
        """Have both ask in a window; their results are of ``shows`` and ``changes``."""
        return (
            self._pool.apply_async(shows, (state, volume, window)),
            self._pool.apply_async(changes, (state, "asked", window)),
        )
