"""`python -m tests.attacks.soak`: the long run of all attacks, in parts; the ledger says how far it has come.

A part goes on with the seeds behind those of the ledger's rows, takes turns between the attacks that are not done, and
adds its rows. So a soak is resumed by running it again, on another machine too, where the ledger is.
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
from tests.attacks.slices import JOBS, Done, Slice, Work, print_table, side_by_side, verdict

LEDGER = Path(__file__).parents[2] / "docs" / "soak-ledger.md"
TURNS = 10  # slices of a prove's size that one attack gets before the next has its turn: a tenth of it each
HEAD = """# Soak ledger

Each row is a part of a soak: `python -m tests.attacks.soak` goes on behind the last seeds and adds its own. A trial is
replayed with `python -m tests.attacks ATTACK --seed SEED --count 1`.

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


def next_seed(rows: list[Row], attack: str) -> int:
    """Return the first seed that no row has."""
    return max((row.first_seed + row.trials for row in rows if row.attack == attack), default=1)


def left(rows: list[Row], attack: Attack) -> int:
    """Return how many trials of an attack a whole soak still needs."""
    return attack.trials[Level.SOAK] - sum(row.trials for row in rows if row.attack == attack.name)


def main() -> int:
    """Run one part; exit code 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part-minutes", type=float, default=55.0, help="how long this part takes (default 55)")
    parser.add_argument("--jobs", type=int, default=min(JOBS, os.cpu_count() or 1), help="slices at a time")
    options = parser.parse_args()
    attacks = [load(name) for name in ATTACKS]
    done = rows_in(LEDGER.read_text()) if LEDGER.exists() else []
    slices = until(time.monotonic() + options.part_minutes * 60, next_slices(attacks, done))
    mine = rows_of(side_by_side(slices, options.jobs), time.strftime("%Y-%m-%d"), head())
    LEDGER.write_text((LEDGER.read_text() if LEDGER.exists() else HEAD) + "".join(row.line() for row in mine))
    print_table(
        [*(summary(attack, done + mine) for attack in attacks), verdict(sum(row.broken for row in done + mine))]
    )
    return 1 if any(row.broken for row in mine) else 0


def until(deadline_s: float, slices: Iterator[Slice]) -> Iterator[Slice]:
    """Give slices as long as there is time."""
    return itertools.takewhile(lambda _: time.monotonic() < deadline_s, slices)


def next_slices(attacks: Sequence[Attack], done: list[Row]) -> Iterator[Slice]:
    """Give slices of what a whole soak still needs, in turns between the attacks, behind the last seeds of each."""
    seeds = {attack.name: next_seed(done, attack.name) for attack in attacks}
    trials = {attack.name: left(done, attack) for attack in attacks}
    while any(count > 0 for count in trials.values()):
        for attack in attacks:
            count = min(trials[attack.name], max(1, attack.trials[Level.PROVE] // TURNS))
            if count > 0:
                yield Slice(attack.name, seeds[attack.name], count)
                seeds[attack.name] += count
                trials[attack.name] -= count


def rows_of(slices: Iterable[tuple[Work, Done]], day: str, commit: str) -> list[Row]:
    """Return a row for each attack that slices were done of; together those of one attack are neighbours."""
    outcomes, seeds, seconds = dict[str, Outcome](), dict[str, int](), Counter[str]()
    for work, done in slices:
        assert isinstance(work, Slice)
        outcomes.setdefault(work.attack, Outcome()).include(done.outcome)
        seeds[work.attack] = min(work.seed, seeds.get(work.attack, work.seed))
        seconds[work.attack] += round(done.seconds)
    rows = []
    for name, outcome in outcomes.items():
        figures = ", ".join(f"{figure}: {value}" for figure, value in outcome.figures.items())
        broken = len(outcome.failures)
        rows.append(Row(day, commit, name, seeds[name], outcome.tried, broken, seconds[name], figures))
    return rows


def summary(attack: Attack, rows: list[Row]) -> tuple[str, ...]:
    """Return what all rows of an attack come to, for the table."""
    mine = [row for row in rows if row.attack == attack.name]
    trials, broken, seconds = (sum(getattr(row, name) for row in mine) for name in ("trials", "broken", "seconds"))
    return (
        attack.name,
        f"{trials:,} of {attack.trials[Level.SOAK]:,} {attack.unit} from seed 1",
        f"{broken} broken",
        f"{seconds:,} s  " + ", ".join(f"{name}: {value:,}" for name, value in figures_of(mine).items()),
    )


def figures_of(rows: list[Row]) -> "Counter[str]":
    """Return what the rows of an attack have counted, together."""
    figures = Counter[str]()
    for row in rows:
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
