"""What is refused before a handler sees it: foreign sites in a browser, bodies that are not JSON, too large, too deep.

A browser can be made to send requests to loopback by any page. It always names the page in Origin where it matters,
and the name it resolved in Host (so DNS rebinding shows there), and it cannot send ``application/json`` across sites
without asking first. On the unix socket there is no browser, only the owner of the file.
"""

import asyncio
import ipaddress
import json
import re
import socket

from aiohttp import web

from blockvirt.errors import BodyTooLarge, ForeignOrigin, InvalidRequest, MalformedRequest, WrongMediaType
from blockvirt.limits import API_BODY_S, API_MAX_BODY_BYTES, API_MAX_JSON_DEPTH

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9.-]{1,253})(:[0-9]{1,5})?", re.ASCII)
_STRINGS_AND_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def check_origin(request: web.Request) -> None:
    """Return if the request is no other site's; raises ForeignOrigin. Only TCP can carry such requests."""
    if _by_unix_socket(request):
        return
    host = request.headers.get("Host", "")
    match = _HOST.fullmatch(host)
    if match is None or not is_loopback(match[1].strip("[]")):
        raise ForeignOrigin(
            f"requests for the host {host[:80]!r} are not answered here",
            cause="a name that is not this machine's loopback may be another site's, in a browser",
            correction="use 127.0.0.1, [::1] or localhost, or the unix socket",
        )
    origin = request.headers.get("Origin")
    if origin is not None and origin.lower() != f"http://{host}".lower():
        raise ForeignOrigin(
            f"requests on behalf of {origin[:80]!r} are not answered here",
            cause="a web page of another origin sent it",
            correction="call the API from a program, or from a page that this daemon served",
        )


def is_loopback(host: str) -> bool:
    """Tell whether ``host`` is a literal loopback address or 'localhost'."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _by_unix_socket(request: web.Request) -> bool:
    connection = request.transport.get_extra_info("socket") if request.transport is not None else None
    return connection is not None and connection.family == socket.AF_UNIX


def check_media_type(request: web.Request) -> None:
    """Return if the body is declared as JSON, in UTF-8 (RFC 8259, 8.1) if it names a charset; raises WrongMediaType."""
    if request.content_type != "application/json":
        raise WrongMediaType(
            f"a body of type {request.headers.get('Content-Type', '(none)')[:80]!r} is not taken",
            correction="send JSON, with 'Content-Type: application/json'",
        )
    if request.charset is not None and request.charset.lower() not in ("utf-8", "utf8"):
        raise WrongMediaType(
            f"JSON in the charset {request.charset[:80]!r} is not taken",
            cause="JSON between programs is UTF-8",
            correction="send UTF-8, with 'Content-Type: application/json'",
        )


def check_coding(request: web.Request, why: str) -> None:
    """Return if the body is sent as it is (RFC 9110, 8.4); raises WrongMediaType, which says ``why``."""
    coding = request.headers.get("Content-Encoding", "identity")
    if coding.lower() != "identity":
        raise WrongMediaType(
            f"a body with the content coding {coding[:80]!r} is not taken",
            cause=why,
            correction="send it as it is, without Content-Encoding",
        )


async def read_body(request: web.Request) -> bytes:
    """Return the whole body.

    Raises WrongMediaType for a compressed one, BodyTooLarge, MalformedRequest for JSON with a key twice in an object,
    and InvalidRequest for JSON that nests too deeply and a body that is broken or takes longer than API_BODY_S.
    """
    check_coding(request, "no legal request is large enough to be worth compressing")
    try:
        async with asyncio.timeout(API_BODY_S):
            raw = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise BodyTooLarge(
            f"the body is larger than {API_MAX_BODY_BYTES} bytes", correction="no legal request needs as much"
        ) from None
    except web.RequestPayloadError as error:
        raise InvalidRequest(
            "the body cannot be read", cause=str(error)[:200], correction="send it whole, with its Content-Length"
        ) from None
    except TimeoutError:  # else it would hold one of the requests that may run at once, for ever
        raise InvalidRequest(
            f"the body did not arrive within {API_BODY_S:g} s", correction="send it whole, with its Content-Length"
        ) from None
    if json_depth(raw) > API_MAX_JSON_DEPTH:
        raise InvalidRequest(
            f"the body nests deeper than {API_MAX_JSON_DEPTH} levels", correction="no legal request nests as deep"
        )
    _check_keys(raw)
    return raw


def _check_keys(raw: bytes) -> None:
    """Return if no object in ``raw`` has a key twice, as far as it is JSON; raises MalformedRequest.

    Numbers stay text: the most that Python makes of a number must not end the search.
    """
    try:
        json.loads(raw.decode(), object_pairs_hook=_distinct, parse_int=str, parse_float=str, parse_constant=str)
    except ValueError:  # no JSON: the parser that takes the request says what is wrong
        pass


def _distinct(pairs: list[tuple[str, object]]) -> None:
    keys = set()
    for key, _ in pairs:
        if key in keys:
            raise MalformedRequest(
                f"the body names {key[:80]!r} twice in one object",
                cause="one program that reads it would take the first, another the last",
                correction="name it once",
            )
        keys.add(key)


def json_depth(raw: bytes) -> int:
    """Return how deeply arrays and objects nest in ``raw``, as far as it is JSON."""
    depth = deepest = 0
    for match in _STRINGS_AND_BRACKETS.finditer(raw):
        token = match[0]
        if token in (b"[", b"{"):
            depth += 1
            deepest = max(deepest, depth)
        elif token in (b"]", b"}"):
            depth -= 1
    return deepest
