"""Where the servers' files lie: one filesystem for all of them, XFS in a loop file unless a directory is given."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IMAGE_BYTES = 32 << 30  # sparse
ROOM = "/var/tmp"  # unlike /tmp never in memory, whose speed would be everybody's


@contextmanager
def ground(directory: Path | None) -> Iterator[Path]:
    """An empty directory for the servers; removed afterwards, with the loop mount where there was one."""
    with tempfile.TemporaryDirectory(prefix="bv-bench-", dir=directory or ROOM) as made:
        scratch = Path(made)
        if directory is not None or not can_mount():
            yield scratch
            return
        image, mountpoint = scratch / "image", scratch / "xfs"
        with image.open("xb") as stream:
            stream.truncate(IMAGE_BYTES)
        mountpoint.mkdir()
        subprocess.run(["mkfs.xfs", "-q", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(mountpoint)], check=True)
        try:
            yield mountpoint
        finally:
            subprocess.run(["umount", str(mountpoint)], check=True)


def can_mount() -> bool:
    """Whether a loop mount can be made: root, a loop driver and XFS's tools."""
    return os.geteuid() == 0 and Path("/dev/loop-control").exists() and shutil.which("mkfs.xfs") is not None
