"""A fixed sample of every attack, and the planted bugs that are caught quickly. All: `python -m tests.attacks`."""

import pytest

from tests.attacks.attack import Attack, Level, carry_out
from tests.attacks.catalogue import ATTACKS, load
from tests.attacks.planted.bugs import Bug, all_bugs, planted


@pytest.mark.parametrize(
    "attack", [pytest.param(load(name), marks=pytest.mark.requires(*load(name).requires), id=name) for name in ATTACKS]
)
def test_no_promise_is_broken(attack: Attack) -> None:
    outcome = carry_out(attack, attack.trials[Level.SAMPLE], 1, print)
    assert outcome.tried == attack.trials[Level.SAMPLE]
    assert not outcome.failures


@pytest.mark.parametrize(
    "bug",
    [
        pytest.param(bug, marks=pytest.mark.requires(*load(bug.attack).requires), id=bug.name)
        for bug in all_bugs()
        if bug.is_quick
    ],
)
def test_a_planted_bug_is_caught(bug: Bug) -> None:
    with planted(bug):
        outcome = carry_out(load(bug.attack), bug.count, bug.seed, print, stop_early=True, planted=bug.name)
    assert outcome.failures, f"{bug.attack} does not notice: {bug.what}"
