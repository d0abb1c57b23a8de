"""The clients of the daemon that is killed: NBD and HTTP, blocking, exact about what was answered before the end."""

from __future__ import annotations

import http.client
import json
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from tests.real.daemon import UnixHTTPConnection

ANSWER_DEADLINE_S = 20.0
STREAM = "application/octet-stream"


class Died(Exception):
    """The connection ended before the answer: the daemon was killed, or let go of it."""


class Refused(AssertionError):
    """The daemon answered with an error where it must not."""


class NbdSession:
    """One NBD connection to an export."""

    def __init__(self, path: Path, export: str) -> None:
        self.export = export
        self.size_bytes = 0
        self._cookie = 0
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_DEADLINE_S)
        try:
            self._socket.connect(str(path))
            self._negotiate()
        except (ConnectionError, FileNotFoundError) as error:
            self.close()
            raise Died(f"connecting to {export}: {error}") from error
        except BaseException:
            self.close()
            raise

    def _negotiate(self) -> None:
        magic, _, _ = GREETING.unpack(self._exactly(GREETING.size))
        assert magic == c.INIT_MAGIC
        payload = pack_info_request(self.export, ())
        option = OPTION.pack(c.OPTION_MAGIC, c.OPT_GO, len(payload)) + payload
        self._socket.sendall(CLIENT_FLAGS.pack(c.CLIENT_FIXED_NEWSTYLE | c.CLIENT_NO_ZEROES) + option)
        while True:
            _, _, kind, length = OPTION_REPLY.unpack(self._exactly(OPTION_REPLY.size))
            text = self._exactly(length)
            if kind & c.REP_ERROR_BIT:
                raise Refused(f"export {self.export!r} is refused: {text.decode(errors='replace')}")
            if kind == c.REP_ACK:
                return
            if struct.unpack_from(">H", text)[0] == c.INFO_EXPORT:
                self.size_bytes = struct.unpack_from(">HQ", text)[1]

    def _exactly(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            try:
                part = self._socket.recv(length - len(parts))
            except ConnectionError as error:
                raise Died(str(error)) from error
            except TimeoutError:
                raise Refused(f"no answer about {self.export!r} in {ANSWER_DEADLINE_S:g} s") from None
            if not part:
                raise Died("the connection was closed")
            parts += part
        return bytes(parts)

    def start(self, command: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
        """Return a request, whose reply ``answers`` will look for."""
        self._cookie += 1
        return REQUEST.pack(c.REQUEST_MAGIC, flags, command, self._cookie, offset, length) + payload

    def answers(self, requests: Sequence[bytes]) -> list[bool]:
        """Send requests in one piece; return of each whether it was answered before the connection ended.

        Raises Refused where the answer is an error.
        """
        first = self._cookie - len(requests) + 1
        answered = [False] * len(requests)
        try:
            self._socket.sendall(b"".join(requests))
        except ConnectionError:
            pass  # replies to some of them may be there all the same
        while not all(answered):
            try:
                magic, error, cookie = SIMPLE_REPLY.unpack(self._exactly(SIMPLE_REPLY.size))
            except Died:
                return answered
            assert magic == c.SIMPLE_REPLY_MAGIC
            if error:
                raise Refused(f"a request to {self.export!r} failed with error {error}")
            answered[cookie - first] = True
        return answered

    def read(self) -> bytes:
        """Return everything that the export holds; raises Died, Refused."""
        self._socket.sendall(self.start(c.CMD_READ, 0, self.size_bytes))
        _, error, _ = SIMPLE_REPLY.unpack(self._exactly(SIMPLE_REPLY.size))
        if error:
            raise Refused(f"reading {self.export!r} failed with error {error}")
        return self._exactly(self.size_bytes)

    def disconnect(self) -> None:
        """Say goodbye and wait for the server's end; raises nothing where that is dead."""
        try:
            self._socket.sendall(self.start(c.CMD_DISC))
            self._exactly(1)
        except (Died, ConnectionError):
            pass
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


class Api:
    """The HTTP API over its unix socket, one connection for each request."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, method: str, target: str, body: object = None) -> UnixHTTPConnection:
        """Send a request; its answer is had with ``end``. ``body``: bytes are a stream, all else is JSON."""
        connection = UnixHTTPConnection(self._path, ANSWER_DEADLINE_S)
        headers = {"Content-Type": STREAM if isinstance(body, bytes) else "application/json"}
        payload = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, target, payload, headers if body is not None else {})
        except (ConnectionError, FileNotFoundError) as error:
            connection.close()
            raise Died(f"{method} {target}: {error}") from error
        return connection

    def end(self, connection: UnixHTTPConnection, what: str) -> bytes:
        """Return the body of an answer that came to its end; raises Died, Refused."""
        try:
            answer = connection.getresponse()
            content = answer.read()
        except (http.client.HTTPException, ConnectionError) as error:
            raise Died(f"{what}: {error}") from error
        except TimeoutError:
            raise Refused(f"{what} is not answered in {ANSWER_DEADLINE_S:g} s") from None
        finally:
            connection.close()
        if answer.status >= 300:
            raise Refused(f"{what} was answered with {answer.status}: {content.decode(errors='replace')}")
        return content

    def bytes_of(self, method: str, target: str, body: object = None) -> bytes:
        """Do a request and return the body of its answer."""
        return self.end(self.begin(method, target, body), f"{method} {target}")

    def call(self, method: str, target: str, body: object = None) -> dict[str, Any]:
        """Do a request and return its answer; raises Died, Refused."""
        content = self.bytes_of(method, target, body)
        answer: dict[str, Any] = json.loads(content) if content else {}
        return answer
