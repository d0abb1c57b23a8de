"""HTTP/1.1 as a client speaks it to one daemon (RFC 9112): a request at a time over one kept socket.

``http.client`` of the standard library brings ``email`` and ``ssl`` with it, 20 ms that every command would wait for.
Bodies are read and sent block by block, so what is larger than memory can pass through.
"""

import re
import select
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import BinaryIO

from blockvirt.limits import CLI_MAX_ANSWER_BYTES, CLI_MAX_HEAD_BYTES, STREAM_IDLE_S
from blockvirt.unix_listener import check_unix_path

_BLOCK_BYTES = 64 * 1024
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: .*)?")  # section 4
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?")  # section 7.1; extensions are ignored
_WITH_CONTENT = ("POST", "PUT", "PATCH")  # RFC 9110, 8.6: these say their length even if it is 0


class NotHttp(Exception):
    """What came is no answer in HTTP/1.1, or ended in the middle of one."""


class Answer:
    """The answer to one request: status and headers at once, the body as it arrives."""

    def __init__(self, status: int, headers: Mapping[str, str], blocks: Iterator[bytes]) -> None:
        self.status = status
        self.headers = headers
        """By their names in lower case."""
        self._blocks = blocks

    def blocks(self) -> Iterator[bytes]:
        """Yield the body in blocks of at most 64 KiB, once; raises NotHttp, OSError where it breaks off."""
        return self._blocks

    def read(self) -> bytes:
        """Return the whole body; raises NotHttp for one beyond CLI_MAX_ANSWER_BYTES, and as ``blocks`` does."""
        body = bytearray()
        for block in self._blocks:
            body += block
            if len(body) > CLI_MAX_ANSWER_BYTES:
                raise NotHttp(f"the answer is larger than {CLI_MAX_ANSWER_BYTES} bytes")
        return bytes(body)


class Connection:
    """One server. Connects at the first request, keeps the connection, and connects again where it was closed.

    An answer that was not read to its end when the next request is made is lost, and its connection with it.
    """

    def __init__(self, connect: Callable[[], socket.socket], host: str) -> None:
        """``connect`` gives a connected socket with its timeout set; ``host`` is the Host header."""
        self._connect = connect
        self._host = host
        self._socket: socket.socket | None = None
        self._stream: BinaryIO | None = None
        self._answering = False  # from a request on until its answer was read to the end

    def request(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes | Iterable[bytes] = b""
    ) -> Answer:
        """Send a request and return the answer to it; ``target`` is percent-encoded. Raises NotHttp, OSError.

        A body in blocks is sent as they come, without a length; what is left of it is not, once an answer comes.
        """
        if self._answering:
            self.close()
        sock, stream = self._connected()
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self._host}", *(f"{k}: {v}" for k, v in headers.items())]
        whole = True
        self._answering = True
        if isinstance(body, bytes):
            if body or method in _WITH_CONTENT:
                lines.append(f"Content-Length: {len(body)}")
            sock.sendall("\r\n".join([*lines, "", ""]).encode("ascii") + body)
        else:
            sock.sendall("\r\n".join([*lines, "Transfer-Encoding: chunked", "", ""]).encode("ascii"))
            whole = _send_chunks(sock, body)
        minor, status, answered = _head(stream)
        options = answered.get("connection", "").lower().replace(" ", "").split(",")
        keep = whole and "close" not in options and (minor == 1 or "keep-alive" in options)
        return Answer(status, answered, self._body(stream, status, answered, keep=keep))

    def close(self) -> None:
        """Close the connection."""
        for part in (self._stream, self._socket):
            if part is not None:
                part.close()
        self._stream = self._socket = None
        self._answering = False

    def _connected(self) -> tuple[socket.socket, BinaryIO]:
        if self._socket is None or self._stream is None:
            self._socket = self._connect()
            self._stream = self._socket.makefile("rb")
        return self._socket, self._stream

    def _body(self, stream: BinaryIO, status: int, headers: Mapping[str, str], *, keep: bool) -> Iterator[bytes]:
        """Yield the body of the answer that is on the wire, then free the connection for the next request."""
        coding, length = headers.get("transfer-encoding"), headers.get("content-length")
        if status in (204, 304):  # section 6.3, item 1: no body, whatever the headers say
            pass
        elif coding is not None:  # item 4: it overrides a length
            if coding.lower() != "chunked":
                raise NotHttp(f"an answer in the transfer coding {coding[:80]!r}")
            yield from _chunks(stream)
        elif length is not None:  # items 5 and 6
            if not (length.isascii() and length.isdecimal() and len(length) <= 18):
                raise NotHttp(f"an answer of the length {length[:80]!r}")
            yield from _exactly(stream, int(length))
        else:  # item 8: until the server closes
            keep = False
            while block := stream.read(_BLOCK_BYTES):
                yield block
        self._answering = False
        if not keep:
            self.close()


def _send_chunks(sock: socket.socket, blocks: Iterable[bytes]) -> bool:
    """Send a chunked body (section 7.1); False where an answer comes before its end (section 9.5: none is needed)."""
    chunks = (b"%x\r\n%b\r\n" % (len(block), block) for block in blocks if block)  # an empty one would be the end
    return all(_send(sock, chunk) for chunk in chunks) and _send(sock, b"0\r\n\r\n")


def _send(sock: socket.socket, data: bytes) -> bool:
    """Send ``data``; False where the server answers, or closes, instead of taking it. Raises TimeoutError."""
    left = memoryview(data)
    while left:
        readable, writable, _ = select.select([sock], [sock], [], STREAM_IDLE_S)
        if readable:
            return False
        if not writable:
            raise TimeoutError(f"nothing was taken for {STREAM_IDLE_S:g} s")
        try:
            left = left[sock.send(left) :]
        except (BrokenPipeError, ConnectionResetError):
            return False
    return True


def _line(stream: BinaryIO, room_bytes: int) -> bytes:
    """Return the next line without its end, of at most ``room_bytes``; raises NotHttp."""
    line = stream.readline(max(room_bytes, 1))  # below 0 would be without bound
    if not line:
        raise NotHttp("the connection was closed before the answer ended")
    if not line.endswith(b"\n"):
        raise NotHttp(f"a line of the answer breaks off, or its head is longer than {CLI_MAX_HEAD_BYTES} bytes")
    return line.rstrip(b"\r\n")


def _head(stream: BinaryIO) -> tuple[int, int, dict[str, str]]:
    """Return (minor version, status, headers) of the next final answer; raises NotHttp."""
    room_bytes = CLI_MAX_HEAD_BYTES
    while True:
        line = _line(stream, room_bytes)
        match = _STATUS_LINE.fullmatch(line)
        if match is None:
            raise NotHttp(f"{line[:40]!r} is no status line of HTTP/1.1")
        headers, room_bytes = _headers(stream, room_bytes - len(line))
        if not match[2].startswith(b"1"):  # 1xx only announces (RFC 9110, 15.2)
            return int(match[1]), int(match[2]), headers


def _headers(stream: BinaryIO, room_bytes: int) -> tuple[dict[str, str], int]:
    """Return the headers up to the empty line, and what is left of the room; raises NotHttp."""
    headers: dict[str, str] = {}
    while line := _line(stream, room_bytes):
        room_bytes -= len(line) + 2
        name, colon, value = line.decode("latin-1").partition(":")
        if not colon or not name or name != name.strip():  # section 5.1
            raise NotHttp(f"{line[:40]!r} is no header")
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value  # RFC 9110, 5.3
    return headers, room_bytes


def _exactly(stream: BinaryIO, length_bytes: int) -> Iterator[bytes]:
    while length_bytes:
        block = stream.read(min(length_bytes, _BLOCK_BYTES))
        if not block:
            raise NotHttp(f"the connection was closed {length_bytes} bytes before the answer ended")
        length_bytes -= len(block)
        yield block


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the content of a chunked body (section 7.1); its trailers are read and left."""
    while True:
        line = _line(stream, CLI_MAX_HEAD_BYTES)
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise NotHttp(f"{line[:40]!r} is no size of a chunk")
        size_bytes = int(match[1], 16)
        if size_bytes == 0:
            _headers(stream, CLI_MAX_HEAD_BYTES)
            return
        yield from _exactly(stream, size_bytes)
        if _line(stream, CLI_MAX_HEAD_BYTES):
            raise NotHttp("a chunk is longer than it says")


def connect_unix(path: str, timeout_s: float) -> socket.socket:
    """Return a connection to the unix socket ``path``; raises InvalidRequest where none can be, OSError."""
    check_unix_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock
