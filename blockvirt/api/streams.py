"""Snapshots out and in as streams of bytes: bodies of any length, which pass through a piece at a time.

What is wrong before the first byte of an answer is a problem document. After it the connection is cut, without the end
that a chunked body has, so that no client takes half a stream for a whole one.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from aiohttp import HttpVersion11, web

from blockvirt.api import answers
from blockvirt.api.guards import check_coding
from blockvirt.api.problems import MEDIA_TYPE, REQUEST_ID
from blockvirt.api.services import Services
from blockvirt.api.snapshot_models import SnapshotsImported
from blockvirt.errors import BlockvirtError, InvalidRequest, Overloaded, StreamDamaged, WrongMediaType
from blockvirt.limits import API_MAX_STREAMS, STREAM_IDLE_S
from blockvirt.snapshots.export import SnapshotExport

log = logging.getLogger("blockvirt.api")

STREAM_TYPE = "application/octet-stream"
CHANGED_BYTES = "X-Blockvirt-Changed-Bytes"
"""How many bytes the ranges of a stream cover, before compression: what progress is measured against."""
EXPORT = ("GET", "/v1/snapshots/{snapshot}/stream")
IMPORT = ("POST", "/v1/volumes/{volume}/import")
ROUTES = (EXPORT, IMPORT)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Streams:
    """The two resources, and how many of them are in use."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._running = 0

    def add_to(self, app: web.Application) -> None:
        """Add the routes."""
        app.router.add_route(*EXPORT, self.send)
        app.router.add_route(*IMPORT, self.receive)

    async def send(self, request: web.Request) -> web.StreamResponse:
        """Answer with the stream of a snapshot."""
        since = _since(request)
        with self._bound():
            async with self._services.exports.export(request.match_info["snapshot"], since) as export:
                response = web.StreamResponse(headers={CHANGED_BYTES: str(export.header.changed_bytes)})
                response.content_type = STREAM_TYPE
                if request.version >= HttpVersion11:
                    response.enable_chunked_encoding()
                await response.prepare(request)
                if not await _sent(request, response, export) and request.transport is not None:
                    request.transport.abort()
                return response

    async def receive(self, request: web.Request) -> web.StreamResponse:
        """Import the streams in a body, one behind the other."""
        if request.query:
            raise InvalidRequest(
                f"there is no query parameter {next(iter(request.query))[:80]!r} here", correction="leave it out"
            )
        _check_type(request)
        services = self._services
        with self._bound():
            records = await services.imports.run(request.match_info["volume"], _pieces(request))
        endpoints = services.endpoints()
        views = [await services.snapshots.get(record.id) for record in records]
        made = SnapshotsImported(snapshots=[answers.snapshot(view, endpoints) for view in views])
        body = made.model_dump_json(exclude_none=True).encode()
        return web.Response(status=201, body=body, content_type="application/json")

    @contextmanager
    def _bound(self) -> Iterator[None]:
        """Count a stream; raises Overloaded where there are too many."""
        if self._running >= API_MAX_STREAMS:
            raise Overloaded(
                f"{self._running} snapshot streams are running already, which is the most",
                correction="wait for one of them to end",
            )
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


async def _sent(request: web.Request, response: web.StreamResponse, export: SnapshotExport) -> bool:
    """Send the stream; False where it cannot be sent to its end, and the log says why."""
    what = f"request {request[REQUEST_ID]}: the stream of snapshot {export.header.snapshot.name}"
    try:
        async with aclosing(export.blocks()) as blocks:
            async for block in blocks:
                async with asyncio.timeout(STREAM_IDLE_S):
                    await response.write(block)
        await response.write_eof()
    except BlockvirtError as error:
        log.warning("%s is cut: %s; %s", what, error.message, error.cause)
    except TimeoutError:
        log.warning("%s is cut: nothing was taken for %g s", what, STREAM_IDLE_S)
    except ConnectionError:
        log.info("%s: its receiver has gone", what)
    except Exception:
        log.exception("%s is cut", what)
    else:
        return True
    return False


async def _pieces(request: web.Request) -> AsyncIterator[bytes]:
    """Yield a body as it arrives; raises StreamDamaged where it breaks off."""
    while True:
        try:
            async with asyncio.timeout(STREAM_IDLE_S):
                piece = await request.content.readany()
        except TimeoutError:
            raise StreamDamaged(
                f"nothing more of the stream has come for {STREAM_IDLE_S:g} s",
                correction="look at its sender; nothing of what had come is kept",
            ) from None
        except (web.RequestPayloadError, ConnectionError) as error:
            raise StreamDamaged(
                "the request breaks off within its body",
                cause=str(error)[:200],
                correction="send it again; nothing of what had come is kept",
            ) from None
        if not piece:
            return
        yield piece


def _since(request: web.Request) -> str | None:
    for name in request.query:
        if name != "since" or len(request.query.getall(name)) > 1:
            raise InvalidRequest(f"the query parameter {name[:80]!r} is not taken here", correction="'since', once")
    return request.query.get("since")


def _check_type(request: web.Request) -> None:
    """Return if the body is declared as what it is: no page can have a browser send that to another site unasked."""
    check_coding(request, "a stream is compressed within itself")
    if request.content_type != STREAM_TYPE:
        raise WrongMediaType(
            f"a stream of type {request.headers.get('Content-Type', '(none)')[:80]!r} is not taken",
            correction=f"send it as it was exported, with 'Content-Type: {STREAM_TYPE}'",
        )


def describe(paths: dict[str, Any]) -> None:
    """Add both resources to those of the OpenAPI document, which has the schema of a snapshot already."""
    stream = {STREAM_TYPE: {"schema": {"type": "string", "format": "binary"}}}
    snapshot = {"type": "array", "items": {"$ref": "#/components/schemas/Snapshot"}}
    imported = {"type": "object", "properties": {"snapshots": snapshot}, "required": ["snapshots"]}
    paths[EXPORT[1]] = {
        "get": {
            "operationId": "export_snapshot",
            "summary": "Export a snapshot as a stream: whole, or what differs from another one",
            "tags": ["snapshots"],
            "parameters": [
                _text("snapshot", "path", "An id, or VOLUME@SNAPSHOT."),
                _text("since", "query", "The snapshot that the receiver has already: an id, or VOLUME@SNAPSHOT."),
            ],
            "responses": {
                "200": {
                    "description": "The stream, cut off where it cannot be sent to its end",
                    "headers": {CHANGED_BYTES: {"schema": {"type": "integer"}}},
                    "content": stream,
                },
                **_problems(403, 404, 422, 500, 503),
            },
        }
    }
    paths[IMPORT[1]] = {
        "post": {
            "operationId": "import_snapshots",
            "summary": "Import snapshot streams: into a new volume, or one that holds what they go on from",
            "tags": ["snapshots"],
            "parameters": [_text("volume", "path", "The volume to make, or to continue.")],
            "requestBody": {"required": True, "content": stream},
            "responses": {
                "201": {"description": "All are there", "content": {"application/json": {"schema": imported}}},
                **_problems(403, 404, 409, 415, 422, 500, 503, 507),
            },
        }
    }


def _text(name: str, place: str, description: str) -> dict[str, Any]:
    required = place == "path"
    return {"name": name, "in": place, "required": required, "description": description, "schema": {"type": "string"}}


def _problems(*statuses: int) -> dict[str, Any]:
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {str(status): {"description": "A problem", "content": content} for status in statuses}
