"""A guest works on the volume while the daemon is killed under it, again and again, and then grows."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.conftest import Boot
from tests.guest.machine import Guest, GuestFailed, virtio_disk
from tests.real.clients import run
from tests.real.conftest import GIB
from tests.real.peers import LyingQemuNbd
from tests.real.process import ServerProcess

pytestmark = pytest.mark.requires(
    "qemu-system-x86_64", "busybox", "cpio", "depmod", "modprobe", "mkfs.ext4", "e2fsck", "nbd-client", "nbdcopy"
)

KILLS = 5
FILES_BETWEEN_KILLS = 10

# Fsynced files, one file overwritten in place, and files removed again (which `discard` turns into trims); what each
# must hold is remembered in memory only once its fsync has returned.
WRITER = """
number=0
while [ ! -e /run/stop ]; do
    number=$((number + 1))
    slot=$((number % 32))
    dd if=/dev/urandom of=/run/piece bs=24k count=1 || exit 1
    sum=$(md5sum < /run/piece)
    dd if=/run/piece of=/mnt/file.$number bs=24k conv=fsync || exit 1
    echo "$sum" > /run/sums/file.$number
    rm -f /run/sums/slot.$slot
    dd if=/run/piece of=/mnt/slots bs=24k seek=$slot conv=notrunc,fsync || exit 1
    echo "$sum" > /run/sums/slot.$slot
    if [ $((number % 4)) = 0 ]; then
        rm /run/sums/file.$((number - 2)) /mnt/file.$((number - 2)) || exit 1
    fi
    echo $number > /run/number.new
    mv /run/number.new /run/number
done
echo ended > /run/ended
"""

VERIFY = """
cd /run/sums
for name in *; do
    case $name in
        file.*) found=$(md5sum < /mnt/$name) ;;
        slot.*) found=$(dd if=/mnt/slots bs=24k skip=${name#slot.} count=1 2>/dev/null | md5sum) ;;
    esac
    [ "$found" = "$(cat $name)" ] || { echo "$name is not what was fsynced"; exit 1; }
done
ls | wc -l
"""


def written(guest: Guest) -> int:
    """How many rounds the writer has done."""
    return int(guest.run("cat /run/number"))


def work_through_kills(server: ServerProcess, guest: Guest, kills: int) -> None:
    """Make a filesystem, write with fsync while the server is killed `kills` times, and verify every fsynced byte."""
    guest.run("mkfs.ext4 -q /dev/vda && mount -o discard /dev/vda /mnt && mkdir /run/sums && echo 0 > /run/number")
    guest.run(f"cat > /run/writer <<'END'\n{WRITER}END\nsh /run/writer 2> /run/errors &")
    for kill in range(1, kills + 1):
        goal = written(guest) + FILES_BETWEEN_KILLS
        guest.until(
            lambda goal=goal: written(guest) >= goal,  # type: ignore[misc]
            f"the guest's writer came no further before kill {kill}",
        )
        server.crash_and_restart()
        found = server.recovered()
        if found is not None:
            complete, frames = found
            assert complete, "the page cache survived, and so must everything that was answered"
            assert frames > 0, "the journal was empty: this kill proved nothing"
    goal = written(guest) + FILES_BETWEEN_KILLS
    guest.until(lambda: written(guest) >= goal, "the guest's writer came no further after the last kill")
    guest.run("touch /run/stop")
    guest.until(lambda: "ended" in guest.run("cat /run/ended 2> /dev/null || true"), "the guest's writer did not end")
    # A new mount and an empty page cache: what is verified comes from the server.
    guest.run("umount /mnt && e2fsck -f -n /dev/vda && mount /dev/vda /mnt && echo 3 > /proc/sys/vm/drop_caches")
    verified = int(guest.run(VERIFY))
    assert verified > kills * FILES_BETWEEN_KILLS // 2, "there was hardly anything to verify"
    assert guest.complaints() == []


def grow_online(server: ServerProcess, guest: Guest, size_bytes: int) -> None:
    """The volume grows under the mounted filesystem: the daemon first, then QEMU, then the guest's ext4."""
    server.grow(size_bytes)

    def taken() -> bool:
        try:
            guest.qmp("block_resize", **{"node-name": "volume", "size": size_bytes})
        except GuestFailed as refusal:
            # QEMU knows the new size only once it has connected again.
            if "Cannot grow" in str(refusal):
                return False
            raise
        return True

    guest.until(taken, "QEMU did not see the volume's new size")
    sectors = str(size_bytes // 512)
    guest.until(lambda: guest.run("cat /sys/block/vda/size").strip() == sectors, "the guest did not see the new size")
    guest.run("resize2fs /dev/vda")
    # More than the old volume could hold behind its end: ext4 spreads directories, so look at the place itself too.
    guest.run("umount /mnt && e2fsck -f -n /dev/vda")
    last = size_bytes // 4096 - 1
    script = f"dd if=/run/piece of=/dev/vda bs=4k count=1 seek={last} conv=notrunc,fsync"
    guest.run(f"{script} && echo 3 > /proc/sys/vm/drop_caches")
    guest.run(f"dd if=/dev/vda bs=4k skip={last} count=1 of=/run/back && dd if=/run/piece of=/run/sent bs=4k count=1")
    guest.run("cmp /run/back /run/sent && mount /dev/vda /mnt && echo 3 > /proc/sys/vm/drop_caches")
    guest.run(VERIFY)
    guest.run("umount /mnt")
    assert guest.complaints() == []


@pytest.mark.timeout(300)  # half a minute when it has a core of its own
def test_a_guest_notices_neither_kills_nor_growth(server: ServerProcess, boot: Boot, tmp_path: Path) -> None:
    guest = boot(*virtio_disk(server.socket, server.export))
    work_through_kills(server, guest, KILLS)
    grow_online(server, guest, 2 * GIB)
    # And what the host finds in the volume is the same filesystem, sound.
    copy = tmp_path / "copy"
    run("nbdcopy", server.uri, copy)
    run("e2fsck", "-f", "-n", copy)
    assert copy.stat().st_size == 2 * GIB


def test_a_server_that_loses_fsynced_writes_is_noticed(
    control: Callable[[Callable[[], ServerProcess]], ServerProcess], boot: Boot
) -> None:
    server = control(LyingQemuNbd)
    guest = boot(*virtio_disk(server.socket, server.export))
    # Which of them depends on what was lost: the filesystem's own blocks, or a file's.
    lost = "still has errors|is not what was fsynced|came no further|EXT4-fs"
    with pytest.raises(AssertionError, match=lost):
        work_through_kills(server, guest, 1)
