"""Where the servers' files lie: one filesystem for all of them, in a loop file unless a directory is given."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IMAGE_BYTES = 32 << 30  # sparse
MAKE = {
    "xfs": ["mkfs.xfs", "-q"],
    # What ext4 would else do in the background after the mount, beside the measurements.
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
}
ROOM = "/var/tmp"  # unlike /tmp never in memory, whose speed would be everybody's


@contextmanager
def ground(directory: Path | None, filesystem: str = "xfs", image_bytes: int = IMAGE_BYTES) -> Iterator[Path]:
    """An empty directory for the servers; removed afterwards, with the loop mount where there was one.

    Without root it lies on whatever filesystem /var/tmp is on.
    """
    with tempfile.TemporaryDirectory(prefix="bv-bench-", dir=directory or ROOM) as made:
        scratch = Path(made)
        if directory is not None or not can_mount(filesystem):
            yield scratch
            return
        image, mountpoint = scratch / "image", scratch / filesystem
        with image.open("xb") as stream:
            stream.truncate(image_bytes)
        mountpoint.mkdir()
        subprocess.run([*MAKE[filesystem], str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(mountpoint)], check=True)
        try:
            yield mountpoint
        finally:
            subprocess.run(["umount", str(mountpoint)], check=True)


def can_mount(filesystem: str = "xfs") -> bool:
    """Whether a loop mount can be made: root, a loop driver and the filesystem's tools."""
    return os.geteuid() == 0 and Path("/dev/loop-control").exists() and shutil.which(MAKE[filesystem][0]) is not None
