"""Files out of the page cache, and the proof that they are."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import MeasurementFailed

LEFT_RATIO = 0.01  # of the bytes; more is not cold


def evict(files: Sequence[Path]) -> None:
    """Drop what the page cache has of files on one filesystem, and of the loop file that this is on.

    Raises MeasurementFailed where much of it stays. Other files stay in the cache.
    """
    os.sync()
    image = loop_image(files[0])
    paths = [*files] if image is None else [*files, image]  # theirs first: reading them fills the image's
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    held, all_bytes = cached_bytes(paths), sum(path.stat().st_blocks * 512 for path in paths)
    if held > LEFT_RATIO * all_bytes:
        raise MeasurementFailed(f"{held:,} of {all_bytes:,} bytes stay in the page cache")


def cached_bytes(files: Sequence[Path]) -> int:
    """What the page cache has of files."""
    command = ["fincore", "--bytes", "--raw", "--noheadings", "--output", "RES", "--", *map(str, files)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(line) for line in told.split())


def loop_image(path: Path) -> Path | None:
    """The file behind the loop device that a file's filesystem is on; None: it is on no loop device."""
    device = path.stat().st_dev
    backing = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/loop/backing_file")
    return Path(backing.read_text().strip()) if backing.exists() else None
