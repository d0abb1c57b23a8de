"""A command whose stdout or stderr is a terminal."""

import asyncio
import os
import pty
import subprocess
import termios
from typing import Literal

from tests.cli.conftest import ROOT


async def run_on_terminal(
    *command: str, stream: Literal["stdout", "stderr"], width: int, terminal: str = "xterm"
) -> tuple[int | None, str, str]:
    """Return the exit code, what the terminal that is ``stream`` got, and what the other of the two got."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, width))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=theirs if stream == "stdout" else subprocess.PIPE,
        stderr=theirs if stream == "stderr" else subprocess.PIPE,
        cwd=ROOT,
        env=environment | {"TERM": terminal},
    )
    os.close(theirs)
    out, err = await process.communicate()
    seen = b""
    try:
        while block := os.read(ours, 65536):
            seen += block
    except OSError:  # EIO: the other side is closed, and all was read
        pass
    os.close(ours)
    return process.returncode, seen.decode(), (err if stream == "stdout" else out).decode()
