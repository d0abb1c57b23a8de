"""What the documents say of attacks and planted bugs is so."""

import re
from pathlib import Path

import pytest

from tests.attacks.catalogue import ATTACKS, load
from tests.attacks.planted.bugs import all_bugs, bug_named
from tests.attacks.planted.table import DOCUMENT, HEADING, section

INVARIANTS = Path(__file__).parents[2] / "docs" / "invariants.md"
ROWS = re.findall(r"^\| (I\w+) \|.*\| (.+) \| (.+) \|$", INVARIANTS.read_text(), re.MULTILINE)


def test_the_table_of_planted_bugs_is_whole() -> None:
    """Write it anew with `python -m tests.attacks.planted.table`."""
    text = DOCUMENT.read_text()
    assert text[text.index(HEADING) :] == section()
    names = [bug.name for bug in all_bugs()]
    assert len(set(names)) == len(names) >= 25


@pytest.mark.parametrize(("invariant", "attacks", "bugs"), ROWS, ids=[row[0] for row in ROWS])
def test_each_invariant_has_its_attackers_and_the_bugs_that_prove_them(invariant: str, attacks: str, bugs: str) -> None:
    named = re.findall(r"`(\w+)`", attacks)
    assert set(named) <= set(ATTACKS)
    assert all(invariant in load(name).promises for name in named)
    planted = [bug_named(name) for name in re.findall(r"`([\w-]+)`", bugs)]
    assert {bug.attack for bug in planted} == set(named), "every attacker named is proven by a bug"
    assert all(invariant in bug.breaks for bug in planted)


def test_every_invariant_is_promised_by_some_attack() -> None:
    promised = {invariant for name in ATTACKS for invariant in load(name).promises}
    assert promised == {invariant for invariant, _, _ in ROWS}
