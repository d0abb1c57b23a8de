"""A server over memory disks, on real sockets."""

import asyncio
import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blockvirt.nbd import constants as c
from blockvirt.nbd.client import NbdClient
from blockvirt.nbd.messages import CLIENT_FLAGS, GREETING, REQUEST
from blockvirt.nbd.server import NbdServer
from blockvirt.nbd.session import Session
from blockvirt.nbd.shared import SharedResources
from blockvirt.testing.memory_volume import MemoryDisk, MemoryExports
from blockvirt.units import MIB

PATIENCE_S = 20.0
"""How long a test waits for what must happen; never a measure of speed."""
both_paths = pytest.mark.parametrize("now", [True, False], ids=["now", "slow"])
both_kinds = pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes that are the same for the same seed."""
    return random.Random(seed).randbytes(size)


@dataclass
class Bench:
    """A running server, its disks, and ways to talk to it."""

    server: NbdServer
    exports: MemoryExports
    shared: SharedResources
    path: str
    address: tuple[str, int]
    clients: list[NbdClient] = field(default_factory=list)

    @property
    def disk(self) -> MemoryDisk:
        """The disk of the export "v"."""
        return self.exports.disks["v"]

    def uri(self, export: str = "v") -> str:
        """The NBD URI over the unix socket."""
        return f"nbd+unix:///{export}?socket={self.path}"

    async def connect(self) -> NbdClient:
        """A client that has exchanged flags."""
        client = await NbdClient.connect_unix(self.path)
        self.clients.append(client)
        return client

    async def enter(self, *, structured: bool = True, export: str = "v") -> NbdClient:
        """A client in transmission; with structured replies it has base:allocation too."""
        client = await self.connect()
        if structured:
            await client.ask_structured()
            assert await client.ask_allocation(export)
        await client.go(export)
        return client

    async def raw(self, *, flags: int = c.CLIENT_FIXED_NEWSTYLE | c.CLIENT_NO_ZEROES) -> "RawConnection":
        """A bare connection that has exchanged flags."""
        connection = RawConnection(*await asyncio.open_unix_connection(self.path))
        assert len(await connection.exactly(GREETING.size)) == GREETING.size
        connection.send(CLIENT_FLAGS.pack(flags))
        return connection

    async def session_ended(self) -> None:
        """Wait until no connection is left, handles closed."""
        async with asyncio.timeout(PATIENCE_S):
            await self.server.all_closed()


@dataclass
class RawConnection:
    """Bytes to and from a server."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)

    async def exactly(self, size: int) -> bytes:
        """Receive so many bytes."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.readexactly(size)

    async def rest(self) -> bytes:
        """Receive until the server closes: b"" if it sends nothing more. A reset counts as a close."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    async def close(self) -> None:
        """Close the connection."""
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            pass


def sessions(bench: Bench) -> list[Session]:
    """The server's sessions, oldest first."""
    return [one.session for one in bench.server._connections.values() if one.session is not None]


async def until_starved(session: Session) -> None:
    """Return when the session has stopped reading requests."""
    async with asyncio.timeout(PATIENCE_S):
        while session._may_read():  # noqa: ASYNC110 - the loop must run, and nothing announces it
            await asyncio.sleep(0)


def read_request(cookie: int, length: int, offset: int = 0) -> bytes:
    """A request as bytes."""
    return REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_READ, cookie, offset, length)


@pytest.fixture
def shared() -> SharedResources:
    """The server's resources; a test may change limits before it connects."""
    return SharedResources()


@pytest.fixture
async def bench(short_tmp_path: Path, shared: SharedResources) -> AsyncGenerator[Bench]:
    """A server with the export "v" of 64 MiB; at the end nothing is lent, held, unsettled or open."""
    exports = MemoryExports({"v": MemoryDisk(64 * MIB)})
    server = NbdServer(exports, shared=shared)
    path = str(short_tmp_path / "s")
    await server.listen_unix(path)
    (address,) = await server.listen_tcp("127.0.0.1", 0)
    bench = Bench(server, exports, shared, path, address)
    yield bench
    for client in bench.clients:
        await client.close()
    await server.stop(PATIENCE_S)
    for name, disk in exports.disks.items():
        assert disk.open_handles == 0, f"{name} was left open"
        assert disk.unsettled_handles == 0, f"{name}: the loop ran, or a reply went out, before settle()"
    assert shared.pool.lent == 0
    assert shared.budget.used_bytes == 0
    assert len(shared.budget) == 0
    assert shared.stats.in_flight == 0
