"""One process per pool, and one pool per device: flock, which the kernel drops when its holder dies."""

import contextlib
import fcntl
import os
from pathlib import Path

from blockvirt.errors import DeviceFault, MetadataFault, PoolLocked

LOCK_FILE = "lock"


class Lock:
    """A held lock. Children do not inherit it; ``release`` or the end of the process lets go."""

    __slots__ = ("_fd", "path")

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    def release(self) -> None:
        """Let go. Idempotent."""
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # a child between fork and exec may still hold the descriptor
            os.close(self._fd)
            self._fd = -1


def lock_pool(state_dir: Path) -> Lock:
    """Take the pool in ``state_dir`` for this process; raises PoolLocked naming the holder, MetadataFault."""
    path = state_dir / LOCK_FILE
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise MetadataFault(
            f"cannot open the lock {path}: {error.strerror}",
            correction="check that the state directory exists, is mounted writable, and belongs to you",
            path=str(path),
        ) from error
    try:
        _lock(fd)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(fd, 32, 0).strip().decode(errors="replace")
        os.close(fd)
        raise PoolLocked(
            f"the pool in {state_dir} is in use by process {holder or 'unknown'}",
            correction=f"stop that process first (systemctl stop blockvirt, or kill {holder or 'it'}), "
            "or use another state directory",
            pid=int(holder) if holder.isdigit() else None,
        ) from error
    except OSError as error:
        os.close(fd)
        raise MetadataFault(
            f"cannot lock {path}: {error.strerror}",
            correction="keep the state directory on a local filesystem with free space",
            path=str(path),
        ) from error
    return Lock(path, fd)


def lock_device(directory: Path) -> Lock:
    """Take a device's directory for this process, writing nothing to it; raises PoolLocked, DeviceFault."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unlockable(directory, error) from error
    try:
        _lock(fd)
    except BlockingIOError as error:
        holder = _holder(fd)
        os.close(fd)
        raise PoolLocked(
            f"the device {directory} is in use by process {holder or 'unknown'}",
            cause="another pool serves it, or it was given to this pool twice",
            correction="give each directory to one pool, once",
            pid=holder,
            path=str(directory),
        ) from error
    except OSError as error:
        os.close(fd)
        raise _unlockable(directory, error) from error
    return Lock(directory, fd)


def _lock(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(fd: int) -> int | None:
    """Return who locks an open file. /proc/locks has lines '1: FLOCK ADVISORY WRITE pid major:minor:inode 0 EOF'."""
    facts = os.fstat(fd)
    wanted = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if len(words) >= 6 and words[1] == "FLOCK" and words[5] == wanted:
                return int(words[4])
    return None


def _unlockable(directory: Path, error: OSError) -> DeviceFault:
    return DeviceFault(
        f"cannot lock the device {directory}: {error.strerror}",
        correction="check that the disk is mounted, local, and that the directory may be read",
        reason="missing" if isinstance(error, FileNotFoundError | NotADirectoryError) else "failed",
        path=str(directory),
    )
