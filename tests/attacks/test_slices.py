"""What a broken promise is told with: the line that brings it again."""

import pytest

from tests.attacks import slices
from tests.attacks.attack import Attack, Budget, Failure, Level, Outcome


def test_a_trial_of_its_own_comes_again_by_itself() -> None:
    assert Failure(7, "lost").again("fsx") == ["again: python -m tests.attacks fsx --seed 7 --count 1"]
    assert len(Failure(7, "lost", within=range(7, 8)).again("fsx")) == 1


def test_what_shared_a_daemon_is_named_too() -> None:
    alone, all_of_it = Failure(31, "lost", 10, range(1, 41)).again("api")
    assert alone.endswith("api --seed 31 --count 10")
    assert all_of_it.endswith("api --seed 1 --count 40")


def test_a_slice_says_what_brings_its_failures_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(budget: Budget) -> Outcome:
        outcome = Outcome()
        if budget.count > 100:
            raise RuntimeError("nothing was done")
        outcome.fail(budget.seed + 2, "lost", count=3, within=range(budget.seed, budget.seed + 5))
        return outcome

    attack = Attack("such", "trials", ("I4",), {level: 1 for level in Level}, run)
    monkeypatch.setattr(slices, "load", lambda _: attack)
    slices.Slice("such", 10, 5).run()
    said = capsys.readouterr().err
    assert "such --seed 12 --count 3\n" in said
    assert "such --seed 10 --count 5\n" in said
    slices.Slice("such", 10, 500).run()
    assert "such --seed 10 --count 500\n" in capsys.readouterr().err
