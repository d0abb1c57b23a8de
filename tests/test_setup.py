"""The way into the project: what `make` says on a machine that lacks something, and what the installer installs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
APT_LINE = "apt-get install -y git make python3-venv"
PACKAGES = {
    line.split()[0]
    for line in (ROOT / "tools" / "test-tools.txt").read_text().splitlines()
    if line and not line.startswith("#")
}


class Machine:
    """A search path whose programs are stand-ins: what a machine has, and what was asked of it."""

    def __init__(self, directory: Path) -> None:
        self.bin = directory / "bin"
        self.bin.mkdir()
        self.log = directory / "log"
        self.log.touch()
        self.installed = directory / "installed"
        self.installed.mkdir()

    def program(self, name: str, script: str) -> None:
        """Put a stand-in first in the path; it may use $LOG and $INSTALLED."""
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def run(self, *command: str, path: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the project there."""
        env = {
            "PATH": path or f"{self.bin}:/usr/bin:/bin",
            "LOG": str(self.log),
            "INSTALLED": str(self.installed),
        } | environment
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    def calls(self) -> list[str]:
        """What the stand-ins were asked to do, in order."""
        return self.log.read_text().splitlines()


# apt-get writes down what it is asked; "install" installs, but for a package that this release does not have.
APT = """
words=(); for word; do case "$word" in -*|DPkg*|Acquire*) ;; *) words+=("$word") ;; esac; done
echo "${words[*]}" >>"$LOG"
case "${words[0]}" in
update) [ ! -e "$INSTALLED/.mirror-down" ] || { rm "$INSTALLED/.mirror-down"; exit 100; } ;;
install) for package in "${words[@]:1}"; do [ "$package" != "${ABSENT:-}" ] || exit 100; done
         for package in "${words[@]:1}"; do touch "$INSTALLED/$package"; done ;;
esac
"""


@pytest.fixture
def debian(tmp_path: Path) -> Machine:
    """A Debian with all the tests' packages, and root's rights."""
    machine = Machine(tmp_path)
    machine.program("id", "echo 0")
    machine.program("sudo", "exit 1")
    machine.program("sleep", 'echo "sleep $1" >>"$LOG"')
    machine.program("apt-get", APT)
    machine.program("apt-cache", "exit 0")
    machine.program("dpkg-query", '[ -e "$INSTALLED/${!#}" ] && printf installed')
    for package in PACKAGES:
        (machine.installed / package).touch()
    # Programs of packages that are "missing" must not be found where this machine really has them.
    for tool in ("bash", "dirname", "cat", "rm", "touch", "env"):
        real = shutil.which(tool)
        assert real is not None
        (machine.bin / tool).symlink_to(real)
    return machine


def install(machine: Machine, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installer with nothing but the stand-ins in its path."""
    return machine.run("tools/install-test-tools", path=str(machine.bin), **environment)


def test_nothing_missing_asks_nothing(debian: Machine) -> None:
    """The usual case costs no network."""
    result = install(debian, CI="true")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert debian.calls() == []


def test_only_what_is_missing_is_installed(debian: Machine) -> None:
    """And what was there stays as it is."""
    (debian.installed / "python3-libnbd").unlink()
    (debian.installed / "busybox-static").unlink()
    assert install(debian, CI="true").returncode == 0
    assert debian.calls() == ["update", "install python3-libnbd busybox-static"]


def test_a_mirror_that_fails_is_tried_again(debian: Machine) -> None:
    """A hiccup of the network is not a reason to skip tests."""
    (debian.installed / "python3-libnbd").unlink()
    (debian.installed / ".mirror-down").touch()
    assert install(debian, CI="true").returncode == 0
    assert debian.calls() == ["update", "sleep 5", "update", "install python3-libnbd"]


def test_one_absent_package_does_not_keep_the_others_out(debian: Machine) -> None:
    """It is named; in CI it stops the run."""
    (debian.installed / "python3-libnbd").unlink()
    (debian.installed / "busybox-static").unlink()
    result = install(debian, ABSENT="python3-libnbd")
    assert result.returncode == 0
    assert (debian.installed / "busybox-static").exists()
    assert "will be skipped: python3-libnbd\n" in result.stderr
    assert install(debian, ABSENT="python3-libnbd", CI="true").returncode == 1


def test_without_rights_it_names_what_will_be_skipped(debian: Machine) -> None:
    """Nothing is tried that would ask for a password; in CI it is a failure."""
    debian.program("id", "echo 1000")
    (debian.installed / "python3-libnbd").unlink()
    result = install(debian)
    assert result.returncode == 0
    assert "will be skipped: python3-libnbd\n" in result.stderr
    assert "apt-get install -y --no-install-recommends python3-libnbd" in result.stderr
    assert debian.calls() == []
    assert install(debian, CI="true").returncode == 1


def test_missing_package_lists_are_fetched(debian: Machine) -> None:
    """The guest test downloads a kernel by apt-get, which knows no package without them."""
    debian.program("apt-cache", "exit 100")
    assert install(debian).returncode == 0
    assert debian.calls() == ["update"]


def make(machine: Machine, target: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run make with nothing in its path but itself, git and the stand-ins."""
    for tool in ("make", "git"):
        real = shutil.which(tool)
        if real is not None and not (machine.bin / tool).exists():
            (machine.bin / tool).symlink_to(real)
    assignments = [f"{name}={value}" for name, value in variables.items()]
    return machine.run("make", target, *assignments, path=str(machine.bin))


def test_make_without_python_prints_the_one_line(tmp_path: Path) -> None:
    """A stranger is told what to paste."""
    result = make(Machine(tmp_path), "venv", VENV=str(tmp_path / "venv"))
    assert result.returncode != 0
    assert APT_LINE in result.stderr


def test_make_without_venv_prints_the_one_line(tmp_path: Path) -> None:
    """Debian's python3 alone cannot make virtual environments."""
    machine = Machine(tmp_path)
    machine.program("python3", 'case "$2" in *ensurepip*) exit 1 ;; esac')
    result = make(machine, "venv", VENV=str(tmp_path / "venv"))
    assert result.returncode != 0
    assert APT_LINE in result.stderr
    assert not (tmp_path / "venv").exists()


def test_make_names_a_python_that_is_too_old(tmp_path: Path) -> None:
    """And how to name another one."""
    machine = Machine(tmp_path)
    machine.program("python3", 'case "$*" in -V) echo Python 3.9.2 ;; *version_info*) exit 1 ;; esac')
    result = make(machine, "venv", VENV=str(tmp_path / "venv"))
    assert result.returncode != 0
    assert "needs Python 3.11 or newer" in result.stderr
    assert "Python 3.9.2" in result.stderr
    assert "make PYTHON=" in result.stderr


def test_make_mentions_git_when_it_is_missing(tmp_path: Path) -> None:
    """It is part of the line, though an unpacked archive works without it."""
    machine = Machine(tmp_path)
    machine.program("git", "exit 0")
    assert "git is missing" not in make(machine, "check-python").stderr
    (machine.bin / "git").unlink()
    machine.program("python3", "exit 0")
    (machine.bin / "make").unlink()
    real = shutil.which("make")
    assert real is not None
    result = subprocess.run(
        [real, "check-python"], cwd=ROOT, env={"PATH": str(machine.bin)}, capture_output=True, text=True, check=False
    )
    assert f"git is missing: {APT_LINE}" in result.stderr
    assert result.returncode == 0


def test_the_readme_begins_with_the_same_line() -> None:
    """What make prints and what the README says are one."""
    assert APT_LINE in (ROOT / "README.md").read_text()
    assert APT_LINE.split("-y ")[1] in (ROOT / ".ci" / "run").read_text()


def test_scripts_are_executable() -> None:
    """git keeps the bit; without it CI stops at its first line."""
    for name in (".ci/run", "tools/install-test-tools"):
        assert os.access(ROOT / name, os.X_OK), name
