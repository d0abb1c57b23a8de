"""Processes that a benchmark starts, asks whether they serve, and ends."""

import http.client
import os
import socket
import subprocess
import sys
from pathlib import Path

START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 60.0
COMMAND_DEADLINE_S = 60.0
CHECKOUT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """Ours, with this checkout's package in front, no other daemon's address, and bytecode kept as by an installation.

    Compiling anew at each start would be half a second of it.
    """
    others = ("BLOCKVIRT_URL", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if name not in others} | {"PYTHONPATH": str(CHECKOUT)}


def blockvirt(state: Path, *arguments: str) -> list[str]:
    """The command line of `blockvirt -s STATE ...` with this interpreter."""
    return [sys.executable, "-m", "blockvirt", "-s", str(state), *arguments]


def accepts(path: Path) -> bool:
    """Whether somebody listens on this unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
        return True


def answers_ready(path: Path) -> bool:
    """Whether GET /readyz over this unix socket answers 200."""
    connection = http.client.HTTPConnection("localhost", timeout=START_DEADLINE_S)
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
            connection.sock = client
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except OSError:
            return False


def end(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, and SIGKILL for who does not listen."""
    process.terminate()
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
