"""This kernel's filesystems on the volume: nbdfuse makes it a file, losetup a disk, and their own checkers judge it."""

import hashlib
import random
from pathlib import Path

import pytest

from tests.real.clients import loop_device, mounted, run
from tests.real.process import ServerProcess

MIB = 1 << 20
FILES = 24


def fill(directory: Path, seed: int) -> dict[str, str]:
    """Write files of many sizes, some rewritten in place, some removed again; digests of what must be there."""
    generator = random.Random(seed)
    digests: dict[str, str] = {}
    for number in range(FILES):
        path = directory / f"file{number}"
        content = bytearray(generator.randbytes(generator.choice([1, 4095, 70_000, 3 * MIB + 17])))
        path.write_bytes(content)
        if number % 3 == 1:
            at = generator.randrange(len(content))
            patch = generator.randbytes(min(5000, len(content) - at))
            content[at : at + len(patch)] = patch
            with path.open("r+b") as stream:
                stream.seek(at)
                stream.write(patch)
        if number % 3 == 2:
            path.unlink()
        else:
            digests[path.name] = hashlib.sha256(content).hexdigest()
    return digests


def digests_of(directory: Path) -> dict[str, str]:
    """The digests of a directory's files."""
    files = (path for path in directory.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


MAKE = {"xfs": ("mkfs.xfs", "-q", "-f"), "ext4": ("mkfs.ext4", "-q", "-F")}
PROVE = {"xfs": ("xfs_repair", "-n"), "ext4": ("e2fsck", "-f", "-n")}


@pytest.mark.requires("loop", "fuse", "nbdfuse", "fusermount3", "fstrim")
@pytest.mark.requires("mkfs.xfs", "xfs_repair", "mkfs.ext4", "e2fsck")
@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_a_filesystem_keeps_its_files_through_remount_trim_and_crash(
    server: ServerProcess, tmp_path: Path, kind: str
) -> None:
    mountpoint = tmp_path / "mnt"
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with loop_device(server, first) as device:
        run(*MAKE[kind], device)
        with mounted(device, mountpoint):
            expected = fill(mountpoint, seed=1)
            run("fstrim", "-v", mountpoint)
        with mounted(device, mountpoint):
            assert digests_of(mountpoint) == expected
        run(*PROVE[kind], device)
    server.crash_and_restart()
    with loop_device(server, second) as device:
        run(*PROVE[kind], device)
        with mounted(device, mountpoint):
            assert digests_of(mountpoint) == expected
            (mountpoint / "more").mkdir()
            more = fill(mountpoint / "more", seed=2)
        with mounted(device, mountpoint, ["ro"]):
            assert digests_of(mountpoint / "more") == more
        run(*PROVE[kind], device)
