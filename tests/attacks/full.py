"""Attack: the pool is full, at each place where it can be, and I10 must hold.

One trial fills one pool in one way: a device's limit, a small filesystem, an allocation that finds no space, the state
directory's filesystem, LMDB's map. While it is full, what is there is read, overwritten, trimmed, flushed and deleted;
only what needs a new chunk is refused, as "no space". Then space is made, and is there. At the end a fresh engine is
compared with what was answered, and proved.
"""

import asyncio
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest

from blockvirt.meta import group_commit
from blockvirt.meta.store import Store
from tests.attacks.attack import Attack, Budget, Level, Outcome
from tests.attacks.faults_model import Expected
from tests.attacks.faults_pool import (
    SETTINGS,
    AttackedPool,
    Hung,
    quiet,
    unfinished,
    watched,
    without_metadata_syncs,
    without_pauses,
)
from tests.attacks.faults_scenario import Scenario
from tests.attacks.faults_verdict import judge
from tests.attacks.full_places import PLACES, Place
from tests.attacks.full_scenario import FullPool

KINDS = ("limit", "small disk", "allocation", "map", "state", "allocation", "map", "limit", "ext4", "map")
"""By the last digit of the seed."""
_TRIAL_S = 60


def run(budget: Budget) -> Outcome:
    """Fill one pool after the other."""
    outcome = Outcome()
    for seed in budget.seeds(outcome):
        root = budget.scratch / f"{seed}"
        root.mkdir()
        kind = KINDS[seed % len(KINDS)]
        with quiet() as complaints, pytest.MonkeyPatch.context() as patch:
            without_pauses(patch)
            without_metadata_syncs(patch)
            try:
                with watched(_TRIAL_S):
                    problems = _trial(kind, root, seed, outcome, patch)
            except Hung:
                problems = [f"it did not end within {_TRIAL_S} s"]
            problems += complaints.found
        shutil.rmtree(root)
        outcome.add(kind)
        for problem in problems[:1]:
            outcome.fail(seed, f"{kind}: {problem}")
        if not outcome.tried % 50:
            budget.say(f"{outcome.tried} of {budget.count} full pools: {outcome.figures}")
    figures = ("refused for lack of space", "done in a full pool", "blocks compared")
    idle = [name for name in figures if not outcome.figures.get(name)]
    if budget.count >= len(KINDS) and not outcome.failures and idle:
        raise RuntimeError(f"the attack proves nothing: {idle} are 0")
    return outcome


def _trial(kind: str, root: Path, seed: int, outcome: Outcome, patch: pytest.MonkeyPatch) -> list[str]:
    if kind == "map":
        return asyncio.run(_full_map(root, seed, outcome, patch))
    with PLACES[kind](root, seed, patch) as place:
        return asyncio.run(_full_place(root, seed, outcome, place))


async def _full_place(root: Path, seed: int, outcome: Outcome, place: Place) -> list[str]:
    lost = unfinished(asyncio.get_running_loop())
    pool = AttackedPool(root, place.settings)
    pool.device = root / "disk1"
    full = FullPool(pool, seed, place)
    await asyncio.wait_for(full.run(), 60)
    is_killed = random.Random(seed).random() < 0.5
    await (pool.kill() if is_killed else pool.close())
    place.make_space()
    problems = [*full.problems, *lost]
    if not problems:
        verdict = await judge(pool, full.expected, power_was_cut=False)
        problems += verdict.problems
        outcome.add("blocks compared", verdict.blocks)
    outcome.add("refused for lack of space", full.refused_for_space)
    outcome.add("done in a full pool", full.done)
    return problems


async def _full_map(root: Path, seed: int, outcome: Outcome, patch: pytest.MonkeyPatch) -> list[str]:
    """LMDB's map is full in some transaction, or in all from then on: a clean error, or a stop."""
    lost = unfinished(asyncio.get_running_loop())
    dice = random.Random(seed)
    full = _FullMap(dice.randrange(1, 60), dice.choice([1, 2, 1000]))
    full.put_in(patch)
    pool = AttackedPool(root, SETTINGS)
    pool.device = root / "disk1"
    scenario = Scenario(pool, seed, Expected())
    await scenario.run()
    if pool.is_up:
        await asyncio.wait_for(pool.close() if dice.random() < 0.5 else pool.kill(), 20)
    full.most = 0
    problems = [*scenario.problems, *lost]
    if not problems:
        verdict = await judge(pool, scenario.expected, power_was_cut=False)
        problems += verdict.problems
        outcome.add("blocks compared", verdict.blocks)
    outcome.add("transactions without room", full.hits)
    return problems


class _FullMap:
    """Transactions that find LMDB's map full, and no way to make it larger."""

    def __init__(self, first: int, most: int) -> None:
        self.first = first
        self.most = most
        self.hits = 0
        self._count = 0
        self._real: Callable[..., Any] = group_commit.run_group

    def put_in(self, patch: pytest.MonkeyPatch) -> None:
        """Stand in for the store's transactions."""
        patch.setattr("blockvirt.meta.store.run_group", self._run_group)
        patch.setattr(Store, "_grow", lambda store, *, wait: False)

    def _run_group(self, *arguments: Any) -> Any:
        self._count += 1
        if self.first <= self._count < self.first + self.most:
            self.hits += 1
            raise lmdb.MapFullError("planted")
        return self._real(*arguments)


ATTACK = Attack(
    name="full",
    unit="full pools",
    promises=("I5", "I6", "I10"),
    trials={Level.SAMPLE: 10, Level.PROVE: 150, Level.SOAK: 1_000},
    run=run,
    requires=("root", "loop", "mkfs.ext4"),
)
