"""A daemon that answers what a test wants it to, request by request, on the socket where the command line looks."""

import csv
import io
import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

Asked = tuple[str, str, Any]
"""Method, path with query, body."""


class Script:
    """What is answered to which request, and what was asked."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        self.asked: list[Asked] = []

    def on(self, method: str, path: str, *answers: Any, status: int = 200) -> None:
        """Answer requests for ``path`` with these, one after the other; the last one again and again."""
        self._answers[method, path] = [(status, answer) for answer in answers]

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """Return the answer to a request; what is not in the script is a problem document that says so."""
        self.asked.append((method, path, body))
        answers = self._answers.get((method, path))
        if answers is None:
            return 404, {"code": "not-found", "status": 404, "detail": f"not in the script: {method} {path}"}
        return answers.pop(0) if len(answers) > 1 else answers[0]


@contextmanager
def scripted(state_dir: Path) -> Iterator[Script]:
    """Serve a script on the socket of ``state_dir``."""
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, answer = script.answer(self.command, self.path, body)
            raw = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = do_PATCH = do_DELETE = handle_request

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True

    with Server(str(state_dir / "http.sock"), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield script
        finally:
            server.shutdown()
            thread.join()


def volume(name: str, **fields: Any) -> dict[str, Any]:
    """A volume as the API shows it."""
    plain = {"id": f"id-{name}", "name": name, "state": "available", "size_bytes": 4096, "mapped_bytes": 0}
    plain |= {"chunk_bytes": 65536, "labels": {}, "placement": {"devices": [], "labels": {}}, "nbd_uris": []}
    return plain | {"units": [], "sessions": 0, "revision": 1, "created_at": "2026-11-22T02:00:00Z"} | fields


JOB = {"id": "j1", "kind": "reclaim", "subject": "v", "created_at": "2026-11-22T02:00:00Z", "done_units": 3}


def rows(text: str) -> list[dict[str, str]]:
    """CSV as dictionaries."""
    return list(csv.DictReader(io.StringIO(text)))
