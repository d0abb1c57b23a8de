"""The README's lines, pasted: what a stranger does in the first minute, in a directory that looks like a clone."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.daemon import Daemon

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DEADLINE_S = 100
# Ctrl-A c: from the guest's console to QEMU's monitor, with -nographic.
MONITOR_INPUT = "\x01cinfo block\nquit\n"


class Clone(Daemon):
    """The daemon as `make run` starts it, with ports that are free: the state in ./var, the program in ./.venv/bin."""

    def __init__(self) -> None:
        super().__init__()
        self.state = self.root / "var"
        self.socket = self.state / "nbd.sock"
        program = self.root / ".venv" / "bin" / "blockvirt"
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m blockvirt "$@"\n')
        program.chmod(0o755)

    def command(self) -> list[str]:
        """The Makefile's line, and free ports."""
        line = re.search(r"@(\$\(BIN\)/blockvirt .*)", (ROOT / "Makefile").read_text())
        assert line is not None
        words = {"$(BIN)": ".venv/bin", "$(STATE)": "var", "$(ARGS)": "--http 127.0.0.1:0 --nbd 127.0.0.1:0"}
        text = line[1]
        for word, meaning in words.items():
            text = text.replace(word, meaning)
        return ["env", "-C", str(self.root), *text.split()]

    def paste(self, lines: str, keyboard: str = "") -> str:
        """Type ``lines`` into a shell in the clone; returns what they print. Any failing line fails the test."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", lines],
            cwd=self.root,
            env=self.environment(),
            input=keyboard,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0, f"{lines}\n{done.stdout}{done.stderr}\n{self.log_tail()}"
        return done.stdout


@pytest.fixture
def clone() -> Iterator[Clone]:
    """A running clone; what it leaves behind must be sound."""
    with Clone() as started:
        started.start()
        yield started
        started.stop()
        started.check()


def block(containing: str) -> str:
    """The one shell block of the README with this text in it."""
    blocks: list[str] = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    found = [text for text in blocks if containing in text]
    assert len(found) == 1
    return found[0]


@pytest.mark.requires("qemu-img", "qemu-io", "qemu-system-x86_64")
def test_a_volume_in_a_guest(clone: Clone) -> None:
    """Five lines: create, download (an image made here stands in), copy, name the disk, boot."""
    lines = block("qemu-system").splitlines()
    assert len(lines) == 5
    create, download, copy, disk, boot = lines
    image = download.rsplit("/", 1)[1]
    clone.paste(f"qemu-img create -q -f qcow2 {image} 64M; qemu-io -f qcow2 -c 'write -P 7 1M 3M' {image}")
    clone.paste("\n".join([create, copy]))
    clone.paste(f"qemu-img compare -f qcow2 -F raw {image} 'nbd+unix:///debian?socket=var/nbd.sock'")
    # KVM here and there is emulated and aborts; the line's own fallback is what is tried.
    monitor = clone.paste("\n".join([disk, boot.replace("-accel kvm ", "")]), MONITOR_INPUT)
    assert "nbd+unix:" in monitor, monitor
    assert "virtio" in monitor, monitor


@pytest.mark.requires("curl")
def test_a_volume_by_curl(clone: Clone) -> None:
    """A size is enough, and the answer says how to attach."""
    volume = json.loads(clone.paste(block("curl")))
    assert volume["size_bytes"] == 1 << 30
    assert any(uri.startswith("nbd+unix:///") for uri in volume["nbd_uris"])


def test_snapshots(clone: Clone) -> None:
    """Taken, listed, cloned, gone back to and deleted, of the volume that the lines before it make."""
    clone.paste(block("qemu-system").splitlines()[0])
    printed = clone.paste(block("snapshot create"))
    assert "\n|-- fresh " in printed
    assert re.search(r"^origin +debian@fresh$", printed, re.MULTILINE)
    listed = clone.paste(".venv/bin/blockvirt -s var snapshot list -o csv")
    assert "debian,before-revert-" in listed
    assert "fresh" not in listed


@pytest.mark.requires("nbdinfo")
def test_the_greeting_can_be_pasted(clone: Clone) -> None:
    """What `make run` prints under "Next" works as it stands, in that order."""
    greeting = clone.log.read_text().split("Next, in another terminal:")[1]
    lines = [line.strip() for line in greeting.splitlines() if line.startswith("  ")]
    assert len(lines) >= 3
    printed = clone.paste("\n".join(lines))
    assert "reconnect-delay" in printed
    assert "export-size: 1073741824" in printed
