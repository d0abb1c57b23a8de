"""The guest's whole user space: busybox, tools of filesystems, nbd-client, and an agent that runs what is asked for."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.guest.kernel import Kernel
from tests.real.clients import run

TOOLS = ("mkfs.ext4", "e2fsck", "resize2fs", "nbd-client")

# The agent reads "ID BASE64-OF-A-SCRIPT" lines from the second serial port and answers "ID STATUS BASE64-OF-OUTPUT".
# Everything it needs is in memory: it goes on answering while the disk's server is down. It is not the first process:
# that one hears of the end of whatever a script left running, and busybox's `read` forgets half a line at any signal.
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /run /mnt /tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
for module in $(cat /modules/order); do
    insmod /modules/$module || echo "module $module did not load"
done
stty -F /dev/ttyS1 raw -echo
exec 3<>/dev/ttyS1
echo "0 0 " >&3
(
    while read -r id script <&3; do
        echo "$script" | base64 -d > /run/script
        sh /run/script > /run/output 2>&1 < /dev/null 3>&-
        status=$?
        echo "$id $status $(base64 -w 0 < /run/output)" >&3
    done
)
poweroff -f
"""


def build(kernel: Kernel, directory: Path, tools: Sequence[str] = TOOLS) -> Path:
    """Write an initramfs with these programs for this kernel into `directory`; its path."""
    tree = directory / "initramfs"
    for name in ("bin", "modules"):
        (tree / name).mkdir(parents=True)
    shutil.copy(_found("busybox"), tree / "bin" / "busybox")
    for name in tools:
        _copy_program(_found(name), tree)
    for module in kernel.modules:
        shutil.copyfile(module, tree / "modules" / module.name)
    (tree / "modules" / "order").write_text("\n".join(module.name for module in kernel.modules))
    init = tree / "init"
    init.write_text(INIT)
    init.chmod(0o755)
    image = directory / "initramfs.cpio"
    names = "".join(f"{path.relative_to(tree)}\n" for path in sorted(tree.rglob("*")))
    with image.open("wb") as stream:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet", "--owner=+0:+0"],
            cwd=tree,
            input=names.encode(),
            stdout=stream,
            check=True,
            timeout=60,
        )
    return image


def _found(program: str) -> Path:
    path = shutil.which(program)
    assert path is not None, f"{program}: the test's `requires` mark should have seen that it is missing"
    return Path(path)


def _copy_program(program: Path, tree: Path) -> None:
    """The program into /bin, and the libraries that it is linked with to where its loader looks for them."""
    shutil.copy(program, tree / "bin" / program.name)
    for library in re.findall(r"(/\S+) \(0x", run("ldd", program)):
        target = tree / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
