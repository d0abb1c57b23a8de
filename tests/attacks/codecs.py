"""Any bytes, for whatever reads bytes from clients, disks and streams: only documented errors may come of them.

libFuzzer feeds each target (``codecs_targets``), guided by which lines of blockvirt an input reaches (atheris), in a
process of its own (``codecs_child``). A trial is one execution; those of a budget are shared evenly by the targets. The
seed is libFuzzer's: the same seed and count begin with the same inputs, but where memory is mapped may lead a long run
to others. So a failure prints its input, which breaks the promise by itself, and the whole slice as what comes again.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from tests.attacks.attack import Attack, Budget, Level, Outcome
from tests.attacks.codecs_targets import TARGETS
from tests.real.daemon import CHECKOUT

_SAID_LINES = 25


def run(budget: Budget) -> Outcome:
    """Feed the targets, one after the other."""
    outcome = Outcome()
    runs = shares(budget.count)
    for done in _fuzzed(budget, runs):
        name = done["target"]
        outcome.tried += runs[name]
        outcome.add(f"of {name}", done["done"])
        if done["input"] is not None:
            outcome.fail(budget.seed, _told(done), count=budget.count)
            if budget.stop_early:
                return outcome
        elif done["done"] < runs[name]:
            raise AssertionError(f"codecs: {name} was given {done['done']} inputs, not {runs[name]}")
    if outcome.tried != budget.count:
        raise AssertionError(f"codecs: {budget.count - outcome.tried} executions are missing")
    return outcome


def shares(count: int) -> dict[str, int]:
    """Return how many executions each target gets of so many; those that get none are left out."""
    each, more = divmod(count, len(TARGETS))
    wanted = {name: each + (number < more) for number, name in enumerate(TARGETS)}
    return {name: runs for name, runs in wanted.items() if runs}


def _fuzzed(budget: Budget, runs: dict[str, int]) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.attacks.codecs_child", str(budget.scratch), str(budget.seed)]
    command += [budget.planted or "-"]
    log = budget.scratch / "log"
    environment = os.environ | {"PYTHONHASHSEED": "0"}  # the order of a set of strings leads to other inputs
    with (
        log.open("wb") as said,
        subprocess.Popen(
            command, cwd=CHECKOUT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            for name, count in runs.items():
                child.stdin.write(f"{name}={count}\n".encode())
                child.stdin.flush()
                line = child.stdout.readline()
                if not line:
                    raise AssertionError(f"codecs: {name} was not done: {log.read_text(errors='replace')[-2_000:]}")
                yield json.loads(line)
                budget.say(f"codecs: {line[:60].decode()}")
        finally:
            child.kill()


def _told(done: dict[str, Any]) -> str:
    _, _, said = done["said"].rpartition("Uncaught Python exception")
    told = "\n".join((said or done["said"]).strip(" =:\n").splitlines()[:_SAID_LINES])
    return (
        f"{done['target']} must take any bytes, and not these: {done['input']}\n{told}\n"
        f"  this input alone: python -m tests.attacks.codecs_child {done['target']} {done['input']}"
    )


ATTACK = Attack(
    name="codecs",
    unit="codec executions",
    promises=("I9",),
    trials={Level.SAMPLE: 20_000, Level.PROVE: 1_000_000, Level.SOAK: 10_000_000},
    run=run,
)
