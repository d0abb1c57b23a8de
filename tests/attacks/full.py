"""Attack: the pool is full, at each place where it can be, and I10 must hold.

One trial fills one pool in one way: a device's limit, a small filesystem, an allocation that finds no space, a journal
that finds none, the state directory's filesystem. While it is full, what is there is read, overwritten, trimmed,
flushed and deleted; only what needs a new chunk is refused, as "no space". Then space is made, and is there. Or three
pools find LMDB's map full, each in another transaction. At the end a fresh engine is compared with what was answered,
and proved.
"""

import asyncio
import random
import shutil
from pathlib import Path

import pytest

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
from tests.attacks.full_journal import JOURNALS, FullJournal
from tests.attacks.full_map import FullMap, places_of
from tests.attacks.full_places import PLACES, Place
from tests.attacks.full_requests import AdministeredPool, Requests
from tests.attacks.full_scenario import FullPool

KINDS = ("limit", "small disk", "allocation", "map", "state", "allocation", "map", "limit", "ext4", "journal")
"""By the last digit of the seed."""
_TRIAL_S = 120


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
        return _full_maps(root, seed, outcome)
    if kind == "journal":
        with JOURNALS[seed // len(KINDS) % len(JOURNALS)](root, seed, patch) as place:
            return asyncio.run(_full_place(root, outcome, FullJournal, place))
    with PLACES[kind](root, seed, patch) as place:
        return asyncio.run(_full_place(root, outcome, FullPool, place))


def map_number(seed: int) -> int:
    """Count the seeds before this one whose kind is "map"."""
    return seed // len(KINDS) * KINDS.count("map") + KINDS[: seed % len(KINDS)].count("map")


def _full_maps(root: Path, seed: int, outcome: Outcome) -> list[str]:
    """Try some places of a full map, one after the other."""
    for number, (place, most) in enumerate(places_of(map_number(seed))):
        with pytest.MonkeyPatch.context() as patch:
            full = FullMap(place, most)
            full.put_in(patch)
            (root / str(number)).mkdir()
            if problems := asyncio.run(_full_map(root / str(number), seed, full, outcome)):
                return problems
    return []


async def _full_place(root: Path, outcome: Outcome, scenario: type[FullPool], place: Place) -> list[str]:
    lost = unfinished(asyncio.get_running_loop())
    pool = AttackedPool(root, place.settings)
    pool.device = root / "disk1"
    full = scenario(pool, place.seed, place)
    await asyncio.wait_for(full.run(), 60)
    is_killed = random.Random(place.seed).random() < 0.5
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


async def _full_map(root: Path, seed: int, full: FullMap, outcome: Outcome) -> list[str]:
    """LMDB's map is full in some transaction, or in all from then on: a clean error, or a stop."""
    lost = unfinished(asyncio.get_running_loop())
    scenario: Requests | Scenario
    if full.place.is_of_requests:
        scenario = Requests(AdministeredPool(root, SETTINGS), seed, full)
    else:
        scenario = Scenario(AttackedPool(root, SETTINGS), seed, Expected())
    pool = scenario.pool
    pool.device = root / "disk1"
    await scenario.run()
    if pool.is_up:
        await asyncio.wait_for(pool.close() if random.Random(seed).random() < 0.5 else pool.kill(), 20)
    full.end()
    problems = [*scenario.problems, *lost]
    if not problems:
        verdict = await judge(pool, scenario.expected, power_was_cut=False)
        problems += verdict.problems
        outcome.add("blocks compared", verdict.blocks)
        full.demand()
    outcome.add("transactions without room", full.hits)
    outcome.add("steps refused by a full map", scenario.refused)
    if isinstance(scenario, Requests):
        outcome.add("requests that went with room again", scenario.tried_again)
    return [f"{full.most} transactions without room from {full.place} on: {each}" for each in problems]


ATTACK = Attack(
    name="full",
    unit="full pools",
    promises=("I5", "I6", "I10"),
    trials={Level.SAMPLE: 10, Level.PROVE: 150, Level.SOAK: 1_000},
    run=run,
    requires=("root", "loop", "mkfs.ext4"),
)
