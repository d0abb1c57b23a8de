"""Requests to the daemon, by its unix socket or by TCP, and its answers or what went wrong with them."""

import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from blockvirt import __version__
from blockvirt.cli.connection import Answer, Connection, NotHttp, connect_unix
from blockvirt.errors import BlockvirtError, InvalidRequest

_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")  # RFC 3986, 2.3
REQUEST_S = 120.0  # deleting with force waits for sessions to end

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_NOT_FOUND, EXIT_CONFLICT, EXIT_NO_SPACE = 1, 2, 3, 4, 5, 6
_EXIT_BY_STATUS = {404: EXIT_NOT_FOUND, 409: EXIT_CONFLICT, 412: EXIT_CONFLICT, 507: EXIT_NO_SPACE}


class Unreachable(BlockvirtError):
    """No daemon answers, or what answers is no blockvirt."""

    code, http_status = "daemon-unreachable", 503


class Refused(BlockvirtError):
    """The daemon answered with a problem document; ``problem`` is all of it."""

    def __init__(self, problem: Mapping[str, Any]) -> None:
        """Take over a problem document of the API."""
        super().__init__(
            str(problem.get("detail") or problem.get("title") or "the request failed"),
            cause=str(problem.get("cause", "")),
            correction=str(problem.get("correction", "")),
        )
        self.problem = problem

    @property
    def exit_code(self) -> int:
        """The exit code that scripts tell failures apart by."""
        return _EXIT_BY_STATUS.get(int(self.problem.get("status", 500)), EXIT_FAILED)


class Client:
    """One daemon. Connects at the first request and keeps the connection."""

    def __init__(self, state_dir: str, url: str | None = None) -> None:
        """Talk to ``url`` (http://HOST:PORT), or without one to the unix socket of ``state_dir``."""
        self._state_dir = state_dir
        self._where = url or os.path.join(state_dir, "http.sock")
        if url is None:
            self._connection = Connection(partial(connect_unix, self._where, REQUEST_S), "localhost")
        else:
            host, port = address_of(url)
            shown = f"[{host}]" if ":" in host else host
            self._connection = Connection(
                partial(socket.create_connection, (host, port), REQUEST_S), shown if port == 80 else f"{shown}:{port}"
            )

    def call(
        self, method: str, path: str, body: Any = None, *, query: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the daemon's JSON answer; raises Refused for a problem document and Unreachable for none."""
        if body is None:
            return self._json(self._request(method, path, query, {}, b""))
        return self._json(
            self._request(method, path, query, {"Content-Type": "application/json"}, json.dumps(body).encode())
        )

    def send_stream(self, path: str, blocks: Iterable[bytes]) -> dict[str, Any]:
        """POST blocks as they come and return the JSON answer; raises as ``call``, and what ``blocks`` raises."""
        return self._json(self._request("POST", path, None, {"Content-Type": "application/octet-stream"}, blocks))

    def take_stream(self, path: str, query: Mapping[str, Any]) -> Iterator[bytes]:
        """Return the blocks of an answer as they come, or raise as ``call``; they raise NotHttp, OSError."""
        response = self._request("GET", path, query, {}, b"")
        if response.status != 200:
            self._json(response)
            raise self._stranger()
        return response.blocks()

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None,
        headers: Mapping[str, str],
        body: bytes | Iterable[bytes],
    ) -> Answer:
        target = path + (f"?{query_of(query)}" if query else "")
        try:
            return self._connection.request(method, target, {"User-Agent": f"blockvirt/{__version__}", **headers}, body)
        except (OSError, NotHttp) as error:
            raise self._unreachable(error) from error

    def _json(self, response: Answer) -> dict[str, Any]:
        try:
            raw = response.read()
        except (OSError, NotHttp) as error:
            raise self._unreachable(error) from error
        try:
            answer = json.loads(raw)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._stranger()
        if response.status >= 400 and "code" in answer:
            raise Refused(answer)
        return answer

    def pages(self, path: str, key: str, query: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the items of a paged list, all pages of it."""
        for page in self.whole_pages(path, query):
            yield from page[key]

    def whole_pages(self, path: str, query: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the pages of a list, with what they say beside their items."""
        asked = {"limit": 1000, **(query or {})}
        while True:
            page = self.call("GET", path, query=asked)
            yield page
            if "next_page_token" not in page:
                return
            asked["page_token"] = page["next_page_token"]

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _stranger(self) -> Unreachable:
        return Unreachable(f"what answers at {self._where} is no blockvirt", correction="check --url and BLOCKVIRT_URL")

    def _unreachable(self, error: Exception) -> Unreachable:
        if isinstance(error, PermissionError):
            return Unreachable(
                f"the daemon at {self._where} may not be asked by this user",
                cause="only the user that runs the daemon may open its socket",
                correction="run the command as that user",
            )
        return Unreachable(
            f"no daemon answers at {self._where}",
            cause=(error.strerror if isinstance(error, OSError) else None) or str(error),
            correction=f"start it with 'blockvirt -s {self._state_dir} serve', or name another one by -s or --url",
        )


def address_of(url: str) -> tuple[str, int]:
    """Return (host, port) of the URL of a daemon, http://HOST[:PORT]; raises InvalidRequest for any other."""
    from urllib.parse import urlsplit  # brings ipaddress along: only where there is a URL

    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname or "", parts.port or 80
        host = host.encode("idna").decode("ascii")
    except ValueError:  # a port or a host that cannot be
        scheme = host = ""
    if scheme == "https":
        raise InvalidRequest(
            f"the daemon cannot be asked by {url!r}",
            cause="this release speaks no TLS",
            correction="write http://127.0.0.1:8470; to another machine, forward that port over ssh",
        )
    if scheme != "http" or not host or parts.path not in ("", "/"):
        raise InvalidRequest(f"{url!r} is not the URL of a daemon", correction="write http://127.0.0.1:8470")
    return host, port


def query_of(values: Mapping[str, Any]) -> str:
    """Return the query part of a URL, without '?'; a list gives its key once for each item."""
    pairs = [(key, item) for key, value in values.items() for item in (value if isinstance(value, list) else [value])]
    return "&".join(f"{segment(key)}={segment(str(item))}" for key, item in pairs)


def segment(text: str) -> str:
    """Return ``text``, percent-encoded (RFC 3986, 2.1), for one place in a path or a query.

    Words of the command line that are not UTF-8 travel as the bytes they are.
    """
    octets = text.encode(errors="surrogateescape")
    return "".join(chr(octet) if octet in _UNRESERVED else f"%{octet:02X}" for octet in octets)
