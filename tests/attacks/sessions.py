"""Malformed NBD sessions, many at a time, against a real daemon: nothing may be left of them, nobody else may notice.

A seed is one session (``sessions_script``). They come in rounds; beside each a good client writes and reads a volume of
its own. After a round that volume is compared, and the daemon must hold what it held before: connections, descriptors,
tasks, objects, bytes in flight, memory. A session of which every message has its length must get each reply once; one
that cannot go on must be hung up on.
"""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice

import uvloop

from tests.attacks.attack import Attack, Budget, Level, Outcome
from tests.attacks.sessions_client import Address, Canary, play
from tests.attacks.sessions_daemon import CANARY_BYTES, REST_S, FuzzedDaemon, Standing
from tests.attacks.sessions_script import Ending, Kind, script_of
from tests.real.process import ServerFailed

ROUND = 250
"""Sessions between two looks at the daemon."""
AT_ONCE = 32
_ENOUGH = 200
_SHORT_REST_S = 1.0  # where a planted bug is looked for
_WARM_UP = range(1_000_000_000, 1_000_000_064)
"""Seeds of what fills the caches that stay, before the first look."""


class Target:
    """A daemon, the canary in it, and what it held at first."""

    def __init__(self, budget: Budget, stack: ExitStack, first: int) -> None:
        """``first``: seed of the first session that it gets."""
        self.first = first
        self.daemon = stack.enter_context(FuzzedDaemon(budget.planted))
        self.daemon.start()
        self.daemon.populate()
        self.tcp = self.daemon.tcp_address()
        self.canary = Canary(self.daemon.socket, self.daemon.canary, CANARY_BYTES, first)
        uvloop.run(self.round([seed for seed in _WARM_UP if script_of(seed).kind is Kind.FRAMED], Outcome()))
        self._rested: Standing = self.daemon.rested()
        self._rest_s = _SHORT_REST_S if budget.stop_early else REST_S

    async def round(self, seeds: Sequence[int], outcome: Outcome) -> None:
        """Play sessions; what each breaks is noted under its seed, what they break together under the first one's."""
        rest, is_over = iter(seeds), asyncio.Event()

        async def play_some() -> None:
            for seed in rest:
                script = script_of(seed)
                address: Address = self.tcp if script.is_tcp else str(self.daemon.socket)
                if broken := await play(script, address):
                    outcome.fail(seed, broken, within=self._so_far(seeds))
                outcome.add(script.kind.value)
                outcome.add(script.ending.value)

        async with asyncio.TaskGroup() as group:
            singing = group.create_task(self.canary.sing(is_over))
            async with asyncio.TaskGroup() as players:
                for _ in range(AT_ONCE):
                    players.create_task(play_some())
            is_over.set()
        if broken := singing.result():
            self._fail(seeds, f"{_among(seeds)}: {broken}", outcome)

    def _so_far(self, seeds: Sequence[int]) -> range:
        return range(self.first, seeds[-1] + 1)

    def _fail(self, seeds: Sequence[int], what: str, outcome: Outcome) -> None:
        """Note what sessions broke together."""
        outcome.fail(seeds[0], what, count=len(seeds), within=self._so_far(seeds))

    def look(self, seeds: Sequence[int], outcome: Outcome) -> None:
        """See whether the daemon is as it was."""
        if faults := self.daemon.new_faults():
            self._fail(seeds, f"{_among(seeds)}: the daemon logged a mistake of its own:\n{faults}", outcome)
        if not self.daemon.running:
            self._fail(seeds, f"{_among(seeds)}: the daemon has ended\n{self.daemon.log_tail()}", outcome)
        elif more := self.daemon.await_rest(self._rested, self._rest_s):
            self._fail(seeds, f"{_among(seeds)}: the daemon holds more than before: {more}", outcome)

    def finish(self, seeds: Sequence[int], outcome: Outcome) -> None:
        """Stop the daemon in order, and prove its pool."""
        try:
            for figure, count in self.daemon.answered().items():
                outcome.add(figure, count)
            self.daemon.stop()
            self.daemon.check()
        except ServerFailed as error:
            self._fail(self._so_far(seeds), f"after {_among(seeds)}, and others before them: {error}", outcome)


def _among(seeds: Sequence[int]) -> str:
    return f"sessions {seeds[0]} to {seeds[-1]}"


def run(budget: Budget) -> Outcome:
    """Play sessions, round by round; a daemon that broke a promise is replaced."""
    outcome = Outcome()
    seeds = budget.seeds(outcome)
    target: Target | None = None
    batch: list[int] = []
    with ExitStack() as stack:
        while more := list(islice(seeds, ROUND)):
            batch, broken = more, len(outcome.failures)
            target = target or Target(budget, stack, more[0])
            uvloop.run(target.round(batch, outcome))
            target.look(batch, outcome)
            outcome.add("looks at the daemon")
            outcome.figures["KiB compared"] = (
                outcome.figures.get("KiB compared", 0) + target.canary.take_compared() // 1024
            )
            if len(outcome.failures) > broken:
                stack.close()
                target = None
            if not (batch[-1] + 1) % 2_000:
                budget.say(f"sessions: {outcome.tried + 1:,} of {budget.count:,}, {len(outcome.failures)} broken")
        if target is not None:
            target.finish(batch, outcome)
    if outcome.tried >= _ENOUGH and not outcome.failures:
        for figure in (*Kind, *Ending, "KiB compared", "requests answered", "errors", "handshakes failed"):
            if not outcome.figures.get(figure):
                raise AssertionError(f"sessions: nothing was attacked: {figure!r} is 0")
    return outcome


ATTACK = Attack(
    name="sessions",
    unit="malformed NBD sessions",
    promises=("I4", "I9"),
    trials={Level.SAMPLE: 300, Level.PROVE: 20_000, Level.SOAK: 100_000},
    run=run,
)
