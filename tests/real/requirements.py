"""What a real-world test needs of its machine: named when missing, and never missing silently in CI."""

import os
import shutil
from pathlib import Path

import pytest

# Debian's packages, by the tools that the tests call; /usr/sbin is not on every user's path.
PACKAGES = {
    "fio": "fio",
    "losetup": "mount",
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "xfs_repair": "xfsprogs",
    "fstrim": "util-linux",
    "mount": "mount",
    "umount": "mount",
    "nbdcopy": "libnbd-bin",
    "nbdfuse": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "fusermount3": "fuse3",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common",
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "depmod": "kmod",
    "ldd": "libc-bin",
    "modprobe": "kmod",
    "nbd-client": "nbd-client",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
}
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def require_tools(*names: str) -> None:
    """Skip the test, naming the Debian packages to install, unless every tool is there."""
    missing = sorted({PACKAGES[name] for name in names if shutil.which(name, path=SEARCH_PATH) is None})
    if missing:
        unavailable(f"needs Debian's {', '.join(missing)}: apt-get install {' '.join(missing)}")


def require_loop_mounts() -> None:
    """Skip the test unless this process may mount loop devices and FUSE filesystems."""
    require_tools("losetup", "fusermount3")
    if os.geteuid() != 0:
        unavailable("needs root for losetup and mount")
    for node in (Path("/dev/loop-control"), Path("/dev/fuse")):
        if not node.exists():
            unavailable(f"needs {node}")


def tool(name: str) -> str:
    """The path of a tool that require_tools has seen."""
    path = shutil.which(name, path=SEARCH_PATH)
    assert path is not None, f"{name}: call require_tools first"
    return path


def unavailable(reason: str) -> None:
    """Skip the test with this reason; where CI=true, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"in CI nothing may be skipped: {reason}")
    pytest.skip(reason)
