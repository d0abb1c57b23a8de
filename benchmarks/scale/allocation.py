"""Volumes allocated over HTTP on connections that are kept: as many as can be, and at a steady rate.

At the steady rate a request counts from when it was due, so one that is slow also costs those that wait behind it.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.scale.figures import Figure, at_least, below
from benchmarks.snapshots.daemon import Daemon
from benchmarks.snapshots.ground import say
from benchmarks.snapshots.tables import percentile
from blockvirt.cli.client import Client

LEAST_RATE = 200
LIMIT_MS = 10
STEADY_CONNECTIONS = 4
VOLUME_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of it."""

    volumes: int
    """For each figure."""
    connections: tuple[int, ...]


FULL, QUICK = Sizes(2_000, (1, 8)), Sizes(100, (1, 2))


@dataclass(frozen=True, slots=True)
class Allocated:
    """What came of a number of requests."""

    rate: float
    """Volumes a second."""
    seconds: list[float]
    """Of each request."""

    def milliseconds(self, percent: float) -> float:
        """A percentile of the requests."""
        return percentile(self.seconds, percent) * 1e3


def measure(directory: Path, quick: bool) -> list[Figure]:
    """As fast as it goes over some connections, then LEAST_RATE a second."""
    sizes = QUICK if quick else FULL
    daemon = Daemon(directory)
    daemon.start()
    figures = []
    try:
        daemon.trust_sparse_files()
        for connections in sizes.connections:
            say(f"allocating {sizes.volumes:,} volumes, {connections} at a time")
            found = allocate(daemon.state, f"of{connections}", sizes.volumes, connections)
            title = f"volumes allocated over {connections} connection{'s' if connections > 1 else ''}"
            note = f"each p50 {found.milliseconds(50):.1f} ms, p99 {found.milliseconds(99):.1f}"
            figures.append(Figure(title, found.rate, "a second", at_least(LEAST_RATE), note, 0))
        say(f"allocating {sizes.volumes:,} volumes, {LEAST_RATE} a second")
        found = allocate(daemon.state, "steady", sizes.volumes, STEADY_CONNECTIONS, LEAST_RATE)
    finally:
        daemon.stop()
    title = f"`POST /v1/volumes` at {LEAST_RATE} a second over {STEADY_CONNECTIONS} connections, p50"
    p99_ms, most_ms = found.milliseconds(99), found.milliseconds(100)
    note = f"p99 {p99_ms:.1f}, longest {most_ms:.1f}; {found.rate:.0f} a second were reached"
    return [*figures, Figure(title, found.milliseconds(50), "ms", below(LIMIT_MS), note)]


def allocate(state: Path, prefix: str, volumes: int, connections: int, rate: float = 0.0) -> Allocated:
    """Allocate so many volumes, each connection asking when the answer before is there, and not before it is due.

    ``rate`` is how many are due a second; 0: all of them at once, and a request counts from when it is made.
    """
    clients = [Client(str(state)) for _ in range(connections)]
    for client in clients:
        client.call("GET", "/v1/pool")  # connected from now on
    start_s = time.perf_counter()

    def work(first: int) -> list[float]:
        seconds = []
        for number in range(first, volumes, connections):
            began_s = time.perf_counter()
            if rate:
                due_s = start_s + number / rate
                time.sleep(max(0.0, due_s - began_s))
                began_s = due_s
            clients[first].call("POST", "/v1/volumes", {"name": f"{prefix}-{number}", "size": VOLUME_BYTES})
            seconds.append(time.perf_counter() - began_s)
        return seconds

    with ThreadPoolExecutor(connections) as threads:
        each = list(threads.map(work, range(connections)))
    took_s = time.perf_counter() - start_s
    for client in clients:
        client.close()
    return Allocated(volumes / took_s, [second for seconds in each for second in seconds])
