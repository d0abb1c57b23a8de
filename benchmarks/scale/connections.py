"""Memory of a daemon with many idle NBD connections: as they are after NBD_OPT_GO, and again after some use."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import resident_bytes
from benchmarks.scale.figures import Figure, below
from benchmarks.snapshots.daemon import Daemon
from benchmarks.snapshots.ground import MIB, say
from blockvirt.nbd.client import NbdClient

LIMIT_MIB = 100
VOLUME_BYTES = 1 << 30
REQUEST_BYTES = 64 << 10
REST_S = 12.0  # the daemon gives buffers back that were not used for ten


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of it."""

    connections: int
    volumes: tuple[int, ...]
    """One figure each; the connections are spread evenly over them."""


FULL, QUICK = Sizes(1_000, (10, 1_000)), Sizes(50, (5, 50))


@dataclass(frozen=True, slots=True)
class Resident:
    """Resident bytes of the daemon."""

    base: int
    """One connection was there, which read a block, and is gone."""
    opened: int
    used: int
    """Each connection has written and read once, and rests."""


def measure(directory: Path, quick: bool) -> list[Figure]:
    """Open them over few volumes, then over a volume for each."""
    sizes = QUICK if quick else FULL
    figures = []
    directory.mkdir()
    for volumes in sizes.volumes:
        daemon = Daemon(directory / f"of-{volumes}")
        daemon.start()
        try:
            daemon.trust_sparse_files()
            for number in range(volumes):
                daemon.create(f"v{number}", VOLUME_BYTES)
            found = asyncio.run(_open(daemon, sizes.connections, volumes))
        finally:
            daemon.stop()
        title = f"daemon with {sizes.connections:,} idle connections to {volumes:,} volumes"
        each_kib = (found.opened - found.base) / sizes.connections / 1024
        used_kib = (found.used - found.base) / sizes.connections / 1024
        opened_note = f"{found.base / MIB:.1f} MiB without; {each_kib:.1f} KiB each"
        figures.append(Figure(title, found.opened / MIB, "MiB", below(LIMIT_MIB), opened_note))
        used_title = f"the same, {REQUEST_BYTES >> 10} KiB written and read on each before"
        figures.append(Figure(used_title, found.used / MIB, "MiB", below(LIMIT_MIB), f"{used_kib:.1f} KiB each"))
    return figures


async def _open(daemon: Daemon, connections: int, volumes: int) -> Resident:
    path = str(daemon.state / "nbd.sock")
    async with await NbdClient.connect_unix(path) as first:
        await first.go("v0")
        await first.read(0, REQUEST_BYTES)
    base = resident_bytes(daemon.pid)
    say(f"opening {connections:,} connections to {volumes:,} volumes")
    async with AsyncExitStack() as stack:
        clients = []
        for number in range(connections):
            client = await NbdClient.connect_unix(path)
            stack.push_async_callback(client.close)
            await client.go(f"v{number % volumes}")
            clients.append(client)
        opened = resident_bytes(daemon.pid)
        for client in clients:
            await client.write(0, b"\1" * REQUEST_BYTES)
            await client.read(0, REQUEST_BYTES)
        await asyncio.sleep(REST_S)
        return Resident(base, opened, resident_bytes(daemon.pid))
