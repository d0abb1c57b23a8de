"""`python -m tests.attacks.soak`: the long run of all attacks, in parts; the ledger says how far it has come.

A part goes on with the seeds behind those of the ledger's rows, takes turns between the attacks that are not done, and
adds its rows. So a soak is resumed by running it again, on another machine too, where the ledger is.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

from tests.attacks.attack import Attack, Level, Outcome, carry_out
from tests.attacks.catalogue import ATTACKS, load

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
    options = parser.parse_args()
    done = rows_in(LEDGER.read_text()) if LEDGER.exists() else []
    mine = part([load(name) for name in ATTACKS], done, time.monotonic() + options.part_minutes * 60)
    LEDGER.write_text((LEDGER.read_text() if LEDGER.exists() else HEAD) + "".join(row.line() for row in mine))
    print("".join(row.line() for row in mine), end="")
    for name in ATTACKS:
        print(f"{name}: {max(0, left(done + mine, load(name))):,} trials left")
    return 1 if any(row.broken for row in mine) else 0


def part(attacks: list[Attack], done: list[Row], deadline_s: float) -> list[Row]:
    """Give each attack that is not done its slices in turns until the time is over; one row for each."""
    rows: dict[str, Row] = {}
    day, commit = time.strftime("%Y-%m-%d"), head()
    while time.monotonic() < deadline_s:
        waiting = [each for each in attacks if left(done + list(rows.values()), each) > 0]
        if not waiting:
            break
        for attack in waiting:
            known = done + list(rows.values())
            count = min(left(known, attack), max(1, attack.trials[Level.PROVE] // TURNS))
            began_s, seed = time.monotonic(), next_seed(known, attack.name)
            outcome = carry_out(attack, count, seed, lambda line: print(line, file=sys.stderr, flush=True))
            report(attack, outcome)
            row = Row(
                day,
                commit,
                attack.name,
                seed,
                outcome.tried,
                len(outcome.failures),
                round(time.monotonic() - began_s),
                ", ".join(f"{name}: {value}" for name, value in outcome.figures.items()),
            )
            rows[attack.name] = merged(rows[attack.name], row) if attack.name in rows else row
            if time.monotonic() >= deadline_s:
                break
    return list(rows.values())


def report(attack: Attack, outcome: Outcome) -> None:
    """Say what was broken, with the line that replays it."""
    for failure in outcome.failures:
        print(f"BROKEN {attack.name}: {failure.what}", file=sys.stderr)
        print(f"  again: python -m tests.attacks {attack.name} --seed {failure.seed} --count 1", file=sys.stderr)


def merged(one: Row, other: Row) -> Row:
    """Return two neighbouring slices as one row."""
    figures: dict[str, int] = {}
    for cell in (one.figures, other.figures):
        for figure in filter(None, cell.split(", ")):
            name, _, value = figure.rpartition(": ")
            figures[name] = figures.get(name, 0) + int(value)
    return Row(
        one.day,
        one.commit,
        one.attack,
        one.first_seed,
        one.trials + other.trials,
        one.broken + other.broken,
        one.seconds + other.seconds,
        ", ".join(f"{name}: {value}" for name, value in figures.items()),
    )


def head() -> str:
    """Return the commit that is attacked; "?" outside of a repository."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=LEDGER.parent)
    return done.stdout.strip() or "?"


if __name__ == "__main__":
    sys.exit(main())
