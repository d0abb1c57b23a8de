"""The page cache's identity: did what was written but not synced live through the time the daemon was away?

It did if the machine was not booted and the filesystem not mounted anew since. The kernel's boot id tells the first;
the inode of ``/sys/fs/<type>/<block device>`` tells the second: it changes with each mount of the filesystem, but not
with a new mount namespace, which a hardened systemd unit gets at every start. Without a node there the boot id and the
device number decide: a filesystem that was mounted anew is then taken for the same, which is right unless the kernel
failed to write it back when it was unmounted.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from blockvirt.errors import DeviceFault

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class PageCacheIdentity:
    """Equal before and after exactly if unsynced writes are still in the page cache."""

    boot_id: str
    filesystem: int
    """``st_dev`` of the device's directory."""
    mounted: int
    """Inode of the filesystem's node in sysfs; 0 where there is none (tmpfs, overlay, NFS; no /sys)."""

    def to_text(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    def digest(self) -> str:
        """Return 16 hexadecimal digits of it: a journal's header holds one for each device of the volume."""
        return hashlib.sha256(self.to_text().encode()).hexdigest()[:16]


def identity_of(directory: Path) -> PageCacheIdentity:
    """Return the identity of the page cache behind ``directory`` now; raises DeviceFault if it cannot be reached."""
    try:
        filesystem = directory.stat().st_dev
        boot_id = _BOOT_ID.read_text().strip()
    except OSError as error:
        raise DeviceFault(
            f"cannot tell which filesystem {directory} is on: {error.strerror}",
            correction="check that the disk is mounted and /proc is there",
            reason="missing",
            path=str(directory),
        ) from error
    return PageCacheIdentity(boot_id, filesystem, _mounted_node(filesystem))


def _mounted_node(filesystem: int) -> int:
    """Return the inode of /sys/fs/<type>/<kernel name of the block device>, 0 if there is none."""
    block = Path(f"/sys/dev/block/{os.major(filesystem)}:{os.minor(filesystem)}")
    try:
        name = block.resolve(strict=True).name
        for fs_type in sorted(Path("/sys/fs").iterdir()):
            node = fs_type / name
            if node.is_dir():
                return node.stat().st_ino
    except OSError:
        pass  # no sysfs, or a filesystem without a block device
    return 0
