"""qemu-nbd in the daemon's place: a peer that keeps its promises, and two that break them on purpose.

A test that cannot fail proves nothing. `BLOCKVIRT_TEST_SERVER=raw` runs the real-world tests against a server known to
be good; the controls in them run against the two that lose data and must fail.
"""

import socket
import subprocess

from tests.real.process import ServerFailed, ServerProcess

TOOL_DEADLINE_S = 60.0
CONNECTIONS = 16


class QemuNbd(ServerProcess):
    """qemu-nbd over a raw file. A write it answered is in the page cache, so SIGKILL loses nothing."""

    format = "raw"
    options: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.image = self.root / "image"
        self._port: int | None = None

    def command(self) -> list[str]:
        """qemu-nbd on the unix socket, or on TCP once somebody asked for the port (it listens on one thing only)."""
        if self._port is None:
            where = ["--socket", str(self.socket)]
        else:
            where = ["--bind", "127.0.0.1", "--port", str(self._port)]
        fixed = ["qemu-nbd", "--persistent", "--shared", str(CONNECTIONS), "--discard", "unmap", "--cache", "writeback"]
        return [*fixed, *self.options, "-f", self.format, "-x", self.export, *where, str(self.image)]

    def ready(self) -> bool:
        """Whether it accepts a connection."""
        unix = self._port is None
        with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as client:
            try:
                client.connect(str(self.socket) if unix else ("127.0.0.1", self._port))
            except OSError:
                return False
            return True

    def create(self, size_bytes: int) -> None:
        """A new image of that size, and the server started over it."""
        if self.format == "raw":
            with self.image.open("xb") as image:
                image.truncate(size_bytes)  # qemu-img writes a first block, and a fresh volume has none
        else:
            self._image_tool("create", "-q", "-f", self.format, str(self.image), str(size_bytes))
        self.start()

    def check(self) -> None:
        """`qemu-img check` where the format has one."""
        if self.format == "qcow2":
            self._image_tool("check", "-q", "-f", self.format, str(self.image))

    def tcp_port(self) -> int:
        """Serve on a free TCP port instead, from now on."""
        if self._port is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._port = int(probe.getsockname()[1])
            self.stop()
            self.start()
        return self._port

    def grow(self, size_bytes: int) -> None:
        """qemu-nbd cannot grow an export: restart it over the larger image."""
        self.kill9()
        self._image_tool("resize", "-q", "-f", self.format, str(self.image), str(size_bytes))
        self.start()

    def _image_tool(self, *arguments: str) -> None:
        done = subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, timeout=TOOL_DEADLINE_S)
        if done.returncode != 0:
            raise ServerFailed(f"qemu-img {' '.join(arguments)}: {done.stdout}{done.stderr}")


class ForgetfulQemuNbd(QemuNbd):
    """Keeps its map of new clusters in its own memory until a flush (qcow2), so SIGKILL loses answered writes."""

    format = "qcow2"


class LyingQemuNbd(QemuNbd):
    """Answers flushes and keeps everything in an unlinked temporary file: SIGKILL loses flushed writes too."""

    options = ("--snapshot",)
