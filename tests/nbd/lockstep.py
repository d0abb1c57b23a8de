"""A client in step with the server: no thread, no clock and no size of a kernel buffer decides what comes when.

It sends a batch of requests, and the next one when the server has answered all of it, looks for more and finds nothing:
as early as a client can be back. What it sends arrives whole, or a payload after its header; what it is sent it takes
whole.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from blockvirt.nbd import constants as c
from blockvirt.nbd.messages import DATA_CHUNK, REQUEST, SIMPLE_REPLY


class Request(NamedTuple):
    """One request without flags."""

    command: int
    offset: int = 0
    length: int = 0

    def packed(self, cookie: int) -> bytes:
        """As it is sent."""
        payload = b"x" * self.length if self.command == c.CMD_WRITE else b""
        return REQUEST.pack(c.REQUEST_MAGIC, 0, self.command, cookie, self.offset, self.length) + payload

    @property
    def reply_bytes(self) -> int:
        """Size of the reply to it, where structured ones were negotiated."""
        return DATA_CHUNK.size + self.length if self.command == c.CMD_READ else SIMPLE_REPLY.size


class LockstepClient:
    """The client's end of a connection. ``served`` is the socket for the session, which closes it.

    With ``apart`` a payload is on its way only when its header was received, as libnbd and QEMU send them.
    """

    def __init__(self, *, apart: bool = False) -> None:
        self._apart = apart
        theirs, self._sock = socket.socketpair()
        self._sock.setblocking(False)
        self.served = _ServedSocket(self, theirs.detach())
        self.served.setblocking(False)
        self._batches: deque[Sequence[Request]] = deque()
        self._unsent = memoryview(b"")
        self._later: deque[bytes] = deque()
        self._owed_bytes = 0
        self._finished: Callable[[], None] | None = None

    def start(self, batches: Iterable[Sequence[Request]], finished: Callable[[], None]) -> None:
        """Send the first batch now; ``finished`` is called when all of them are answered."""
        self._batches.extend(batches)
        self._finished = finished
        self.go_on()

    def go_on(self) -> None:
        """Send the next batch if the last one is answered, or finish."""
        if self._owed_bytes:
            return
        if self._batches:
            batch = self._batches.popleft()
            self._owed_bytes = sum(request.reply_bytes for request in batch)
            packed = [request.packed(cookie) for cookie, request in enumerate(batch)]
            if self._apart:
                self._later.extend(
                    part for one in packed for part in (one[: REQUEST.size], one[REQUEST.size :]) if part
                )
            else:
                self._later.append(b"".join(packed))
            self.send_later()
        elif self._finished is not None:
            finished, self._finished = self._finished, None
            finished()

    def send_later(self) -> None:
        """Send what comes after all that was received."""
        if self._later and not self._unsent:
            self._unsent = memoryview(self._later.popleft())
            self.push()

    def push(self) -> None:
        """Have as much of the batch in the server's socket as that takes."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except BlockingIOError:
            pass  # again when the server has received some

    def take(self, count: int) -> None:
        """Take bytes that the server has sent."""
        while count:
            taken = len(self._sock.recv(count))
            count -= taken
            self._owed_bytes -= taken
        assert self._owed_bytes >= 0
        asyncio.get_running_loop().call_soon(self.go_on)  # after the reply to a slow request nobody looks for more

    def close(self) -> None:
        """Close the client's end."""
        self._sock.close()


class _ServedSocket(socket.socket):
    """Receives and sends by real system calls, more of them where the kernel's buffers are small; each is one here."""

    def __init__(self, client: LockstepClient, fd: int) -> None:
        super().__init__(fileno=fd)
        self._client = client

    def recv_into(self, buffer: memoryview, *_: int) -> int:  # type: ignore[override]
        received = 0
        try:
            while received < len(buffer) and (more := super().recv_into(buffer[received:])):
                received += more
                self._client.push()
        except BlockingIOError:
            if not received:
                self._client.go_on()
                raise
        self._client.send_later()
        return received

    def sendmsg(self, buffers: Iterable[bytes | memoryview], *_: object) -> int:  # type: ignore[override]
        left = whole = b"".join(buffers)
        while left:
            sent = self.send(left)
            self._client.take(sent)
            left = left[sent:]
        return len(whole)
