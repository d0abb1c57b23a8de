"""Targets of the attack "codecs": what reads bytes of NBD clients, and of snapshot streams.

A target takes any bytes; what it raises is a broken promise. Bytes that come in pieces mean what they mean in one.
"""

import asyncio
import hashlib
import random
import struct
from collections.abc import Callable
from typing import Any, cast

from blockvirt.checksum import crc32c
from blockvirt.device import VolumeHandle
from blockvirt.errors import StreamDamaged, StreamVersion
from blockvirt.limits import NBD_CONNECTION_BUDGET_BYTES, NBD_GLOBAL_BUDGET_BYTES, NBD_MAX_OPTION_BYTES
from blockvirt.nbd import constants as c
from blockvirt.nbd.budget import Budget, ConnectionBudget
from blockvirt.nbd.buffers import Buffer, BufferPool
from blockvirt.nbd.dispatch import Dispatcher
from blockvirt.nbd.handshake import Negotiated
from blockvirt.nbd.incoming import Incoming
from blockvirt.nbd.messages import CLIENT_FLAGS, OPTION, REQUEST, pack_context_request, pack_info_request
from blockvirt.nbd.outgoing import Outgoing
from blockvirt.nbd.slow import SlowLane
from blockvirt.nbd.stats import ServerStats
from blockvirt.nbd.transmission import ExportView, SimpleReplies, StructuredReplies, done
from blockvirt.snapshots import stream_format, stream_reader
from blockvirt.snapshots.stream_format import (
    BODY_BYTES,
    FRAME_HEAD,
    PREAMBLE,
    TRAILER,
    Kind,
    StreamBase,
    StreamEncoder,
    StreamHeader,
    StreamSnapshot,
)
from blockvirt.testing.memory_volume import MemoryDisk
from blockvirt.units import KIB
from tests.nbd.handshake_driver import Driver

DISK_BYTES = 64 * KIB
PREAMBLE_BYTES = stream_format.preamble()
_ID = "6f1a3e1c-7d1b-4a52-9d1e-0123456789ab"


def in_pieces(content: bytes, seed: int) -> list[bytes]:
    """Cut ``content``, at places that ``seed`` chooses."""
    dice = random.Random(seed)
    cuts = sorted(dice.randrange(len(content) + 1) for _ in range(dice.choice((1, 2, 5))))
    return [content[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(content)], strict=True)]


# --- the handshake ---------------------------------------------------------------------------------------------------


def handshake(data: bytes) -> None:
    """The first byte says where the rest, which a client sends, is cut."""
    whole = _negotiated([data[1:]])
    assert _negotiated(in_pieces(data[1:], data[0])) == whole if data else True, "pieces do not matter"


def _negotiated(pieces: list[bytes]) -> tuple[list[Any], bytes, bytes]:
    driver = Driver()
    most_bytes = OPTION.size + NBD_MAX_OPTION_BYTES
    for piece in pieces:
        driver.feed(piece)
        if driver.effects and isinstance(driver.effects[-1], Negotiated):
            continue
        held_bytes = len(driver.machine.leftover())
        assert held_bytes <= most_bytes + len(piece), f"a handshake holds {held_bytes} bytes"
    return driver.effects, driver.output, driver.machine.leftover()


def _option(number: int, payload: bytes = b"") -> bytes:
    return OPTION.pack(c.OPTION_MAGIC, number, len(payload)) + payload


def handshake_examples() -> list[bytes]:
    """Handshakes that go well."""
    flags = b"\0" + CLIENT_FLAGS.pack(3)
    contexts = pack_context_request("v", ["base:allocation", "qemu:"])
    return [
        flags + _option(c.OPT_LIST) + _option(c.OPT_GO, pack_info_request("v", [1, 2, 3])),
        flags + _option(c.OPT_STRUCTURED_REPLY) + _option(c.OPT_LIST_META_CONTEXT, contexts),
        flags + _option(c.OPT_STRUCTURED_REPLY) + _option(c.OPT_SET_META_CONTEXT, contexts) + _option(c.OPT_ABORT),
        flags + _option(c.OPT_INFO, pack_info_request("nobody", [])) + _option(c.OPT_EXPORT_NAME, b"v"),
    ]


# --- requests --------------------------------------------------------------------------------------------------------


class _Socket:
    """Gives what a client sent, and keeps what it is sent."""

    def __init__(self) -> None:
        self.arrived = b""
        self.sent = bytearray()

    def fileno(self) -> int:
        return -1

    def recv_into(self, view: memoryview) -> int:
        count = min(len(view), len(self.arrived))
        if not count:
            raise BlockingIOError
        view[:count] = self.arrived[:count]
        self.arrived = self.arrived[count:]
        return count

    def sendmsg(self, parts: list[Any]) -> int:
        for part in parts:
            self.sent += part
        return sum(map(len, parts))


class _Handle:
    """What the dispatcher asks of a volume itself."""

    def __init__(self, disk: MemoryDisk, *, now: bool) -> None:
        self._disk = disk
        self._now = now

    def read_now(self, offset: int, into: memoryview) -> bool:
        if self._now:
            into[:] = self._disk.data[offset : offset + len(into)]
        return self._now

    def write_now(self, offset: int, data: memoryview) -> bool:
        if self._now:
            self._disk.store(offset, data)
        return self._now

    def settle(self) -> None:
        pass


class _AtOnce:
    """Stands in for the slow lane: does everything at once, in the order of the requests."""

    def __init__(
        self, disk: MemoryDisk, pool: BufferPool, budget: ConnectionBudget, answer: Callable[..., None]
    ) -> None:
        self._disk = disk
        self._pool = pool
        self._budget = budget
        self._answer = answer
        self.full = False
        self.count = 0
        self.added = ()

    def add_read(self, cookie: int, offset: int, length: int) -> bool:
        self._answer(c.CMD_READ, cookie, bytes(self._disk.data[offset : offset + length]))
        return True

    def start_read(self, cookie: int, offset: int, length: int, buffer: Buffer) -> None:
        self.add_read(cookie, offset, length)
        self._give(buffer)

    def start_copied_write(self, cookie: int, offset: int, data: memoryview, *, fua: bool) -> bool:
        self._disk.store(offset, data)
        self._answer(c.CMD_WRITE, cookie)
        return True

    def start_write(self, cookie: int, offset: int, data: memoryview, buffer: Buffer, *, fua: bool) -> None:
        self.start_copied_write(cookie, offset, data, fua=fua)
        self._give(buffer)

    def start_flush(self, cookie: int) -> bool:
        self._answer(c.CMD_FLUSH, cookie)
        return True

    def start_other(self, flags: int, command: int, cookie: int, offset: int, length: int) -> bool:
        if command in (c.CMD_TRIM, c.CMD_WRITE_ZEROES):
            self._disk.clear(offset, length, punch=command == c.CMD_TRIM)
        self._answer(command, cookie)
        return True

    def _give(self, buffer: Buffer) -> None:
        self._pool.give(buffer)
        self._budget.give(buffer.charge_bytes)


class _Requests:
    """A dispatcher with everything around it, but for a loop and a socket."""

    def __init__(self, kind: int) -> None:
        disk = self.disk = MemoryDisk(DISK_BYTES, block_bytes=4 * KIB)
        sock, pool, total = _Socket(), BufferPool(), Budget(NBD_GLOBAL_BUDGET_BYTES)
        budget = ConnectionBudget(total, NBD_CONNECTION_BUDGET_BYTES, lambda: None)
        self.total, self.socket, self.pool = total, sock, pool
        self.ended = ""
        self.answers: list[tuple[int, int, bytes]] = []
        self._incoming = Incoming(cast("Any", sock), pool, budget, b"")
        self._outgoing = Outgoing(
            cast("asyncio.AbstractEventLoop", None),
            cast("Any", sock),
            pool,
            budget,
            patience_s=1.0,
            on_drained=lambda: None,
            on_broken=self._end,
        )
        slow = _AtOnce(disk, pool, budget, self._answered)
        is_structured = bool(kind & 2)
        view = ExportView(DISK_BYTES, bool(kind & 4), bool(kind & 8), is_structured, bool(kind & 16))
        replies = StructuredReplies() if is_structured else SimpleReplies()
        self._dispatch = Dispatcher(
            "x",
            cast("VolumeHandle", _Handle(disk, now=bool(kind & 1))),
            view,
            replies,
            self._incoming,
            self._outgoing,
            cast("SlowLane", slow),
            ServerStats(),
            finish=self._end,
            abandon=self._end,
        )

    def _end(self, reason: str) -> None:
        self.ended = self.ended or reason

    def _answered(self, command: int, cookie: int, data: bytes = b"") -> None:
        self.answers.append((command, cookie, data))
        self.socket.sent += b"" if command == c.CMD_READ else done(cookie)

    def feed(self, piece: bytes) -> None:
        """Take what arrived."""
        self.socket.arrived += piece
        while not self.ended and (self._incoming.receive() or self._dispatch.backlog):
            self._dispatch.serve(64)
        self._incoming.park()
        self._outgoing.rest()

    def close(self) -> None:
        """End the connection."""
        self._dispatch.close()
        self._incoming.close()
        self._outgoing.rest()
        assert not self.pool.lent, "a buffer is not given back"
        assert not self.total.used_bytes, "bytes in flight are not given back"


def requests(data: bytes) -> None:
    """The first byte says where the rest is cut, the second what the session is like."""
    if len(data) < 2:
        return
    outcomes = []
    for pieces in ([data[2:]], in_pieces(data[2:], data[0])):
        session = _Requests(data[1])
        for piece in pieces:
            session.feed(piece)
        session.close()
        outcomes.append((session.ended, bytes(session.disk.data), session.disk.allocated))
    assert outcomes[0] == outcomes[1], "pieces do not matter"


def request_examples() -> list[bytes]:
    """Sessions of all commands."""
    found = []
    for kind in (0, 1, 3, 4, 27):
        content = b""
        for command in range(8):
            if command != c.CMD_DISC:
                payload = bytes(range(200)) if command == c.CMD_WRITE else b""
                content += REQUEST.pack(c.REQUEST_MAGIC, 0, command, command, 512, 200) + payload
        found.append(bytes([7, kind]) + content + REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_DISC, 0, 0, 0))
    return found


# --- streams ---------------------------------------------------------------------------------------------------------


def stream(data: bytes) -> None:
    """The first byte: whether the rest is frames to be sealed, which fit then; and where all is cut."""
    if data:
        content = _sealed(data[1:]) if data[0] & 1 else data[1:]
        events = _decoded([content])
        assert _decoded(in_pieces(content, data[0])) == events, "pieces do not matter"
        said = sum(not isinstance(event, str) for event in events)
        assert said <= _whole_frames(content), "what a frame says is believed, and its checksum does not fit"


def _decoded(pieces: list[bytes]) -> list[Any]:
    decoder, events = stream_reader.StreamDecoder(), list[Any]()
    most_bytes = FRAME_HEAD.size + max(most for _, most in BODY_BYTES.values())
    try:
        for piece in pieces:
            for event in decoder.feed(piece):
                events.append(event)
            assert len(decoder._held) <= most_bytes, "more than a frame is held"
        decoder.finish()
    except (StreamDamaged, StreamVersion) as error:
        events.append(f"{type(error).__name__}: {error.message}")
    return events


def _whole_frames(content: bytes) -> int:
    """Count the frames that fit, up to the first that does not: those of streams that begin behind one another, too."""
    whole, at, chain = 0, 0, -1
    while True:
        if content[at : at + PREAMBLE.size] == PREAMBLE_BYTES:
            at, chain = at + PREAMBLE.size, int.from_bytes(PREAMBLE_BYTES[-4:], "little")
        if chain < 0 or at + FRAME_HEAD.size > len(content):
            return whole
        crc, kind, length = FRAME_HEAD.unpack_from(content, at)
        end = at + FRAME_HEAD.size + length
        if end > len(content) or crc32c(content[at + 4 : end], chain) != crc:
            return whole
        whole, at, chain = whole + 1, end, -1 if kind == Kind.TRAILER else crc


def _sealed(data: bytes) -> bytes:
    """Make a stream of frames (kind u8, length u16, body) whose checksums fit; a trailer's digest does, too."""
    content = stream_format.preamble()
    chain = int.from_bytes(content[-4:], "little")
    at = 0
    while at + 3 <= len(data):
        kind, length = struct.unpack_from("<BH", data, at)
        body = data[at + 3 : at + 3 + length]
        at += 3 + length
        if kind == Kind.TRAILER and len(body) == TRAILER.size:
            body = body[:-32] + hashlib.sha256(content).digest()
        chain = stream_format.frame_crc(kind, body, chain)
        content += FRAME_HEAD.pack(chain, kind, len(body)) + body
    return content


def stream_examples() -> list[bytes]:
    """A whole stream and one of differences, each as it is and as frames to be sealed."""
    found = []
    for base in (None, StreamBase(_ID, "before")):
        snapshot = StreamSnapshot(_ID, "s", 1.5, {"a": "b"}, 8192)
        encoder = StreamEncoder(StreamHeader(_ID, "v", 8192, 4096, 6144, snapshot, base))
        frames = [encoder.begin(), encoder.data(0, bytes(1024)), encoder.data(1024, random.Random(1).randbytes(1024))]
        frames += [encoder.zeros(4096, 4096), encoder.end()]
        whole = b"".join(frames)
        found.append(b"\0" + whole)
        loose, at = b"\1", len(stream_format.preamble())
        while at < len(whole):
            _, kind, length = FRAME_HEAD.unpack_from(whole, at)
            at += FRAME_HEAD.size
            loose += struct.pack("<BH", kind, length) + whole[at : at + length]
            at += length
        found.append(loose)
    return found
