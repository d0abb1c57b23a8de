"""The long run: what its ledger says is where it goes on."""

import time
from dataclasses import replace
from itertools import chain

import pytest

from tests.attacks import slices
from tests.attacks.attack import Attack, Budget, Level, Outcome
from tests.attacks.slices import BugSlice, Done, Slice, in_turns, side_by_side, sliced, verdict
from tests.attacks.soak import HEAD, Row, figures_of, gaps, next_slices, open_failures, rows_in, rows_of, summary, until

TRIALS = {Level.SAMPLE: 1, Level.PROVE: 40, Level.SOAK: 10}


def attack(name: str, parts: int = 4) -> Attack:
    return Attack(name, "trials", ("I1",), TRIALS, lambda _: Outcome(), parts)


def done(slice_: Slice, bad_seed: int = 0) -> Done:
    outcome = Outcome(slice_.count, figures={"kills": 2 * slice_.count})
    if bad_seed in range(slice_.seed, slice_.seed + slice_.count):
        outcome.fail(bad_seed, "lost")
    return Done(outcome, seconds=2.0)


def test_parts_go_on_where_the_ledger_ends_and_no_seed_comes_twice() -> None:
    attacks = [attack("one"), attack("other")]
    assert not list(until(time.monotonic(), next_slices(attacks, []))), "none is begun when the time is over"
    given = list(until(time.monotonic() + 3600, next_slices(attacks, [])))
    assert [each.attack for each in given[:4]] == ["one", "other", "one", "other"], "in turns"
    for name in ("one", "other"):
        seeds = chain.from_iterable(range(each.seed, each.seed + each.count) for each in given if each.attack == name)
        assert list(seeds) == list(range(1, 11))
    ended = [(each, done(each, bad_seed=7 if each.attack == "other" else 0)) for each in reversed(given)]
    rows = rows_of(ended, "2026-01-02", "abc1234")
    assert sorted((row.attack, row.first_seed, row.trials, row.broken, row.figures) for row in rows) == [
        ("one", 1, 10, 0, "kills: 20"),
        ("other", 1, 4, 0, "kills: 8"),
        ("other", 5, 4, 1, "kills: 8"),
        ("other", 9, 2, 0, "kills: 4"),
    ]
    (again,) = next_slices(attacks, rows)
    assert again == Slice("other", 5, 4), "what has broken a promise is tried again"
    assert [open_failures(rows, each) for each in attacks] == [0, 1]
    mended = [*rows, *rows_of([(again, done(again))], "2026-01-03", "abc1235")]
    assert not list(next_slices(attacks, mended)), "all is done"
    assert open_failures(mended, attacks[1]) == 0
    told = summary(attacks[1], mended)
    assert told[1:3] == ("10 of 10 trials from seed 1", "0 broken, 1 mended")
    assert told[3].endswith("  kills: 20"), "what was tried again counts once"


def test_a_part_that_ended_early_is_gone_on_with() -> None:
    some = [(each, done(each)) for each in list(next_slices([attack("one")], []))[:2]]
    rows = rows_of(some, "2026-01-02", "abc1234")
    rest = list(next_slices([attack("one")], rows))
    assert rest[0].seed == sum(each.count for each, _ in some) + 1
    assert sum(each.count for each in rest) + sum(each.count for each, _ in some) == 10


def test_a_ledger_is_read_as_it_was_written() -> None:
    rows = [
        Row("2026-01-02", "abc1234", "kills", 1, 100, 0, 60, "kills: 99, replies: 1"),
        Row("2026-01-03", "abc1235", "kills", 101, 50, 1, 30, ""),
    ]
    assert rows_in(HEAD + "".join(row.line() for row in rows)) == rows
    assert gaps(rows, "kills", 200) == [range(101, 201)]
    assert gaps(rows, "kills", 100) == []
    assert gaps(rows, "faults", 5) == [range(1, 6)]
    assert figures_of([*rows, *rows]) == {"kills": 198, "replies": 2}
    told = summary(replace(attack("kills"), trials=TRIALS | {Level.SOAK: 150}), rows)
    assert told == ("kills", "100 of 150 trials from seed 1", "1 broken", "90 s  kills: 99, replies: 1")
    attacks = [replace(attack("one"), promises=("I3b", "I7")), attack("two")]
    assert verdict(1, attacks)[2:] == ("1 broken", "")
    assert verdict(0, attacks)[2:] == ("0 broken", "writes lost to SIGKILL: 0"), "of the others nothing is known"


def test_slices_are_all_trials_once_and_few_stay_together() -> None:
    assert sliced(attack("one"), 5, 39) == [Slice("one", 5, 39)]
    assert sliced(attack("one", parts=1), 1, 40) == [Slice("one", 1, 40)]
    assert sliced(attack("one"), 5, 42) == [
        Slice("one", 5, 10),
        Slice("one", 15, 11),
        Slice("one", 26, 10),
        Slice("one", 36, 11),
    ]
    assert in_turns([1, 2, 3], [], [4]) == [1, 4, 2, 3]


def test_slices_run_in_processes_of_their_own_and_their_failures_come_out() -> None:
    work = [Slice("simulation", 1, 1), Slice("simulation", 2, 1)]
    found = {slice_: each.outcome.tried for slice_, each in side_by_side(work, 2)}
    assert found == dict.fromkeys(work, 1)


def test_a_process_that_ends_too_early_is_no_success() -> None:
    (unknown,) = side_by_side([Slice("no_such_attack", 4, 1)], 2)
    (failure,) = unknown[1].outcome.failures
    assert failure.seed == 4
    (bugs,) = side_by_side([BugSlice(("no-such-bug",))], 2)
    assert bugs[1].missed == ("no-such-bug",)


def test_an_attack_that_fails_itself_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: Budget) -> Outcome:
        raise RuntimeError("nothing was compared")

    monkeypatch.setattr(slices, "load", lambda _: replace(attack("one"), run=run))
    (failure,) = Slice("one", 4, 2).run().outcome.failures
    assert failure.seed == 4
    assert "nothing was compared" in failure.what
