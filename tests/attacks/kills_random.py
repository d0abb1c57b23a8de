"""Stories that dice write: what the others tell one by one, in any order, on volumes of any history."""

from __future__ import annotations

import random
from functools import partial

from tests.attacks.kills_driver import Driver
from tests.attacks.kills_model import CHUNK_BYTES
from tests.attacks.kills_scenarios import CHUNKS, Scenario

CELLS = (0, 8, 96, 200, 296, 408, 504, 512)
"""Where ranges begin, in chunks: what has been written, what has not, the border of two leaves, and the end."""
CELL_CHUNKS = 8
MOST_VOLUMES = 7
MOST_CALLS, MOST_LINES = 160, 5_000
"""About what a story has, with a start of the daemon."""


def random_story(seed: int) -> Scenario:
    """Return the story of a seed."""
    dice = random.Random(seed)
    base = dice.choice(("clean", "dirty"))
    return Scenario("random", partial(_tell, seed=seed), base, armed=base == "dirty" and dice.random() < 0.3)


def _tell(driver: Driver, seed: int) -> None:
    dice = random.Random(seed + 1)
    for number in range(dice.randrange(3, 16)):
        if dice.random() < 0.6:
            _use(driver, dice)
        else:
            _change(driver, dice, f"n{number}")


def _use(driver: Driver, dice: random.Random) -> None:
    """What guests do."""
    volume = dice.choice(sorted(driver.world.volumes))
    ranges = _ranges(driver, dice, volume)
    kind = dice.random()
    if kind < 0.6:
        driver.write(volume, *ranges, fua=dice.random() < 0.1)
    elif kind < 0.75:
        driver.trim(volume, *ranges)
    elif kind < 0.85:
        driver.zero(volume, *ranges, hole=dice.random() < 0.5)
    elif kind < 0.92:
        driver.flush(volume)
    elif kind < 0.96:
        driver.forget_cached()
    else:
        driver.alone(*driver.open_volumes())


def _ranges(driver: Driver, dice: random.Random, volume: str) -> list[tuple[float, float]]:
    """Return ranges that do not overlap."""
    chunks = len(driver.world.volumes[volume].content) // CHUNK_BYTES
    ranges = []
    for cell in dice.sample(CELLS, dice.randrange(1, 5)):
        room = min(CELL_CHUNKS, chunks - cell)
        first = dice.choice((0.0, 0.0, 0.25, 0.5)) + dice.randrange(room)
        count = dice.choice((0.125, 0.5, 1.0, 1.0, 2.5, float(room)))
        ranges.append((cell + first, min(count, room - first)))
    return ranges


def _change(driver: Driver, dice: random.Random, new: str) -> None:
    """What administrators do; ``new`` is a name that nothing has."""
    volumes = driver.world.volumes
    volume = dice.choice(sorted(volumes))
    points = [(each, name) for each in sorted(volumes) for name in sorted(volumes[each].snapshots)]
    kind = dice.random()
    if kind < 0.3 or not points:
        if dice.random() < 0.3:
            driver.snapshot_under(volume, new, *((each,) for each in _ranges(driver, dice, volume)))
        else:
            driver.snapshot(volume, new)
    elif kind < 0.4:
        driver.group(new, *dice.sample(sorted(volumes), min(len(volumes), dice.choice((2, 3)))))
    elif kind < 0.55:
        if len(volumes) < MOST_VOLUMES:
            driver.clone(*dice.choice(points), new)
    elif kind < 0.65:
        driver.alone(*driver.open_volumes())
        driver.revert(*dice.choice(points), new if dice.random() < 0.7 else "")
    elif kind < 0.8:
        names = dice.sample(points, min(len(points), dice.choice((1, 1, 2))))
        driver.delete_snapshots(*(f"{each}@{name}" for each, name in names))
    elif kind < 0.86:
        driver.grow(volume, dice.choice((1, 100, 600)))
    elif kind < 0.9:
        driver.alone(*driver.open_volumes())
        driver.rename(volume, new)
    elif kind < 0.94:
        driver.create(new, CHUNKS)
    elif kind < 0.97:
        driver.flatten(volume)
    elif len(volumes) > 2:
        driver.alone(*driver.open_volumes())
        driver.delete(volume)
