"""`python -m tests.attacks.soak`: the long run of all attacks, in parts; the ledger says how far it has come.

A part goes on with the seeds that no row of the ledger has without a broken promise, takes turns between the attacks
that are not done, and adds its rows. So a soak is resumed by running it again, on another machine too, where the ledger
is; and seeds that have broken a promise are tried again, until they pass: their first row stays.
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from tests.attacks.attack import Attack, Level, Outcome
from tests.attacks.catalogue import ATTACKS, load
from tests.attacks.slices import JOBS, Done, Slice, Work, lacking, print_table, side_by_side, verdict

LEDGER = Path(__file__).parents[2] / "docs" / "soak-ledger.md"
TURNS = 10  # slices of a prove's size that one attack gets before the next has its turn: a tenth of it each
HEAD = """# Soak ledger

Each row is a part of a soak: `python -m tests.attacks.soak` goes on with the seeds that are left and adds its own. The
seeds of a row with broken promises are left until a later row has them without. What replays a broken promise is
printed where it is found. Where an attack becomes stricter its older rows are taken out, and their seeds run again.

| day | commit | attack | from seed | trials | broken promises | seconds | figures |
|---|---|---|---:|---:|---:|---:|---|
"""


@dataclass(frozen=True, slots=True)
class Row:
    """What one part did of one attack."""

    day: str
    commit: str
    attack: str
    first_seed: int
    trials: int
    broken: int
    seconds: int
    figures: str

    def line(self) -> str:
        """The row of the table."""
        return "| " + " | ".join(str(getattr(self, field.name)) for field in fields(self)) + " |\n"


def rows_in(text: str) -> list[Row]:
    """Return the rows of a ledger; raises ValueError for a line that is none."""
    rows = []
    for line in text.splitlines():
        if line.startswith("| 2"):
            day, commit, attack, *numbers, figures = [cell.strip() for cell in line.strip().strip("|").split("|")]
            first_seed, trials, broken, seconds = map(int, numbers)
            rows.append(Row(day, commit, attack, first_seed, trials, broken, seconds, figures))
    return rows


def gaps(rows: Sequence[Row], attack: str, upto: int) -> list[range]:
    """Return the seeds from 1 to ``upto`` that no row has without a broken promise: they are to be done, or again."""
    found, first = [], 1
    for row in sorted((row for row in rows if row.attack == attack and not row.broken), key=lambda row: row.first_seed):
        if row.first_seed > first:
            found.append(range(first, min(row.first_seed, upto + 1)))
        first = max(first, row.first_seed + row.trials)
    return [each for each in [*found, range(first, upto + 1)] if each]


def open_failures(rows: Sequence[Row], attack: Attack) -> int:
    """Return how many promises were broken by seeds that have not passed since."""
    to_do = gaps(rows, attack.name, attack.trials[Level.SOAK])
    mine = [row for row in rows if row.attack == attack.name and row.broken]
    return sum(
        row.broken
        for row in mine
        if any(each.start < row.first_seed + max(row.trials, 1) and row.first_seed < each.stop for each in to_do)
    )


def main() -> int:
    """Run one part; exit code 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part-minutes", type=float, default=55.0, help="how long this part takes (default 55)")
    parser.add_argument("--jobs", type=int, default=min(JOBS, os.cpu_count() or 1), help="slices at a time")
    options = parser.parse_args()
    began_s = time.monotonic()
    attacks = [load(name) for name in ATTACKS]
    impossible = set(lacking(ATTACKS))
    done = rows_in(LEDGER.read_text()) if LEDGER.exists() else []
    slices = until(
        began_s + options.part_minutes * 60,
        next_slices([attack for attack in attacks if attack.name not in impossible], done),
    )
    mine = rows_of(side_by_side(slices, options.jobs), time.strftime("%Y-%m-%d"), head())
    LEDGER.write_text((LEDGER.read_text() if LEDGER.exists() else HEAD) + "".join(row.line() for row in mine))
    print_table(
        [
            *(summary(attack, done + mine) for attack in attacks),
            verdict(
                sum(open_failures(done + mine, attack) for attack in attacks),
                [attack for attack in attacks if any(row.attack == attack.name for row in done + mine)],
            ),
        ]
    )
    print(
        f"{sum(row.seconds for row in done + mine):,} s of all jobs, {time.monotonic() - began_s:,.0f} s in this part"
    )
    return 1 if any(row.broken for row in mine) else 0


def until(deadline_s: float, slices: Iterator[Slice]) -> Iterator[Slice]:
    """Give slices as long as there is time."""
    return itertools.takewhile(lambda _: time.monotonic() < deadline_s, slices)


def next_slices(attacks: Sequence[Attack], done: Sequence[Row]) -> Iterator[Slice]:
    """Give slices of what a whole soak still needs, in turns between the attacks."""
    to_do = {attack.name: gaps(done, attack.name, attack.trials[Level.SOAK]) for attack in attacks}
    while any(to_do.values()):
        for attack in attacks:
            if to_do[attack.name]:
                gap, *others = to_do[attack.name]
                part = gap[: max(1, attack.trials[Level.PROVE] // TURNS)]
                yield Slice(attack.name, part.start, len(part))
                to_do[attack.name] = [each for each in (gap[len(part) :], *others) if each]


def rows_of(slices: Iterable[tuple[Work, Done]], day: str, commit: str) -> list[Row]:
    """Return rows for what was done: one for each run of neighbouring slices of an attack that broke nothing."""
    ended = [(work, done) for work, done in slices if isinstance(work, Slice)]
    order = {name: place for place, name in enumerate(dict.fromkeys(work.attack for work, _ in ended))}
    runs: list[tuple[Slice, Outcome, float]] = []
    for work, done in sorted(ended, key=lambda each: (order[each[0].attack], each[0].seed)):
        if runs and not done.outcome.failures:
            first, outcome, seconds = runs[-1]
            is_next = (work.attack, work.seed) == (first.attack, first.seed + outcome.tried)
            if is_next and not outcome.failures:
                outcome.include(done.outcome)
                runs[-1] = first, outcome, seconds + done.seconds
                continue
        runs.append((work, done.outcome, done.seconds))
    rows = []
    for first, outcome, seconds in runs:
        figures = ", ".join(f"{figure}: {value}" for figure, value in outcome.figures.items())
        broken = len(outcome.failures)
        rows.append(Row(day, commit, first.attack, first.seed, outcome.tried, broken, round(seconds), figures))
    return rows


def summary(attack: Attack, rows: Sequence[Row]) -> tuple[str, ...]:
    """Return what all rows of an attack come to, for the table."""
    mine = [row for row in rows if row.attack == attack.name]
    asked = attack.trials[Level.SOAK]
    trials = asked - sum(map(len, gaps(rows, attack.name, asked)))
    broken = open_failures(rows, attack)
    mended = sum(row.broken for row in mine) - broken
    return (
        attack.name,
        f"{trials:,} of {asked:,} {attack.unit} from seed 1",
        f"{broken} broken" + (f", {mended} mended" if mended else ""),
        f"{sum(row.seconds for row in mine):,} s  {Outcome(figures=figures_of(mine)).told()}",
    )


def figures_of(rows: Sequence[Row]) -> "Counter[str]":
    """Return what the rows of an attack have counted, together; without those whose seeds are tried again."""
    figures = Counter[str]()
    for row in (row for row in rows if not row.broken):
        for figure in row.figures.split(", ") if row.figures else []:
            name, _, value = figure.rpartition(": ")
            figures[name] += int(value)
    return figures


def head() -> str:
    """Return the commit that is attacked; "?" outside of a repository."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=LEDGER.parent)
    return done.stdout.strip() or "?"


if __name__ == "__main__":
    sys.exit(main())
