"""The page cache's identity: the same for a new process and a new mount namespace, another after a remount."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blockvirt.errors import DeviceFault
from blockvirt.pool.identity import PageCacheIdentity, identity_of, parse_identity

SHOW = "import sys; from blockvirt.pool.identity import *; print(identity_of(Path(sys.argv[1])).to_text())"


def test_it_comes_back_from_text(tmp_path: Path) -> None:
    identity = identity_of(tmp_path)
    assert parse_identity(identity.to_text()) == identity
    shown = subprocess.run([sys.executable, "-c", SHOW, str(tmp_path)], check=True, capture_output=True, text=True)
    assert parse_identity(shown.stdout) == identity


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"boot_id": "x"}', '{"boot_id":"x","filesystem":1,"x":2}'])
def test_anything_else_equals_no_identity(text: str) -> None:
    assert parse_identity(text) is None


def test_each_part_counts() -> None:
    identity = PageCacheIdentity("boot", 1, 2)
    assert len({identity, PageCacheIdentity("b", 1, 2), PageCacheIdentity("boot", 2, 2)}) == 3
    assert identity != PageCacheIdentity("boot", 1, 0)


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
    assert 0 != first.mounted != second.mounted != 0


def mounted_identity(source: str, point: Path, *, in_namespace: bool = False) -> PageCacheIdentity:
    """Mount a device, return the identity behind it, unmount it."""
    subprocess.run(["mount", source, str(point)], check=True)
    try:
        identity = identity_of(point)
        if in_namespace:
            show = ["unshare", "--mount", sys.executable, "-c", SHOW, str(point)]
            shown = subprocess.run(show, check=True, capture_output=True, text=True)
            assert parse_identity(shown.stdout) == identity
        return identity
    finally:
        subprocess.run(["umount", str(point)], check=True)
