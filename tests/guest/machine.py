"""A QEMU guest that tests talk to: commands over a serial port, QMP over a socket, the console in a file."""

import base64
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.guest.kernel import Kernel

BOOT_DEADLINE_S = 60.0
COMMAND_DEADLINE_S = 60.0
POLL_S = 0.05
MEMORY_MIB = 384
MAX_LINE_BYTES = 8 << 20
RECONNECT_S = (
    60  # QEMU tries again after 1, 2, 4, 8 and then every 16 s: a slow start costs the test more than its time
)
# Broken KVM is common inside VMs (it opens, then the guest hangs), so emulation unless somebody asks for kvm.
ACCELERATOR = os.environ.get("BLOCKVIRT_TEST_ACCELERATOR", "tcg,thread=single")

COMPLAINTS = (
    *("I/O error", "EXT4-fs error", "EXT4-fs warning", "Aborting journal", "Remounting filesystem", "hung task"),
    *("XFS (vda): Metadata", "XFS (vda): Corruption", "XFS (vda): Internal error", "hut down"),
)


def virtio_disk(socket_path: Path, export: str) -> list[str]:
    """QEMU's arguments for an export as the guest's /dev/vda, through QEMU's own NBD client."""
    where = {"type": "unix", "path": str(socket_path)}
    node = {"driver": "nbd", "node-name": "volume", "server": where, "export": export, "discard": "unmap"}
    return [
        "-blockdev",
        json.dumps(node | {"reconnect-delay": RECONNECT_S}),
        "-device",
        "virtio-blk-pci,drive=volume,id=disk",
    ]


class GuestFailed(AssertionError):
    """The guest did not boot, did not answer, or a command in it failed; carries the end of its console."""


class LineSocket:
    """A unix socket that carries lines."""

    def __init__(self, path: Path, qemu: "subprocess.Popen[bytes]", deadline_s: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._buffer = b""
        end = time.monotonic() + deadline_s
        while True:
            try:
                return self._socket.connect(str(path))
            except OSError:
                if qemu.poll() is not None or time.monotonic() > end:
                    raise
                time.sleep(POLL_S)

    def send(self, line: str) -> None:
        """Write one line."""
        self._socket.sendall(line.encode() + b"\n")

    def receive(self, deadline_s: float) -> str:
        """The next line; raises TimeoutError after the deadline and EOFError when the other end is gone."""
        end = time.monotonic() + deadline_s
        while b"\n" not in self._buffer:
            assert len(self._buffer) < MAX_LINE_BYTES, "a command in the guest says too much"
            self._socket.settimeout(max(0.001, end - time.monotonic()))
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError("QEMU closed the socket")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="replace")

    def close(self) -> None:
        """Close it."""
        self._socket.close()


class Guest:
    """One virtual machine, booted on entry and powered off on exit. `arguments` add devices to its command line."""

    def __init__(self, directory: Path, kernel: Kernel, initramfs: Path, arguments: Sequence[str]) -> None:
        self._directory = directory
        self._console = directory / "console"
        self._sequence = 0
        fixed = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        fixed += ["-machine", "q35", "-accel", ACCELERATOR, "-cpu", "max", "-m", str(MEMORY_MIB)]
        fixed += ["-kernel", str(kernel.image), "-initrd", str(initramfs)]
        fixed += ["-append", "console=ttyS0 quiet panic=-1 mitigations=off"]
        fixed += ["-serial", f"file:{self._console}"]
        # QEMU waits for us on the agent's socket, so nothing that the guest says is lost.
        fixed += [
            "-chardev",
            f"socket,id=agent,path={directory / 'agent'},server=on,wait=on",
            "-serial",
            "chardev:agent",
        ]
        fixed += ["-qmp", f"unix:{directory / 'qmp'},server=on,wait=off"]
        self._command = [*fixed, *arguments]

    def __enter__(self) -> Self:
        self._qemu = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            self._agent = LineSocket(self._directory / "agent", self._qemu, BOOT_DEADLINE_S)
            self._answer("0", BOOT_DEADLINE_S, "boot")
            self._qmp = LineSocket(self._directory / "qmp", self._qemu, BOOT_DEADLINE_S)
            self._qmp.receive(BOOT_DEADLINE_S)  # the greeting
            self.qmp("qmp_capabilities")
        except BaseException as error:
            self._qemu.kill()
            said, _ = self._qemu.communicate()
            raise GuestFailed(f"the guest did not boot: {error!r}\n{said.decode()}\n{self.console_tail()}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.qmp("quit")  # QEMU flushes and disconnects as at a guest's power-off
                self._qemu.wait(COMMAND_DEADLINE_S)
        finally:
            self._qemu.kill()
            self._qemu.communicate()
            self._agent.close()
            self._qmp.close()

    def run(self, script: str, deadline_s: float = COMMAND_DEADLINE_S) -> str:
        """Run a shell script in the guest; its output. Raises GuestFailed when its exit status is not 0."""
        self._sequence += 1
        number = str(self._sequence)
        self._agent.send(f"{number} {base64.b64encode(script.encode()).decode()}")
        status, output = self._answer(number, deadline_s, script)
        if status != 0:
            raise GuestFailed(f"in the guest: {script}\nexit status {status}\n{output}\n{self.console_tail()}")
        return output

    def _answer(self, number: str, deadline_s: float, script: str) -> tuple[int, str]:
        try:
            answered, status, *output = self._agent.receive(deadline_s).split(" ")
        except (TimeoutError, EOFError) as error:
            raise GuestFailed(f"no answer from the guest to: {script}\n{self.console_tail()}") from error
        assert answered == number, f"answer {answered} to command {number}"
        return int(status), base64.b64decode("".join(output)).decode(errors="replace")

    def until(self, condition: Callable[[], bool], failure: str, deadline_s: float = COMMAND_DEADLINE_S) -> None:
        """Poll `condition` until it holds; raises GuestFailed with `failure` and the console after the deadline."""
        end = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > end:
                raise GuestFailed(f"{failure} within {deadline_s:.0f} s\n{self.console_tail()}")
            time.sleep(POLL_S)

    def qmp(self, execute: str, **arguments: object) -> object:
        """One QMP command; its return value. Raises GuestFailed with QEMU's description when QEMU refuses."""
        self._qmp.send(json.dumps({"execute": execute, "arguments": arguments}))
        while True:
            answer = json.loads(self._qmp.receive(COMMAND_DEADLINE_S))
            if "error" in answer:
                raise GuestFailed(f"QMP {execute}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def complaints(self) -> list[str]:
        """What the guest's kernel has logged about disks that fail and filesystems that gave up."""
        return [line for line in self.run("dmesg").splitlines() if any(word in line for word in COMPLAINTS)]

    def console_tail(self) -> str:
        """The end of the console, for messages."""
        if not self._console.exists():
            return "(no console)"
        return "--- end of the guest's console ---\n" + self._console.read_bytes()[-4096:].decode(errors="replace")
