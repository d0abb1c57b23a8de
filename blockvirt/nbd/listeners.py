"""Listening sockets: TCP, and those that a service manager hands over; and who is at the other end of either kind."""

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import MutableMapping

from blockvirt.errors import InUse, InvalidRequest
from blockvirt.limits import NBD_SEND_BUFFER_BYTES

_BACKLOG = 128
_FIRST_ACTIVATED_FD = 3  # sd_listen_fds(3): SD_LISTEN_FDS_START


def tcp_listener(family: int, address: tuple[object, ...]) -> socket.socket:
    """Return a socket that listens on a resolved TCP address; raises InUse or OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise InUse(
                f"TCP address {address[0]} port {address[1]} is taken by another program",
                correction="choose another port, or 0 to have one chosen",
            ) from None
        raise
    return sock


def activation_sockets(environ: MutableMapping[str, str], pid: int, name: str = "") -> list[socket.socket]:
    """Return the listening sockets that the service manager passed to process ``pid`` (sd_listen_fds(3)).

    With ``name`` only those called so in LISTEN_FDNAMES, if it names any. The variables are left in ``environ`` until
    all takers are served: call ``clear_activation`` then. Raises InvalidRequest for what may not be served.
    """
    if environ.get("LISTEN_PID") != str(pid):
        return []
    try:
        count = int(environ.get("LISTEN_FDS", ""))
    except ValueError:
        return []
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    found = []
    for number in range(count):
        if name and name in names and (number >= len(names) or names[number] != name):
            continue
        try:
            sock = socket.socket(fileno=_FIRST_ACTIVATED_FD + number)
        except OSError as error:
            raise InvalidRequest(
                f"descriptor {_FIRST_ACTIVATED_FD + number} is no socket, although LISTEN_FDS says so",
                cause=error.strerror or "",
                correction="start the daemon through its socket unit, or without LISTEN_FDS",
            ) from error
        check_activated(sock)
        sock.setblocking(False)
        os.set_inheritable(sock.fileno(), False)
        found.append(sock)
    return found


def check_activated(sock: socket.socket) -> None:
    """Return if a socket from the service manager may be served; raises InvalidRequest.

    The same addresses as for our own listeners: without credentials the network must not reach the volumes.
    """
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise InvalidRequest(
            f"the activated socket {sock.getsockname()!r} does not listen for connections",
            correction="use ListenStream= and Accept=no in the socket unit",
        )
    if sock.family == socket.AF_UNIX:
        return
    host = sock.getsockname()[0] if sock.family in (socket.AF_INET, socket.AF_INET6) else ""
    if not host or not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        raise InvalidRequest(
            f"refused to serve the activated socket {sock.getsockname()!r}",
            cause="this release has no TLS and no credentials: anybody who reaches the port could read every volume",
            correction="give the socket unit a path or a loopback address: ListenStream=127.0.0.1:10809",
        )


def clear_activation(environ: MutableMapping[str, str]) -> None:
    """Forget the service manager's variables, so that no child takes our sockets for its own."""
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environ.pop(variable, None)


def prepare_connection(sock: socket.socket) -> tuple[str, str]:
    """Make an accepted socket ready; returns (peer for people, the part that tells one client from another).

    A TCP peer is its address; on a unix socket it is the process at the other end.
    """
    sock.setblocking(False)
    # Room for eight replies of 128 KiB: with the usual 208 KiB a session waits for its client at every second batch.
    # The kernel takes what net.core.wmem_max allows, and memory only for what is queued.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, NBD_SEND_BUFFER_BYTES)
    if sock.family == socket.AF_UNIX:
        pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return f"unix:pid={pid},uid={uid}", f"pid {pid}"
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    host, port = sock.getpeername()[:2]
    return f"{f'[{host}]' if ':' in host else host}:{port}", host
