"""The attacks, by name."""

import importlib

from tests.attacks.attack import Attack

ATTACKS: tuple[str, ...] = (
    "fsx",
    "kills",
    "power_cuts",
    "crash_states",
    "simulation",
    "faults",
    "full",
    "bit_rot",
    "sessions",
    "guests",
    "codecs",
    "api",
)
"""Each a module of this directory with its ``ATTACK``, in the order of the table."""


def load(name: str) -> Attack:
    """Return an attack; raises ModuleNotFoundError."""
    attack: Attack = importlib.import_module(f"tests.attacks.{name}").ATTACK
    return attack
