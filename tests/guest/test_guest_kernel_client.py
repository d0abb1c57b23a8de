"""Linux's own NBD client, which knows simple replies only, over two TCP connections."""

import sys
from pathlib import Path

import pytest

from tests.guest.conftest import Boot
from tests.real.clients import run
from tests.real.conftest import GIB
from tests.real.process import ServerProcess

pytestmark = pytest.mark.requires(
    "qemu-system-x86_64", "busybox", "cpio", "depmod", "modprobe", "mkfs.ext4", "e2fsck", "nbd-client", "nbdcopy"
)

SERVER_IN_GUEST = ("10.0.2.100", 10809)
FILES = 20

WRITE = f"""
mkdir /run/sums
for number in $(seq {FILES}); do
    dd if=/dev/urandom of=/mnt/file.$number bs=8k count=$number conv=fsync || exit 1
    md5sum < /mnt/file.$number > /run/sums/file.$number
done
rm /mnt/file.3 /run/sums/file.3
sync
"""
VERIFY = """
cd /run/sums
for name in *; do
    [ "$(md5sum < /mnt/$name)" = "$(cat $name)" ] || { echo "$name is not what was written"; exit 1; }
done
ls | wc -l
"""


def test_the_kernels_own_client_works(server: ServerProcess, boot: Boot, tmp_path: Path) -> None:
    address, port = SERVER_IN_GUEST
    relay = f"{sys.executable} {Path(__file__).with_name('relay.py')} {server.tcp_port()}"
    guest = boot("-nic", f"user,model=virtio-net-pci,restrict=on,guestfwd=tcp:{address}:{port}-cmd:{relay}")
    guest.run("ip link set lo up && ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up")
    guest.run(f"nbd-client -C 2 -N {server.export} {address} {port} /dev/nbd0")
    assert guest.run("cat /sys/block/nbd0/size").strip() == str(GIB // 512)
    assert guest.run(f"netstat -tn | grep {address}:{port} | grep -c ESTABLISHED").strip() == "2"
    guest.run("mkfs.ext4 -q /dev/nbd0 && mount -o discard /dev/nbd0 /mnt")
    guest.run(WRITE)
    guest.run("umount /mnt && e2fsck -f -n /dev/nbd0 && mount /dev/nbd0 /mnt && echo 3 > /proc/sys/vm/drop_caches")
    assert int(guest.run(VERIFY)) == FILES - 1
    guest.run("umount /mnt && nbd-client -d /dev/nbd0")
    assert guest.complaints() == []
    # Disconnected, and every byte where another client finds it.
    copy = tmp_path / "copy"
    run("nbdcopy", f"nbd://127.0.0.1:{server.tcp_port()}/{server.export}", copy)
    run("e2fsck", "-f", "-n", copy)
