"""The whole control plane on a real daemon: commands, sessions that really are open, restarts, the offline check."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from blockvirt.nbd.client import NbdClient
from blockvirt.units import GIB, MIB
from tests.real.daemon import Daemon


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A running daemon over an empty pool."""
    with Daemon() as started:
        started.start()
        yield started


def as_json(daemon: Daemon, *words: str) -> Any:
    return json.loads(daemon.cli(*words, "-o", "json"))


Opener = Callable[[str], Awaitable[NbdClient]]


@pytest.fixture
async def opened(daemon: Daemon) -> AsyncIterator[Opener]:
    """Open a session on an export; all are closed in the end."""
    async with AsyncExitStack() as stack:

        async def open_export(export: str) -> NbdClient:
            client = await NbdClient.connect_unix(str(daemon.socket))
            stack.push_async_callback(client.close)
            await client.go(export)
            client.begin()
            return client

        yield open_export


async def test_sessions_are_seen_and_dropped(daemon: Daemon, opened: Opener) -> None:
    volume = as_json(daemon, "volume", "create", "v", "--size", "1GiB")
    daemon.cli("host", "create", "web1")
    daemon.cli("lun", "map", "web1", "v")
    by_name, by_unit = await opened("v"), await opened("web1/lun0")
    await by_name.write(0, b"x" * 4096)
    assert await by_unit.read(0, 4096) == b"x" * 4096, "one volume under two names"
    sessions = as_json(daemon, "session", "list", "--volume", "v")
    assert [session["export"] for session in sessions] == ["v", "web1/lun0"]
    assert {session["volume_id"] for session in sessions} == {volume["id"]}
    assert [session["bytes_written"] for session in sessions] == [4096, 0]
    shown = as_json(daemon, "volume", "show", "v")
    assert (shown["state"], shown["sessions"], shown["mapped_bytes"]) == ("in-use", 2, 16 << 10)
    assert daemon.http("DELETE", "/v1/hosts/web1/luns/0")[0] == 409
    assert as_json(daemon, "session", "drop", sessions[0]["id"]) == {"dropped": 1}
    await by_name.closed()
    daemon.cli("lun", "unmap", "web1/lun0", "--force")
    await by_unit.closed()
    assert as_json(daemon, "session", "list") == []
    daemon.cli("volume", "delete", "v")
    assert daemon.http("GET", "/v1/volumes/v")[0] == 404
    daemon.stop()
    daemon.check()


async def test_growth_is_seen_by_new_sessions_and_by_those_that_reconnect(daemon: Daemon, opened: Opener) -> None:
    daemon.cli("volume", "create", "v", "--size", "1GiB")
    client = await opened("v")
    daemon.cli("volume", "resize", "v", "--size", "2GiB")
    await client.write(0, b"old session")
    quiet = await opened("v")
    await quiet.write(2 * GIB - 4, b"tail")
    daemon.cli("volume", "resize", "v", "--size", "3GiB", "--reconnect")
    await asyncio.gather(client.closed(), quiet.closed())
    back = await opened("v")
    assert await back.read(2 * GIB - 4, 8) == b"tail\0\0\0\0"
    await back.write(3 * GIB - 4, b"tail")
    await back.disconnect()


async def test_everything_outlives_sigkill(daemon: Daemon, opened: Opener) -> None:
    daemon.cli("volume", "create", "v", "--size", "1GiB", "--label", "a=b")
    daemon.cli("host", "create", "web1")
    daemon.cli("lun", "map", "web1", "v", "--lun", "7")
    daemon.cli("pool", "set", "--overcommit", "3")
    client = await opened("web1/lun7")
    await client.write(MIB, b"written, not flushed")
    daemon.crash_and_restart()
    client.abort()
    volume = as_json(daemon, "volume", "show", "v")
    assert (volume["labels"], volume["units"]) == ({"a": "b"}, ["web1/lun7"])
    assert as_json(daemon, "pool", "show")["overcommit_ratio"] == 3
    client = await opened("web1/lun7")
    assert await client.read(MIB, 20) == b"written, not flushed"
    await client.disconnect()


async def test_force_deletes_a_volume_from_under_its_client(daemon: Daemon, opened: Opener) -> None:
    daemon.cli("volume", "create", "v", "--size", "1GiB")
    client = await opened("v")
    await client.write(0, b"x" * MIB)
    assert daemon.http("DELETE", "/v1/volumes/v")[0] == 409
    daemon.cli("volume", "delete", "v", "--force")
    await client.closed()
    again = as_json(daemon, "volume", "create", "v", "--size", "1GiB")
    assert again["mapped_bytes"] == 0
    client = await opened("v")
    assert await client.read(0, MIB) == bytes(MIB), "nobody's old bytes"
    await client.disconnect()
    daemon.stop()
    daemon.check()


def test_a_second_daemon_and_a_check_name_the_first(daemon: Daemon) -> None:
    for words in (("serve", "--http", "none", "--nbd", "none"), ("check",)):
        second = subprocess.run(
            [*daemon.command()[:5], *words],
            capture_output=True,
            text=True,
            env=daemon.environment(),
            timeout=60,
            check=False,
        )
        assert second.returncode == 1, second.stderr
        assert str(daemon.pid) in second.stderr
    assert daemon.http("GET", "/healthz")[0] == 200


def test_metrics_of_the_real_thing(daemon: Daemon) -> None:
    daemon.cli("volume", "create", "v", "--size", "1GiB")
    status, text = daemon.http("GET", "/metrics")
    assert status == 200
    assert b"\nblockvirt_pool_promised_bytes 1.073741824e+09\n" in text


# What a service manager does: the socket listens, lies at descriptor 3 (sd_listen_fds(3)), and the daemon takes over.
ACTIVATE = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="nbd")
os.execv(sys.argv[2], sys.argv[2:])
"""


class Activated(Daemon):
    """A daemon that a service manager starts with a socket beside its own."""

    def command(self) -> list[str]:
        """See Daemon."""
        return [sys.executable, "-c", ACTIVATE, str(self.root / "activated"), *super().command()]


async def test_an_activated_socket_is_served_beside_the_daemons_own() -> None:
    with Activated() as daemon:
        daemon.create(GIB)
        given = await NbdClient.connect_unix(str(daemon.root / "activated"))
        await given.go("v")
        await given.write(0, b"by the socket unit")
        own = await NbdClient.connect_unix(str(daemon.socket))
        await own.go("v")
        assert await own.read(0, 18) == b"by the socket unit"
        await given.disconnect()
        await own.disconnect()
        daemon.stop()
        assert (daemon.root / "activated").is_socket(), "it is the service manager's, and waits for the next start"
        assert not daemon.socket.exists()
        daemon.check()
