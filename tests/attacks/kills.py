"""SIGKILL at every call that changes a file, and at every line of the code that writes; nothing answered may be lost.

A story is told to a real daemon on a pool that is the same each time, up to the N-th such call or line. Then:
`blockvirt check` finds no corruption; after a restart (sometimes in another mount namespace) everything that was
answered is there; snapshots hold what they held; what was under way is done or not done; and further writes and a clean
stop go well.

A seed names the story, the kind of kill, and how far into the story it comes (a fraction of what a first telling
counts). Seeds that follow one another go through the stories, and through each ever more finely. Behind these samples,
in a soak, come all calls of all stories, one by one, and each line that any of them runs.
"""

from tests.attacks.attack import Attack, Budget, Level, Outcome
from tests.attacks.kills_trial import SAMPLED, WALKED_CALLS, WALKED_LINES, Range

SAY_EVERY = 100
ENOUGH = 8
"""Trials in which something must have happened."""


def run(budget: Budget) -> Outcome:
    """Kill daemons."""
    outcome = Outcome()
    with Range(budget.scratch, budget.planted, outcome) as kills:
        for seed in budget.seeds(outcome):
            kills.trial(seed)
            if outcome.tried % SAY_EVERY == SAY_EVERY - 1:
                budget.say(f"kills: {outcome.tried + 1:,} of {budget.count:,}, {len(outcome.failures)} broken")
    if outcome.tried - outcome.figures.get("nothing left", 0) >= ENOUGH and not outcome.failures:
        for figures in needed(budget.seed):
            if not any(map(outcome.figures.get, figures)):
                raise AssertionError(f"kills: nothing was attacked: {' and '.join(figures)} are 0")
    return outcome


def needed(first_seed: int) -> tuple[tuple[str, ...], ...]:
    """Return what must have happened in trials from a seed on, one of each group: a walk has what its stories have."""
    if SAMPLED < first_seed <= SAMPLED + WALKED_CALLS + WALKED_LINES:
        return (("kills at calls", "kills at lines"),)
    return (("kills at calls",), ("kills at lines",), ("answers kept",), ("snapshots compared",))


ATTACK = Attack(
    name="kills",
    unit="kills",
    promises=("I2", "I3b", "I5", "I6", "I8"),
    trials={Level.SAMPLE: 8, Level.PROVE: 700, Level.SOAK: SAMPLED + WALKED_CALLS + WALKED_LINES},
    run=run,
)
