"""The servers that are compared, each with the settings its users get: what it takes to have a volume served."""

import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.jobs import Role
from benchmarks.processes import (
    COMMAND_DEADLINE_S,
    START_DEADLINE_S,
    accepts,
    answers_ready,
    blockvirt,
    end,
    environment,
)

POLL_S = 0.005
CONNECTIONS_MAX = "64"  # the most that a cell has is 32


class ServerUnavailable(Exception):
    """A server cannot take part: its program is missing or does not start. The message says which and why."""


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume that is served now: where, and by which process."""

    uri: str
    pid: int | None
    """None: nobody serves it."""

    @property
    def engine(self) -> tuple[str, ...]:
        """The fio options that reach it."""
        return ("--ioengine=nbd", f"--uri={self.uri}")


Fill = Callable[[Volume], object]
"""Writes a volume from end to end."""


class Server(ABC):
    """One competitor. Its files, sockets and logs all lie in `directory`."""

    name: str
    role: Role

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._numbers = iter(range(1 << 30))
        self._running = ExitStack()

    def start(self) -> None:
        """Get ready to serve volumes; raises ServerUnavailable."""
        self.directory.mkdir()

    def stop(self) -> None:
        """End every process that was started."""
        self._running.close()

    @abstractmethod
    @contextmanager
    def volume(self, size_bytes: int) -> Iterator[Volume]:
        """A new, empty volume, gone again after the block."""

    @contextmanager
    def snapshotted(self, size_bytes: int, fill: Fill) -> Iterator[Volume]:
        """A new volume that was filled and then had a snapshot taken; raises ServerUnavailable where there are none."""
        raise ServerUnavailable(f"{self.name} has no snapshots")
        yield

    def unused_name(self) -> str:
        """A name that no volume of this server had."""
        return f"bench{next(self._numbers)}"

    def spawn(self, command: list[str], ready: Callable[[], bool]) -> "subprocess.Popen[bytes]":
        """Start a process and wait until `ready`; raises ServerUnavailable with its log if it ends or stays silent."""
        log = self.directory / "log"
        with log.open("ab") as stream:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment()
            )
        end = time.monotonic() + START_DEADLINE_S
        while not ready():
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                process.wait()
                raise ServerUnavailable(f"{self.name} did not start: {log.read_text(errors='replace')[-2000:].strip()}")
            time.sleep(POLL_S)
        return process

    @contextmanager
    def serving(self, command: list[str], socket_path: Path) -> Iterator[Volume]:
        """A process that serves one volume on a socket of its own, ended after the block."""
        process = self.spawn(command, lambda: accepts(socket_path))
        try:
            yield Volume(f"nbd+unix:///?socket={socket_path}", process.pid)
        finally:
            end(process)
            socket_path.unlink(missing_ok=True)


class Blockvirt(Server):
    """Our daemon: one process for all of its volumes."""

    name = "blockvirt"
    role = Role.OURS

    def start(self) -> None:
        super().start()
        self.state, device = self.directory / "state", self.directory / "device"
        device.mkdir()
        arguments = ["--device", str(device), "--http", "127.0.0.1:0", "--nbd", "127.0.0.1:0"]
        self._process = self.spawn(
            blockvirt(self.state, "serve", *arguments), lambda: answers_ready(self.state / "http.sock")
        )
        self._running.callback(end, self._process)

    @contextmanager
    def volume(self, size_bytes: int) -> Iterator[Volume]:
        name = self.unused_name()
        with self._created(name, size_bytes) as volume:
            yield volume

    @contextmanager
    def snapshotted(self, size_bytes: int, fill: Fill) -> Iterator[Volume]:
        name = self.unused_name()
        with self._created(name, size_bytes) as volume:
            fill(volume)
            self._cli("snapshot", "create", name)
            yield volume

    @contextmanager
    def _created(self, name: str, size_bytes: int) -> Iterator[Volume]:
        self._cli("volume", "create", name, "--size", str(size_bytes))
        try:
            yield Volume(f"nbd+unix:///{name}?socket={self.state / 'nbd.sock'}", self._process.pid)
        finally:
            self._cli("volume", "delete", name, "--force", "--purge", "--wait")  # or its space came back later

    def _cli(self, *arguments: str) -> None:
        done = subprocess.run(
            blockvirt(self.state, *arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_DEADLINE_S,
            env=environment(),
        )
        if done.returncode != 0:
            raise ServerUnavailable(f"blockvirt {' '.join(arguments)}: {done.stdout}{done.stderr}")


class ProcessPerVolume(Server):
    """A server that is one process for one image file."""

    program: str

    def start(self) -> None:
        if shutil.which(self.program) is None:
            raise ServerUnavailable(f"{self.name} is left out: {self.program} is not installed")
        super().start()

    @abstractmethod
    def create(self, image: Path, size_bytes: int) -> None:
        """Make the image file."""

    @abstractmethod
    def command(self, image: Path, socket_path: Path) -> list[str]:
        """The command line that serves it in the foreground."""

    @contextmanager
    def volume(self, size_bytes: int) -> Iterator[Volume]:
        image = self.directory / self.unused_name()
        self.create(image, size_bytes)
        try:
            with self.served(image) as volume:
                yield volume
        finally:
            image.unlink()

    @contextmanager
    def served(self, image: Path) -> Iterator[Volume]:
        """An image that is there already."""
        path = image.with_name(f"{image.name}.sock")
        with self.serving(self.command(image, path), path) as volume:
            yield volume


class QemuNbd(ProcessPerVolume):
    """qemu-nbd on a new qcow2 with QEMU's defaults; only `--shared` differs, or there could be one connection only."""

    program = "qemu-nbd"
    role = Role.QCOW2

    def __init__(self, directory: Path, aio: str) -> None:
        super().__init__(directory)
        self._aio = aio
        self.name = f"qemu-nbd qcow2, {aio}"

    def create(self, image: Path, size_bytes: int) -> None:
        _qemu_img("create", "-q", "-f", "qcow2", str(image), str(size_bytes))

    def command(self, image: Path, socket_path: Path) -> list[str]:
        shown = ["--persistent", "--shared", CONNECTIONS_MAX, "--aio", self._aio, "--socket", str(socket_path)]
        return ["qemu-nbd", "-f", "qcow2", *shown, str(image)]

    @contextmanager
    def snapshotted(self, size_bytes: int, fill: Fill) -> Iterator[Volume]:
        """By a new overlay: the first writes after an internal snapshot take QEMU tens of times as long."""
        image = self.directory / self.unused_name()
        over = image.with_name(f"{image.name}-over")
        self.create(image, size_bytes)
        try:
            with self.served(image) as volume:
                fill(volume)
            self.overlay(image, over)
            with self.served(over) as volume:
                yield volume
        finally:
            image.unlink()
            over.unlink(missing_ok=True)

    def snapshot(self, image: Path, name: str) -> None:
        """Take an internal snapshot of an image that nobody serves."""
        _qemu_img("snapshot", "-c", name, str(image))

    def overlay(self, image: Path, over: Path) -> None:
        """Make an image that goes on from another one, which nobody may write to from then on."""
        _qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(image), str(over))


class NbdkitFile(ProcessPerVolume):
    """nbdkit's file plugin over a sparse file: no copy-on-write, no map, nothing to lose but the file."""

    name = "nbdkit file"
    role = Role.PLAIN
    program = "nbdkit"

    def create(self, image: Path, size_bytes: int) -> None:
        with image.open("xb") as stream:
            stream.truncate(size_bytes)

    def command(self, image: Path, socket_path: Path) -> list[str]:
        return ["nbdkit", "--foreground", "--unix", str(socket_path), "file", str(image)]


def _qemu_img(*arguments: str) -> None:
    command = ["qemu-img", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S)
    if done.returncode != 0:
        raise ServerUnavailable(f"{' '.join(command)}: {done.stdout}{done.stderr}")
