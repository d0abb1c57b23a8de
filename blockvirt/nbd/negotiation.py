"""Drives one connection's handshake: the socket on one side, the export directory on the other.

Only waiting for the client counts against the time limit; describing and opening an export is never cut short, because
a volume that was half opened would have to be half closed. Nothing is opened before the client asks to enter
transmission.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from blockvirt.device import ExportDirectory, ExportInfo, VolumeHandle
from blockvirt.errors import BlockvirtError, DeviceFault
from blockvirt.nbd.handshake import (
    DescribeExport,
    Effect,
    FindContexts,
    Handshake,
    Hangup,
    ListExports,
    Negotiated,
    OpenExport,
    Question,
)
from blockvirt.units import KIB

log = logging.getLogger("blockvirt.nbd")

_RECEIVE_BYTES = 64 * KIB


@dataclass(frozen=True, slots=True)
class OpenedExport:
    """An export that was opened for a client: the handle, and what the client is told of it."""

    handle: VolumeHandle
    info: ExportInfo


@dataclass(frozen=True, slots=True)
class Entered:
    """A client that has entered transmission. ``leftover``: the beginning of its requests, sent ahead."""

    negotiated: Negotiated
    opened: OpenedExport
    leftover: bytes


Opener = Callable[[OpenExport], Awaitable[OpenedExport]]


class HandshakeFailed(Exception):
    """The client did not get as far as transmission; the message says why. ``polite``: it did not want to."""

    def __init__(self, reason: str, *, polite: bool = False) -> None:
        super().__init__(reason)
        self.polite = polite


async def negotiate(sock: socket.socket, directory: ExportDirectory, open_export: Opener, deadline_s: float) -> Entered:
    """Take a client from its connection to transmission; raises HandshakeFailed, and then nothing stays open.

    ``deadline_s`` is on the loop's clock.
    """
    negotiation = _Negotiation(sock, directory, open_export, deadline_s)
    try:
        return await negotiation.run()
    except BaseException as error:
        if negotiation.opened is not None:
            await negotiation.opened.handle.close()
        if isinstance(error, TimeoutError):
            raise HandshakeFailed("the handshake took too long") from None
        if isinstance(error, OSError):
            raise HandshakeFailed(f"the connection failed: {error.strerror}") from None
        raise


class _Negotiation:
    def __init__(self, sock: socket.socket, directory: ExportDirectory, open_export: Opener, deadline_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._directory = directory
        self._open_export = open_export
        self._deadline_s = deadline_s
        self._machine = Handshake()
        self.opened: OpenedExport | None = None

    async def run(self) -> Entered:
        effect: Effect | None = None
        while True:
            if effect is None:
                effect = self._machine.advance()
            await self._send()
            if effect is None:
                await self._receive()
            elif isinstance(effect, Hangup):
                raise HandshakeFailed(effect.reason, polite=effect.polite)
            elif isinstance(effect, Negotiated):
                assert self.opened is not None
                return Entered(effect, self.opened, self._machine.leftover())
            else:
                effect = await self._carry_out(effect)

    async def _carry_out(self, effect: Question) -> Effect | None:
        machine = self._machine
        try:
            if isinstance(effect, ListExports):
                machine.answer_names(self._directory.names())
                return None
            if isinstance(effect, DescribeExport):
                return machine.answer_export(await self._directory.describe(effect.name))
            if isinstance(effect, FindContexts):
                directory = self._directory
                await directory.describe(effect.name)  # it must be there, even where nothing is asked of it
                machine.answer_contexts([directory.contexts(effect.name, query) for query in effect.queries])
                return None
            self.opened = await self._open_export(effect)
            return machine.answer_export(self.opened.info)
        except BlockvirtError as error:
            return machine.answer_error(error)
        except TimeoutError:  # which is an OSError too
            raise
        except OSError as error:
            log.exception("nbd: looking up an export failed")
            return machine.answer_error(DeviceFault(f"the export cannot be opened: {error.strerror}"))

    async def _receive(self) -> None:
        async with asyncio.timeout_at(self._deadline_s):
            data = await self._loop.sock_recv(self._sock, _RECEIVE_BYTES)
        if not data:
            raise HandshakeFailed("the client closed the connection during the handshake", polite=True)
        self._machine.receive(data)

    async def _send(self) -> None:
        if output := self._machine.take_output():
            async with asyncio.timeout_at(self._deadline_s):
                await self._loop.sock_sendall(self._sock, output)
