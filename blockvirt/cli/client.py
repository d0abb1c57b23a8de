"""Requests to the daemon, by its unix socket or by TCP, with nothing but the standard library."""

import http.client
import json
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from blockvirt import __version__
from blockvirt.errors import BlockvirtError, InvalidRequest

_BYTES = "surrogateescape"  # words of the command line that are not UTF-8 travel as the bytes they are
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


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=REQUEST_S)
        self._path = path

    def connect(self) -> None:
        """Connect to the path."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(REQUEST_S)
        try:
            self.sock.connect(self._path)
        except BaseException:
            self.sock.close()
            raise


class Client:
    """One daemon. Connects at the first request and keeps the connection."""

    def __init__(self, state_dir: str, url: str | None = None) -> None:
        """Talk to ``url`` (http://HOST:PORT), or without one to the unix socket of ``state_dir``."""
        self._state_dir = state_dir
        self._where = url or os.path.join(state_dir, "http.sock")
        if url is None:
            self._connection: http.client.HTTPConnection = _UnixConnection(self._where)
        else:
            parts = urlsplit(url)
            if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
                raise InvalidRequest(f"{url!r} is not the URL of a daemon", correction="write http://127.0.0.1:8470")
            self._connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=REQUEST_S)

    def call(
        self, method: str, path: str, body: Any = None, *, query: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the daemon's JSON answer; raises Refused for a problem document and Unreachable for none."""
        target = path + (f"?{urlencode(query, doseq=True, errors=_BYTES)}" if query else "")
        headers = {"User-Agent": f"blockvirt/{__version__}"}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        try:
            self._connection.request(method, target, body=data, headers=headers)
            response = self._connection.getresponse()
            raw = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        try:
            answer = json.loads(raw)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Unreachable(
                f"what answers at {self._where} is no blockvirt", correction="check --url and BLOCKVIRT_URL"
            )
        if response.status >= 400 and "code" in answer:
            raise Refused(answer)
        return answer

    def pages(self, path: str, key: str, query: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the items of a paged list, all pages of it."""
        asked = {"limit": 1000, **(query or {})}
        while True:
            page = self.call("GET", path, query=asked)
            yield from page[key]
            if "next_page_token" not in page:
                return
            asked["page_token"] = page["next_page_token"]

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _unreachable(self, error: Exception) -> Unreachable:
        if isinstance(error, PermissionError):
            return Unreachable(
                f"the daemon at {self._where} may not be asked by this user",
                cause="only the user that runs the daemon may open its socket",
                correction="run the command as that user",
            )
        return Unreachable(
            f"no daemon answers at {self._where}",
            cause=os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error),
            correction=f"start it with 'blockvirt -s {self._state_dir} serve', or name another one by -s or --url",
        )


def segment(text: str) -> str:
    """Return a name for a place in a path."""
    return quote(text, safe="", errors=_BYTES)
