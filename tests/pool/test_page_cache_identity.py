"""The page cache's identity: the same for a new process and a new mount namespace, another after a remount."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blockvirt.errors import DeviceFault
from blockvirt.pool.identity import PageCacheIdentity, identity_of

SHOW = "import sys; from blockvirt.pool.identity import *; print(identity_of(Path(sys.argv[1])).to_text())"


def test_a_new_process_sees_the_same(tmp_path: Path) -> None:
    identity = identity_of(tmp_path)
    shown = subprocess.run([sys.executable, "-c", SHOW, str(tmp_path)], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == identity.to_text()


def test_each_part_counts() -> None:
    identity = PageCacheIdentity("boot", 1, 2)
    assert len({identity, PageCacheIdentity("b", 1, 2), PageCacheIdentity("boot", 2, 2)}) == 3
    assert identity != PageCacheIdentity("boot", 1, 0)
    assert identity.digest() != PageCacheIdentity("boot", 1, 0).digest()


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(DeviceFault, match="cannot tell which filesystem"):
        identity_of(tmp_path / "gone")


@pytest.mark.requires("root", "loop", "mkfs.ext4", "mkfs.xfs")
@pytest.mark.parametrize(("fs_type", "size_mib"), [("ext4", 16), ("xfs", 320)])
def test_a_remount_changes_it_and_a_namespace_does_not(
    tmp_path: Path, make_image: Callable[[str, int], Path], fs_type: str, size_mib: int
) -> None:
    point = tmp_path / "point"
    point.mkdir()
    image = str(make_image(fs_type, size_mib))
    loop = subprocess.run(["losetup", "-f", "--show", image], check=True, capture_output=True, text=True).stdout.strip()
    try:
        first = mounted_identity(loop, point, in_namespace=True)
        second = mounted_identity(loop, point)
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)
    assert (first.boot_id, first.filesystem) == (second.boot_id, second.filesystem), "only the node tells"
    if os.path.ismount("/sys"):
        assert 0 != first.mounted != second.mounted != 0
    else:  # as in a bare chroot
        assert first == second


def mounted_identity(source: str, point: Path, *, in_namespace: bool = False) -> PageCacheIdentity:
    """Mount a device, return the identity behind it, unmount it."""
    subprocess.run(["mount", source, str(point)], check=True)
    try:
        identity = identity_of(point)
        if in_namespace:
            # Where / is no mount point, as in a chroot, its propagation cannot be changed.
            show = ["unshare", "--mount", "--propagation", "unchanged", sys.executable, "-c", SHOW, str(point)]
            shown = subprocess.run(show, check=True, capture_output=True, text=True)
            assert shown.stdout.strip() == identity.to_text()
        return identity
    finally:
        subprocess.run(["umount", str(point)], check=True)
