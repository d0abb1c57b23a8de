"""The attack "simulation": real volumes, journals, checkpoints and snapshots on a simulated machine, from a seed.

A trial is one history: several lives of the daemon, each with up to eight clients at work on a few volumes, ended by
SIGKILL or a power cut at any system call (in recovery too), or in order. After each start everything is read and
compared with what the promises allow.
"""

import shutil
from pathlib import Path

from tests.attacks.attack import Attack, Budget, Level, Outcome
from tests.attacks.simulation_clients import Clients
from tests.attacks.simulation_loop import Hanging, Killed
from tests.attacks.simulation_model import Broken
from tests.attacks.simulation_patches import interposed
from tests.attacks.simulation_world import World

MUST_HAPPEN = (
    "kills",
    "power cuts",
    "deaths in a start",
    "orderly stops",
    "sectors lost",
    "sectors torn away",
    "names lost",
    "writes answered",
    "flushes answered",
    "reads compared",
    "volumes compared",
    "snapshots compared",
    "snapshots taken",
    "snapshots deleted",
    "clones",
    "reverts",
    "volumes deleted",
    "maps proved",
    "errors explained",
    "refused for lack of space",
    "reopened",
)
"""Figures that are not 0 after enough trials: else the attack attacks nothing."""
_ENOUGH = 200
_JOURNAL_BYTES = (20 * 1024, 64 * 1024)


def trial(seed: int, root: Path, outcome: Outcome, log: list[str] | None = None) -> int:
    """Live through one history; returns the checksum of its trace. Raises Broken; ``log`` takes every step."""
    root.mkdir()
    world = World(root, seed, outcome)
    machine, dice = world.machine, world.dice
    machine.log = log
    try:
        with interposed(machine, dice.choice(_JOURNAL_BYTES)):
            lives = dice.randrange(2, 5)
            for number in range(lives + 1):
                _live(world, number, is_last=number == lives)
    finally:
        for figure, count in machine.disk.figures.items():
            outcome.add(figure, count)
        shutil.rmtree(root)
    return machine.trace


def _live(world: World, number: int, *, is_last: bool) -> None:
    """One life of the daemon, and its end."""
    machine, dice = world.machine, world.dice
    dies_in_start = bool(number) and not is_last and dice.random() < 0.3
    in_order = is_last or dice.random() < 0.15
    machine.dies_at = dice.randrange(1, dice.choice((6, 30))) if dies_in_start else None
    loop = machine.begin()
    is_over = False
    try:
        loop.run(_life(world, dies_soon=not in_order, things=0 if is_last else dice.choice((5, 20, 40, 70))))
        is_over = True
        if loop.faults:
            raise Broken(f"a mistake of blockvirt: {loop.faults[0]}")
    except Killed:
        world.outcome.add("deaths in a start" if not world.is_started else "kills")
    except Hanging:
        raise Broken("something is waited for that never comes") from None
    finally:
        machine.bury()
    if is_over:
        world.outcome.add("orderly stops")
    power = not is_last and dice.random() < 0.5
    world.died(power=power)
    if power:
        machine.cut_power()
        world.outcome.add("power cuts")


async def _life(world: World, *, dies_soon: bool, things: int) -> None:
    machine, dice = world.machine, world.dice
    world.is_started = False
    await world.start()
    world.is_started = True
    machine.dies_at = machine.calls + dice.choice((20, 100, 400, 1000)) if dies_soon else None
    if machine.dies_at is not None:
        machine.dies_at -= dice.randrange(19)
    await Clients(world, things).run(dice.choice((1, 2, 4, 8)))
    if dies_soon:
        machine.kill()
    await world.stop()


def run(budget: Budget) -> Outcome:
    """Carry out trials; see ``attack``."""
    outcome = Outcome()
    for seed in budget.seeds(outcome):
        try:
            trial(seed, budget.scratch / f"{seed}", outcome)
        except Broken as broken:
            outcome.fail(seed, str(broken))
        except Exception as error:  # nobody asked for anything that may end like this
            outcome.fail(seed, f"something ended in {error!r}")
        if outcome.tried % 100 == 99:
            budget.say(f"simulation: {outcome.tried + 1} histories, {len(outcome.failures)} broken")
    missing = [figure for figure in MUST_HAPPEN if not outcome.figures.get(figure)]
    if missing and outcome.tried >= _ENOUGH and not budget.stop_early:
        raise RuntimeError(f"the simulation attacks nothing: in {outcome.tried} histories there were no {missing}")
    return outcome


ATTACK = Attack(
    name="simulation",
    unit="histories",
    promises=("I1", "I2", "I3", "I3b", "I4", "I5", "I6", "I7", "I8", "I10"),
    trials={Level.SAMPLE: 40, Level.PROVE: 1_000, Level.SOAK: 50_000},
    run=run,
    in_memory=True,
)
