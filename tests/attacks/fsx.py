"""The attack of "fsx": random requests over several connections, with snapshots and all that comes of them.

Named after Apple's file system exerciser. One daemon as its users run it, in the smallest chunks, serves many histories
one after the other. A history has volumes of its own (``fsx_history``); what they must hold is a ``bytearray`` each
(``fsx_model``). At the end ``blockvirt check --data`` must find nothing.
"""

import asyncio
from contextlib import ExitStack

from tests.attacks.attack import Attack, Budget, Level, Outcome
from tests.attacks.fsx_history import FAILURES, OPERATIONS, History
from tests.attacks.fsx_model import CHUNK_BYTES
from tests.attacks.planted.bugs import command
from tests.conftest import LIBNBD_MISSING
from tests.real.daemon import Daemon

_HISTORY_S = 90.0  # a second when the machine is quiet
_KEPT = 20  # of so many histories one leaves its volumes for the check at the end
_MUST_HAPPEN = ("reads", "writes", "zeroes", "trims", "flushes", "ancestors compared", "differences compared")


class SmallChunks(Daemon):
    """A daemon with the smallest chunks, which may have a planted bug."""

    def __init__(self, planted: str) -> None:
        super().__init__()
        self._planted = planted

    def environment(self) -> dict[str, str]:
        """The daemon's own, with the size of chunks, and little space kept back."""
        small = {"BLOCKVIRT_CHUNK_SIZE": f"{CHUNK_BYTES}B", "BLOCKVIRT_METADATA_RESERVE": "1MiB"}
        return super().environment() | small

    def _blockvirt(self, *arguments: str) -> list[str]:
        return [*command(self._planted), "-s", str(self.state), *arguments]

    def check(self) -> None:
        """Prove the stopped daemon's pool, every sealed chunk included."""
        self.cli("check", "--data")


def run(budget: Budget) -> Outcome:
    """Do one history after the other; a failure gets a new daemon for those that come after it."""
    outcome = Outcome()
    if LIBNBD_MISSING:
        budget.say(f"fsx: without libnbd: {LIBNBD_MISSING}")
    with ExitStack() as stack:
        daemon: SmallChunks | None = None
        seed = first = budget.seed
        for seed in budget.seeds(outcome):
            if daemon is None:
                daemon = stack.enter_context(SmallChunks(budget.planted))
                daemon.start()
                first = seed
            try:
                is_kept = not seed % _KEPT or seed == budget.seed + budget.count - 1
                asyncio.run(_history(daemon, seed, outcome, is_kept=is_kept))
            except FAILURES as error:
                log = f"\n{daemon.log_tail()}" if "internal error" in str(error) else ""
                within = range(first, seed + 1)
                outcome.fail(seed, f"{type(error).__name__}: {error}{log}", within=within)
                daemon.close()
                daemon = None
            if not (seed + 1) % 25:
                budget.say(f"fsx: seed {seed}: {outcome.tried + 1} histories, {len(outcome.failures)} broken")
        if daemon is not None:
            _prove(daemon, range(first, seed + 1), outcome)
    outcome.figures["operations"] = OPERATIONS * outcome.tried
    missing = [figure for figure in _MUST_HAPPEN if not outcome.figures.get(figure)]
    if missing and not outcome.failures:
        raise AssertionError(f"fsx proves nothing: no {', '.join(missing)}")
    return outcome


async def _history(daemon: Daemon, seed: int, outcome: Outcome, *, is_kept: bool) -> None:
    async with asyncio.timeout(_HISTORY_S):
        await History(daemon, seed, outcome).run(is_kept=is_kept)


def _prove(daemon: SmallChunks, seeds: range, outcome: Outcome) -> None:
    """Stop the daemon and check its pool, with what the histories so far have left in it."""
    try:
        daemon.stop()
        daemon.check()
    except AssertionError as error:
        outcome.fail(seeds.start, f"after these histories: {error}", count=len(seeds))


ATTACK = Attack(
    name="fsx",
    unit=f"histories of {OPERATIONS:,} operations",
    promises=("I3b", "I4", "I5", "I6", "I8"),
    trials={Level.SAMPLE: 4, Level.PROVE: 200, Level.SOAK: 5_000},
    run=run,
)
