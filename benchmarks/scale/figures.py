"""What was measured beside what it should be, as one table. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from benchmarks.snapshots.tables import figure


class Bound(StrEnum):
    """On which side of its limit a figure should lie."""

    BELOW = "<"
    AT_MOST = "<="
    AT_LEAST = ">="


@dataclass(frozen=True, slots=True)
class Target:
    """A limit in the figure's own unit."""

    bound: Bound
    limit: float

    def met_by(self, value: float) -> bool:
        """Whether a figure is on the right side."""
        if self.bound is Bound.BELOW:
            return value < self.limit
        return value <= self.limit if self.bound is Bound.AT_MOST else value >= self.limit


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the report."""

    what: str
    value: float | None
    """None: it could not be measured; the note says why."""
    unit: str
    target: Target | None = None
    """None: it stands there to explain another one."""
    note: str = ""
    digits: int = 1
    """Behind the point."""

    def row(self) -> list[str]:
        """What, target, measured, met."""
        unit = f" {self.unit}" if self.unit else ""
        wanted = f"{self.target.bound} {self.target.limit:,g}{unit}" if self.target else ""
        note = f" ({self.note})" if self.note else ""
        if self.value is None:
            return [self.what, wanted, f"not measured{note}", "-"]
        met = "" if self.target is None else "yes" if self.target.met_by(self.value) else "**no**"
        return [self.what, wanted, f"{figure(self.value, self.digits)}{unit}{note}", met]


def below(limit: float) -> Target:
    """A target that a figure must stay under."""
    return Target(Bound.BELOW, limit)


def at_most(limit: float) -> Target:
    """A target that a figure may reach and not pass."""
    return Target(Bound.AT_MOST, limit)


def at_least(limit: float) -> Target:
    """A target that a figure must reach."""
    return Target(Bound.AT_LEAST, limit)


def report(figures: Sequence[Figure]) -> str:
    """The table in Markdown."""
    lines = ["| what | target | measured | met? |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(each.row()) + " |" for each in figures]
    return "\n".join(lines)
