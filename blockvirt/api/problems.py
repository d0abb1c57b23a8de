"""Errors as RFC 9457 problem documents: one shape for everything that can go wrong."""

import logging
import secrets
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from aiohttp import web
from pydantic import ValidationError

from blockvirt.api.models import FieldProblem, Problem
from blockvirt.errors import (
    BlockvirtError,
    BodyTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    OperationPending,
    Overloaded,
)
from blockvirt.limits import API_MAX_BODY_BYTES

log = logging.getLogger("blockvirt.api")

MEDIA_TYPE = "application/problem+json"
REQUEST_ID = web.RequestKey("request_id", str)
RETRY_AFTER_S = 1

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class InvalidFields(InvalidRequest):
    """Fields of a request that do not fit; ``fields`` names each with what is wrong."""

    def __init__(self, what: str, error: ValidationError) -> None:
        """Take over what pydantic found in ``what`` ('the body', 'the query')."""
        self.fields = [
            FieldProblem(pointer="".join(f"/{_escaped(part)}" for part in found["loc"]), detail=found["msg"])
            for found in error.errors(include_url=False, include_context=False, include_input=False)[:20]
        ]
        first = self.fields[0]
        super().__init__(
            f"{what} is not valid: {first.pointer or '/'}: {first.detail}",
            correction="see 'errors'; /v1/openapi.json describes every request",
        )


def _escaped(part: str | int) -> str:
    return str(part)[:80].replace("~", "~0").replace("/", "~1")


def new_request_id() -> str:
    """Return what names a request in its answer and in the log."""
    return secrets.token_hex(8)


def problem_of(error: BlockvirtError, instance: str | None, request_id: str) -> Problem:
    """Return the document for an error of the tree; ``instance`` is the path, None where that is not known."""
    return Problem(
        type=f"urn:blockvirt:problem:{error.code}",
        title=error.code.replace("-", " "),
        status=error.http_status,
        detail=error.message,
        instance=instance,
        code=error.code,
        cause=error.cause or None,
        correction=error.correction or None,
        retryable=error.retryable,
        request_id=request_id,
        details=error.details or None,
        errors=error.fields if isinstance(error, InvalidFields) else None,
    )


def our_mistake(request_id: str) -> BlockvirtError:
    """Return the error for an exception that is none of the tree; the log has it under ``request_id``."""
    return BlockvirtError(
        "the request failed for a reason that is our mistake",
        correction=f"look for request {request_id} in the daemon's log, and report it",
    )


def problem_answer(error: BlockvirtError, instance: str | None, request_id: str) -> web.Response:
    """Return the answer that carries the document for an error of the tree."""
    headers = {"X-Request-Id": request_id}
    if isinstance(error, OperationPending | Overloaded):
        headers["Retry-After"] = str(RETRY_AFTER_S)
    document = problem_of(error, instance, request_id)
    body = document.model_dump_json(exclude_none=True).encode()
    return web.Response(status=document.status, body=body, content_type=MEDIA_TYPE, headers=headers)


@web.middleware
async def answer_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give each request an id, and each failure a problem document; nothing else leaves as an error."""
    request_id = new_request_id()
    request[REQUEST_ID] = request_id
    allow = ""
    try:
        response = await handler(request)
        response.headers.setdefault("X-Request-Id", request_id)
        return response
    except BlockvirtError as failure:
        error = failure
    except web.HTTPException as failure:
        error = translated(request, failure)
        allow = failure.headers.get("Allow", "")
    except Exception:
        log.exception("request %s failed: %s %s", request_id, request.method, request.path)
        error = our_mistake(request_id)
    if error.http_status >= 500:
        log.warning("request %s: %s %s: %s", request_id, request.method, request.path, error.message)
    answer = problem_answer(error, request.path, request_id)
    if allow:
        answer.headers["Allow"] = allow
    return answer


def translated(request: web.BaseRequest, failure: web.HTTPException) -> BlockvirtError:
    """Return the error of the tree for one that aiohttp raised itself."""
    if failure.status == HTTPStatus.NOT_FOUND:
        return NotFound(
            f"there is no resource {request.path[:200]!r}", correction="/v1/openapi.json says what there is"
        )
    if failure.status == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = failure.headers.get("Allow", "")
        return MethodNotAllowed(
            f"{request.method[:20]} is not possible on {request.path[:200]!r}", correction=f"possible are: {allowed}"
        )
    if failure.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return BodyTooLarge(f"the body is larger than {API_MAX_BODY_BYTES} bytes")
    return InvalidRequest(f"the request cannot be understood: {failure.reason}")
