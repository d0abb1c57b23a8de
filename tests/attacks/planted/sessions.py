"""Bugs for the attack "sessions": what is not bounded, not given back, not looked at, or told to the wrong client."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from blockvirt.nbd import buffers, dispatch, handshake, incoming, transmission
from blockvirt.nbd.buffers import Buffer, BufferPool
from blockvirt.nbd.dispatch import Dispatcher
from blockvirt.nbd.server import NbdServer
from blockvirt.nbd.session import Session
from tests.attacks.planted.bugs import Bug, replacing


def _without_limit(module: object, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(module, name, 1 << 32)


_serve = NbdServer._serve


async def _serve_and_keep(self: Any, connection: Any) -> None:
    await _serve(self, connection)
    if connection.session is None:
        self._connections[connection.id] = connection


_abandon = Session.abandon


def _abandon_with_a_timer(self: Session, reason: str) -> None:
    self._stall = None
    _abandon(self, reason)


def _close_uncharged(self: incoming.Incoming) -> None:
    self._parked = b""
    buffer, self._buffer = self._buffer, None
    self.view = incoming._NOTHING
    self.low = self.high = 0
    if buffer is not None:
        self._pool.give(buffer)


def _lend_twice(self: BufferPool, length_bytes: int) -> Buffer:
    kind = buffers.kind_for(length_bytes)
    self._made += 1
    if not self._free[kind]:
        self._free[kind].append(Buffer(kind))
    return self._free[kind][-1]


def _forget_the_payload(self: Dispatcher, command: int, cookie: int, length: int, code: int, text: str) -> Any:
    self._count(command)
    self._incoming.low += dispatch._HEADER_BYTES
    self._error(cookie, code, text)
    return dispatch._Step.NEXT


_open_export = NbdServer._open


async def _hold_on_to_what_is_open(self: Any, connection: Any, wanted: Any, deadline_s: float) -> Any:
    opened = await _open_export(self, connection, wanted, deadline_s)
    if wanted.contexts:
        self._opened = (*getattr(self, "_opened", ()), opened)
    return opened


async def _open_what_was_asked_for_last(self: Any, connection: Any, wanted: Any, deadline_s: float) -> Any:
    self._wanted = wanted
    await asyncio.sleep(0.005)
    return await _open_export(self, connection, self._wanted, deadline_s)


def _bug(
    name: str,
    what: str,
    breaks: str,
    plant: Callable[[pytest.MonkeyPatch], None],
    *,
    count: int,
    seed: int = 0,
    is_quick: bool = True,
) -> Bug:
    return Bug(name, what, tuple(breaks.split()), "sessions", plant, count, seed, is_quick)


BUGS: tuple[Bug, ...] = (
    _bug(
        "failed-handshakes-stay",
        "a connection whose handshake failed stays in the table of connections",
        "I9",
        replacing(NbdServer, "_serve", _serve_and_keep),
        count=20,
    ),
    _bug(
        "endless-options",
        "an option of any length is waited for and kept",
        "I9",
        _without_limit(handshake, "NBD_MAX_OPTION_BYTES"),
        count=250,
        is_quick=False,
    ),
    _bug(
        "any-payload",
        "the length of a payload is not looked at",
        "I9",
        _without_limit(transmission, "NBD_MAX_PAYLOAD_BYTES"),
        count=250,
        is_quick=False,
    ),
    _bug(
        "bytes-in-flight-not-given-back",
        "a client that goes in the middle of a payload takes its bytes of the budget along",
        "I9",
        replacing(incoming.Incoming, "close", _close_uncharged),
        count=250,
    ),
    _bug(
        "stall-watch-outlives-its-session",
        "the timer for stalled payloads keeps a session that has ended",
        "I9",
        replacing(Session, "abandon", _abandon_with_a_timer),
        count=250,
        is_quick=False,
    ),
    _bug(
        "exports-remembered",
        "what was opened with metadata contexts is remembered for ever",
        "I9",
        replacing(NbdServer, "_open", _hold_on_to_what_is_open),
        count=250,
        is_quick=False,
    ),
    _bug(
        "payload-of-a-refused-write-read-as-requests",
        "the payload of a refused write is not skipped",
        "I4",
        replacing(Dispatcher, "_refuse", _forget_the_payload),
        count=250,
        is_quick=False,
    ),
    _bug(
        "a-buffer-lent-twice",
        "two connections receive into the same buffer",
        "I4",
        replacing(BufferPool, "take", _lend_twice),
        count=250,
        is_quick=False,
    ),
    _bug(
        "the-export-asked-for-last",
        "who waits while somebody else opens an export gets that one",
        "I4",
        replacing(NbdServer, "_open", _open_what_was_asked_for_last),
        count=500,
        is_quick=False,
    ),
)
