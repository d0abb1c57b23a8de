"""What an offline check finds: one thing that is wrong, how bad it is, and in words what it means."""

from dataclasses import dataclass
from enum import Enum


class Severity(Enum):
    """How bad a finding is."""

    CORRUPT = "corrupt"
    """Something that must hold does not."""
    LEAK = "leak"
    """Space or rows that nothing refers to, as a crash may leave them; harmless, and ``check --repair`` removes it."""
    UNCHECKED = "unchecked"
    """It could not be looked at: nothing is known of it, good or bad."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    severity: Severity
    code: str
    """Stable, for programs: 'damaged-record', 'name-index' ..."""
    what: str
    """What it concerns: 'volume web', 'file 17' ..."""
    message: str


def corrupt(code: str, what: str, message: str) -> Finding:
    """Return a finding that says that data or metadata is not what it must be."""
    return Finding(Severity.CORRUPT, code, what, message)


def leak(code: str, what: str, message: str) -> Finding:
    """Return a finding that says that something is left over."""
    return Finding(Severity.LEAK, code, what, message)


def unchecked(code: str, what: str, message: str) -> Finding:
    """Return a finding that says that something could not be looked at."""
    return Finding(Severity.UNCHECKED, code, what, message)
