"""Attacks in slices: several at a time, each slice in a process of its own, in turns between the attacks."""

import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import chain, pairwise, zip_longest
from typing import TypeVar

from tests.attacks.attack import Attack, Level, Outcome, carry_out
from tests.attacks.catalogue import load
from tests.attacks.planted.bugs import Bug, bug_named, planted

T = TypeVar("T")
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
            outcome.fail(self.seed, f"the attack from this seed on has failed itself: {error!r}")
        for failure in outcome.failures:
            say(f"BROKEN {self.attack}: {failure.what}")
            say(f"  again: python -m tests.attacks {self.attack} --seed {failure.seed} --count 1")
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
    word = "caught" if outcome.failures else "MISSED"
    took_s = time.monotonic() - began_s
    say(f"{word} {bug.name} by {bug.attack} after {outcome.tried} trials, {took_s:.0f} s")
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
    """Do ``work``, ``jobs`` slices at a time, and yield each as it is done. The next is asked for when one may begin.

    What a slice raises comes out here, when those that run are done.
    """
    rest = iter(work)
    # Processes that are started anew: an attack has threads, mounts and patches of its own.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        running: dict[Future[Done], Work] = {}
        while True:
            while len(running) < jobs and (each := next(rest, None)) is not None:
                running[pool.submit(_run, each)] = each
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def _run(work: Work) -> Done:
    return work.run()


def say(line: str) -> None:
    """Progress, to standard error: standard output is the table."""
    print(line, file=sys.stderr, flush=True)


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows in columns."""
    widths = [max(len(each[column]) for each in rows) for column in range(3)] if rows else []
    for each in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(each, widths, strict=False)), each[3]]).rstrip())
