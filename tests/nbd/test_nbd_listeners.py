"""Where the server listens: TCP, unix paths old and long, inherited sockets; and how many may come."""

import asyncio
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from blockvirt.errors import InUse, InvalidRequest
from blockvirt.nbd import listeners
from blockvirt.nbd.client import NbdClient, NbdClientError
from blockvirt.nbd.listeners import activation_sockets, check_activated, clear_activation
from blockvirt.nbd.server import NbdServer
from blockvirt.testing.memory_volume import MemoryDisk, MemoryExports
from blockvirt.units import MIB
from tests.nbd.conftest import Bench

ROOT = Path(__file__).parent.parent.parent


async def test_unix_and_tcp_at_once(bench: Bench) -> None:
    unix = await bench.enter()
    tcp = await NbdClient.connect_tcp(*bench.address)
    bench.clients.append(tcp)
    assert await tcp.list_exports() == ["v"]
    await tcp.go("v")
    await tcp.write(0, b"over tcp")
    assert await unix.read(0, 8) == b"over tcp"
    assert bench.server.sessions()[1].peer.startswith("127.0.0.1:")


async def test_the_unix_socket_is_for_its_owner_and_goes_with_the_server(bench: Bench) -> None:
    assert stat.S_IMODE(os.stat(bench.path).st_mode) == 0o600
    await bench.server.stop()
    assert not os.path.exists(bench.path)


async def test_a_taken_port_is_explained(bench: Bench) -> None:
    with pytest.raises(InUse, match=str(bench.address[1])):
        await bench.server.listen_tcp(*bench.address)


async def test_the_number_of_connections_is_bounded(bench: Bench) -> None:
    bench.server._max_connections = 3
    for _ in range(3):
        await bench.enter()
    with pytest.raises(NbdClientError):
        await bench.enter()
    assert bench.server.stats().refused_total == 1
    await bench.clients[0].disconnect()
    bench.server._max_connections = 4  # the first may not have been buried yet
    await bench.enter()


async def test_running_out_of_descriptors_is_survived(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """accept() fails once as it does at the limit; the client that waits in the queue gets in afterwards."""
    monkeypatch.setattr("blockvirt.nbd.server._ACCEPT_PAUSE_S", 0.01)
    failed: list[bool] = []
    (listener, *_rest) = bench.server._listeners

    class Exhausted(socket.socket):
        """A listener with no descriptor to spare, the first time."""

        def accept(self) -> tuple[socket.socket, object]:
            if not failed:
                failed.append(True)
                raise OSError(24, "Too many open files")
            return super().accept()

    loop_reader = Exhausted(listener.family, listener.type, fileno=os.dup(listener.fileno()))
    loop_reader.setblocking(False)
    asyncio.get_running_loop().remove_reader(listener.fileno())
    bench.server.adopt(loop_reader)
    assert await (await bench.enter()).read(0, 1) == b"\0"
    assert failed


def test_sockets_of_another_process_are_not_ours() -> None:
    assert activation_sockets({}, 1) == []
    assert activation_sockets({"LISTEN_PID": "2", "LISTEN_FDS": "1"}, 1) == []
    assert activation_sockets({"LISTEN_PID": "1", "LISTEN_FDS": "many"}, 1) == []
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "nbd", "HOME": "/"}
    clear_activation(environ)
    assert environ == {"HOME": "/"}


ACTIVATED = """
import asyncio, os
from blockvirt.nbd.listeners import activation_sockets, clear_activation
from blockvirt.nbd.server import NbdServer
from blockvirt.testing.memory_volume import MemoryDisk, MemoryExports

async def main():
    server = NbdServer(MemoryExports({"": MemoryDisk(1 << 20)}))
    for sock in activation_sockets(os.environ, os.getpid(), "nbd"):
        server.adopt(sock)
    clear_activation(os.environ)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.requires("nbdinfo")
def test_socket_activation_as_libnbd_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """nbdinfo [ COMMAND ] starts the server with a listening socket as descriptor 3 (sd_listen_fds)."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = ["nbdinfo", "--size", "--", "[", sys.executable, "-c", ACTIVATED, "]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "1048576\n", done.stderr


@pytest.mark.parametrize(
    ("family", "address", "listens", "refusal"),
    [
        (socket.AF_INET, ("127.0.0.1", 0), True, None),
        (socket.AF_UNIX, "socket", True, None),
        (socket.AF_INET, ("0.0.0.0", 0), True, "no TLS"),
        (socket.AF_INET, ("127.0.0.1", 0), False, "Accept=no"),
    ],
)
def test_which_activated_sockets_are_served(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: int,
    address: str | tuple[str, int],
    listens: bool,
    refusal: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(family) as sock:
        sock.bind(address)
        if listens:
            sock.listen()
        if refusal is None:
            check_activated(sock)
        else:
            with pytest.raises(InvalidRequest) as refused:
                check_activated(sock)
            assert refusal in refused.value.cause + refused.value.correction


def test_a_descriptor_that_is_no_socket_is_explained() -> None:
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "100000", "LISTEN_FDNAMES": "a:nbd"}
    with open("/dev/null") as null, pytest.MonkeyPatch.context() as patched:
        patched.setattr(listeners, "_FIRST_ACTIVATED_FD", null.fileno())
        with pytest.raises(InvalidRequest, match="is no socket"):
            activation_sockets(environ, 1)


async def test_ipv6_where_there_is_any() -> None:
    server = NbdServer(MemoryExports({"v": MemoryDisk(MIB)}))
    try:
        found = await server.listen_tcp("::1", 0)
    except OSError:
        assert not Path("/proc/net/if_inet6").exists() or "::1" not in _addresses()
        return
    client = await NbdClient.connect_tcp(*found[0])
    await client.go("v")
    assert server.sessions()[0].peer.startswith("[::1]:")
    await client.disconnect()
    await server.stop()


def _addresses() -> str:
    text = Path("/proc/net/if_inet6").read_text()
    return "::1" if "00000000000000000000000000000001" in text else ""
