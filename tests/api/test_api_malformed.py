"""What is not HTTP, or not quite: bytes over a raw socket, answered like every other error and logged in a line."""

import asyncio
import json
import logging
from typing import Any

import pytest
from aiohttp import web

from blockvirt.api import guards
from tests.api.conftest import Api

HOST = b"Host: x\r\n"
POST = b"POST /v1/volumes HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"

NOT_HTTP = {
    "a method that is none": b"G\x00T /v1/pool HTTP/1.1\r\n" + HOST + b"\r\n",
    "no HTTP at all": b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n\r\n",
    "an unknown version": b"GET /v1/pool HTTP/7.3\r\n" + HOST + b"\r\n",
    "two Hosts": b"GET /v1/pool HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
    "a header without a name": b"GET /v1/pool HTTP/1.1\r\n" + HOST + b": x\r\n\r\n",
    "a NUL in a header": b"GET /v1/pool HTTP/1.1\r\n" + HOST + b"A: \x00\r\n\r\n",
    "a long request line": b"GET /v1/volumes/" + b"x" * 20_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "a long header": b"GET /v1/pool HTTP/1.1\r\n" + HOST + b"A: " + b"x" * 20_000 + b"\r\n\r\n",
    "many headers": b"GET /v1/pool HTTP/1.1\r\n" + HOST + b"A: x\r\n" * 500 + b"\r\n",
    "a length that is none": POST + b"Content-Length: many\r\n\r\n{}",
    "a negative length": POST + b"Content-Length: -1\r\n\r\n{}",
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a length and chunks": POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "an unknown transfer coding": POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "a broken first chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n0\r\n\r\n",
}


async def exchange(api: Api, *parts: bytes) -> bytes:
    """Send the parts, one by one, and return all that comes back until the server closes."""
    reader, writer = await asyncio.open_unix_connection(str(api.unix_path))
    for part in parts:
        writer.write(part)
        await writer.drain()
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


def only_problem(answer: bytes) -> dict[str, Any]:
    """The problem document that ``answer`` is, all of it."""
    head, _, body = answer.partition(b"\r\n\r\n")
    problem: dict[str, Any] = json.loads(body)
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    assert int(head.split(b" ")[1]) == problem["status"]
    assert headers["Content-Type"] == "application/problem+json"
    assert headers["X-Request-Id"] == problem["request_id"]
    assert problem["type"] == f"urn:blockvirt:problem:{problem['code']}"
    assert problem["retryable"] is False
    return problem


@pytest.mark.parametrize("sent", NOT_HTTP.values(), ids=NOT_HTTP.keys())
async def test_what_is_not_http_is_a_problem_and_a_line_in_the_log(
    api: Api, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        problem = only_problem(await exchange(api, sent))
    assert (problem["status"], problem["code"]) == (400, "malformed-request")
    assert problem["cause"]
    assert problem["correction"]
    assert "instance" not in problem
    (line,) = [record for record in caplog.records if record.name.startswith(("aiohttp", "blockvirt"))]
    assert (line.levelno, line.exc_info) == (logging.INFO, None)
    assert problem["request_id"] in line.getMessage()
    assert "\n" not in line.getMessage()
    assert (await api.call("GET", "/v1/volumes")).json == {"volumes": []}


async def test_a_connection_that_was_http_ends_the_same_way(api: Api) -> None:
    reader, writer = await asyncio.open_unix_connection(str(api.unix_path))
    writer.write(b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n")
    assert (await reader.readuntil(b'{"status":"ok"}')).startswith(b"HTTP/1.1 200 ")
    writer.write(NOT_HTTP["two Hosts"])
    assert only_problem(await reader.read())["code"] == "malformed-request"
    writer.close()
    await writer.wait_closed()


async def test_a_chunk_that_breaks_while_the_body_is_read(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """aiohttp's parser does not tell the reader of the body then: it is our own limit that ends the wait."""
    reading = asyncio.Event()
    read = web.Request.read

    async def seen(request: web.Request) -> bytes:
        reading.set()
        return await read(request)

    monkeypatch.setattr(web.Request, "read", seen)
    monkeypatch.setattr(guards, "API_BODY_S", 0.05)
    reader, writer = await asyncio.open_unix_connection(str(api.unix_path))
    writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{")
    await reading.wait()
    writer.write(b"}\r\nxyz\r\n\r\n")
    problem = only_problem(await reader.readuntil(b"}"))
    assert (problem["status"], problem["code"]) == (422, "invalid-argument")
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("path", [b"/v1/pool", b"/nowhere"])
async def test_an_expectation_that_nobody_knows(api: Api, path: bytes) -> None:
    head = b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"Connection: close\r\nExpect: wonders\r\n\r\n"
    problem = only_problem(await exchange(api, head))
    assert (problem["code"], problem["instance"]) == ("invalid-argument", path.decode())


async def test_what_fails_outside_of_the_handlers(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(request: web.Request) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(api.server.application.router, "resolve", broken)
    problem = only_problem(await exchange(api, b"GET /v1/pool HTTP/1.1\r\n" + HOST + b"\r\n"))
    assert (problem["status"], problem["code"]) == (500, "internal")
    (line,) = [record for record in caplog.records if record.exc_info]
    assert problem["request_id"] in line.getMessage()
