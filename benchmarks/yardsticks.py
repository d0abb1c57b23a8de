"""What no storage server can beat: NBD servers that do next to nothing, and writes to a file with no server."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.jobs import Role
from benchmarks.processes import COMMAND_DEADLINE_S
from benchmarks.servers import Fill, Server, ServerUnavailable, Volume

SOURCE = Path(__file__).with_name("floor.c")


class Floor(Server):
    """`floor.c`, compiled at the start; its volumes are memory of the process that serves them."""

    name = "C floor"
    role = Role.FLOOR

    def start(self) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            raise ServerUnavailable(f"{self.name} is left out: there is no C compiler (cc; on Debian gcc, libc6-dev)")
        super().start()
        self._program = self.directory / "floor"
        done = subprocess.run(
            [compiler, "-O2", "-pthread", "-o", str(self._program), str(SOURCE)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_DEADLINE_S,
        )
        if done.returncode != 0:
            raise ServerUnavailable(f"{self.name} is left out: {compiler} {SOURCE.name}: {done.stderr}")

    @contextmanager
    def volume(self, size_bytes: int) -> Iterator[Volume]:
        path = self.directory / f"{self.unused_name()}.sock"
        with self.serving([str(self._program), str(path), str(size_bytes)], path) as volume:
            yield volume


class FileFloor(Floor):
    """The same over a sparse file: a write is one pwrite, a flush one fdatasync, with nothing between them and NBD."""

    name = "C over a file"
    role = Role.FILE_FLOOR
    options: tuple[str, ...] = ()

    @contextmanager
    def volume(self, size_bytes: int) -> Iterator[Volume]:
        path = self.directory / f"{self.unused_name()}.sock"
        with (
            sparse_file(path.with_suffix(".image"), size_bytes) as image,
            self.serving([str(self._program), str(path), str(size_bytes), str(image), *self.options], path) as volume,
        ):
            yield volume


class ThreadedFileFloor(FileFloor):
    """The same with the fdatasync in another thread, as in every server whose loop goes on while a disk hangs."""

    name = "C over a file, thread"
    options = ("thread",)


class PythonFloor(Server):
    """`floor.py`, by the interpreter that our daemon runs in: what a server in Python can do on one thread."""

    name = "Python floor"
    role = Role.PYTHON
    program = "benchmarks.floor"

    @contextmanager
    def volume(self, size_bytes: int) -> Iterator[Volume]:
        path = self.directory / f"{self.unused_name()}.sock"
        with (
            sparse_file(path.with_suffix(".image"), size_bytes) as image,
            self.serving([sys.executable, "-m", self.program, str(path), str(size_bytes), str(image)], path) as volume,
        ):
            yield volume


class VolumeFloor(PythonFloor):
    """`volume_floor.py`: the same with a map and what else a volume takes, on the event loop of our daemon."""

    name = "volume floor"
    role = Role.VOLUME
    program = "benchmarks.volume_floor"

    @contextmanager
    def snapshotted(self, size_bytes: int, fill: Fill) -> Iterator[Volume]:
        """What was filled is another process's, which is gone: this one copies from its file."""
        paths = [self.directory / f"{self.unused_name()}.sock" for _ in range(2)]
        with ExitStack() as held:
            images = [str(held.enter_context(sparse_file(path.with_suffix(".image"), size_bytes))) for path in paths]
            command = [sys.executable, "-m", self.program]
            with self.serving([*command, str(paths[1]), str(size_bytes), images[1]], paths[1]) as volume:
                fill(volume)
            with self.serving([*command, str(paths[0]), str(size_bytes), *images], paths[0]) as volume:
                yield volume


class LocalFile(Volume):
    """A file, for fio to write to itself; `uri` is its path."""

    @property
    def engine(self) -> tuple[str, ...]:
        """One pwrite after the other, and where the cell flushes, an fdatasync after each."""
        return ("--ioengine=psync", f"--filename={self.uri}", "--invalidate=0", "--fsync=0", "--fdatasync=1")


class BareFile(Server):
    """pwrite and fdatasync on a sparse file: what the filesystem and the disk take of a flushed write."""

    name = "bare file"
    role = Role.BARE

    @contextmanager
    def volume(self, size_bytes: int) -> Iterator[Volume]:
        with sparse_file(self.directory / self.unused_name(), size_bytes) as image:
            yield LocalFile(str(image), None)


@contextmanager
def sparse_file(image: Path, size_bytes: int) -> Iterator[Path]:
    """A new file that holds nothing yet, gone again after the block."""
    with image.open("xb") as stream:
        stream.truncate(size_bytes)
    try:
        yield image
    finally:
        image.unlink()
