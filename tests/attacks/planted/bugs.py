"""Bugs that are planted on purpose: an attack that does not find its own proves nothing.

Each is a patch of the product's code that only a test can switch on: in this process (``planted``), or in a daemon that
is started by ``command``.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True, slots=True)
class Bug:
    """One planted bug."""

    name: str
    """Words with hyphens: "reply-before-journal"."""
    what: str
    """What the code does wrong then."""
    breaks: tuple[str, ...]
    """The invariants that it breaks."""
    attack: str
    """The name of the attack that must catch it."""
    plant: Callable[[pytest.MonkeyPatch], None]
    """Patches the code."""
    count: int = 1
    """So many trials catch it for sure."""
    seed: int = 0
    """Of the first of them."""
    is_quick: bool = True
    """It is caught in a few seconds: a part of `make test`; else of `python -m tests.attacks` only."""


MODULES: tuple[str, ...] = (
    "fsx",
    "kills",
    "power_cuts",
    "crash_states",
    "faults",
    "full",
    "bit_rot",
    "simulation",
    "sessions",
    "codecs",
    "api",
    "guests",
)
"""One for each attack that has planted bugs: ``tests.attacks.planted.NAME``, with its ``BUGS``."""


def all_bugs() -> list[Bug]:
    """Return every planted bug."""
    return [bug for module in MODULES for bug in importlib.import_module(f"tests.attacks.planted.{module}").BUGS]


def bug_named(name: str) -> Bug:
    """Return a planted bug; raises KeyError."""
    return {bug.name: bug for bug in all_bugs()}[name]


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """Have a bug in this process, for a while."""
    with pytest.MonkeyPatch.context() as patch:
        bug.plant(patch)
        yield


def command(name: str) -> list[str]:
    """Return the beginning of a command line that is ``blockvirt`` with a bug, or without one if ``name`` is empty."""
    if not name:
        return [sys.executable, "-m", "blockvirt"]
    return [sys.executable, "-m", "tests.attacks.planted", name]


def replacing(owner: object, name: str, wrong: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return a plant that puts ``wrong`` in the place of an attribute."""
    return lambda patch: patch.setattr(owner, name, wrong)
