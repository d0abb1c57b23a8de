"""Streams over HTTP: bodies that are no JSON, of any length; what breaks off is known to be cut."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from blockvirt.api.streams import CHANGED_BYTES, STREAM_TYPE
from blockvirt.limits import API_MAX_BODY_BYTES, API_MAX_STREAMS
from tests.api.conftest import PoolApi, serve_pool
from tests.snapshots.stream_pools import pieces
from tests.volumes.conftest import findings, until

MIB = 1 << 20
HEADERS = {"Content-Type": STREAM_TYPE}


@pytest.fixture
async def here(short_tmp_path: Path) -> AsyncIterator[PoolApi]:
    (short_tmp_path / "a").mkdir()
    async with serve_pool(short_tmp_path / "a") as served:
        yield served


@pytest.fixture
async def there(short_tmp_path: Path) -> AsyncIterator[PoolApi]:
    (short_tmp_path / "b").mkdir()
    async with serve_pool(short_tmp_path / "b") as served:
        yield served
        await served.until_reclaimed()
        assert findings(served.pool, leaks=True) == []


async def with_snapshot(api: PoolApi, content: bytes) -> None:
    """A volume 'web' that holds ``content``, and its snapshot 's'."""
    await api.ok("POST", "/v1/volumes", {"name": "web", "size": len(content)})
    await api.write("web", 0, content)
    await api.ok("POST", "/v1/snapshots", {"volume": "web", "name": "s"})


async def import_from(api: PoolApi, volume: str, body: object) -> tuple[int, dict[str, object]]:
    url = f"http://blockvirt/v1/volumes/{volume}/import"
    async with api.unix.post(url, data=body, headers=HEADERS) as answer:
        return answer.status, await answer.json(content_type=None)


async def test_from_one_daemon_into_the_other_without_a_stop(here: PoolApi, there: PoolApi) -> None:
    content = os.urandom(3 * MIB) + bytes(2 * MIB) + b"end" * 4096
    content += bytes(-len(content) % 512)
    await with_snapshot(here, content)
    async with here.unix.get("http://blockvirt/v1/snapshots/web@s/stream") as stream:
        assert stream.content_type == STREAM_TYPE
        assert int(stream.headers[CHANGED_BYTES]) >= 3 * MIB + 3 * 4096 > API_MAX_BODY_BYTES
        status, made = await import_from(there, "copy", stream.content.iter_any())
    assert status == 201, made
    assert [(each["volume"], each["name"], each["size_bytes"]) for each in made["snapshots"]] == [  # type: ignore[attr-defined]
        ("copy", "s", len(content))
    ]
    assert await there.read("copy", 0, len(content)) == content


async def test_what_is_wrong_before_the_first_byte_is_a_problem(here: PoolApi) -> None:
    await with_snapshot(here, b"x" * 4096)
    assert await here.refused("GET", "/v1/snapshots/web@none/stream") == (404, "not-found")
    assert await here.refused("GET", "/v1/snapshots/web@s/stream?since=web@none") == (404, "not-found")
    assert await here.refused("GET", "/v1/snapshots/web@s/stream?until=now") == (422, "invalid-argument")
    for headers in ({"Content-Type": "text/plain"}, HEADERS | {"Content-Encoding": "gzip"}):
        answer = await here.call("POST", "/v1/volumes/copy/import", data=b"x", headers=headers)
        assert (answer.status, answer.json["code"]) == (415, "unsupported-media-type")
    for body in (b"", b"no stream at all"):
        assert (await import_from(here, "copy", body))[1]["code"] == "stream-damaged"
    answer = await here.call(
        "POST", "/v1/volumes/copy/import", data=b"", headers=HEADERS | {"Origin": "http://evil"}, tcp=True
    )
    assert (answer.status, answer.json["code"]) == (403, "foreign-origin")


@pytest.mark.parametrize("path", ["/v1/volumes/copy/import", "/v1/volumes"])
@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "none-such"])
async def test_a_coded_body_is_refused_without_a_look_at_it(
    here: PoolApi, caplog: pytest.LogCaptureFixture, path: str, coding: str
) -> None:
    """Whether it is what it says or not: the rest of it arrives behind the answer, and is only read away."""
    kind = STREAM_TYPE if path.endswith("import") else "application/json"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Encoding: {coding}\r\n"
    reader, writer = await asyncio.open_unix_connection(here.services.endpoints().http_socket)
    writer.write(f"{head}Content-Length: 1000\r\n\r\n".encode() + b"z" * 500)
    answer = await reader.readuntil(b"}")
    assert b" 415 " in answer.partition(b"\r\n")[0]
    assert b"application/problem+json" in answer
    assert f"content coding '{coding}'".encode() in answer
    writer.write(b"q" * 500 + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert b" 200 " in (await reader.read()).partition(b"\r\n")[0], "the connection is in order"
    writer.close()
    await writer.wait_closed()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_stream_that_cannot_go_on_is_cut(here: PoolApi) -> None:
    await with_snapshot(here, os.urandom(16 * MIB))
    async with here.unix.get("http://blockvirt/v1/snapshots/web@s/stream") as stream:
        await stream.content.readexactly(1000)
        await here.ok("DELETE", "/v1/snapshots/web@s?force=true")
        with pytest.raises(aiohttp.ClientPayloadError):
            await stream.read()
    assert await here.refused("GET", "/v1/snapshots/web@s") == (404, "not-found")


async def test_a_receiver_that_goes_away_lets_go_of_the_snapshot(here: PoolApi) -> None:
    await with_snapshot(here, os.urandom(16 * MIB))
    async with here.unix.get("http://blockvirt/v1/snapshots/web@s/stream") as stream:
        await stream.content.readexactly(1000)
        assert (await here.ok("GET", "/v1/snapshots/web@s"))["sessions"] == 1
        assert await here.refused("DELETE", "/v1/snapshots/web@s") == (409, "in-use")
        stream.close()
    snapshot = here.services.snapshots.find("web@s").id
    await until(lambda: not here.readers.sessions_of(snapshot))
    await here.ok("DELETE", "/v1/snapshots/web@s")


async def test_a_sender_that_goes_away_leaves_nothing(here: PoolApi, there: PoolApi) -> None:
    await with_snapshot(here, os.urandom(4 * MIB))
    async with here.unix.get("http://blockvirt/v1/snapshots/web@s/stream") as answer:
        stream = await answer.read()
    halfway = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield stream[: 2 * MIB]
        halfway.set()
        await asyncio.Event().wait()

    sending = asyncio.create_task(import_from(there, "copy", half()))
    await halfway.wait()
    await until(lambda: bool(there.services.imports.running))
    assert await there.refused("DELETE", "/v1/volumes/copy?force=true") == (409, "in-use")
    assert (await there.ok("GET", "/v1/volumes/copy"))["name"] == "copy"
    sending.cancel()
    await until(lambda: not there.services.imports.running)
    assert (await there.ok("GET", "/v1/volumes"))["volumes"] == []
    status, _ = await import_from(there, "copy", pieces(stream, MIB))
    assert status == 201


async def test_only_so_many_streams_at_once(here: PoolApi) -> None:
    stop = asyncio.Event()

    async def resting() -> AsyncIterator[bytes]:
        yield b"\x89BVS"
        await stop.wait()

    running = [asyncio.create_task(import_from(here, f"v{number}", resting())) for number in range(API_MAX_STREAMS)]
    answer = await here.call("GET", "/v1/snapshots/none@s/stream")
    while answer.status == 404:  # until all of them have begun
        answer = await here.call("GET", "/v1/snapshots/none@s/stream")
    assert (answer.status, answer.json["code"]) == (503, "overloaded")
    stop.set()
    assert {refused["code"] for _, refused in await asyncio.gather(*running)} == {"stream-damaged"}
    assert await here.refused("GET", "/v1/snapshots/none@s/stream") == (404, "not-found")
