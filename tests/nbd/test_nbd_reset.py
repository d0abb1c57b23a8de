"""A connection that is reset while much of it is unread, on the loop of the daemon.

uvloop calls the reader of a socket that failed once, and never again: what a turn leaves unread must not be waited for.
"""

import asyncio
import socket
import struct
from collections.abc import Callable

import pytest
import uvloop

from blockvirt.nbd import constants as c
from blockvirt.nbd.messages import CLIENT_FLAGS, OPTION, REQUEST, pack_info_request
from blockvirt.nbd.server import NbdServer
from blockvirt.nbd.shared import SharedResources
from blockvirt.testing.memory_volume import MemoryDisk, MemoryExports
from blockvirt.units import KIB, MIB
from tests.nbd.conftest import PATIENCE_S
from tests.volumes.conftest import until

_RESET = struct.pack("ii", 1, 0)


async def session_that_is_reset(
    send: Callable[[socket.socket], None], shared: SharedResources, disk: MemoryDisk | None = None
) -> None:
    """Open an export, send something and reset, before the server has read any of it."""
    server = NbdServer(MemoryExports({"v": disk or MemoryDisk(8 * MIB)}), shared=shared)
    (address,) = await server.listen_tcp("127.0.0.1", 0)
    loop = asyncio.get_running_loop()
    with socket.create_connection(address) as client:
        client.setblocking(False)
        payload = pack_info_request("v", ())
        client.send(CLIENT_FLAGS.pack(3) + OPTION.pack(c.OPTION_MAGIC, c.OPT_GO, len(payload)) + payload)
        while not server.sessions():
            await asyncio.wait_for(loop.sock_recv(client, 64 * KIB), PATIENCE_S)
        send(client)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    async with asyncio.timeout(PATIENCE_S):
        await until(lambda: not server.sessions())
    for gate in disk.gates.values() if disk is not None else ():
        gate.let_go()
    async with asyncio.timeout(PATIENCE_S):
        await server.all_closed()
    await server.stop()


@pytest.mark.parametrize("offset", [0, 1 << 40], ids=["taken", "refused"])
def test_a_reset_in_the_middle_of_a_payload_ends_the_session(offset: int) -> None:
    def send_half_of_a_write(client: socket.socket) -> None:
        client.send(REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_WRITE, 1, offset, 4 * MIB))
        sent = 0
        while sent < 2 * MIB:
            try:
                sent += client.send(bytes(64 * KIB))
            except BlockingIOError:
                break
        assert sent > 256 * KIB, "more than a turn takes"

    shared = SharedResources()
    shared.limits.batch_s = 0.0  # each turn takes one piece
    uvloop.run(session_that_is_reset(send_half_of_a_write, shared))


@pytest.mark.parametrize("command", [c.CMD_READ, c.CMD_WRITE], ids=["with a reply", "without one"])
def test_a_reset_behind_a_short_message_ends_the_session(command: int) -> None:
    """A turn that sends a reply takes the socket for alive, and looks no further; another has to look."""

    def send_a_little(client: socket.socket) -> None:
        client.send(REQUEST.pack(c.REQUEST_MAGIC, 0, command, 1, 0, 4 * KIB) + b"1")

    uvloop.run(session_that_is_reset(send_a_little, SharedResources()))


def test_a_reset_is_noticed_while_a_request_is_under_way() -> None:
    disk = MemoryDisk(8 * MIB)
    disk.block("flush")

    def send_a_flush(client: socket.socket) -> None:
        client.send(REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_FLUSH, 1, 0, 0))

    uvloop.run(session_that_is_reset(send_a_flush, SharedResources(), disk))
