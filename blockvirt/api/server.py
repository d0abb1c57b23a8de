"""Listening: a unix socket that only its owner may open, and loopback TCP. Nothing else without credentials and TLS."""

import os
import socket
import stat

from aiohttp import web

from blockvirt.api.guards import is_loopback
from blockvirt.errors import InUse, InvalidRequest
from blockvirt.limits import UNIX_PATH_MAX_BYTES

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
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=DRAIN_S)
        self._unix_path = unix_path
        self._host = host
        self.port = port
        """The TCP port, the one picked after ``start``."""
        self._socket_identity: tuple[int, int] | None = None

    async def start(self) -> None:
        """Listen; raises InUse where another process does already."""
        await self._runner.setup()
        try:
            listener = _bind_unix(self._unix_path)
            status = os.stat(self._unix_path)
            self._socket_identity = (status.st_dev, status.st_ino)
            await web.SockSite(self._runner, listener).start()
            if self._host is not None:
                tcp = _bind_tcp(self._host, self.port)
                self.port = tcp.getsockname()[1]
                await web.SockSite(self._runner, tcp).start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop listening, let what runs finish for ``DRAIN_S``, and take the socket file away."""
        await self._runner.cleanup()
        if self._socket_identity is not None:
            try:
                status = os.stat(self._unix_path)
                if (status.st_dev, status.st_ino) == self._socket_identity:  # not somebody else's by now
                    os.unlink(self._unix_path)
            except FileNotFoundError:
                pass
            self._socket_identity = None


def check_unix_path(path: str) -> None:
    """Return if a unix socket can have this path; raises InvalidRequest."""
    length = len(os.fsencode(path))
    if length > UNIX_PATH_MAX_BYTES:
        raise InvalidRequest(
            f"the path of the unix socket has {length} bytes, {UNIX_PATH_MAX_BYTES} is the most: {path}",
            cause="the kernel keeps the paths of unix sockets in 108 bytes",
            correction="choose a state directory with a shorter path",
        )


def check_listen_host(host: str) -> None:
    """Return if it is safe to listen on ``host`` without credentials; raises InvalidRequest."""
    if not is_loopback(host):
        raise InvalidRequest(
            f"refused to listen on {host!r}",
            cause="this release has no TLS and no credentials: anybody who reaches the port could delete volumes",
            correction="listen on 127.0.0.1 or ::1 and forward a port over ssh; TLS and tokens come in a later release",
        )


def _bind_unix(path: str) -> socket.socket:
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)  # before listen(): nobody gets in between
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Take away the socket file of a process that is gone; raises InUse where it lives, or where it is no socket."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise InUse(
            f"{path} is in the way: it is not a socket", correction="move it, or choose another state directory"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
    raise InUse(f"another process listens on {path}", correction="stop it, or choose another state directory")


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
