"""Typed routes: a handler's annotations say what it takes, and both the parser and the OpenAPI document read them.

A handler is ``async def f(call: Call, ...) -> Reply`` with, in any order, a ``str`` or ``int`` parameter for each
placeholder of the path, ``query: Model`` and ``body: Model``. What does not fit the annotations never reaches it.
"""

import asyncio
import inspect
import re
import typing
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web
from pydantic import BaseModel, ValidationError

from blockvirt.api.guards import check_media_type, read_body
from blockvirt.api.problems import InvalidFields
from blockvirt.errors import InvalidRequest, PreconditionFailed

if TYPE_CHECKING:
    from blockvirt.api.services import Services

_PLACEHOLDER = re.compile(r"{(\w+)}")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)  # one resource, one spelling
_ETAG = re.compile(r'"([0-9]{1,18})"', re.ASCII)


@dataclass(frozen=True, slots=True)
class Call:
    """One request, as its handler sees it."""

    services: "Services"
    request_id: str
    path: str
    expected_revision: int | None = None
    """From If-Match."""
    idempotency_key: str | None = None
    request_sha256: str = ""
    """Over method, path, query and body: what an Idempotency-Key stands for."""
    stopping: asyncio.Future[None] = field(kw_only=True)
    """Done when the API stops: who only waits answers then."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a handler answers."""

    body: BaseModel | str
    """One of the operation's models, or the JSON of one, where that is quicker written without it."""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> str:
        """Return the body as it is sent: what is None is left out."""
        return self.body if isinstance(self.body, str) else self.body.model_dump_json(exclude_none=True)


Handler = Callable[..., Awaitable[Reply]]


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one resource."""

    method: str
    path: str
    handler: Handler
    tag: str
    answers: Mapping[int, type[BaseModel]]
    errors: tuple[int, ...]
    path_parameters: Mapping[str, type]
    query: type[BaseModel] | None
    body: type[BaseModel] | None
    idempotent: bool
    """Takes an Idempotency-Key."""
    conditional: bool
    """Takes If-Match."""

    @property
    def needs_body(self) -> bool:
        """Whether the request has to have a body: a POST can go without where everything in it is optional."""
        if self.body is None:
            return False
        return self.method != "POST" or any(each.is_required() for each in self.body.model_fields.values())


class Operations:
    """The operations of one group of resources, collected by a decorator."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.all: list[Operation] = []

    def add(
        self,
        method: str,
        path: str,
        answers: Mapping[int, type[BaseModel]],
        *,
        errors: tuple[int, ...] = (),
        idempotent: bool = False,
        conditional: bool = False,
    ) -> Callable[[Handler], Handler]:
        """Register the decorated handler; ``answers`` are the models by status, ``errors`` the further statuses."""

        def register(handler: Handler) -> Handler:
            hints = typing.get_type_hints(handler)
            placeholders = _PLACEHOLDER.findall(path)
            taken = set(inspect.signature(handler).parameters) - {"call", "query", "body"}
            assert taken == set(placeholders), f"{handler.__name__} does not take what {path} names"
            self.all.append(
                Operation(
                    method,
                    path,
                    handler,
                    self.tag,
                    answers,
                    errors,
                    {name: hints[name] for name in placeholders},
                    hints.get("query"),
                    hints.get("body"),
                    idempotent,
                    conditional,
                )
            )
            return handler

        return register


async def arguments_of(operation: Operation, request: web.Request) -> tuple[dict[str, Any], bytes]:
    """Return the handler's arguments and the raw body; raises what is wrong with them as errors of the tree."""
    arguments: dict[str, Any] = {}
    for name, kind in operation.path_parameters.items():
        arguments[name] = _path_value(name, request.match_info[name], kind)
    if operation.query is not None:
        arguments["query"] = _query(operation.query, request)
    elif request.query:
        raise InvalidRequest(
            f"there is no query parameter {next(iter(request.query))[:80]!r} here",
            correction="leave it out; /v1/openapi.json says what there is",
        )
    raw = await read_body(request)
    if operation.body is not None and not raw and not operation.needs_body:
        arguments["body"] = operation.body()
    elif operation.body is not None:
        check_media_type(request)
        try:
            arguments["body"] = operation.body.model_validate_json(raw)
        except ValidationError as error:
            raise InvalidFields("the body", error) from None
    elif raw:
        raise InvalidRequest("this request takes no body", correction="send it without one")
    return arguments, raw


def _path_value(name: str, text: str, kind: type) -> str | int:
    if kind is str:
        return text
    if _NUMBER.fullmatch(text) is None:
        raise InvalidRequest(
            f"{text[:80]!r} is not a {name}", correction="give a whole number from 0 on, without leading zeros"
        )
    return int(text)


def _query(model: type[BaseModel], request: web.Request) -> BaseModel:
    values: dict[str, Any] = {}
    for name in request.query:
        given = request.query.getall(name)
        known = model.model_fields.get(name)
        if known is not None and typing.get_origin(known.annotation) is list:
            values[name] = given
        elif len(given) > 1:
            raise InvalidRequest(f"the query parameter {name[:80]!r} is given twice", correction="give it once")
        else:
            values[name] = given[0]
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InvalidFields("the query", error) from None


def expected_revision(request: web.Request) -> int | None:
    """Return the revision that If-Match demands, None for none or '*'; raises PreconditionFailed for other ETags."""
    header = request.headers.get("If-Match")
    if header is None or header.strip() == "*":
        return None
    match = _ETAG.fullmatch(header.strip())
    if match is None:
        raise PreconditionFailed(
            f"If-Match {header[:80]!r} is no ETag of this API",
            correction='send the ETag of an earlier answer as it was, such as "3"',
        )
    return int(match[1])


def etag(revision: int) -> dict[str, str]:
    """Return the header that names a revision."""
    return {"ETag": f'"{revision}"'}
