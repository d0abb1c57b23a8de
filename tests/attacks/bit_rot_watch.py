"""Who looks at a rotten pool, and what there is to look at."""

import json
import selectors
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.attacks.bit_rot_damage import Rot
from tests.attacks.bit_rot_pool import Kept, RottingPool
from tests.real.daemon import CHECKOUT

_ANSWER_S = 60.0  # a check takes a twentieth of a second when the machine is quiet, a daemon one second


class Watcher:
    """The process that looks at a pool; a new one where the last has ended."""

    def __init__(self, root: Path, planted: str) -> None:
        self._command = [
            sys.executable,
            "-m",
            "tests.attacks.bit_rot_child",
            str(root),
            *([planted] if planted else []),
        ]
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=CHECKOUT
        )

    def ask(self, what: str, **arguments: object) -> dict[str, Any]:
        """Have it look; the answer, or how it ended: by which signal, where it was one."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"what": what} | arguments).encode() + b"\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            is_there = bool(selector.select(_ANSWER_S))
        line = process.stdout.readline() if is_there else b""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.renew()
        code = process.returncode
        return {"fault": f"it ended with code {code}" if is_there else "it hangs"} | (
            {"signal": -code} if is_there and code < 0 else {}
        )

    def renew(self) -> None:
        """End it as SIGKILL does, with the daemon in it, and take another one."""
        self.close()
        self._process = self._start()

    def close(self) -> None:
        """End it."""
        process = self._process
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        process.wait()


@dataclass(slots=True)
class Side:
    """A pool with its untouched copy, and who looks at it."""

    pool: RottingPool
    kept: Kept
    watcher: Watcher


@dataclass(slots=True)
class Bench:
    """The pools: one at rest, and one whose daemon was killed."""

    rot: Rot
    rest: Side
    killed: Side
    digest: str
    """Of all rows of the pool at rest."""
    files: dict[int, tuple[int, Path]]
    """Branch and path of each backing file of the pool at rest."""
    users: dict[int, frozenset[str]]
    """The volumes that see something of each branch."""
    own_files: dict[str, frozenset[Path]]
    """The backing files of each volume's head, which its new chunks may go to."""
    acknowledged: Path
    """Where it is noted what exports must hold after a trial that wrote to them."""
