"""The command line's HTTP against a peer that says, byte for byte, what a test wants it to say."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import BinaryIO

import pytest

from blockvirt.cli import connection
from blockvirt.cli.client import Client, Unreachable, address_of, query_of, segment
from blockvirt.cli.connection import Connection, NotHttp
from blockvirt.errors import InvalidRequest

DEADLINE_S = 30.0
OK = b"HTTP/1.1 200 OK\r\n"


class Peer:
    """A server whose every connection is a list of answers; it keeps the requests that it got."""

    def __init__(self, *connections: list[bytes]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(DEADLINE_S)
        self.port: int = self._listener.getsockname()[1]
        self._connections = connections
        self.requests: list[bytes] = []
        self.accepted = 0
        self.thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        for answers in self._connections:
            sock, _ = self._listener.accept()
            self.accepted += 1
            sock.settimeout(DEADLINE_S)
            # A client that has seen enough hangs up while it is still being told more.
            with suppress(ConnectionError), sock, sock.makefile("rb") as stream:
                for answer in answers:
                    self.requests.append(_request(stream))
                    for part in answer.split(b"|"):  # what follows must be found without being in the same segment
                        sock.sendall(part)

    def connect(self) -> socket.socket:
        """A connection of a client."""
        return socket.create_connection(("127.0.0.1", self.port), DEADLINE_S)


def _request(stream: BinaryIO) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            return head
        head += line
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")), 0)
    return head + stream.read(length)


@contextmanager
def serving(*connections: list[bytes]) -> Iterator[Peer]:
    """Serve the answers; in the end every connection must have been used."""
    with ExitStack() as stack:
        peer = Peer(*connections)
        stack.callback(peer._listener.close)
        peer.thread.start()
        stack.callback(peer.thread.join, DEADLINE_S)
        yield peer


def fetch(answer: bytes) -> tuple[int, bytes]:
    """The status and body that a client makes of one answer, after which the peer closes."""
    with serving([answer]) as peer:
        client = Connection(peer.connect, "h")
        try:
            answered = client.request("GET", "/", {})
            return answered.status, answered.read()
        finally:
            client.close()


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (OK + b"Content-Length: 5\r\n\r\nhello", 200, b"hello"),
        (OK + b"content-length:5\r\n\r\nhe|llo and more", 200, b"hello"),
        (OK + b"Content-Length: 0\r\n\r\n", 200, b""),
        (b"HTTP/1.1 404 \r\nContent-Length: 1\r\n\r\nx", 404, b"x"),
        (b"HTTP/1.1 500\r\nContent-Length: 1\r\n\r\nx", 500, b"x"),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 7\r\n\r\n", 204, b""),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the| end", 200, b"until the end"),
        (OK + b"\r\n", 200, b""),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 200, b"hello"),
        (
            OK + b"Transfer-Encoding: Chunked\r\n\r\n3;a=b\r\nhe|l\r\n|0000A \r\nlo, world!\r\n0\r\nTrailer: x\r\n\r\n",
            200,
            b"hello, world!",
        ),
        (OK + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", 200, b"ab"),
        (
            b"HTTP/1.1 100 Continue\r\n\r\n|HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n|"
            + OK
            + b"Content-Length: 1\r\n\r\nx",
            200,
            b"x",
        ),
        (OK + b"Content-Length: 200000\r\n\r\n" + bytes(200_000), 200, bytes(200_000)),
    ],
)
def test_bodies_of_every_framing(answer: bytes, status: int, body: bytes) -> None:
    assert fetch(answer) == (status, body)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "closed"),
        (b"NBDMAGICIHAVEOPT\0\3", "breaks off"),
        (b"SSH-2.0-OpenSSH\r\n", "no status line"),
        (b"HTTP/2 200\r\n\r\n", "no status line"),
        (b"HTTP/1.1 099 x\r\n\r\n", "no status line"),
        (OK, "closed"),
        (OK + b"Content-Le", "breaks off"),
        (OK + b"no colon\r\n\r\n", "no header"),
        (OK + b"Name : x\r\n\r\n", "no header"),
        (OK + b"A: b\r\n folded\r\n\r\n", "no header"),
        (OK + b"A: b\r\n" * 20_000, "head is longer"),
        (b"x" * 70_000 + b"\r\n\r\n", "head is longer"),
        (OK + b"Content-Length: 5\r\n\r\nhell", "1 bytes before"),
        (OK + b"Content-Length: -5\r\n\r\nhello", "of the length"),
        (OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", "of the length"),
        (OK + b"Content-Length: " + b"9" * 19 + b"\r\n\r\n", "of the length"),
        (OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "transfer coding"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel", "2 bytes before"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhello\r\n0\r\n\r\n", "longer than it says"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n0x2\r\nab\r\n0\r\n\r\n", "no size"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n", "no size"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n", "closed"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n", "closed"),
    ],
)
def test_what_is_no_whole_answer_is_refused(answer: bytes, why: str) -> None:
    with pytest.raises(NotHttp, match=why):
        fetch(answer)


def test_an_answer_without_end_is_not_read_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CLI_MAX_ANSWER_BYTES", 1000)
    assert fetch(OK + b"Content-Length: 1000\r\n\r\n" + bytes(1000))[1] == bytes(1000)
    with pytest.raises(NotHttp, match="larger than 1000 bytes"):
        fetch(OK + b"\r\n" + bytes(1001))


def test_a_body_is_read_as_it_arrives() -> None:
    """The next block is asked for when the last one is done with: an export need not fit into memory."""
    with serving([OK + b"Content-Length: 150000\r\n\r\n" + bytes(150_000)]) as peer:
        client = Connection(peer.connect, "h")
        assert [len(block) for block in client.request("GET", "/", {}).blocks()] == [65536, 65536, 18928]
        client.close()


def test_requests_are_whole() -> None:
    answer = OK + b"Content-Length: 0\r\n\r\n"
    with serving([answer] * 3) as peer:
        client = Connection(peer.connect, "h:1")
        for method, body in (("GET", b""), ("POST", b"\xff{}"), ("POST", b"")):
            client.request(method, "/a?b=c", {"User-Agent": "x"}, body).read()
        client.close()
    assert peer.requests == [
        b"GET /a?b=c HTTP/1.1\r\nHost: h:1\r\nUser-Agent: x\r\n\r\n",
        b"POST /a?b=c HTTP/1.1\r\nHost: h:1\r\nUser-Agent: x\r\nContent-Length: 3\r\n\r\n\xff{}",
        b"POST /a?b=c HTTP/1.1\r\nHost: h:1\r\nUser-Agent: x\r\nContent-Length: 0\r\n\r\n",
    ]
    assert peer.accepted == 1, "one connection for all"


@pytest.mark.parametrize(
    "first",
    [
        OK + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        OK + b"\r\n{}",
    ],
)
def test_a_closed_connection_is_made_again(first: bytes) -> None:
    with serving([first], [OK + b"Content-Length: 2\r\n\r\n{}"]) as peer:
        client = Connection(peer.connect, "h")
        assert [client.request("GET", "/", {}).read() for _ in range(2)] == [b"{}", b"{}"]
        client.close()
    assert peer.accepted == 2


@pytest.mark.parametrize("read", [0, 1])
def test_an_unread_answer_is_not_taken_for_the_next(read: int) -> None:
    with serving(
        [OK + b"Content-Length: 100000\r\n\r\n" + bytes(100_000)], [OK + b"Content-Length: 1\r\n\r\nx"]
    ) as peer:
        client = Connection(peer.connect, "h")
        unread = client.request("GET", "/", {}).blocks()
        for _ in range(read):
            next(unread)
        second = client.request("GET", "/", {})
        del unread  # collecting the old answer must not close the new connection
        assert second.read() == b"x"
        client.close()


def test_a_daemon_that_never_answers_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockvirt.cli.client.REQUEST_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Client("s", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(Unreachable) as refused:
            client.call("GET", "/")
        assert refused.value.cause == "timed out"
        client.close()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "no status line"),
        (OK + b"Content-Length: 5\r\n\r\nhello", "is no blockvirt"),
        (OK + b"Content-Length: 2\r\n\r\n[]", "is no blockvirt"),
    ],
)
def test_a_stranger_is_told_from_a_daemon(answer: bytes, said: str) -> None:
    with serving([answer]) as peer:
        client = Client("s", f"http://127.0.0.1:{peer.port}")
        with pytest.raises(Unreachable) as refused:
            client.call("GET", "/")
        client.close()
    assert said in refused.value.message + refused.value.cause
    assert b"\r\nHost: 127.0.0.1:%d\r\n" % peer.port in peer.requests[0]


def test_names_and_queries_are_percent_encoded() -> None:
    assert segment("a b/ü?\udcff~") == "a%20b%2F%C3%BC%3F%FF~"
    assert query_of({"limit": 1000, "label": ["a=b", "c&d"], "page_token": "x+y"}) == (
        "limit=1000&label=a%3Db&label=c%26d&page_token=x%2By"
    )


def test_urls() -> None:
    assert address_of("http://127.0.0.1:8470") == ("127.0.0.1", 8470)
    assert address_of("http://[::1]:8470/") == ("::1", 8470)
    assert address_of("http://localhost") == ("localhost", 80)
    for bad, why in (
        ("https://localhost:8470", "no TLS"),
        ("nbd://localhost", "is not the URL"),
        ("http://h:x", "URL"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            address_of(bad)
        assert why in refused.value.message + refused.value.cause


# --- bodies in blocks ------------------------------------------------------------------------------------------------


class StreamPeer:
    """A server of one connection: it reads until a request's body has what it waits for, answers, and reads on."""

    def __init__(self, until: bytes, answer: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._until = until
        self._answer = answer
        self.got = b""
        self.thread = threading.Thread(target=self._serve)

    def connect(self) -> socket.socket:
        """A connection of a client."""
        return socket.create_connection(self._listener.getsockname(), DEADLINE_S)

    def _serve(self) -> None:
        sock, _ = self._listener.accept()
        sock.settimeout(DEADLINE_S)
        with self._listener, sock:
            while self._until not in self.got and (block := sock.recv(65536)):
                self.got += block
            sock.sendall(self._answer)
            with suppress(ConnectionError):
                while sock.recv(65536):
                    pass


@contextmanager
def streamed(until: bytes, answer: bytes) -> Iterator[tuple[StreamPeer, Connection]]:
    """A peer, and a client of it."""
    peer = StreamPeer(until, answer)
    peer.thread.start()
    client = Connection(peer.connect, "peer")
    yield peer, client
    client.close()
    peer.thread.join()


def test_a_body_in_blocks_is_sent_as_they_come() -> None:
    with streamed(b"0\r\n\r\n", OK + b"Content-Length: 2\r\n\r\nok") as (peer, client):
        answer = client.request("POST", "/in", {}, iter([b"one", b"", b"twenty" * 4]))
        assert (answer.status, answer.read()) == (200, b"ok")
    head, _, body = peer.got.partition(b"\r\n\r\n")
    assert b"Transfer-Encoding: chunked" in head
    assert b"Content-Length" not in head
    assert body == b"3\r\none\r\n18\r\n" + b"twenty" * 4 + b"\r\n0\r\n\r\n"


def test_an_answer_before_the_end_ends_the_body() -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b"block" * 10_000

    refusal = b"HTTP/1.1 409 Conflict\r\nContent-Length: 3\r\n\r\nno!"
    with streamed(b"blockblock", refusal) as (_, client):
        answer = client.request("POST", "/in", {}, endless())
        assert (answer.status, answer.read()) == (409, b"no!")
        assert client._socket is None, "half a request is on that connection"
    assert sent
