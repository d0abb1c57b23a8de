"""Stores in directories of their own, and small filesystems on loop devices to be filled and shut down."""

import subprocess
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blockvirt.meta.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Generator[Store]:
    """An empty store."""
    opened = Store.open(tmp_path / "metadata", create=True, reserve_bytes=0)
    yield opened
    opened.close()


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


@pytest.fixture
def make_filesystem(tmp_path: Path) -> Generator[Callable[[str, int], Path]]:
    """Make and mount a filesystem of (type, MiB) on a loop device; returns where it is mounted."""
    with ExitStack() as mounted:

        def make(fs_type: str, size_mib: int) -> Path:
            image, mount = tmp_path / f"{fs_type}.img", tmp_path / f"{fs_type}-mount"
            with image.open("wb") as file:
                file.truncate(size_mib << 20)
            _run(f"mkfs.{fs_type}", "-q", image)
            mount.mkdir()
            _run("mount", "-o", "loop", image, mount)
            mounted.callback(_run, "umount", "-l", mount)
            return mount

        yield make
