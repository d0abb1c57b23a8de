"""Mounts that are taken away again."""

import subprocess
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path

import pytest

Mounter = Callable[..., Path]


def run(*command: str | Path) -> None:
    """Run a command; a failure is the test's."""
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


@pytest.fixture
def mount(tmp_path: Path) -> Generator[Mounter]:
    """Call ``mount`` with these arguments and the new or given directory ``at``; returns the directory."""
    with ExitStack() as mounted:

        def do(*arguments: str | Path, at: Path | None = None) -> Path:
            point = at or tmp_path / f"mount-{len(list(tmp_path.iterdir()))}"
            point.mkdir(exist_ok=True)
            run("mount", *arguments, point)
            mounted.callback(run, "umount", "-l", point)
            return point

        yield do


@pytest.fixture
def make_image(tmp_path: Path) -> Callable[..., Path]:
    """Make a filesystem of (type, MiB), with these options of mkfs, in a file."""

    def make(fs_type: str, size_mib: int, *options: str) -> Path:
        image = tmp_path / f"{fs_type}.img"
        with image.open("wb") as file:
            file.truncate(size_mib << 20)
        run(f"mkfs.{fs_type}", "-q", *options, image)
        return image

    return make
