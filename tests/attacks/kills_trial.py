"""One trial: a daemon is killed in a story, and what it leaves is compared with what may be there."""

from __future__ import annotations

import json
import logging
import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from blockvirt import check
from blockvirt.errors import BlockvirtError
from tests.attacks.attack import Outcome
from tests.attacks.kills_clients import Died
from tests.attacks.kills_daemon import Daemon, DaemonFailed, ForkServer, Pool, Shot
from tests.attacks.kills_driver import Driver
from tests.attacks.kills_model import Expected, World
from tests.attacks.kills_random import MOST_CALLS, MOST_LINES, random_story
from tests.attacks.kills_scenarios import SCENARIOS, Scenario, leave, prepare

MODES = ("calls", "lines")
_GOLDEN = 0.6180339887498949
_STRIDE = 19
"""Seeds that are neighbours do not tell the same story; no divisor of the number of stories and modes."""
_RANDOM_EVERY = 4
_EXACT, _TARGETS = 100_000_000, 1_000_000
_APART = 0.25
"""So many trials go on in another mount namespace."""
SAMPLED = 2_800
"""So many of the first seeds are samples. Behind them all calls of all stories come, one by one, then all lines."""
WALKED_CALLS, WALKED_LINES = 3_400, 4_000
"""The room for these, each line at its first run and at one of the others; nothing is left for the rest."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a seed stands for."""

    scenario: Scenario
    mode: str
    """What is counted: ``calls`` or ``lines``."""
    fraction: float
    """How far into the story the kill comes: of all its calls, or lines."""
    target: int
    """The call or line, from 1 on, instead of a fraction; 0: by the fraction."""
    is_apart: bool
    """The daemon starts again in a mount namespace of its own."""
    line: str = ""
    """The line to be killed at, "FILE:NUMBER", when it is run for the ``target``-th time; empty: any one."""


SLOTS = [(scenario, mode) for scenario in SCENARIOS for mode in MODES if mode == "calls" or scenario.base != "none"]


def plan_of(seed: int) -> Plan:
    """Return the plan of a seed: each story in turn, and in each the kills come ever closer to one another.

    Every fourth tells a story of its own. Seeds from ``_EXACT`` on name the very call or line, see ``exact``.
    """
    if seed >= _EXACT:
        place, target = divmod(seed - _EXACT, _TARGETS)
        return Plan(*SLOTS[place // 2], 0.0, target, bool(place % 2))
    dice = random.Random(seed)
    is_apart = dice.random() < _APART
    turn, place = divmod(seed, _RANDOM_EVERY)
    if place == _RANDOM_EVERY - 1:
        mode, most = dice.choice((("calls", MOST_CALLS), ("lines", MOST_LINES)))
        return Plan(random_story(seed), mode, 0.0, dice.randrange(1, most), is_apart)
    step, place = divmod(turn * (_RANDOM_EVERY - 1) + place, len(SLOTS))
    fraction = (step * _GOLDEN + place * _GOLDEN**2) % 1.0
    return Plan(*SLOTS[place * _STRIDE % len(SLOTS)], fraction, 0, is_apart)


def exact(slot: int, target: int, *, is_apart: bool = False) -> int:
    """Return the seed of a kill at a certain call or line of a story; the next seed is the kill at the next one."""
    return _EXACT + (2 * slot + is_apart) * _TARGETS + target


def slot_of(name: str, mode: str) -> int:
    """Return the slot of a story and a mode."""
    return next(slot for slot, (scenario, other) in enumerate(SLOTS) if (scenario.name, other) == (name, mode))


class Broken(AssertionError):
    """A promise was broken."""


class Range:
    """The pools, and what one run over many trials shares."""

    def __init__(self, folder: Path, planted: str, outcome: Outcome) -> None:
        self._folder = folder
        self._outcome = outcome
        self._stack = ExitStack()
        self._pool = Pool(folder)
        self._server = ForkServer(planted)
        self._stack.callback(self._server.close)
        self._worlds = {"none": World(devices={"disk1"})}
        self._streams: dict[str, bytes] = {}
        self._counts: dict[tuple[str, str], int] = {}
        self._lines: list[tuple[Scenario, str, int]] = []
        self._where = ""
        """What the daemon was about to do when it was killed."""

    def __enter__(self) -> Self:
        logging.getLogger("blockvirt").addHandler(_SILENCE)  # what the check in this process has to say is looked at
        self._stack.callback(logging.getLogger("blockvirt").removeHandler, _SILENCE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # --- the pools that stories begin with ---------------------------------------------------------------------------

    def _base(self, name: str) -> World:
        """Have the pool as a story begins with it; returns what it holds."""
        if name == "none":
            self._pool.begin()
            return self._worlds["none"].copy()
        kept = self._folder / name
        if name not in self._worlds:
            before = self._base("clean" if name == "dirty" else "none")
            with self._running(Shot(), before, seed=1) as driver:
                (leave if name == "dirty" else prepare)(driver)
                if name == "clean":
                    driver.close()
                    driver.daemon.await_sealing()
                    driver.daemon.stop()
            self._worlds[name] = driver.world
            self._pool.keep(kept)
        else:
            self._pool.restore(kept)
        return self._worlds[name].copy()

    @contextmanager
    def _running(
        self, shot: Shot, world: World, seed: int, *, armed: bool = False, apart: bool = False
    ) -> Iterator[Driver]:
        with Daemon(self._server, self._pool, shot, armed=armed, is_apart=apart) as daemon:
            driver = Driver(daemon, world, seed, self._streams, self._pool.root)
            try:
                if not daemon.ready():
                    raise Died("the daemon was killed as it started")
                yield driver
            finally:
                driver.close()

    def _tell(self, scenario: Scenario, shot: Shot) -> int:
        """Tell a story to its end; returns how many calls or lines it has."""
        world = self._base(scenario.base)
        with self._running(shot, world, 0, armed=scenario.armed) as driver:
            if not scenario.armed:
                driver.daemon.arm()
            scenario.tell(driver)
            driver.daemon.stop()
            return driver.daemon.seen()

    def count(self, scenario: Scenario, mode: str) -> int:
        """Return how many calls or lines a story has: by telling it once."""
        key = (scenario.name, mode)
        if key not in self._counts:
            self._counts[key] = self._tell(scenario, Shot(mode))
        return self._counts[key]

    def _all_calls(self) -> list[tuple[Scenario, int]]:
        """Return each call of each story."""
        return [(scenario, call + 1) for scenario in SCENARIOS for call in range(self.count(scenario, "calls"))]

    def _all_lines(self) -> list[tuple[Scenario, str, int]]:
        """Return each line that any story runs, with the first story that does, and how often that runs it."""
        if not self._lines:
            found: dict[str, tuple[Scenario, str, int]] = {}
            listing = self._folder / "lines"
            for scenario in (scenario for scenario, mode in SLOTS if mode == "lines"):
                self._tell(scenario, Shot("lines", listing=str(listing)))
                runs = json.loads(listing.read_text())
                found |= {line: (scenario, line, runs[line]) for line in sorted(runs) if line not in found}
            self._lines = list(found.values())
        return self._lines

    def _plan(self, seed: int) -> Plan | None:
        """Return the plan of a seed; None: there is not so much to be walked through."""
        place = seed - SAMPLED - 1
        if not 0 <= place < WALKED_CALLS + WALKED_LINES:
            return plan_of(seed)
        dice = random.Random(seed)
        is_apart = dice.random() < _APART
        if place < WALKED_CALLS:
            calls = self._all_calls()
            assert len(calls) <= WALKED_CALLS, f"the stories have {len(calls)} calls: give them more room"
            return Plan(calls[place][0], "calls", 0.0, calls[place][1], is_apart) if place < len(calls) else None
        turn, place = divmod(place - WALKED_CALLS, WALKED_LINES // 2)
        lines = self._all_lines()
        assert len(lines) <= WALKED_LINES // 2, f"the stories run {len(lines)} lines: give them more room"
        scenario, line, runs = lines[place] if place < len(lines) else (SCENARIOS[0], "", 0)
        if runs <= turn:
            return None
        return Plan(scenario, "lines", 0.0, dice.randint(2, runs) if turn else 1, is_apart, line)

    # --- a trial ----------------------------------------------------------------------------------------------------

    def trial(self, seed: int) -> None:
        """Carry out the trial of a seed; failures go to the outcome."""
        plan = self._plan(seed)
        if plan is None:
            self._outcome.add("nothing left")
            return
        target = plan.target or 1 + int(plan.fraction * self.count(plan.scenario, plan.mode))
        self._pool.log.unlink(missing_ok=True)
        self._where = "its end"
        try:
            expected = self._kill(plan, Shot(plan.mode, target, plan.line), self._base(plan.scenario.base))
            self._judge(plan, expected)
            if "Traceback" in self._pool.log.read_text(errors="replace"):
                raise Broken(f"the daemon logged a fault of its own: {self._pool.log_tail()}")
        except (AssertionError, Died) as error:
            story = f"{plan.scenario.name}, {plan.mode[:-1]} {plan.line or 'number'} {target}: killed at {self._where}"
            if plan.fraction:
                seed = exact(slot_of(plan.scenario.name, plan.mode), target, is_apart=plan.is_apart)
            self._outcome.fail(seed, f"{story}: {error}")

    def _kill(self, plan: Plan, shot: Shot, world: World) -> Expected:
        """Tell the story up to the kill; returns what may be found."""
        scenario = plan.scenario
        with Daemon(self._server, self._pool, shot, armed=scenario.armed, is_apart=False) as daemon:
            driver = Driver(daemon, world, 0, self._streams, self._pool.root)
            try:
                if daemon.ready():
                    if not scenario.armed:
                        daemon.arm()
                    scenario.tell(driver)
            except Died as error:
                if not daemon.is_dying():
                    raise Broken(f"the daemon lives and has dropped a connection: {error}") from error
            finally:
                code = daemon.stop()
                self._where = daemon.killed_at() or self._where
                driver.close()
        if code not in (0, -signal.SIGKILL):
            raise DaemonFailed(f"the daemon ended with code {code}: {self._pool.log_tail()}")
        self._outcome.add("answers kept", driver.answers)
        self._outcome.add(f"kills at {plan.mode}" if daemon.was_shot else "not reached")
        return driver.expected

    def _judge(self, plan: Plan, expected: Expected) -> None:
        """Compare what is there with what may be, after a check, a restart, more writes, and another check."""
        if plan.scenario.base != "none":
            self._check("after the kill", expected)
        with self._running(Shot(), World(), seed=2, apart=plan.is_apart) as driver:
            found = driver.look()
            if broken := expected.broken(found):
                raise Broken(f"after the restart: {'; '.join(broken)}")
            if expected.instead is not None:
                self._outcome.add("found done" if expected.is_done(found) else "found undone")
            driver.expected.answered = found
            driver.wait_for_all()
            for volume in found.volumes:
                driver.write(volume, (0.125, 0.25), (410.25, 0.125), (411.5, 0.25), (508.5, 1))
            broken = Expected(driver.world).broken(driver.look())
            if broken:
                raise Broken(f"after further writes: {'; '.join(broken)}")
            driver.close()
            if code := driver.daemon.stop():
                raise DaemonFailed(f"the daemon ended with code {code} after the restart: {self._pool.log_tail()}")
        self._check("after the end of the restarted daemon", expected)
        self._outcome.add("snapshots compared", sum(len(volume.snapshots) for volume in found.volumes.values()))
        self._outcome.add("other mount namespaces", int(plan.is_apart))

    def _check(self, when: str, expected: Expected) -> None:
        try:
            report = check.run(self._pool.state, repair=False, restore_metadata=False, data=True)
        except BlockvirtError as error:
            raise Broken(f"the check {when} cannot run: {error.message}") from error
        if report.exit_code not in (check.CLEAN, check.LEAKS if expected.may_leak or expected.writes else check.CLEAN):
            raise Broken(f"the check {when}: {report.summary}: {report.findings[0]}")
        if report.exit_code == check.LEAKS:
            self._outcome.add(f"leaks {when}")


_SILENCE = logging.NullHandler()
