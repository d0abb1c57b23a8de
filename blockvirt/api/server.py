"""Listening: a unix socket that only its owner may open, and loopback TCP. Nothing else without credentials and TLS."""

import asyncio
import os
import socket

from aiohttp import web

from blockvirt.api.connection import Connection
from blockvirt.api.guards import is_loopback
from blockvirt.errors import InUse, InvalidRequest
from blockvirt.unix_listener import UnixListener, check_unix_path, listen_on_unix

DRAIN_S = 5.0  # how long requests that run at the stop may take


class ApiServer:
    """The HTTP server of one application."""

    def __init__(self, app: web.Application, unix_path: str, host: str | None = None, port: int = 0) -> None:
        """Serve ``app`` on a unix socket, and on ``host``:``port`` if there is a host (port 0: pick one).

        Raises InvalidRequest for an address that is not loopback and for a path that no socket can have.
        """
        check_unix_path(unix_path)
        if host is not None:
            check_listen_host(host)
        self.application = app
        self._runner = web.AppRunner(app, shutdown_timeout=DRAIN_S)
        self._unix_path = unix_path
        self._host = host
        self.port = port
        """The TCP port, the one picked after ``start``."""
        self._unix: UnixListener | None = None
        self._accepting: list[asyncio.Server] = []

    async def start(self) -> None:
        """Listen; raises InUse where another process does already."""
        await self._runner.setup()
        try:
            self._unix = listen_on_unix(self._unix_path, 0o600)
            await self._accept_on(self._unix.sock)
            if self._host is not None:
                tcp = _bind_tcp(self._host, self.port)
                self.port = tcp.getsockname()[1]
                await self._accept_on(tcp)
        except BaseException:
            await self.stop()
            raise

    async def _accept_on(self, listener: socket.socket) -> None:
        server = self._runner.server
        assert server is not None, "the runner is set up"
        # Not by web.SockSite, whose connections would answer in plain text what is not HTTP.
        accepting = await asyncio.get_running_loop().create_server(lambda: Connection(server), sock=listener)
        self._accepting.append(accepting)

    async def stop(self) -> None:
        """Stop listening, take the socket file away, and let what runs finish for ``DRAIN_S``."""
        if self._unix is not None:
            self._unix.remove_file()
            self._unix = None
        while self._accepting:
            self._accepting.pop().close()
        await self._runner.cleanup()


def check_listen_host(host: str) -> None:
    """Return if it is safe to listen on ``host`` without credentials; raises InvalidRequest."""
    if not is_loopback(host):
        raise InvalidRequest(
            f"refused to listen on {host!r}",
            cause="this release has no TLS and no credentials: anybody who reaches the port could delete volumes",
            correction="listen on 127.0.0.1 or ::1 and forward a port over ssh; TLS and tokens come in a later release",
        )


def _bind_tcp(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise InUse(
            f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}",
            correction="choose another port (0 picks a free one), or stop the process that has it",
        ) from error
    return listener
