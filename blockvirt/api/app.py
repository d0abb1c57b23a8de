"""The application: guards, problems, typed operations, and the few resources that are not JSON of ours."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from blockvirt import __version__
from blockvirt.api import (
    changes,
    hosts,
    jobs,
    models,
    pool,
    schedules,
    scrubs,
    sessions,
    snapshots,
    streams,
    trash,
    volumes,
)
from blockvirt.api.guards import check_origin
from blockvirt.api.openapi import document
from blockvirt.api.operations import Call, Operation, Reply, arguments_of, expected_revision
from blockvirt.api.problems import REQUEST_ID, Handler, answer_problems
from blockvirt.api.services import Services
from blockvirt.errors import Overloaded
from blockvirt.limits import API_MAX_BODY_BYTES, API_MAX_REQUESTS
from blockvirt.meta.records import IdempotencyRecord

__all__ = ["Services", "build"]

OPERATIONS: tuple[Operation, ...] = tuple(
    operation
    for room in (volumes, snapshots, changes, schedules, trash, jobs, scrubs, hosts, pool, sessions)
    for operation in room.operations.all
)
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

RequestHandler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build(services: Services) -> web.Application:
    """Return the application over ``services``; ``api.server`` listens for it. On the event loop that runs it."""
    app = web.Application(
        middlewares=[answer_problems, _bound_requests(), _refuse_foreign], client_max_size=API_MAX_BODY_BYTES
    )
    stopping = asyncio.get_running_loop().create_future()

    async def stop_waiting(app: web.Application) -> None:
        if not stopping.done():
            stopping.set_result(None)

    app.on_shutdown.append(stop_waiting)
    for operation in OPERATIONS:
        app.router.add_route(operation.method, operation.path, _route(operation, services, stopping))
    streams.Streams(services).add_to(app)
    openapi = json.dumps(document(OPERATIONS, __version__)).encode()

    async def show_openapi(request: web.Request) -> web.StreamResponse:
        return web.Response(body=openapi, content_type="application/json")

    async def healthz(request: web.Request) -> web.StreamResponse:
        return _answer(Reply(models.Health(status="ok")))

    async def readyz(request: web.Request) -> web.StreamResponse:
        reason = services.not_ready()
        if not reason:
            return _answer(Reply(models.Health(status="ok")))
        word = reason.partition(":")[0]
        status = word if word in ("starting", "stopping") else "failed"
        return _answer(Reply(models.Health.model_validate({"status": status, "reason": reason}), 503))

    async def metrics(request: web.Request) -> web.StreamResponse:
        render = services.metrics()
        text = await asyncio.to_thread(render)
        return web.Response(body=text, headers={"Content-Type": METRICS_TYPE})

    app.router.add_get("/v1/openapi.json", show_openapi)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    return app


def _bound_requests() -> Middleware:
    """Return a middleware that lets only so many requests run at once."""
    running = 0

    @web.middleware
    async def bound(request: web.Request, handler: Handler) -> web.StreamResponse:
        nonlocal running
        if running >= API_MAX_REQUESTS:
            raise Overloaded(f"{running} requests are running already", correction="ask again in a second")
        running += 1
        try:
            return await handler(request)
        finally:
            running -= 1

    return bound


@web.middleware
async def _refuse_foreign(request: web.Request, handler: Handler) -> web.StreamResponse:
    check_origin(request)
    return await handler(request)


def _route(operation: Operation, services: Services, stopping: asyncio.Future[None]) -> RequestHandler:
    async def handle(request: web.Request) -> web.StreamResponse:
        arguments, raw = await arguments_of(operation, request)
        key = request.headers.get("Idempotency-Key") if operation.idempotent else None
        digest = hashlib.sha256(b"\0".join((request.method.encode(), request.path_qs.encode(), raw))).hexdigest()
        call = Call(
            services=services,
            request_id=request[REQUEST_ID],
            path=request.path,
            expected_revision=expected_revision(request) if operation.conditional else None,
            idempotency_key=key,
            request_sha256=digest,
            stopping=stopping,
        )
        if key is None:
            return _answer(await operation.handler(call, **arguments))
        kept = services.idempotency.find(key, digest)
        if kept is not None:
            return _replay(kept)
        with services.idempotency.running(key):
            reply = await operation.handler(call, **arguments)
            if services.idempotency.find(key, digest) is None:
                text = reply.json()
                location = reply.headers.get("Location", "")
                record = services.idempotency.answer(key, digest, reply.status, text, location)
                await services.idempotency.keep_alone(record)
        return _answer(reply)

    return handle


def _answer(reply: Reply) -> web.Response:
    headers = dict(reply.headers)
    return web.Response(
        status=reply.status, body=reply.json().encode(), content_type="application/json", headers=headers
    )


def _replay(kept: IdempotencyRecord) -> web.Response:
    headers = {"Idempotency-Replayed": "true"}
    if kept.location:
        headers["Location"] = kept.location
    return web.Response(status=kept.status, body=kept.body.encode(), content_type="application/json", headers=headers)
