"""The host's side of a guest's disk: the daemon that is killed and started again, and copies of what it exports."""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from blockvirt import check
from blockvirt.units import KIB
from tests.attacks.kills_clients import Died
from tests.attacks.kills_daemon import SETTINGS, Daemon, DaemonFailed, ForkServer, Pool
from tests.real.clients import mounted, run

EXPORT = "v"
PROVE = {"ext4": ("e2fsck", "-f", "-n"), "xfs": ("xfs_repair", "-n")}
MOUNT_OPTIONS = {"ext4": ("loop",), "xfs": ("loop", "nouuid")}
MOST_HELD_S, MOST_START_S = 0.03, 0.1


class Broken(AssertionError):
    """A promise was broken."""


class Host:
    """A pool with one volume, and the daemon that has it now; ``life`` ends with a SIGKILL where it is not stopped."""

    def __init__(self, server: ForkServer, folder: Path, dice: random.Random, size_bytes: int) -> None:
        self._server = server
        self._folder = folder
        self._dice = dice
        self._settings = SETTINGS | {"BLOCKVIRT_CHUNK_SIZE": f"{dice.choice((4, 16, 64)) * KIB}B"}
        self._life = ExitStack()
        self._pool = Pool(folder)
        self.socket = self._pool.state / "nbd.sock"
        self.kills = self.kills_in_start = self.other_namespaces = 0
        self._start(is_apart=False)
        if not self._daemon.ready():
            raise DaemonFailed("the daemon was killed by somebody else")
        self._daemon.api.call("POST", "/v1/volumes", {"name": EXPORT, "size": size_bytes})

    def _start(self, *, is_apart: bool) -> None:
        self.other_namespaces += is_apart
        daemon = Daemon(self._server, self._pool, armed=False, is_apart=is_apart, settings=self._settings)
        self._daemon = self._life.enter_context(daemon)

    def kill(self) -> None:
        """Kill the daemon with SIGKILL, and have the next one: one time in three in another mount namespace.

        One time in five that is killed too, while it starts.
        """
        self._life.close()
        self.kills += 1
        if self._dice.random() < 0.2:
            self._start(is_apart=self._dice.random() < 1 / 3)
            time.sleep(self._dice.uniform(0, MOST_START_S))  # the moment of the kill, which waits for nothing
            self._life.close()
            self.kills += 1
            self.kills_in_start += 1
        self._start(is_apart=self._dice.random() < 1 / 3)
        if not self._daemon.ready():
            raise DaemonFailed(f"the daemon does not start after a kill: {self._pool.log_tail()}")

    def take_snapshot(self, name: str) -> None:
        """Take a snapshot."""
        self._daemon.api.call("POST", "/v1/snapshots", {"volume": EXPORT, "name": name})

    def take_snapshot_and_kill(self, name: str) -> bool:
        """Ask for a snapshot, and kill the daemon a moment later; returns whether it was answered before."""
        asked = self._daemon.api.begin("POST", "/v1/snapshots", {"volume": EXPORT, "name": name})
        time.sleep(self._dice.uniform(0, MOST_HELD_S))  # likewise
        self.kill()
        try:
            self._daemon.api.end(asked, f"the snapshot {name}")
        except Died:
            return False
        return True

    def snapshots(self) -> set[str]:
        """Return the names of all snapshots."""
        answer = self._daemon.api.call("GET", f"/v1/snapshots?volume={EXPORT}")
        return {each["name"] for each in answer["snapshots"]}

    @contextmanager
    def copy(self, snapshot: str = "") -> Iterator[Path]:
        """Have a file that is a copy of the volume, or of a snapshot."""
        export = f"{EXPORT}@{snapshot}" if snapshot else EXPORT
        target = self._folder / "copy"
        try:
            run("nbdcopy", f"nbd+unix:///{export}?socket={self.socket}", target)
            yield target
        finally:
            target.unlink(missing_ok=True)

    def frames_replayed(self) -> int:
        """Return how many journal frames all recoveries so far have replayed."""
        return sum(int(count) for count in re.findall(r"recovered .+: (\d+) frames", self._log()))

    def stop(self) -> None:
        """Stop the daemon, and look at what it leaves; raises Broken."""
        code = self._daemon.stop()
        if code:
            raise Broken(f"the daemon ended with code {code}: {self._pool.log_tail()}")
        if "Traceback" in self._log():
            raise Broken(f"the daemon logged a fault of its own: {self._pool.log_tail()}")
        report = check.run(self._pool.state, repair=False, restore_metadata=False, data=True)
        if report.exit_code not in (check.CLEAN, check.LEAKS):
            raise Broken(f"the check at the end: {report.summary}: {report.findings[0]}")

    def close(self) -> None:
        """Kill the daemon, if it runs."""
        self._life.close()

    def _log(self) -> str:
        return self._pool.log.read_text(errors="replace")


def prove_clean(kind: str, image: Path) -> None:
    """Have the filesystem's own checker look at an image that is not mounted; raises ClientFailed."""
    run(*PROVE[kind], image)


def files_in(kind: str, image: Path, mountpoint: Path, pattern: str) -> dict[str, str]:
    """Mount an image, whose log is replayed by that, and return MD5 sums by name; raises ClientFailed, Broken."""
    with mounted(image, mountpoint, MOUNT_OPTIONS[kind]) as root:
        try:
            return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in root.glob(pattern)}
        except OSError as error:
            raise Broken(f"a file cannot be read: {os.strerror(error.errno or 0)}") from error
