"""The long run: what its ledger says is where it goes on."""

import time
from collections.abc import Callable

from tests.attacks.attack import Attack, Budget, Level, Outcome
from tests.attacks.soak import HEAD, Row, left, merged, next_seed, part, rows_in

TRIALS = {Level.SAMPLE: 1, Level.PROVE: 40, Level.SOAK: 10}


def attack(name: str, seen: list[int], bad: Callable[[int], bool] = lambda _: False) -> Attack:
    def run(budget: Budget) -> Outcome:
        outcome = Outcome()
        for seed in budget.seeds(outcome):
            seen.append(seed)
            outcome.add("kills", 2)
            if bad(seed):
                outcome.fail(seed, "lost")
        return outcome

    return Attack(name, "trials", ("I1",), TRIALS, run)


def test_parts_go_on_where_the_ledger_ends_and_no_seed_comes_twice() -> None:
    one: list[int] = []
    other: list[int] = []
    attacks = [attack("one", one), attack("other", other, bad=lambda seed: seed == 7)]
    first = part(attacks, [], deadline_s=time.monotonic())  # none is begun when the time is over
    assert not first
    rows = part(attacks, [], deadline_s=time.monotonic() + 3600)
    assert one == other == list(range(1, 11))
    assert [(row.attack, row.first_seed, row.trials, row.broken, row.figures) for row in rows] == [
        ("one", 1, 10, 0, "kills: 20"),
        ("other", 1, 10, 1, "kills: 20"),
    ]
    assert not part(attacks, rows, deadline_s=time.monotonic() + 3600), "all is done"


def test_a_ledger_is_read_as_it_was_written() -> None:
    rows = [
        Row("2026-01-02", "abc1234", "kills", 1, 100, 0, 60, "kills: 99, replies: 1"),
        Row("2026-01-03", "abc1235", "kills", 101, 50, 1, 30, ""),
    ]
    assert rows_in(HEAD + "".join(row.line() for row in rows)) == rows
    assert next_seed(rows, "kills") == 151
    assert next_seed(rows, "faults") == 1
    assert left(rows, attack("kills", [])) == 10 - 150
    assert merged(rows[0], rows[0]).figures == "kills: 198, replies: 2"
