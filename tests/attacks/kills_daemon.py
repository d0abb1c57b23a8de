"""Daemons on one pool, started and killed by this process through the fork server."""

from __future__ import annotations

import json
import mmap
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.attacks.kills_clients import Api, NbdSession
from tests.attacks.kills_model import CHUNK_BYTES
from tests.attacks.kills_seccomp import CallWatch
from tests.attacks.kills_server import CONTROL, CONTROL_BYTES
from tests.real.daemon import CHECKOUT

DEADLINE_S = 30.0
POLL_S = 0.002
SETTINGS = {
    "BLOCKVIRT_CHUNK_SIZE": f"{CHUNK_BYTES // 1024}KiB",
    "BLOCKVIRT_METADATA_RESERVE": "1MiB",
    "BLOCKVIRT_TRASH_S": "3600",
}


class DaemonFailed(AssertionError):
    """A daemon did not start, or did not end, where nobody killed it."""


class ForkServer:
    """The process that forks daemons; see ``kills_server``."""

    def __init__(self, planted: str) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(DEADLINE_S)
        self._listeners: list[int] = []
        command = [sys.executable, "-m", "tests.attacks.kills_server", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                [*command, planted] if planted else command, cwd=CHECKOUT, pass_fds=(theirs.fileno(),)
            )
        self._answer("started")

    def _answer(self, key: str) -> Any:
        """Return what an answer says; what else comes before is kept."""
        while True:
            message, listeners, _, _ = socket.recv_fds(self._channel, 65536, 1)
            if not message:
                raise DaemonFailed("the fork server has ended")
            self._listeners += listeners
            answer = json.loads(message)
            if key in answer:
                return answer[key]
            assert "pid" not in answer

    def start(self, wanted: dict[str, Any]) -> tuple[int, int]:
        """Start a daemon; returns its process and, in the mode ``calls``, the listener (else -1)."""
        self._channel.send(json.dumps(wanted).encode())
        if wanted["mode"] != "calls":
            return self._answer("pid"), -1
        pid = 0
        while not pid or not self._listeners:
            message, listeners, _, _ = socket.recv_fds(self._channel, 65536, 1)
            self._listeners += listeners
            answer = json.loads(message) if message else {}
            pid = answer.get("pid", pid)
            if not answer or not answer.get("watched", True):
                raise DaemonFailed("the daemon cannot be watched: see its log")
        return pid, self._listeners.pop()

    def reap(self, pid: int) -> int:
        """Return the exit code of a daemon that has ended; minus the signal that ended it."""
        self._channel.send(json.dumps({"reap": pid}).encode())
        return int(self._answer("status"))

    def close(self) -> None:
        """End it."""
        self._channel.close()
        try:
            self._process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True, slots=True)
class Shot:
    """How a daemon is to be killed."""

    mode: str = "plain"
    """``calls``, ``lines``, or ``plain``: not by itself."""
    target: int = 0
    """The call or line to die at, from 1 on; 0: none, they are only counted."""
    line: str = ""
    """Among lines: the one to die at, as "FILE:NUMBER", when it is run for the ``target``-th time."""
    listing: str = ""
    """Among lines: the file that says in the end how often each was run."""


class Pool:
    """The folder of a pool under attack, which can be brought back to how it was."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "pool"
        self.state = self.root / "state"
        self.log = folder / "log"
        self.control = folder / "control"
        self.control.write_bytes(bytes(CONTROL_BYTES))
        self.begin()

    def begin(self) -> None:
        """Have the folders of a pool that was never started."""
        self.drop()
        for name in ("disk1", "disk2", "disk3"):
            (self.root / name).mkdir(parents=True)

    def drop(self) -> None:
        """Have nothing."""
        shutil.rmtree(self.root, ignore_errors=True)

    def restore(self, kept: Path) -> None:
        """Have what ``keep`` put there."""
        self.drop()
        subprocess.run(["cp", "-a", str(kept), str(self.root)], check=True)

    def keep(self, kept: Path) -> None:
        """Copy the pool."""
        subprocess.run(["cp", "-a", str(self.root), str(kept)], check=True)

    def log_tail(self) -> str:
        """Return the last lines that the daemons wrote, in one line."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return " | ".join(lines[-6:])


class Daemon:
    """One run of the daemon on a pool; killed at the end where it still runs."""

    def __init__(
        self,
        server: ForkServer,
        pool: Pool,
        shot: Shot = Shot(),
        *,
        armed: bool,
        is_apart: bool,
        settings: Mapping[str, str] = SETTINGS,
    ) -> None:
        """``armed``: calls or lines count from the first on; else from ``arm``. ``settings``: its environment."""
        self.api = Api(pool.state / "http.sock")
        self.watch: CallWatch | None = None
        self._pool = pool
        self._server = server
        self._code = 0
        self._notes = pool.state / "metadata-copies.txt"
        self._notes_before = _inode(self._notes)
        self._stack = ExitStack()
        self._notices = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        address = pool.root.parent / "ready"
        address.unlink(missing_ok=True)
        self._notices.bind(str(address))
        with pool.control.open("r+b") as file:
            self._control = self._stack.enter_context(mmap.mmap(file.fileno(), CONTROL_BYTES))
        self._control[:] = CONTROL.pack(int(armed), shot.target, 0).ljust(CONTROL_BYTES, b"\0")
        wanted = {
            "arguments": ["-s", str(pool.state), "serve", "--http", "none", "--nbd", "none"],
            "environment": {
                **settings,
                "NOTIFY_SOCKET": str(address),
                "BLOCKVIRT_DEVICES": f'["{pool.root}/disk1"]',
            },
            "log": str(pool.log),
            "mode": shot.mode,
            "line": shot.line,
            "listing": shot.listing,
            "control": str(pool.control),
            "is_apart": is_apart,
        }
        self.pid, listener = server.start(wanted)
        self._end = os.pidfd_open(self.pid)
        self._stack.callback(os.close, self._end)
        if listener >= 0:
            self.watch = CallWatch(listener, self.pid, pool.root, shot.target)
            self.watch.is_armed = armed
            self.watch.start()

    def ready(self) -> bool:
        """Wait until it serves; False where it was killed before. Raises DaemonFailed where it cannot start."""
        waited: list[Any] = [self._notices, self._end]  # an object with a descriptor, and a descriptor
        found = select.select(waited, [], [], DEADLINE_S)[0]
        if self._notices in found:
            return True
        if self._end in found and self.reap() == -signal.SIGKILL:
            return False
        raise DaemonFailed(f"the daemon does not start: {self._pool.log_tail()}")

    def arm(self) -> None:
        """Count from now on: once its own work of the start is done, so that each telling counts the same."""
        self._await(lambda: _inode(self._notes) != self._notes_before, "notes where the copies of its metadata are")
        self._control[0] = 1
        if self.watch is not None:
            self.watch.is_armed = True

    def await_sealing(self) -> None:
        """Wait until all chunks of snapshots have checksums."""
        self._await(
            lambda: b'lmdb_entries{table="seals"} 0.0' in self.api.bytes_of("GET", "/metrics"), "has sealed all"
        )

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > end_s:
                raise DaemonFailed(f"the daemon never {what}: {self._pool.log_tail()}")
            time.sleep(POLL_S)

    def session(self, export: str) -> NbdSession:
        """Open an export; raises Died, Refused."""
        return NbdSession(self._pool.state / "nbd.sock", export)

    def reap(self) -> int:
        """Wait for its end and return its exit code; raises DaemonFailed where it does not end."""
        if self.pid:
            if not select.select([self._end], [], [], DEADLINE_S)[0]:
                raise DaemonFailed(f"the daemon does not end: {self._pool.log_tail()}")
            self._code = self._server.reap(self.pid)
            self.pid = 0
            if self.watch is not None:
                self.watch.join(DEADLINE_S)
        return self._code

    def is_dying(self) -> bool:
        """Tell whether it is gone, or goes in the next moment."""
        return not self.pid or bool(select.select([self._end], [], [], DEADLINE_S)[0])

    def is_gone(self) -> bool:
        """Tell whether it is gone by now."""
        return not self.pid or bool(select.select([self._end], [], [], 0)[0])

    def stop(self) -> int:
        """End it as systemd would; returns its exit code."""
        if self.pid:
            os.kill(self.pid, signal.SIGTERM)
        return self.reap()

    def seen(self) -> int:
        """Return how many calls or lines were counted."""
        return self.watch.seen if self.watch is not None else int(CONTROL.unpack_from(self._control)[2])

    @property
    def was_shot(self) -> bool:
        """Whether its shot killed it; known once it was reaped."""
        return self._code == -signal.SIGKILL

    def killed_at(self) -> str:
        """Return what it was about to do when it was killed; empty: it was not killed by its shot."""
        if self.watch is not None:
            return self.watch.killed_at
        return bytes(self._control[CONTROL.size :]).rstrip(b"\0").decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.reap()
        self._stack.close()


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0
