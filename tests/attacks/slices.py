"""Attacks in slices: several at a time, each slice in a process of its own, in turns between the attacks."""

import importlib
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import TypeVar

from tests.attacks.attack import Attack, Level, Outcome, carry_out
from tests.attacks.catalogue import load
from tests.attacks.planted.bugs import Bug, bug_named, planted
from tests.conftest import CI, why_missing

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
JOBS = 2  # slices at a time: two processors are what is at least expected
BUGS_IN_A_SLICE = 6  # a process takes a second to start, and one of the slower bugs a minute


@dataclass(frozen=True, slots=True)
class Done:
    """What a slice came to."""

    outcome: Outcome = field(default_factory=Outcome)
    seconds: float = 0.0
    missed: tuple[str, ...] = ()
    """Planted bugs that were not caught."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Neighbouring trials of one attack."""

    attack: str
    seed: int
    count: int

    def run(self) -> Done:
        """Carry it out, and say what was broken: by the product, or in the attack itself."""
        attack = load(self.attack)
        say(f"{self.attack}: {self.count:,} {attack.unit} from seed {self.seed}")
        began_s = time.monotonic()
        try:
            outcome = carry_out(attack, self.count, self.seed, say)
        except Exception as error:
            traceback.print_exc()
            outcome = Outcome()
            problem = f"the attack from this seed on has failed itself: {error!r}"
            outcome.fail(self.seed, problem, count=self.count)
        for failure in outcome.failures:
            say(f"BROKEN {self.attack}: {failure.what}")
            for line in failure.again(self.attack):
                say(f"  {line}")
        return Done(outcome, time.monotonic() - began_s)


@dataclass(frozen=True, slots=True)
class BugSlice:
    """Some planted bugs."""

    bugs: tuple[str, ...]

    def run(self) -> Done:
        """Plant one after the other, and look whether its attack notices."""
        began_s = time.monotonic()
        missed = tuple(name for name in self.bugs if not _is_caught(bug_named(name)))
        return Done(seconds=time.monotonic() - began_s, missed=missed)


Work = Slice | BugSlice


def _is_caught(bug: Bug) -> bool:
    began_s = time.monotonic()
    try:
        with planted(bug):
            outcome = carry_out(
                load(bug.attack), bug.count, bug.seed, lambda _: None, stop_early=True, planted=bug.name
            )
    except Exception:
        traceback.print_exc()
        outcome = Outcome()
    word, by = "MISSED", ""
    if outcome.failures:  # by what it broke, and not by a patch that fits the code no more: so say what that was
        word, by = "caught", f": {outcome.failures[0].what.splitlines()[0][:160]}"
    took_s = time.monotonic() - began_s
    say(f"{word} {bug.name} by {bug.attack} after {outcome.tried} trials, {took_s:.0f} s{by}")
    return bool(outcome.failures)


def sliced(attack: Attack, seed: int, count: int) -> list[Slice]:
    """Cut so many trials from ``seed`` on into slices of about one size; few of them stay together."""
    parts = attack.slices if count >= attack.trials[Level.PROVE] else 1
    cuts = [seed + count * part // parts for part in range(parts + 1)]
    return [Slice(attack.name, start, stop - start) for start, stop in pairwise(cuts) if stop > start]


def sliced_bugs(bugs: Sequence[Bug]) -> list[BugSlice]:
    """Cut a list of bugs."""
    names = tuple(bug.name for bug in bugs)
    return [BugSlice(names[at : at + BUGS_IN_A_SLICE]) for at in range(0, len(names), BUGS_IN_A_SLICE)]


def in_turns(*queues: Sequence[T]) -> list[T]:
    """Return the first of each, then the second of each, and so on."""
    return [each for each in chain.from_iterable(zip_longest(*queues)) if each is not None]


def side_by_side(work: Iterable[Work], jobs: int) -> Iterator[tuple[Work, Done]]:
    """Do ``work``, ``jobs`` slices at a time, and yield each as it is done. Asks for each when it can begin."""
    rest = iter(work)
    with ThreadPoolExecutor(jobs) as threads:
        running: dict[Future[Done], Work] = {}
        while True:
            while len(running) < jobs and (each := next(rest, None)) is not None:
                running[threads.submit(in_a_process, each)] = each
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def in_a_process(work: Work) -> Done:
    """Do a slice in a process of its own: an attack has threads, mounts and patches, and may end with its process."""
    command = [sys.executable, "-m", "tests.attacks.slices"]
    ended = subprocess.run(command, input=pickle.dumps(work), stdout=subprocess.PIPE, cwd=ROOT)
    if ended.returncode == 0:
        done: Done = pickle.loads(ended.stdout)
        return done
    problem = f"the process of {work} has ended with {ended.returncode}"
    say(problem)
    if isinstance(work, BugSlice):
        return Done(missed=work.bugs)
    outcome = Outcome()
    outcome.fail(work.seed, problem, count=work.count)
    return Done(outcome)


def main() -> None:
    """Be such a process: a slice on standard input, what it came to on standard output, which nobody else may use."""
    work: Work = pickle.load(sys.stdin.buffer)
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        done = work.run()
        pickle.dump(done, answer)


def say(line: str) -> None:
    """Progress, to standard error: standard output is the table."""
    print(line, file=sys.stderr, flush=True)


def verdict(broken: int, attacks: Iterable[Attack]) -> tuple[str, ...]:
    """The last row of the table, of the ``attacks`` that were made: each of these would be a broken promise."""
    lost = {"I3": "acknowledged flushes lost", "I3b": "writes lost to SIGKILL", "I6": "check errors beyond leaks"}
    attacked = {promise for attack in attacks for promise in attack.promises}
    none = [f"{loss}: 0" for promise, loss in lost.items() if promise in attacked]
    return ("all of them", "", f"{broken} broken", "" if broken else "  ".join(none))


def lacking(names: Iterable[str]) -> Iterator[str]:
    """Give the attacks that cannot be carried out here, and say why; raises SystemExit with CI=true."""
    for name in names:
        if reasons := [reason for each in load(name).requires if (reason := why_missing(each))]:
            say(f"NOT RUN: {name}: {'; '.join(reasons)}")
            if CI:
                raise SystemExit("CI=true allows no attack to be left out")
            yield name


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows in columns."""
    widths = [max(len(each[column]) for each in rows) for column in range(3)] if rows else []
    for each in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(each, widths, strict=False)), each[3]]).rstrip())


if __name__ == "__main__":
    # Not as what this module is called here: what is pickled must be found by its name in another process.
    importlib.import_module("tests.attacks.slices").main()
