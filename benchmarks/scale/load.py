"""Many connections at once, kept busy by one thread: a client that costs less than any server behind it.

Requests are packed beforehand, half of them reads and half writes, and shared by all connections. A reply is told by
its cookie, counted, and answered with the next request. What a connection gets is what the server gives it: the thread
looks at every ready connection once before it looks at any of them again.
"""

import random
import select
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.measure import MeasurementFailed
from blockvirt.nbd import constants as c
from blockvirt.nbd.messages import (
    CLIENT_FLAGS,
    GREETING,
    OPTION,
    OPTION_REPLY,
    REQUEST,
    SIMPLE_REPLY,
    pack_info_request,
)

BLOCK_BYTES = 4 << 10
REQUESTS = 4_096
RECEIVE_BYTES = 256 << 10
TIMEOUT_S = 20.0
_EXPORT = struct.Struct(">HQ")


@dataclass(frozen=True, slots=True)
class Window:
    """From when until when it counts, by the monotonic clock, which all processes share."""

    begins_s: float
    ends_s: float

    @property
    def seconds(self) -> float:
        """How long."""
        return self.ends_s - self.begins_s


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a load."""

    requests: list[int]
    """For each connection."""
    busy_ratio: float
    """Of the window that the client's thread was on a processor: at 1 it measures itself."""


def run(path: str, exports: Sequence[str], depth: int, window: Window) -> Done:
    """Keep so many requests in flight on a connection to each export until the window ends; raises MeasurementFailed.

    The exports must be of one size, and hold data.
    """
    with ExitStack() as stack:
        poll = stack.enter_context(select.epoll())
        connections = {}
        for number, export in enumerate(exports):
            sock, size_bytes = connect(path, export)
            stack.enter_context(sock)
            if not number:
                requests = pack_requests(size_bytes)
            connections[sock.fileno()] = ClosedLoop(sock, requests, number * REQUESTS // len(exports), depth)
            poll.register(sock, select.EPOLLIN)
        before, began_cpu_s = None, 0.0
        while (now := time.monotonic()) < window.ends_s:
            if before is None and now >= window.begins_s:
                before, began_cpu_s = [each.replies for each in connections.values()], time.thread_time()
            for number, _ in poll.poll(0.01, len(connections)):
                connections[number].turn()
        if before is None:
            raise MeasurementFailed("the connections were not there when the window ended")
        busy_ratio = (time.thread_time() - began_cpu_s) / window.seconds
        counts = [each.replies - first for each, first in zip(connections.values(), before, strict=True)]
        return Done(counts, busy_ratio)


class ClosedLoop:
    """One connection with so many requests in flight, whatever it is answered."""

    def __init__(self, sock: socket.socket, requests: list[bytes], first: int, depth: int) -> None:
        """``first`` is the number of the request to begin with."""
        self.replies = self.asked = 0
        self._sock = sock
        self._requests = requests
        self._first = first
        self._left = b""
        self._send(depth)

    def turn(self) -> None:
        """Take the replies that are there, ask as many times again."""
        received = self._sock.recv(RECEIVE_BYTES)
        if not received:
            raise MeasurementFailed("the server closed a connection")
        count, used = count_replies(data := self._left + received)
        self._left = data[used:]
        self.replies += count
        self._send(count)

    def _send(self, count: int) -> None:
        first = self._first + self.asked
        chosen = [self._requests[(first + index) % REQUESTS] for index in range(count)]
        self.asked += count
        self._sock.sendall(b"".join(chosen))


def pack_requests(size_bytes: int) -> list[bytes]:
    """REQUESTS requests at random places; the cookie of a read is even."""
    dice = random.Random(size_bytes)
    data = dice.randbytes(BLOCK_BYTES)
    requests = []
    for cookie in range(REQUESTS):
        command, payload = (c.CMD_WRITE, data) if cookie & 1 else (c.CMD_READ, b"")
        offset = dice.randrange(size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        requests.append(REQUEST.pack(c.REQUEST_MAGIC, 0, command, cookie, offset, BLOCK_BYTES) + payload)
    return requests


def count_replies(data: bytes) -> tuple[int, int]:
    """How many whole replies there are in front, and their bytes; raises MeasurementFailed for anything else."""
    count = at = 0
    while at + SIMPLE_REPLY.size <= len(data):
        magic, error, cookie = SIMPLE_REPLY.unpack_from(data, at)
        if magic != c.SIMPLE_REPLY_MAGIC or error:
            raise MeasurementFailed(f"no good reply: magic {magic:#x}, error {error}")
        end = at + SIMPLE_REPLY.size + (0 if cookie & 1 else BLOCK_BYTES)
        if end > len(data):
            break
        count, at = count + 1, end
    return count, at


def connect(path: str, export: str) -> tuple[socket.socket, int]:
    """A connection in transmission, without structured replies, and the export's bytes; raises MeasurementFailed."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(TIMEOUT_S)
        sock.connect(path)
        stream = sock.makefile("rb", buffering=0)
        _exactly(stream, GREETING.size)
        request = pack_info_request(export, [])
        flags = CLIENT_FLAGS.pack(c.CLIENT_FIXED_NEWSTYLE | c.CLIENT_NO_ZEROES)
        sock.sendall(flags + OPTION.pack(c.OPTION_MAGIC, c.OPT_GO, len(request)) + request)
        size_bytes = 0
        while True:
            _, _, kind, length = OPTION_REPLY.unpack(_exactly(stream, OPTION_REPLY.size))
            payload = _exactly(stream, length)
            if kind & c.REP_ERROR_BIT:
                raise MeasurementFailed(f"{export} was refused: {payload.decode()}")
            if kind == c.REP_ACK:
                return sock, size_bytes
            if _EXPORT.unpack_from(payload.ljust(_EXPORT.size, b"\0"))[0] == c.INFO_EXPORT:
                size_bytes = _EXPORT.unpack_from(payload)[1]
    except BaseException:
        sock.close()
        raise


def _exactly(stream: socket.SocketIO, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = stream.read(size - len(data))
        if not more:
            raise MeasurementFailed("the server closed a connection")
        data += more
    return data
