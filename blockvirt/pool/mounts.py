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
    source: str


def mount_of(directory: Path) -> Mount | None:
    """Return the mount that ``directory`` is on; None where the kernel does not tell. Raises OSError."""
    fd = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    try:
        facts = Path(f"/proc/self/fdinfo/{fd}").read_text()
    except FileNotFoundError:
        return None  # no /proc
    finally:
        os.close(fd)
    found = re.search(r"^mnt_id:\s*(\d+)$", facts, re.MULTILINE)
    if found is None:
        return None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if line.startswith(f"{found[1]} "):
            return parse_mount(line)
    return None


def parse_mount(line: str) -> Mount:
    """Return the mount in one line of mountinfo; raises ValueError if it is none."""
    before, separator, after = line.partition(" - ")
    left, right = before.split(), after.split()
    if not separator or len(left) < 6 or len(right) < 3:
        raise ValueError(f"not a line of mountinfo: {line!r}")
    return Mount(_unescaped(left[4]), right[0], _unescaped(right[1]))


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
