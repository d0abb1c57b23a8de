"""Which mounted filesystem a directory is on, from the kernel's mount table (proc(5), /proc/self/mountinfo)."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the mount table."""

    point: str
    fs_type: str
    """Empty where the kernel does not tell."""
    source: str
    filesystem: int
    """``st_dev`` of what is on it."""


def mount_of(directory: Path) -> Mount:
    """Return the mount that ``directory`` is on, as far as this process can see it. Raises OSError.

    The mount itself may be missing from the table: below a chroot whose root is a plain directory, and without /proc.
    Its point is then the topmost directory on the same filesystem, and its type that of another mount of it.
    """
    fd = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    try:
        filesystem = os.fstat(fd).st_dev
        facts = _text_of(f"/proc/self/fdinfo/{fd}")
    finally:
        os.close(fd)
    found = re.search(r"^mnt_id:\s*(\d+)$", facts, re.MULTILINE)
    number = f"{os.major(filesystem)}:{os.minor(filesystem)}"
    fs_type = source = ""
    for line in _text_of("/proc/self/mountinfo").splitlines():
        if found is not None and line.startswith(f"{found[1]} "):
            return parse_mount(line)
        if line.split(" ", 3)[2:3] == [number]:
            other = parse_mount(line)
            fs_type, source = other.fs_type, other.source
    return Mount(str(_topmost(directory.resolve(), filesystem)), fs_type, source, filesystem)


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text()
    except FileNotFoundError:
        return ""  # no /proc


def _topmost(directory: Path, filesystem: int) -> Path:
    top = directory
    while top.parent != top and top.parent.stat().st_dev == filesystem:
        top = top.parent
    return top


def parse_mount(line: str) -> Mount:
    """Return the mount in one line of mountinfo; raises ValueError if it is none."""
    before, separator, after = line.partition(" - ")
    left, right = before.split(), after.split(" ")  # a source may be empty
    if not separator or len(left) < 6 or len(right) < 3:
        raise ValueError(f"not a line of mountinfo: {line!r}")
    major, _, minor = left[2].partition(":")
    return Mount(_unescaped(left[4]), right[0], _unescaped(right[1]), os.makedev(int(major), int(minor)))


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
