"""A filesystem on a loop device that can lose its power: made, mounted, shut down, mounted again. Needs root."""

import ctypes
import errno
import fcntl
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from blockvirt.syscalls import punch_hole

_GOING_DOWN = 0x8004587D  # FS_IOC_GOINGDOWN, <linux/fs.h>; xfsprogs' xfs_io -x -c shutdown
FLUSH_LOG, LOSE_LOG = 1, 2
"""How a filesystem goes down: its own log is written before, or what of it was not written is lost."""
_BLKFLSBUF = 0x1261
_WRITE_BACK = 1 | 2 | 4  # SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE, _WAIT_AFTER
_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_BUSY_S = 10.0  # that an unmount waits for descriptors of a process that was killed a moment ago
_LOOK_S = 0.001
_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

T = TypeVar("T")

MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
}
_SMALL_XFS = {"TEST_DIR": "/", "TEST_DEV": "/", "QA_CHECK_FS": "/"}  # mkfs.xfs makes less than 300 MiB for tests only


def run(*command: str | Path) -> str:
    """Run a program and return what it prints; raises CalledProcessError, whose note is its standard error."""
    try:
        done = subprocess.run(
            [str(word) for word in command], check=True, capture_output=True, text=True, env=os.environ | _SMALL_XFS
        )
    except subprocess.CalledProcessError as error:
        error.add_note(error.stderr)
        raise
    return done.stdout


def with_own_mounts(work: Callable[[], T]) -> T:
    """Do ``work`` in a thread that has a mount namespace of its own, and return what it returns.

    Else whoever makes a namespace meanwhile would have a copy of each of our mounts in it: to unmount ours would not
    end the life of a filesystem that was shut down.
    """

    def in_thread() -> T:
        if _libc.unshare(_CLONE_NEWNS) != 0:
            raise OSError(ctypes.get_errno(), "no mount namespace can be made")
        _mount("none", Path("/"), "", "", _MS_REC | _MS_PRIVATE)
        return work()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(in_thread).result()


@contextmanager
def memory_folder(path: Path) -> Iterator[Path]:
    """Have a directory in memory: loop files there cost no sync of a real disk."""
    path.mkdir()
    _mount("tmpfs", path, "tmpfs", "size=4g")
    try:
        yield path
    finally:
        _unmount(path)


def make_filesystem(kind: str, image: Path, size_bytes: int) -> None:
    """Make an empty filesystem of a kind that MAKE knows."""
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(size_bytes)
    run(*MAKE[kind], image)


@contextmanager
def loop_device(image: Path) -> Iterator[str]:
    """Have a block device over a file, without O_DIRECT: a FUSE export and a tmpfs have none that works."""
    device = run("losetup", "--find", "--show", "--direct-io=off", image).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


class Disk:
    """A filesystem on a block device, mounted at one place. ``close`` unmounts it."""

    def __init__(self, device: str, kind: str, mountpoint: Path) -> None:
        self.device = device
        self.kind = kind
        self.mountpoint = mountpoint
        self.is_mounted = False
        mountpoint.mkdir(exist_ok=True)

    def mount(self) -> None:
        """Mount it; raises OSError, also where its log cannot be replayed."""
        fd = os.open(self.device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _BLKFLSBUF)  # nothing of what was on the device before may be in the cache
        finally:
            os.close(fd)
        _mount(self.device, self.mountpoint, self.kind, "noinit_itable" if self.kind == "ext4" else "")
        self.is_mounted = True

    def unmount(self) -> None:
        """Unmount it; what was written is written back unless it was shut down before."""
        _unmount(self.mountpoint)
        self.is_mounted = False

    def shut_down(self, how: int = LOSE_LOG) -> None:
        """Cut the power: nothing reaches the disk any more, everything fails with EIO until it is mounted anew."""
        fd = os.open(self.mountpoint, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _GOING_DOWN, how.to_bytes(4, "little"))
        finally:
            os.close(fd)

    def write_back(self, file: Path) -> None:
        """Write a file's dirty pages to the disk, as the kernel does whenever it likes; without a flush of the disk."""
        try:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            _libc.sync_file_range(fd, 0, 0, _WRITE_BACK)
        finally:
            os.close(fd)

    def sync_all(self) -> None:
        """Write everything back, the filesystem's log too."""
        fd = os.open(self.mountpoint, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _libc.syncfs(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Shut it down and unmount it, if it is mounted."""
        if self.is_mounted:
            with suppress(OSError):  # EIO: it was shut down before
                self.shut_down()
            self.unmount()


def random_file(folder: Path, dice: random.Random) -> Path | None:
    """Return a journal or a backing file of a device, for the kernel to write back."""
    files = sorted([*(folder / "journal").glob("*"), *(folder / "files").glob("*")])
    return dice.choice(files) if files else None


def copy_sparse(source: int, target: int) -> None:
    """Make the file ``target`` the same as ``source``, holes included. Both are open, and of one size."""
    size = os.fstat(source).st_size
    punch_hole(target, 0, size)
    at = 0
    while True:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(source, at, os.SEEK_HOLE)
        os.lseek(target, at, os.SEEK_SET)
        while at < end:
            at += os.sendfile(target, source, at, end - at)


def _mount(source: str, target: Path, kind: str, options: str, flags: int = 0) -> None:
    words = [os.fsencode(word) for word in (source, target, kind)]
    if _libc.mount(*words, ctypes.c_ulong(flags), options.encode()) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{source} ({kind}) cannot be mounted at {target}: {os.strerror(code)}")


def _unmount(target: Path) -> None:
    deadline_s = time.monotonic() + _BUSY_S
    while _libc.umount2(os.fsencode(target), 0) != 0:
        code = ctypes.get_errno()
        if code != errno.EBUSY or time.monotonic() > deadline_s:
            raise OSError(code, f"{target} cannot be unmounted: {os.strerror(code)}")
        time.sleep(_LOOK_S)
