"""A server process that tests start, kill without warning, and start again.

Both the daemon and the peers that stand in for it (and prove that the tests can fail) are driven through this class,
so that one test runs against either.
"""

import os
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

START_DEADLINE_S = 30.0  # two cores shared with a guest in TCG: starting takes well under a second when quiet
STOP_DEADLINE_S = 30.0
POLL_S = 0.02
LOG_TAIL_BYTES = 8_192  # what a failure shows of the log


class ServerFailed(AssertionError):
    """The server did not do what a server must (start, stop, pass its own check); carries the end of its log."""


class ServerProcess(ABC):
    """One NBD server with one volume, exported as `export`, with all its files below `root`.

    Sub-classes say how it is started, when it is ready and what proves its files sound.
    """

    export = "v"

    def __init__(self) -> None:
        # Not pytest's tmp_path: a unix socket's path may have 107 bytes only.
        self._directory = tempfile.TemporaryDirectory(prefix="bv-")
        self.root = Path(self._directory.name)
        self.socket = self.root / "nbd.sock"
        self.log = self.root / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    # What differs between servers.

    @abstractmethod
    def command(self) -> list[str]:
        """The command line that serves in the foreground."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether it serves now; must not block longer than a poll."""

    @abstractmethod
    def create(self, size_bytes: int) -> None:
        """Start the server and give it its volume of that size."""

    @abstractmethod
    def check(self) -> None:
        """Prove the stopped server's files sound; raises ServerFailed when they are not."""

    @abstractmethod
    def tcp_port(self) -> int:
        """The loopback TCP port on which the volume is exported too."""

    @abstractmethod
    def grow(self, size_bytes: int) -> None:
        """Make the volume larger while it is in use, and drop its sessions so that clients see the new size."""

    def recovered(self) -> tuple[bool, int] | None:
        """What this start replayed of the last one's journal: whether all of it, and how many frames; None: no journal.

        A kill that finds the journal empty proves little, so tests look.
        """
        return None

    # What does not.

    @property
    def uri(self) -> str:
        """The volume's NBD URI over the unix socket."""
        return f"nbd+unix:///{self.export}?socket={self.socket}"

    @property
    def pid(self) -> int:
        """The running server's process id."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def environment(self) -> dict[str, str]:
        """The environment the server runs in."""
        return dict(os.environ)

    def start(self) -> None:
        """Start the process and wait until it serves."""
        assert not self.running, "the server runs already"
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,
            )
        self.await_ready()

    def await_ready(self) -> None:
        """Wait until the server serves; raises ServerFailed when it ends first or is not ready in time."""

        def ready() -> bool:
            if not self.running:
                code = self._process.returncode if self._process else None
                raise ServerFailed(f"{self.describe()} ended with code {code} before it was ready\n{self.log_tail()}")
            return self.ready()

        self.until(ready, f"{self.describe()} was not ready", START_DEADLINE_S)

    def until(self, condition: Callable[[], bool], failure: str, deadline_s: float) -> None:
        """Poll `condition` until it holds; raises ServerFailed with `failure` and the log after the deadline."""
        end = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > end:
                raise ServerFailed(f"{failure} within {deadline_s:.0f} s\n{self.log_tail()}")
            time.sleep(POLL_S)

    def kill9(self) -> None:
        """End the process with SIGKILL and reap it: it gets no chance to write anything more."""
        assert self._process is not None, "the server was never started"
        self._process.kill()
        self._process.wait(STOP_DEADLINE_S)

    def reap(self) -> None:
        """Wait for the end of a process that somebody else killed; raises ServerFailed if it lives on."""
        assert self._process is not None, "the server was never started"
        try:
            self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise ServerFailed(f"{self.describe()} should have been killed and runs\n{self.log_tail()}") from None

    def stop(self) -> None:
        """End it as systemd would, with SIGTERM; raises ServerFailed if it does not end, or ends in failure."""
        if self._process is None or not self.running:
            return
        self._process.terminate()
        try:
            code = self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.kill9()
            raise ServerFailed(
                f"{self.describe()} ignored SIGTERM for {STOP_DEADLINE_S:.0f} s\n{self.log_tail()}"
            ) from None
        if code not in (0, -signal.SIGTERM):
            raise ServerFailed(f"{self.describe()} ended with code {code} after SIGTERM\n{self.log_tail()}")

    def crash_and_restart(self) -> None:
        """SIGKILL, then a new start over the same files."""
        self.kill9()
        self.start()

    def describe(self) -> str:
        """How messages name this server."""
        return type(self).__name__

    def log_of_this_start(self) -> str:
        """What the server has said since it was last started."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def log_tail(self) -> str:
        """The end of the server's output, for messages."""
        if not self.log.exists():
            return "(no log)"
        with self.log.open("rb") as log:
            return f"--- end of {self.describe()}'s log ---\n" + _tail(log, LOG_TAIL_BYTES)

    def close(self) -> None:
        """End the process if it still runs, and remove its files."""
        if self.running:
            self.kill9()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _tail(stream: IO[bytes], limit_bytes: int) -> str:
    stream.seek(0, os.SEEK_END)
    stream.seek(max(0, stream.tell() - limit_bytes))
    return stream.read().decode(errors="replace")
