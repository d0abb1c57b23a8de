"""What commands print: tables for people, JSON and CSV for programs.

On a terminal sizes are rounded ('1.5GiB'), and rich draws a table that does not fit as it is; anywhere else sizes are
exact bytes and tables are plain columns, so that a pipe never gets less than the truth.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import click

from blockvirt.units import format_size

Kind = Literal["text", "time", "size", "number", "percent", "duration"]
EXIT_BROKEN_PIPE = 141  # what a shell makes of SIGPIPE
_TO_THE_RIGHT = ("size", "number", "percent", "duration")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its title, the key of the answer's field, and how to show it."""

    title: str
    key: str
    kind: Kind = "text"


def output_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``-o table|json|csv``."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json", "csv"]),
        default="table",
        show_default=True,
        help="How to print; sizes are exact bytes unless it is a table on a terminal.",
    )(command)


def show_rows(
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[Column],
    output: str,
    *,
    footer: Sequence[str] = (),
    folds: bool = True,
) -> None:
    """Print a list, and below a table the lines of ``footer``; raises ClickException where stdout cannot take it.

    Without ``folds`` a line that is too long for the terminal stays a line: a tree would not survive it.
    """
    rows = list(rows)
    with whole_output():
        if output == "json":
            _json(rows)
        elif output == "csv":
            _csv(rows, columns)
        else:
            terminal = sys.stdout.isatty()
            cells = [[column.title for column in columns], *(_cells(row, columns, human=terminal) for row in rows)]
            lines = _aligned(cells, columns)
            if terminal and folds and not _fit(lines):
                _drawn(cells, columns)
            else:
                styled = terminal and os.environ.get("TERM") not in ("dumb", "unknown")
                click.echo(click.style(lines[0], bold=True) if styled else lines[0])
                for line in lines[1:]:
                    click.echo(line)
            for line in footer:
                click.echo(line)


def show_one(item: Mapping[str, Any], columns: Sequence[Column], output: str) -> None:
    """Print one thing, a line for each field; raises ClickException where stdout cannot take it."""
    with whole_output():
        if output == "json":
            _json(item)
        elif output == "csv":
            _csv([item], columns)
        else:
            cells = _cells(item, columns, human=sys.stdout.isatty())
            width = max(len(column.title) for column in columns)
            for column, cell in zip(columns, cells, strict=True):
                click.echo(f"{column.title.lower():{width}}  {cell}".rstrip())


@contextmanager
def whole_output() -> Iterator[None]:
    """Have everything that is printed arrive before the command ends well; raises ClickException otherwise."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered must not fail again at exit
        if isinstance(error, BrokenPipeError):  # who reads has seen enough; click itself would make a failure of it
            raise click.exceptions.Exit(EXIT_BROKEN_PIPE) from error
        raise click.ClickException(f"the output is not complete: {error.strerror}") from error


def _json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[Column]) -> None:
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([column.key for column in columns])
    for row in rows:
        writer.writerow(_cells(row, columns, human=False))


def _cells(row: Mapping[str, Any], columns: Sequence[Column], *, human: bool) -> list[str]:
    return [_cell(row.get(column.key), column.kind, human=human) for column in columns]


def _cell(value: Any, kind: Kind, *, human: bool) -> str:
    if value is None:
        return ""
    if human and (shown := _for_people(value, kind)):
        return shown
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return " ".join(f"{key}={inner}" for key, inner in value.items())
    if isinstance(value, list):
        return " ".join(str(inner) for inner in value)
    return str(value)


def _for_people(value: Any, kind: Kind) -> str:
    """Return what a terminal shows instead of the exact value; empty: the value itself."""
    if kind == "size":
        return format_size(value)
    if kind == "time":
        return to_the_second(value)
    if kind == "percent":
        return f"{value:.1f}%"
    if kind == "duration":
        return duration(value)
    return ""


def size_for_people(size_bytes: int) -> str:
    """Return a size within a sentence: rounded on a terminal, exact anywhere else."""
    return format_size(size_bytes) if sys.stdout.isatty() else f"{size_bytes} bytes"


def to_the_second(time: str) -> str:
    """Return a time of the API (RFC 3339) without what is less than a second."""
    return re.sub(r"\.[0-9]+", "", time)


def duration(seconds: float) -> str:
    """Return a time span for people: the two largest units of it that count ('45s', '3m20s', '2d4h')."""
    left_s = round(max(0.0, seconds))
    spans = (("d", left_s // 86_400), ("h", left_s // 3_600 % 24), ("m", left_s // 60 % 60), ("s", left_s % 60))
    first = next((place for place, (_, count) in enumerate(spans) if count), len(spans) - 1)
    return "".join(f"{count}{unit}" for unit, count in spans[first : first + 2] if count) or "0s"


def _aligned(lines: Sequence[Sequence[str]], columns: Sequence[Column]) -> list[str]:
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    aligned = []
    for line in lines:
        cells = [
            f"{cell:>{width}}" if column.kind in _TO_THE_RIGHT else f"{cell:{width}}"
            for cell, width, column in zip(line, widths, columns, strict=True)
        ]
        aligned.append("  ".join(cells).rstrip())
    return aligned


def _fit(lines: Sequence[str]) -> bool:
    """Whether the terminal shows every line as one line: not too long, one cell for each character."""
    columns = os.get_terminal_size(sys.stdout.fileno()).columns or 80
    return all(len(line) <= columns and line.isascii() and line.isprintable() for line in lines)


def _drawn(lines: Sequence[Sequence[str]], columns: Sequence[Column]) -> None:
    from rich.console import Console  # 40 ms: only where cells must be folded or measured
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, column in zip(lines[0], columns, strict=True):
        table.add_column(title, justify="right" if column.kind in _TO_THE_RIGHT else "left", overflow="fold")
    for line in lines[1:]:
        table.add_row(*(Text(cell) for cell in line))
    Console().print(table)
