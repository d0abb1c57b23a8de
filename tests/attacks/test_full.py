"""What a full map is tried with."""

from tests.attacks.attack import Level
from tests.attacks.full import ATTACK, KINDS, map_number
from tests.attacks.full_map import PLACES, places_of


def test_every_prove_comes_to_every_transaction() -> None:
    for first in (1, 4711):
        seeds = range(first, first + ATTACK.trials[Level.PROVE])
        maps = [seed for seed in seeds if KINDS[seed % len(KINDS)] == "map"]
        assert {place for seed in maps for place, _ in places_of(map_number(seed))} == set(PLACES)


def test_a_soak_comes_to_each_with_every_length() -> None:
    numbers = range(ATTACK.trials[Level.SOAK] // len(KINDS) * KINDS.count("map"))
    assert {each for number in numbers for each in places_of(number)} == {
        (place, most) for place in PLACES for most in (1, 2, 1000)
    }
