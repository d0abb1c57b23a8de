"""The daemon as its users run it: `python -m blockvirt serve` in its own process, driven by its CLI and API."""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from tests.real.process import ServerFailed, ServerProcess

CHECKOUT = Path(__file__).resolve().parents[2]
COMMAND_DEADLINE_S = 60.0
HTTP_DEADLINE_S = 30.0


class UnixHTTPConnection(http.client.HTTPConnection):
    """An HTTP connection over a unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path
        self._timeout_s = timeout_s

    def connect(self) -> None:
        """Connect to the socket; raises OSError as a TCP connection would."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self._timeout_s)
        self.sock.connect(str(self._path))


class Daemon(ServerProcess):
    """A daemon over one device directory, with state in `root/state` and its volume named `v`.

    `serve_arguments` are appended to `serve`'s command line.
    """

    def __init__(self, *serve_arguments: str) -> None:
        super().__init__()
        self.state = self.root / "state"
        self.device = self.root / "device"
        self.device.mkdir()
        self.socket = self.state / "nbd.sock"
        self._serve_arguments = serve_arguments

    def environment(self) -> dict[str, str]:
        """Ours, with the checkout's package importable from any directory and no other daemon's address in it."""
        inherited = os.environ.get("PYTHONPATH")
        path = f"{CHECKOUT}{os.pathsep}{inherited}" if inherited else str(CHECKOUT)
        return {name: value for name, value in os.environ.items() if name != "BLOCKVIRT_URL"} | {
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
        }

    def _blockvirt(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "blockvirt", "-s", str(self.state), *arguments]

    def command(self) -> list[str]:
        """`blockvirt serve` on free loopback ports and the state directory's sockets."""
        return self._blockvirt(
            "serve",
            *("--device", str(self.device)),
            *("--http", "127.0.0.1:0"),
            *("--nbd", "127.0.0.1:0"),
            *self._serve_arguments,
        )

    def ready(self) -> bool:
        """Whether `/readyz` answers 200 over the unix socket."""
        try:
            return self.http("GET", "/readyz")[0] == 200
        except OSError:
            return False  # no socket yet, or the last daemon's, which nobody listens on

    def http(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """One API request over the unix socket; `body` is sent as JSON. The status and the body of the answer."""
        connection = UnixHTTPConnection(self.state / "http.sock", HTTP_DEADLINE_S)
        try:
            payload = None if body is None else json.dumps(body).encode()
            headers = {} if payload is None else {"Content-Type": "application/json"}
            connection.request(method, path, payload, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def cli(self, *arguments: str) -> str:
        """Run `blockvirt -s STATE ...`; its standard output. Raises ServerFailed when it fails."""
        done = self._run(*arguments)
        if done.returncode != 0:
            raise ServerFailed(
                f"blockvirt {' '.join(arguments)}: exit code {done.returncode}\n"
                f"{done.stdout}{done.stderr}\n{self.log_tail()}"
            )
        return done.stdout

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._blockvirt(*arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_DEADLINE_S,
            env=self.environment(),
        )

    def create(self, size_bytes: int) -> None:
        """Start the daemon and allocate the volume over its command line."""
        self.start()
        self.cli("volume", "create", self.export, "--size", str(size_bytes))

    def volume(self) -> dict[str, object]:
        """What the API says about the volume."""
        status, body = self.http("GET", f"/v1/volumes/{self.export}")
        if status != 200:
            raise ServerFailed(f"GET /v1/volumes/{self.export}: {status} {body!r}\n{self.log_tail()}")
        shown = json.loads(body)
        assert isinstance(shown, dict)
        return shown

    def tcp_port(self) -> int:
        """The port of the volume's `nbd://` URI."""
        uris = self.volume()["nbd_uris"]
        assert isinstance(uris, list)
        for uri in uris:
            parts = urlsplit(uri)
            if parts.scheme == "nbd" and parts.port is not None:
                return parts.port
        raise ServerFailed(f"no nbd:// URI with a port in {uris}")

    def grow(self, size_bytes: int) -> None:
        """`volume resize --reconnect`: the new size, and every session of the volume dropped."""
        self.cli("volume", "resize", self.export, "--size", str(size_bytes), "--reconnect")

    def recovered(self) -> tuple[bool, int]:
        """What the daemon logs of its recovery; raises ServerFailed when it recovered nothing."""
        found = re.search(rf"volume {self.export} recovered (.+): (\d+) frames", self.log_of_this_start())
        if found is None:
            raise ServerFailed(f"the daemon does not say that it recovered {self.export}\n{self.log_tail()}")
        return found[1] == "completely", int(found[2])

    def check(self) -> None:
        """`blockvirt check` over the stopped daemon's metadata and files must find nothing, not even a leak."""
        assert not self.running, "check is offline: stop the daemon first"
        done = self._run("check")
        if done.returncode != 0:
            raise ServerFailed(
                f"blockvirt check: exit code {done.returncode}\n{done.stdout}{done.stderr}\n{self.log_tail()}"
            )
