"""A snapshot of a running guest's filesystem: what was fsynced before it is in it, whole, after a journal replay."""

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import Boot
from tests.guest.machine import Guest, virtio_disk
from tests.guest.test_guest_reconnect import WRITER, written
from tests.real.clients import mounted, run
from tests.real.conftest import GIB
from tests.real.daemon import Daemon

pytestmark = pytest.mark.requires(
    *("qemu-system-x86_64", "busybox", "cpio", "depmod", "modprobe", "mkfs.ext4", "e2fsck", "nbd-client", "nbdcopy"),
    *("loop", "root"),
)

NEEDS_RECOVERY = 0x4
"""Of ext4's feature_incompat: it was mounted, its journal is to be replayed."""


def needs_recovery(image: Path) -> bool:
    """Whether a filesystem's superblock says that it was in use."""
    with image.open("rb") as stream:
        stream.seek(1024 + 0x60)
        (features,) = struct.unpack("<I", stream.read(4))
    return bool(features & NEEDS_RECOVERY)


def fsynced_files(guest: Guest) -> dict[str, str]:
    """Files whose fsync has returned, with their MD5 sums. Whatever the writer removes later is left out."""
    lines = guest.run("cd /run/sums && for name in file.*; do echo $name $(cat $name); done").splitlines()
    files = {line.split()[0]: line.split()[1] for line in lines if len(line.split()) == 3}
    return {name: found for name, found in files.items() if (int(name.split(".")[1]) + 2) % 4}


def md5_sums(daemon: Daemon, snapshot: str, folder: Path) -> dict[str, str]:
    """The files in a snapshot of the volume, copied out and mounted; its filesystem must be clean after that."""
    copy = folder / snapshot
    run("nbdcopy", f"nbd+unix:///v@{snapshot}?socket={daemon.socket}", copy)
    assert needs_recovery(copy), "the filesystem was not in use: this proves little"
    with mounted(copy, folder / "mnt", ["loop"]) as mountpoint:
        sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in mountpoint.glob("file.*")}
    run("e2fsck", "-f", "-n", copy)
    return sums


def work_on(guest: Guest, files: int) -> None:
    """Let the guest's writer do so many more rounds."""
    goal = written(guest) + files
    guest.until(lambda: written(guest) >= goal, "the guest's writer came no further")


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon with a volume; what it leaves must be sound."""
    with Daemon() as started:
        started.create(GIB)
        yield started
        started.stop()
        started.check()


@pytest.mark.timeout(300)  # a quarter of a minute when it has a core of its own
def test_a_running_guests_snapshot_holds_what_was_fsynced(daemon: Daemon, boot: Boot, tmp_path: Path) -> None:
    guest = boot(*virtio_disk(daemon.socket, daemon.export))
    guest.run("mkfs.ext4 -q /dev/vda && mount -o discard /dev/vda /mnt && mkdir /run/sums && echo 0 > /run/number")
    guest.run(f"cat > /run/writer <<'END'\n{WRITER}END\nsh /run/writer 2> /run/errors &")
    expected = {}
    for name in ("first", "second"):
        work_on(guest, 10)
        expected[name] = fsynced_files(guest)
        daemon.cli("snapshot", "create", f"v@{name}")  # the writer does not stop for it
    work_on(guest, 5)
    found = {name: md5_sums(daemon, name, tmp_path) for name in expected}
    for name, files in expected.items():
        assert len(files) >= 5
        assert files.items() <= found[name].items()
    assert not expected["second"].keys() <= found["first"].keys(), "a snapshot holds nothing from after it"
    guest.run("touch /run/stop")
    guest.until(lambda: "ended" in guest.run("cat /run/ended 2> /dev/null || true"), "the guest's writer did not end")
    guest.run("umount /mnt && e2fsck -f -n /dev/vda")
    assert guest.complaints() == []
