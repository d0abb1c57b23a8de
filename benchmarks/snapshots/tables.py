"""Markdown tables of whatever was measured, and the percentiles in them."""

import math
import statistics
from collections.abc import Sequence


def table(heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table under its heading; the first column is text, the others are figures."""
    lines = [f"### {heading}", "", "| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: a value that was measured."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(percent * len(ranked) / 100) - 1)]


def median_or_none(values: Sequence[float | None]) -> float | None:
    """The median of those that could be measured; None without any."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def figure(value: float | None, digits: int = 1) -> str:
    """A number for a cell: so many digits behind the point, thousands apart; '-' for what was not measured."""
    return "-" if value is None else f"{value:,.{digits}f}"
