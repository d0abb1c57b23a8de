"""`python -m tests.attacks`: attack the storage, print what it came to; exit code 1 if a promise was broken.

python -m tests.attacks                                    every attack, at the level "prove", and all bugs
python -m tests.attacks NAME --level sample                one of them, shortly
python -m tests.attacks NAME --seed 4711 --count 1         one trial again
python -m tests.attacks --bugs [BUG...]                    only the planted bugs: each must be caught
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from tests.attacks.attack import Attack, Level, Outcome
from tests.attacks.catalogue import ATTACKS, load
from tests.attacks.planted.bugs import all_bugs
from tests.attacks.slices import (
    JOBS,
    BugSlice,
    Slice,
    Work,
    in_turns,
    lacking,
    print_table,
    side_by_side,
    sliced,
    sliced_bugs,
    verdict,
)


def main() -> int:
    """Do what the command line asks for."""
    options = arguments()
    began_s = time.monotonic()
    impossible = set(lacking(options.attacks or ATTACKS))
    wanted = [load(name) for name in options.attacks or ATTACKS if name not in impossible]
    attacks = wanted if options.bugs is None else []
    counts = [options.count if options.count is not None else each.trials[Level(options.level)] for each in attacks]
    queues: list[Sequence[Work]] = [
        sliced(attack, options.seed, count) for attack, count in zip(attacks, counts, strict=True)
    ]
    if options.bugs is not None or not options.attacks:
        bugs = [bug for bug in all_bugs() if bug.attack not in impossible]
        queues.append(sliced_bugs([bug for bug in bugs if not options.bugs or bug.name in options.bugs]))
    outcomes = {attack.name: Outcome() for attack in attacks}
    seconds = dict.fromkeys(outcomes, 0.0)
    planted, missed = 0, list[str]()
    for work, done in side_by_side(in_turns(*queues), options.jobs):
        if isinstance(work, Slice):
            outcomes[work.attack].include(done.outcome)
            seconds[work.attack] += done.seconds
        else:
            planted += len(work.bugs)
            missed += done.missed
    rows = [row(attack, options.seed, outcomes[attack.name], seconds[attack.name]) for attack in attacks]
    if any(isinstance(work, BugSlice) for queue in queues for work in queue):
        rows.append(("planted bugs", f"{planted - len(missed)} of {planted} caught", "", ", ".join(missed)))
    print_table([*rows, verdict(sum(len(outcome.failures) for outcome in outcomes.values()), attacks)])
    print(f"{time.monotonic() - began_s:.0f} s in all")
    return 1 if missed or any(outcome.failures for outcome in outcomes.values()) else 0


def row(attack: Attack, seed: int, outcome: Outcome, took_s: float) -> tuple[str, ...]:
    """What the table says of an attack."""
    return (
        attack.name,
        f"{outcome.tried:,} {attack.unit} from seed {seed}",
        f"{len(outcome.failures)} broken",
        f"{took_s:.0f} s  {outcome.told()}",
    )


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
    parser.add_argument("--jobs", type=int, default=min(JOBS, os.cpu_count() or 1), help="slices at a time")
    options = parser.parse_args()
    if unknown := set(options.bugs or ()) - {bug.name for bug in all_bugs()}:
        parser.error(f"no such planted bug: {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    sys.exit(main())
