"""Attack: each system call on a pool's files fails, in every way that it can, once and from then on.

One trial is one cell: a site (which call on which kind of file), its n-th call, an error or a part of the work, once or
always; or, in a soak, a pair of them. A pool is made, written, snapshotted, trimmed, checkpointed, reclaimed, killed
and closed meanwhile; each answer is noted. What may come of it: success, a clean error, a stop. Then, with a disk that
works, a fresh engine is compared with what was answered, and proved.
"""

import asyncio
import multiprocessing
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.attacks.attack import Attack, Budget, Level, Outcome
from tests.attacks.faults_hangs import heartbeat
from tests.attacks.faults_model import Expected
from tests.attacks.faults_pool import (
    SETTINGS,
    AttackedPool,
    Hung,
    open_descriptors,
    quiet,
    unfinished,
    watched,
    without_metadata_syncs,
    without_pauses,
)
from tests.attacks.faults_scenario import Scenario
from tests.attacks.faults_sites import ONCE, Cell, Site, first_cells, further_cells
from tests.attacks.faults_traced import traced_trial
from tests.attacks.faults_verdict import judge
from tests.attacks.faulty_disk import FaultyDisk

_TRIAL_S = 60
_FEW = 200
"""Fewer trials are done in this process."""
_PART = 50
_FIRST, _FURTHER = first_cells(), further_cells()
CELLS = [*_FIRST, *_FURTHER]
_AFTER_A_STOP, _STOP = Site("data", "advise"), Cell(Site("data", "sync"), "EIO", ONCE, 2)
"""What is called only once a volume has stopped, and what stops one."""
_PAIRED = [cell for cell in _FIRST if not cell.is_traced]
ENDINGS = ("close", "kill", "power cut")
_PAIRS = 2_000


def _plan() -> list[tuple[Cell, str] | None]:
    """Return by seed which cell is tried, and how the daemon's life ends then; None for a pair of cells.

    Each cell comes with each ending. Seeds are what a soak's ledger counts and planted bugs name, so further cells lie
    behind the pairs; but each of them once right behind the first cells, in exchange, for a prove goes no further.
    """
    first, further = (
        [
            (cell, ENDINGS[(number + place) % len(ENDINGS)])
            for number in range(len(ENDINGS))
            for place, cell in enumerate(cells)
        ]
        for cells in (_FIRST, _FURTHER)
    )
    plan = [*first, *[None] * _PAIRS, *further]
    for place in range(len(_FURTHER)):
        here, there = 1 + len(_FIRST) + place, len(first) + _PAIRS + place  # a prove begins with seed 1
        plan[here], plan[there] = plan[there], plan[here]
    return plan


PLAN = _plan()


def ending_of(seed: int) -> str:
    """Return how the daemon's life ends in a trial."""
    planned = PLAN[seed] if seed < len(PLAN) else None
    return planned[1] if planned is not None else random.Random(seed).choice(ENDINGS)


def cells_of(seed: int) -> tuple[Cell, ...]:
    """Return what fails in a trial: one cell of the plan, or a pair, as behind the plan."""
    planned = PLAN[seed] if seed < len(PLAN) else None
    if planned is None:
        return tuple(random.Random(f"pair {seed}").sample(_PAIRED, 2))
    cell = planned[0]
    return (cell, _STOP) if cell.site == _AFTER_A_STOP else (cell,)


def seed_of(cell: Cell, ending: str = "") -> int:
    """Return the first seed that is a cell's, and ends so."""
    return next(
        seed
        for seed, planned in enumerate(PLAN)
        if planned is not None and planned[0] == cell and ending in ("", planned[1])
    )


def run(budget: Budget) -> Outcome:
    """Try one cell after the other; many of them in two processes."""
    if budget.count < _FEW:
        outcome, hit_sites = _run(budget)
    else:
        outcome, hit_sites = _run_in_two(budget)
    _demand(budget, outcome, hit_sites)
    return outcome


def _run_in_two(budget: Budget) -> tuple[Outcome, set[Site]]:
    """Give every other part to a process of its own."""
    context = multiprocessing.get_context("fork")
    outcome, hit_sites = Outcome(), set[Site]()
    running = []
    for mine in range(2):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=lambda mine=mine, sending=sending: sending.send(_run_parts(budget, mine)))
        process.start()
        sending.close()
        running.append((receiving, process))
    for receiving, process in running:
        found, sites = receiving.recv()
        process.join()
        outcome.include(found)
        hit_sites |= sites
    return outcome, hit_sites


def _run_parts(budget: Budget, mine: int) -> tuple[Outcome, set[Site]]:
    outcome, hit_sites = Outcome(), set[Site]()
    for at in range(mine * _PART, budget.count, 2 * _PART):
        found, sites = _run(replace(budget, seed=budget.seed + at, count=min(_PART, budget.count - at)))
        outcome.include(found)
        hit_sites |= sites
    return outcome, hit_sites


def _run(budget: Budget) -> tuple[Outcome, set[Site]]:
    outcome, hit_sites = Outcome(), set[Site]()
    for seed in budget.seeds(outcome):
        cells = cells_of(seed)
        root = budget.scratch / f"{seed}"
        root.mkdir()
        hits = _figure(outcome, "hit")
        try:
            with watched(_TRIAL_S):
                if cells[0].is_traced:
                    problems = traced_trial(root, cells[0], seed, outcome, budget.planted)
                else:
                    problems = trial(root, cells, seed, outcome)
        except Hung:
            problems = [f"it did not end within {_TRIAL_S} s"]
        shutil.rmtree(root)
        for problem in problems[:1]:
            outcome.fail(seed, f"{' and '.join(map(str, cells))}: {problem}")
        if _figure(outcome, "hit") > hits:
            hit_sites.add(cells[0].site)
    budget.say(f"{outcome.tried} faults from seed {budget.seed}: {outcome.figures}")
    return outcome, hit_sites


def _demand(budget: Budget, outcome: Outcome, hit_sites: set[Site]) -> None:
    """Raise RuntimeError if the attack has passed by doing nothing."""
    if budget.count >= 20 and not outcome.failures:
        figures = ("hit", "steps refused", "stops", "flushes", "blocks compared")
        if idle := [name for name in figures if not _figure(outcome, name)]:
            raise RuntimeError(f"the attack proves nothing: {idle} are 0")
    if budget.count >= len(CELLS) and (missed := {cell.site for cell in CELLS} - hit_sites):
        raise RuntimeError(f"the scenario never comes to {', '.join(map(str, sorted(missed)))}")


def _figure(outcome: Outcome, name: str) -> int:
    return outcome.figures.get(name, 0)


def trial(root: Path, cells: tuple[Cell, ...], seed: int, outcome: Outcome) -> list[str]:
    """Run with these faults; returns what must not be."""
    with quiet() as complaints, pytest.MonkeyPatch.context() as patch:
        without_pauses(patch)
        without_metadata_syncs(patch)
        disk = FaultyDisk(root, *cells)
        disk.put_in(patch)
        problems = asyncio.run(_trial(root, disk, seed, outcome))
        problems += complaints.found
    outcome.add("hit" if cells[0] in disk.hit else "not reached")
    return problems


async def _trial(root: Path, disk: FaultyDisk, seed: int, outcome: Outcome) -> list[str]:
    lost = unfinished(asyncio.get_running_loop())
    pool = AttackedPool(root, SETTINGS)
    pool.device = root / "disk1"
    scenario = Scenario(pool, seed, Expected(), disk)
    ending = ending_of(seed)
    with heartbeat(scenario.problems):
        disk.arm()
        await scenario.run()
        if ending != "close":
            disk.disarm()
        await scenario.end(ending)
        disk.disarm()
    problems = scenario.problems
    problems += [f"{path} was synced again after a failed sync" for path in disk.tried_again]
    if left := open_descriptors(root):
        problems.append(f"{left[0]} and {len(left) - 1} more descriptors were left open")
    if ending == "power cut":
        disk.cut_power()
        pool.change_page_cache()
    if not problems:
        with disk.recovering():
            verdict = await judge(
                pool,
                scenario.expected,
                power_was_cut=ending == "power cut",
                may_not_leak={cell.site.call for cell in disk.cells} == {"punch"} and ending == "close",
            )
        problems += verdict.problems
        outcome.add("blocks compared", verdict.blocks)
    for figure, more in (
        *(("steps refused", scenario.refused), ("stops", scenario.stops)),
        *(("flushes", scenario.expected.flushes), ("writes lost", disk.lost_writes)),
    ):
        outcome.add(figure, more)
    return [*problems, *(f"nobody asked what became of: {each}" for each in lost)]


ATTACK = Attack(
    name="faults",
    unit="faults",
    promises=("I3", "I3b", "I5", "I6", "I7"),
    trials={Level.SAMPLE: 40, Level.PROVE: len(CELLS), Level.SOAK: len(PLAN)},
    run=run,
    slices=1,
    requires=("strace",),
)
