"""The NBD server: listeners, connections and sessions, and how they are watched, dropped and drained."""

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from blockvirt.device import ExportDirectory
from blockvirt.errors import ShuttingDown
from blockvirt.ids import new_id
from blockvirt.limits import NBD_DRAIN_S, NBD_HANDSHAKE_S, NBD_MAX_CONNECTIONS
from blockvirt.nbd.handshake import OpenExport
from blockvirt.nbd.listeners import prepare_connection, tcp_listener
from blockvirt.nbd.negotiation import HandshakeFailed, OpenedExport, negotiate
from blockvirt.nbd.session import Session
from blockvirt.nbd.shared import SharedResources
from blockvirt.nbd.stats import ServerStats, Traffic
from blockvirt.tasks import TaskSet
from blockvirt.unix_listener import UnixListener, listen_on_unix

log = logging.getLogger("blockvirt.nbd")

_ACCEPT_AT_ONCE = 64
_ACCEPT_PAUSE_S = 1.0
"""How long nothing is accepted after the process ran out of descriptors."""
_TRIM_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One open session, for the session list."""

    id: str
    export: str
    """What the client asked for."""
    volume: str
    """The export's own name, as the directory describes it."""
    peer: str
    since_s: float
    """Unix time."""
    read_only: bool
    bytes_read: int
    bytes_written: int
    requests: int
    in_flight: int


@dataclass(slots=True, eq=False)
class _Connection:
    id: str
    sock: socket.socket
    peer: str
    client: str
    since_s: float
    volume: str = ""
    read_only: bool = False
    session: Session | None = None
    export: str = ""


class NbdServer:
    """Serves the exports of a directory. Listen on as many addresses as wanted; ``stop`` ends it."""

    def __init__(
        self,
        directory: ExportDirectory,
        *,
        shared: SharedResources | None = None,
        handshake_s: float = NBD_HANDSHAKE_S,
        max_connections: int = NBD_MAX_CONNECTIONS,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._shared = shared or SharedResources()
        self._handshake_s = handshake_s
        self._max_connections = max_connections
        self._wall_clock = wall_clock
        self._listeners: dict[socket.socket, UnixListener | None] = {}
        self._connections: dict[str, _Connection] = {}
        self._tasks = TaskSet("nbd")
        self._closed_traffic: dict[str, Traffic] = {}
        self._stopping = False
        self._trimmer: asyncio.TimerHandle | None = None

    # --- listening -------------------------------------------------------------------------------------------------

    async def listen_tcp(self, host: str, port: int) -> list[tuple[str, int]]:
        """Listen on every address of ``host``; returns (address, port) of each. Port 0 picks one. Raises InUse."""
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        bound: list[tuple[str, int]] = []
        for family, _type, _protocol, _name, address in found:
            chosen = (address[0], bound[0][1] if bound and port == 0 else address[1], *address[2:])
            sock = tcp_listener(family, chosen)
            self._listen(sock)
            bound.append(sock.getsockname()[:2])
        return bound

    async def listen_unix(self, path: str, mode: int = 0o600) -> None:
        """Listen on a unix socket at ``path``, removed again by ``stop``. Raises InvalidRequest, InUse, OSError."""
        unix = listen_on_unix(path, mode)
        self._listen(unix.sock, unix)

    def adopt(self, sock: socket.socket) -> None:
        """Listen on a socket that already listens (``listeners.activation_sockets``)."""
        sock.setblocking(False)
        self._listen(sock)

    def _listen(self, sock: socket.socket, unix: UnixListener | None = None) -> None:
        self._listeners[sock] = unix
        asyncio.get_running_loop().add_reader(sock.fileno(), self._accept, sock)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPT_AT_ONCE):
            try:
                sock, _address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if listener not in self._listeners:
                    return
                # Out of descriptors or memory: level-triggered readiness would spin, so look away for a moment
                log.error("nbd: accepting a connection failed: %s; trying again in %g s", error, _ACCEPT_PAUSE_S)
                loop = asyncio.get_running_loop()
                loop.remove_reader(listener.fileno())
                loop.call_later(_ACCEPT_PAUSE_S, self._resume_accepting, listener)
                return
            self._admit(sock)

    def _resume_accepting(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)

    def _admit(self, sock: socket.socket) -> None:
        stats = self._shared.stats
        if len(self._connections) >= self._max_connections:
            stats.refused_total += 1
            log.warning("nbd: connection refused: %d are open, which is the limit", len(self._connections))
            sock.close()
            return
        try:
            peer, client = prepare_connection(sock)
        except OSError:  # gone before it was looked at
            sock.close()
            return
        stats.accepted_total += 1
        connection = _Connection(new_id(), sock, peer, client, self._wall_clock())
        self._connections[connection.id] = connection
        self._tasks.start(self._serve(connection), f"connection {peer}")
        if self._trimmer is None:
            self._trimmer = asyncio.get_running_loop().call_later(_TRIM_INTERVAL_S, self._trim)

    def _trim(self) -> None:
        self._shared.pool.trim()
        self._trimmer = None
        if self._connections or self._shared.pool.kept_bytes:
            self._trimmer = asyncio.get_running_loop().call_later(_TRIM_INTERVAL_S, self._trim)

    # --- one connection --------------------------------------------------------------------------------------------

    async def _serve(self, connection: _Connection) -> None:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._handshake_s

        async def open_export(wanted: OpenExport) -> OpenedExport:
            return await self._open(connection, wanted, deadline_s)

        try:
            try:
                entered = await negotiate(connection.sock, self._directory, open_export, deadline_s)
            except HandshakeFailed as error:
                self._shared.stats.handshakes_failed_total += not error.polite
                log.log(logging.DEBUG if error.polite else logging.INFO, "nbd %s: %s", connection.peer, error)
                return
            connection.export = entered.negotiated.export
            session = Session(
                connection.id,
                connection.sock,
                entered.opened.handle,
                entered.negotiated,
                self._shared,
                entered.leftover,
            )
            connection.session = session
            session.start()
            if self._stopping:
                session.drain("the server is stopping")
            self._announce(connection)
            log.info("nbd %s: %s: %s", connection.peer, connection.export, await session.ended)
            await session.close()
        finally:
            connection.sock.close()
            del self._connections[connection.id]
            self._bury(connection)

    async def _open(self, connection: _Connection, wanted: OpenExport, deadline_s: float) -> OpenedExport:
        info = await self._directory.describe(wanted.name)
        await self._fence(info.name, deadline_s)
        if self._stopping:
            raise ShuttingDown("the server is stopping", correction="connect again in a moment")
        handle = await self._directory.open(wanted.name, connection.id, wanted.contexts)
        connection.volume = info.name
        connection.read_only = handle.capabilities.read_only
        # The volume may have grown since it was described: what counts is what was opened
        return OpenedExport(handle, replace(info, size_bytes=handle.size_bytes, capabilities=handle.capabilities))

    async def _fence(self, volume: str, deadline_s: float) -> None:
        """Wait until no earlier session's started write of ``volume`` can land on what the new one is going to write.

        A client that lost its connection re-sends what was not answered; a write of the old session that ran after that
        would bring older data back. Sessions whose connection is half dead count too, hence all of them.
        """
        earlier = [one.session for one in self._connections.values() if one.session and one.volume == volume]
        async with asyncio.timeout_at(deadline_s):
            for session in earlier:
                await session.changes_done()

    def _announce(self, connection: _Connection) -> None:
        log.info("nbd %s: opened %s, session %s", connection.peer, connection.export, connection.id)
        if connection.read_only:
            return
        for other in self._connections.values():
            writes_too = other.session is not None and not other.session.ended.done() and not other.read_only
            if writes_too and other.volume == connection.volume and other.client != connection.client:
                log.warning(
                    "nbd: %s is open for writing by two clients, %s and %s: their filesystems will not agree",
                    connection.volume,
                    other.peer,
                    connection.peer,
                )
                return

    def _bury(self, connection: _Connection) -> None:
        if connection.session is None:
            return
        traffic = connection.session.traffic
        self._shared.stats.total.add(traffic)
        if any(one.session and one.export == connection.export for one in self._connections.values()):
            self._closed_traffic.setdefault(connection.export, Traffic()).add(traffic)
        else:
            self._closed_traffic.pop(connection.export, None)

    # --- watching and dropping -------------------------------------------------------------------------------------

    def sessions(self) -> list[SessionInfo]:
        """Return the open sessions, oldest first."""
        found = []
        for connection in self._connections.values():
            session = connection.session
            if session is None or session.ended.done():
                continue
            traffic = session.traffic
            found.append(
                SessionInfo(
                    connection.id,
                    connection.export,
                    connection.volume,
                    connection.peer,
                    connection.since_s,
                    connection.read_only,
                    traffic.bytes_read,
                    traffic.bytes_written,
                    sum(traffic.requests),
                    session.in_flight,
                )
            )
        return found

    def drop(self, session_id: str) -> bool:
        """Close a session's connection without a reply to what is in flight; False if there is no such session.

        A client with a reconnect option comes back, and sees the volume's present size.
        """
        connection = self._connections.get(session_id)
        if connection is None or connection.session is None or connection.session.ended.done():
            return False
        connection.session.abandon("dropped on request")
        return True

    def stats(self) -> ServerStats:
        """Return what was counted so far: a snapshot whose totals include the open sessions."""
        kept = self._shared.stats
        exports = {name: traffic.copy() for name, traffic in self._closed_traffic.items()}
        total = kept.total.copy()
        sessions = 0
        for connection in self._connections.values():
            if connection.session is not None:
                sessions += not connection.session.ended.done()
                exports.setdefault(connection.export, Traffic()).add(connection.session.traffic)
                total.add(connection.session.traffic)
        return replace(
            kept,
            exports=exports,
            total=total,
            errors=dict(kept.errors),
            latency=[one.copy() for one in kept.latency],
            connections=len(self._connections),
            sessions=sessions,
            in_flight_bytes=self._shared.budget.used_bytes,
        )

    async def all_closed(self) -> None:
        """Return when no connection is left, their volume handles closed."""
        await self._tasks.wait()

    # --- the end ---------------------------------------------------------------------------------------------------

    async def stop(self, drain_s: float = NBD_DRAIN_S) -> None:
        """Stop listening, answer what has started, close all connections and volume handles.

        After ``drain_s`` connections are closed without waiting for replies, after twice that operations are given up,
        after thrice that volumes that do not let go are left.
        Nothing is answered with ESHUTDOWN: a guest would see an I/O error, whereas it survives a closed connection.
        """
        self._stopping = True
        loop = asyncio.get_running_loop()
        listeners, self._listeners = self._listeners, {}
        for listener, unix in listeners.items():
            loop.remove_reader(listener.fileno())
            if unix is not None:
                unix.remove_file()
            listener.close()
        for connection in list(self._connections.values()):
            if connection.session is not None:
                connection.session.drain("the server is stopping")
            else:
                _hang_up(connection.sock)  # the handshake ends by itself; an export being opened is closed again
        if not await self._all_gone(drain_s):
            log.warning("nbd: %d connections still busy after %g s: closing them", len(self._connections), drain_s)
            for connection in list(self._connections.values()):
                if connection.session is not None:
                    connection.session.abandon("the shutdown ran out of time")
            if not await self._all_gone(drain_s):
                for connection in list(self._connections.values()):
                    if connection.session is not None:
                        await connection.session.cancel()
                await self._all_gone(drain_s)
        await self._tasks.close()
        if self._trimmer is not None:
            self._trimmer.cancel()

    async def _all_gone(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                await self.all_closed()
        except TimeoutError:
            return False
        return True


def _hang_up(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # not connected any more
        pass
