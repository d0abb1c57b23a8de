"""Volumes allocated one after the other over HTTP, on one kept connection and on several."""

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
VOLUME_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of it."""

    volumes: int
    """For each figure."""
    clients: tuple[int, ...]


FULL, QUICK = Sizes(2_000, (1, 2, 8)), Sizes(100, (1, 2))


def measure(directory: Path, quick: bool) -> list[Figure]:
    """As many clients as each figure has, each asking for its next volume once it has the last."""
    sizes = QUICK if quick else FULL
    daemon = Daemon(directory)
    daemon.start()
    figures = []
    try:
        daemon.trust_sparse_files()
        for clients in sizes.clients:
            say(f"allocating {sizes.volumes:,} volumes, {clients} at a time")
            took_s, seconds = _allocate(daemon.state, sizes.volumes, clients)
            on = "one connection" if clients == 1 else f"{clients} connections"
            rate = len(seconds) / took_s
            p50_ms, p99_ms, most_ms = (percentile(seconds, percent) * 1e3 for percent in (50, 99, 100))
            figures.append(Figure(f"volumes allocated over {on}", rate, "a second", at_least(LEAST_RATE), digits=0))
            note = f"p99 {p99_ms:.1f}, longest {most_ms:.1f}"
            figures.append(Figure(f"`POST /v1/volumes` over {on}, p50", p50_ms, "ms", below(LIMIT_MS), note))
    finally:
        daemon.stop()
    return figures


def _allocate(state: Path, volumes: int, connections: int) -> tuple[float, list[float]]:
    """Seconds of all of it, and of each request."""
    clients = [Client(str(state)) for _ in range(connections)]
    for client in clients:
        client.call("GET", "/v1/pool")  # connected from now on

    def work(first: int) -> list[float]:
        seconds = []
        for number in range(first, volumes, connections):
            began_s = time.perf_counter()
            body = {"name": f"of{connections}-{number}", "size": VOLUME_BYTES}
            clients[first].call("POST", "/v1/volumes", body)
            seconds.append(time.perf_counter() - began_s)
        return seconds

    with ThreadPoolExecutor(connections) as threads:
        began_s = time.perf_counter()
        each = list(threads.map(work, range(connections)))
        took_s = time.perf_counter() - began_s
    for client in clients:
        client.close()
    return took_s, [second for seconds in each for second in seconds]
