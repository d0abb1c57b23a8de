"""qcow2 images with snapshots in them or under them, served by qemu-nbd with its defaults."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import measure
from benchmarks.jobs import FILL
from benchmarks.processes import COMMAND_DEADLINE_S
from benchmarks.servers import QemuNbd, Volume

AIO = "threads"  # qemu-nbd's own choice
FILL_RUNTIME_S = 60.0  # only bounds how long fio may take


class Qcow2:
    """One disk: an image, and the overlays over it. Served only inside `served`, snapshotted only outside."""

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.snapshots = 0
        self.overlays = 0
        self._server = QemuNbd(directory, AIO)
        self._server.start()
        self.directory = directory
        self.top = directory / "base.qcow2"
        self._server.create(self.top, size_bytes)

    @contextmanager
    def served(self) -> Iterator[Volume]:
        """The disk, by a process of its own."""
        with self._server.served(self.top) as volume:
            yield volume

    def fill(self) -> None:
        """Write it once from end to end."""
        with self.served() as volume:
            measure.run(FILL, volume, self.size_bytes, FILL_RUNTIME_S)

    def snapshot(self) -> None:
        """Take an internal snapshot."""
        self._server.snapshot(self.top, f"s{self.snapshots}")
        self.snapshots += 1

    def snapshot_until(self, snapshots: int, limit_s: float) -> None:
        """Take internal snapshots until there are so many, or the time is up."""
        limit = time.monotonic() + limit_s
        while self.snapshots < snapshots and time.monotonic() < limit:
            self.snapshot()

    def overlay(self) -> None:
        """Go on in a new image over the present one."""
        self.overlays += 1
        over = self.directory / f"over{self.overlays}.qcow2"
        self._server.overlay(self.top, over)
        self.top = over

    def overlay_until(self, overlays: int) -> None:
        """Add overlays until there are so many, each with one block of its own."""
        step = (self.size_bytes // overlays) & ~0xFFFF if overlays else 0
        while self.overlays < overlays:
            write = ["qemu-io", "-f", "qcow2", "-c", f"write -q {self.overlays * step} 64k", str(self.top)]
            subprocess.run(write, check=True, stdin=subprocess.DEVNULL, timeout=COMMAND_DEADLINE_S)
            self.overlay()

    def remove(self) -> None:
        """Delete its images."""
        for image in self.directory.glob("*.qcow2"):
            image.unlink()
