"""Clients of the attack "sessions": one that plays a script, and one whose data nobody else may touch."""

import asyncio
import random
import socket
import struct
from pathlib import Path

from blockvirt.nbd.client import NbdClient, NbdClientError
from blockvirt.units import KIB
from tests.attacks.sessions_replies import wrong_replies
from tests.attacks.sessions_script import Ending, Kind, Script

HANG_S = 5.0
"""Nothing that the daemon owes a client takes as long."""
_RECEIVE_BYTES = 64 * KIB
_LINGER_NOT = struct.pack("ii", 1, 0)

Address = str | tuple[str, int]


async def play(script: Script, address: Address) -> str:
    """Play a session against the daemon; returns what was promised and not held, or nothing."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as sock:
        sock.setblocking(False)
        player = _Player(script, sock)
        try:
            async with asyncio.timeout(HANG_S):
                await asyncio.get_running_loop().sock_connect(sock, address)
                await player.play()
        except TimeoutError:
            return f"a session that is {script.ending.value} hangs for {HANG_S:g} s {player.where()}"
        except ConnectionError as error:
            return f"nobody must be refused: {error}"
    if script.kind is Kind.FRAMED:
        return wrong_replies(script, bytes(player.received))
    return ""


class _Player:
    def __init__(self, script: Script, sock: socket.socket) -> None:
        self._script = script
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._sent = 0
        self.received = bytearray()

    def where(self) -> str:
        """How far it came, for a message."""
        return f"after {self._sent} of {len(self._script.pieces)} pieces, with {len(self.received)} bytes received"

    async def play(self) -> None:
        if not self._script.reads:
            await self._send_deaf()
            self._let_go()
            return
        async with asyncio.TaskGroup() as both:
            receiving = both.create_task(self._receive())
            await self._send()
            if self._script.ending is Ending.WAIT:
                return
            if self._script.ending is Ending.FINISH:
                try:
                    self._sock.shutdown(socket.SHUT_WR)
                except OSError:  # the server was quicker
                    pass
                return
            await self._rest()
            receiving.cancel()
        self._let_go()

    async def _send(self) -> None:
        try:
            for piece in self._script.pieces:
                await self._loop.sock_sendall(self._sock, piece)
                self._sent += 1
                await asyncio.sleep(0)
        except ConnectionError:  # it hung up in the middle, as it may
            pass

    async def _send_deaf(self) -> None:
        """Send what the server takes from a client that reads nothing."""
        try:
            for piece in self._script.pieces:
                if self._sock.send(piece) < len(piece):
                    break
                self._sent += 1
                await asyncio.sleep(0)
        except (ConnectionError, BlockingIOError):
            pass
        await self._rest()

    async def _rest(self) -> None:
        if self._script.ending is Ending.STALL:
            await asyncio.sleep(self._script.rest_s)

    async def _receive(self) -> None:
        is_kept = self._script.kind is Kind.FRAMED
        try:
            while data := await self._loop.sock_recv(self._sock, _RECEIVE_BYTES):
                if is_kept:
                    self.received += data
        except ConnectionError:
            pass

    def _let_go(self) -> None:
        if self._script.ending is Ending.RESET and self._sock.family == socket.AF_INET:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)


class Canary:
    """A volume of a name that no script knows, and a client that compares whatever it reads of it."""

    def __init__(self, path: Path, name: str, size_bytes: int, seed: int) -> None:
        self._path = str(path)
        self._name = name
        self._dice = random.Random(seed)
        self._content = bytearray(size_bytes)
        self._compared_bytes = 0

    def take_compared(self) -> int:
        """Return how many bytes were compared since this was last asked."""
        compared, self._compared_bytes = self._compared_bytes, 0
        return compared

    async def sing(self, until: asyncio.Event) -> str:
        """Write and read on a connection of its own; returns what was promised and not held."""
        try:
            async with await NbdClient.connect_unix(self._path) as client:
                async with asyncio.timeout(HANG_S):
                    await client.go(self._name)
                while not until.is_set():
                    async with asyncio.timeout(HANG_S):
                        if broken := await self._note(client):
                            return broken
                async with asyncio.timeout(HANG_S):
                    await client.flush()
                    await client.disconnect()
            return await self.look()
        except TimeoutError:
            return f"a good client must be served: nothing for {HANG_S:g} s"
        except (OSError, NbdClientError) as error:
            return f"a good client must be served: {error}"

    async def _note(self, client: NbdClient) -> str:
        offset = self._dice.randrange(len(self._content))
        length = min(self._dice.choice((512, 4 * KIB, 40 * KIB)), len(self._content) - offset)
        data = self._dice.randbytes(length)
        await client.write(offset, data)
        self._content[offset : offset + length] = data
        offset = self._dice.randrange(len(self._content))
        found = await client.read(offset, min(64 * KIB, len(self._content) - offset))
        return self._compare(offset, found)

    async def look(self) -> str:
        """Read all of it on a new connection, and compare."""
        async with asyncio.timeout(HANG_S), await NbdClient.connect_unix(self._path) as client:
            await client.go(self._name)
            found = await client.read(0, len(self._content))
            await client.disconnect()
        return self._compare(0, found)

    def _compare(self, offset: int, found: bytes) -> str:
        self._compared_bytes += len(found)
        expected = self._content[offset : offset + len(found)]
        if found == expected:
            return ""
        at = next(index for index, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other)
        return f"a volume that only its own client writes has other bytes at {offset + at}"
