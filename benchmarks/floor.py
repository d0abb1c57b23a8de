"""The Python floor of the speed report: what one thread of an interpreter can do that keeps no promise but a flush's.

    python -m benchmarks.floor SOCKET SIZE_BYTES FILE

It serves a file on a unix socket: all requests of a receive buffer in one pass, `preadv`, `pwrite`, one `sendmsg`, as
the daemon that it is compared with. A flush is an `fdatasync` in another thread, one for all who wait. There is no map,
no journal, no limit, no metric, no event loop but epoll, and a client that asks for anything else than fio's nbd engine
does is hung up on: what it takes is what the socket, the file and the interpreter take.
"""

import contextlib
import os
import queue
import select
import socket
import struct
import sys
import threading
from collections import deque

# "Fixed newstyle negotiation" of the NBD protocol document
GREETING = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 1 | 2)
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
OPTION_REPLY_MAGIC = 0x0003E889045565A9
OPT_INFO, OPT_GO, OPT_STRUCTURED_REPLY = 6, 7, 8
REP_ACK, REP_INFO, REP_ERR_UNSUP = 1, 3, 0x80000001
EXPORT_FLAGS = 1 << 0 | 1 << 2 | 1 << 8  # HAS_FLAGS, SEND_FLUSH, CAN_MULTI_CONN

# "Transmission"
REQUEST = struct.Struct(">IHHQQI")
SIMPLE_REPLY = struct.Struct(">IIQ")
DATA_CHUNK = struct.Struct(">IHHQIQ")
REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
CMD_READ, CMD_WRITE, CMD_FLUSH = 0, 1, 3

BUFFER_BYTES = 16 << 20
BATCH_BYTES = 128 << 10  # of data read before it is sent: what stays in the processor's cache
BATCH_PARTS = 1000  # one sendmsg takes 1,024


class Connection:
    """A client that has chosen the export. Replies are sent to the end: such clients receive while they send."""

    def __init__(self, sock: socket.socket, fd: int, size_bytes: int, flushes: "Flushes") -> None:
        self._sock = sock
        self._fd = fd
        self._size = size_bytes
        self._flushes = flushes
        self._view = memoryview(bytearray(BUFFER_BYTES))
        self._arena = memoryview(bytearray(BUFFER_BYTES))
        self._low = self._high = 0

    def serve(self) -> bool:
        """Answer what has arrived; False when the client is done with."""
        if self._low == self._high:
            self._low = self._high = 0
        elif self._high == BUFFER_BYTES:
            kept = self._high - self._low
            self._view[:kept] = self._view[self._low : self._high]
            self._low, self._high = 0, kept
        received = self._sock.recv_into(self._view[self._high :], 0, socket.MSG_DONTWAIT)
        self._high += received
        goes_on = received > 0
        while goes_on and self._high - self._low >= REQUEST.size:
            before = self._low
            goes_on = self._batch()
            if self._low == before:
                break  # the rest of a payload is to come
        return goes_on

    def _batch(self) -> bool:
        view, arena, low, high, used = self._view, self._arena, self._low, self._high, 0
        out: list[bytes | memoryview] = []
        known = True
        while high - low >= REQUEST.size and used < BATCH_BYTES and len(out) < BATCH_PARTS:
            magic, _, command, cookie, offset, length = REQUEST.unpack_from(view, low)
            known = magic == REQUEST_MAGIC and offset + length <= self._size
            if not known:
                break
            if command == CMD_READ:
                into = arena[used : used + length]
                os.preadv(self._fd, (into,), offset)
                out.append(DATA_CHUNK.pack(STRUCTURED_REPLY_MAGIC, 1, 1, cookie, length + 8, offset))
                out.append(into)
                used += length
            elif command == CMD_WRITE:
                if high - low < REQUEST.size + length:
                    break
                os.pwrite(self._fd, view[low + REQUEST.size : low + REQUEST.size + length], offset)
                out.append(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie))
                low += length
            elif command == CMD_FLUSH:
                self._flushes.asked.put((self, cookie))
            else:
                known = False
                break
            low += REQUEST.size
        self._low = low
        if out:
            send(self._sock, out)
        return known

    def close(self) -> None:
        """Hang up: nbdcopy waits for that."""
        self._sock.close()

    def flushed(self, cookie: int) -> None:
        """Answer a flush."""
        send(self._sock, [SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)])


class Flushes:
    """A thread that syncs, and what it has synced for."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.asked: queue.SimpleQueue[tuple[Connection, int]] = queue.SimpleQueue()
        self.done: deque[tuple[Connection, int]] = deque()
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            together = [self.asked.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    together.append(self.asked.get_nowait())
            os.fdatasync(self._fd)
            self.done.extend(together)
            os.eventfd_write(self.bell, 1)

    def answer(self) -> None:
        """Tell those whose flush is done."""
        os.eventfd_read(self.bell)
        while self.done:
            connection, cookie = self.done.popleft()
            with contextlib.suppress(OSError):  # it may have gone
                connection.flushed(cookie)


def send(sock: socket.socket, parts: list[bytes | memoryview]) -> None:
    """Send all of ``parts``, also where the socket does not wait."""
    try:
        sent = sock.sendmsg(parts)
    except BlockingIOError:
        sent = 0
    for part in parts:
        left = memoryview(part)[min(sent, len(part)) :]
        sent -= len(part) - len(left)
        while left:
            try:
                left = left[sock.send(left) :]
            except BlockingIOError:
                select.select((), (sock,), ())


def negotiate(sock: socket.socket, size_bytes: int) -> bool:
    """True when the client has chosen the export, which it gets under every name; it must take structured replies."""
    sock.sendall(GREETING)
    sock.recv(4, socket.MSG_WAITALL)
    structured = False
    while len(header := sock.recv(OPTION.size, socket.MSG_WAITALL)) == OPTION.size:
        _, option, length = OPTION.unpack(header)
        sock.recv(length, socket.MSG_WAITALL)
        kind = REP_ACK if option in (OPT_INFO, OPT_GO, OPT_STRUCTURED_REPLY) else REP_ERR_UNSUP
        if option in (OPT_INFO, OPT_GO):
            info = struct.pack(">HQH", 0, size_bytes, EXPORT_FLAGS)
            sock.sendall(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, REP_INFO, len(info)) + info)
        sock.sendall(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, 0))
        structured = structured or option == OPT_STRUCTURED_REPLY
        if option == OPT_GO:
            return structured
    return False


def main(path: str, size_bytes: int, image: str) -> None:
    """Serve until killed."""
    fd = os.open(image, os.O_RDWR)
    flushes = Flushes(fd)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    connections: dict[int, Connection] = {}
    poll = select.epoll()
    poll.register(listener.fileno(), select.EPOLLIN)
    poll.register(flushes.bell, select.EPOLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready == flushes.bell:
                flushes.answer()
            elif ready == listener.fileno():
                sock, _ = listener.accept()
                with contextlib.suppress(OSError):
                    if negotiate(sock, size_bytes):
                        connections[sock.fileno()] = Connection(sock, fd, size_bytes, flushes)
                        poll.register(sock.fileno(), select.EPOLLIN)
            else:
                with contextlib.suppress(OSError):
                    if connections[ready].serve():
                        continue
                poll.unregister(ready)
                connections.pop(ready).close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
