"""The pure parts of the kills: which kill a seed is, and what may be found after one."""

from tests.attacks.kills_model import CHUNK_BYTES, Expected, Snapshot, Volume, World, Write
from tests.attacks.kills_trial import SLOTS, exact, plan_of


def test_a_round_of_seeds_tells_every_story() -> None:
    told = {(plan.scenario.name, plan.mode) for plan in map(plan_of, range(400, 400 + len(SLOTS) * 4 // 3 + 1))}
    assert told >= {(scenario.name, mode) for scenario, mode in SLOTS}


def test_many_rounds_come_to_every_call_of_a_story() -> None:
    calls = 100
    plans = [plan_of(seed) for seed in range(3 * calls * len(SLOTS) * 4 // 3)]
    for scenario, mode in SLOTS:
        mine = [plan for plan in plans if (plan.scenario, plan.mode) == (scenario, mode)]
        assert {int(plan.fraction * calls) for plan in mine} == set(range(calls))


def test_a_seed_can_name_the_very_call() -> None:
    plan = plan_of(exact(5, 17, is_apart=True))
    assert (plan.scenario, plan.mode, plan.target, plan.is_apart) == (*SLOTS[5], 17, True)
    assert plan_of(exact(5, 17) + 1) == plan_of(exact(5, 18))


def test_what_was_answered_must_be_there() -> None:
    expected = Expected(World({"v": Volume(bytearray(b"a" * CHUNK_BYTES))}))
    assert not expected.broken(World({"v": Volume(bytearray(b"a" * CHUNK_BYTES))}))
    assert expected.broken(World({"v": Volume(bytearray(CHUNK_BYTES))}))
    assert expected.broken(World())
    assert expected.broken(World({"v": Volume(bytearray(b"a" * CHUNK_BYTES), {"s": Snapshot(b"")})}))


def test_a_write_that_was_not_answered_is_there_or_not_chunk_by_chunk() -> None:
    write = Write("v", CHUNK_BYTES // 2, b"n" * CHUNK_BYTES)
    expected = Expected(World({"v": Volume(bytearray(2 * CHUNK_BYTES))}), writes=[write])
    old, new = bytes(CHUNK_BYTES // 2), b"n" * (CHUNK_BYTES // 2)
    for first in (old, new):
        for second in (old, new):
            assert not expected.broken(World({"v": Volume(bytearray(old + first + second + old))}))
    torn = new[: CHUNK_BYTES // 4] + old[: CHUNK_BYTES // 4]
    assert expected.broken(World({"v": Volume(bytearray(old + torn + old + old))}))
    assert expected.broken(World({"v": Volume(bytearray(new + new + new + old))}))


def test_what_is_no_write_is_done_as_a_whole_or_not_at_all() -> None:
    before = World({"v": Volume(bytearray(4)), "w": Volume(bytearray(4))})
    after, half = before.copy(), before.copy()
    for name in ("v", "w"):
        after.volumes[name].snapshots["s"] = Snapshot(bytes(4))
    half.volumes["v"].snapshots["s"] = Snapshot(bytes(4))
    expected = Expected(before, instead=after)
    assert not expected.broken(before)
    assert not expected.broken(after)
    assert expected.broken(half)
    assert expected.is_done(after)
    assert not expected.is_done(before)
