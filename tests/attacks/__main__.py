"""`python -m tests.attacks`: attack the storage, print what it came to; exit code 1 if a promise was broken.

python -m tests.attacks                                    every attack, at the level "prove", and all bugs
python -m tests.attacks NAME --level sample                one of them, shortly
python -m tests.attacks NAME --seed 4711 --count 1         one trial again
python -m tests.attacks --bugs [BUG...]                    only the planted bugs: each must be caught
"""

import argparse
import sys
import time
from collections.abc import Sequence

from tests.attacks.attack import Attack, Level, Outcome, carry_out
from tests.attacks.catalogue import ATTACKS, load
from tests.attacks.planted.bugs import Bug, all_bugs, planted


def main() -> int:
    """Do what the command line asks for."""
    options = arguments()
    rows: list[tuple[str, ...]] = []
    bad = 0
    if options.bugs is None:
        for name in options.attacks or ATTACKS:
            attack = load(name)
            count = options.count if options.count is not None else attack.trials[Level(options.level)]
            outcome, took_s = timed(attack, count, options.seed)
            rows.append(row(attack, outcome, took_s))
            bad += len(outcome.failures)
            for failure in outcome.failures:
                say(f"BROKEN {name}: {failure.what}")
                say(f"  again: python -m tests.attacks {name} --seed {failure.seed} --count 1")
    if options.bugs is not None or not options.attacks:
        wanted = [bug for bug in all_bugs() if not options.bugs or bug.name in options.bugs]
        missed = [bug for bug in wanted if not caught(bug)]
        bad += len(missed)
        rows.append(("planted bugs", f"{len(wanted) - len(missed)} of {len(wanted)} caught", "", ""))
    print_table(rows)
    return 1 if bad else 0


def timed(attack: Attack, count: int, seed: int) -> tuple[Outcome, float]:
    """Carry out an attack; returns what it came to, and the seconds that it took."""
    say(f"{attack.name}: {count:,} {attack.unit} from seed {seed}")
    began_s = time.monotonic()
    outcome = carry_out(attack, count, seed, say)
    return outcome, time.monotonic() - began_s


def caught(bug: Bug) -> bool:
    """Tell whether a planted bug is found by its attack."""
    with planted(bug):
        outcome = carry_out(load(bug.attack), bug.count, bug.seed, lambda _: None, stop_early=True, planted=bug.name)
    say(f"{'caught' if outcome.failures else 'MISSED'} {bug.name} by {bug.attack} after {outcome.tried} trials")
    return bool(outcome.failures)


def row(attack: Attack, outcome: Outcome, took_s: float) -> tuple[str, ...]:
    """What the table says of an attack."""
    figures = ", ".join(f"{name}: {value:,}" for name, value in outcome.figures.items())
    return (
        attack.name,
        f"{outcome.tried:,} {attack.unit}",
        f"{len(outcome.failures)} broken",
        f"{took_s:.0f} s  {figures}",
    )


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows in columns."""
    widths = [max(len(each[column]) for each in rows) for column in range(3)] if rows else []
    for each in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(each, widths, strict=False)), each[3]]).rstrip())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.attacks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("attacks", nargs="*", metavar="NAME", help=", ".join(ATTACKS))
    parser.add_argument("--level", choices=[level.value for level in Level], default=Level.PROVE.value)
    parser.add_argument("--seed", type=int, default=1, help="of the first trial (default 1)")
    parser.add_argument("--count", type=int, help="so many trials instead of the level's")
    parser.add_argument("--bugs", nargs="*", metavar="BUG", help="only planted bugs: these, or all")
    return parser.parse_args()


def say(line: str) -> None:
    """Progress, to standard error: standard output is the table."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
