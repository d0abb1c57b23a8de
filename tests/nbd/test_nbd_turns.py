"""However many clients are busy, what else the loop has to do comes in between."""

import asyncio
from collections.abc import Callable

import pytest

from blockvirt.nbd import constants as c
from blockvirt.nbd.session import Session
from blockvirt.nbd.shared import SharedResources
from blockvirt.nbd.turns import Turns
from tests.nbd.conftest import PATIENCE_S, Bench

PASS_S = 4e-3
TURN_S = 1e-3


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s


class Worker:
    """Takes a turn of a millisecond, and another for each time it is told to."""

    def __init__(self, turns: Turns, clock: Clock, name: str, history: list[str]) -> None:
        self.turns, self.clock, self.name, self.history, self.more = turns, clock, name, history, 0

    def give_back(self) -> None:
        """It holds nothing."""

    def scheduled_turn(self) -> None:
        """Work, and wait again if there is more."""
        self.history.append(self.name)
        self.clock.now_s += TURN_S
        self.turns.last_s = self.clock.now_s
        if self.more:
            self.more -= 1
            self.turns.wait(self)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that ``Turns`` looks at."""
    clock = Clock()
    monkeypatch.setattr("blockvirt.nbd.turns.perf_counter", clock)
    return clock


async def passes(history: list[str], until: Callable[[], bool]) -> list[str]:
    """Let the loop go round and note each pass as "|"."""
    while not until():
        history.append("|")
        await asyncio.sleep(0)
    return history


async def test_who_waits_has_a_turn_in_order_some_in_each_pass(clock: Clock) -> None:
    turns, history = Turns(PASS_S), list[str]()
    for name in "abcdefghijk":
        turns.wait(Worker(turns, clock, name, history))
    # A fifth turn begins while it is not yet later than the time to pause
    assert "".join(await passes(history, lambda: "k" in history)) == "|abcde|fghij|k"


async def test_who_has_more_to_do_waits_for_the_next_pass(clock: Clock) -> None:
    turns, history = Turns(PASS_S), list[str]()
    workers = [Worker(turns, clock, name, history) for name in "ab"]
    workers[0].more = 2
    for one in workers:
        turns.wait(one)
    assert "".join(await passes(history, lambda: history.count("a") == 3)) == "|ab|a|a"


async def test_a_turn_waits_while_others_do_or_when_all_have_worked_too_long(clock: Clock) -> None:
    turns, history = Turns(PASS_S), list[str]()
    assert not turns.must_wait(clock.now_s), "nobody has worked for a while"
    assert turns.pause_at_s == clock.now_s + PASS_S
    turns.last_s = clock.now_s = turns.pause_at_s + TURN_S / 2
    assert turns.must_wait(clock.now_s), "somebody had a turn just now"
    turns.wait(Worker(turns, clock, "a", history))
    clock.now_s += 1.0
    assert turns.must_wait(clock.now_s), "somebody else waits already"
    await passes(history, lambda: "a" in history)
    assert clock.now_s < turns.pause_at_s, "a new pass, new time"
    clock.now_s += 1.0
    assert not turns.must_wait(clock.now_s)


async def test_a_turn_that_raises_takes_nothing_from_others(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, history, told = Turns(PASS_S), list[str](), list[str]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
    broken = Worker(turns, clock, "a", history)
    monkeypatch.setattr(broken, "clock", None)
    for one in (broken, Worker(turns, clock, "b", history)):
        turns.wait(one)
    assert "".join(await passes(history, lambda: "b" in history)) == "|a|b"
    assert len(told) == 1


async def test_turns_of_busy_clients_leave_the_loop_to_others(
    bench: Bench, shared: SharedResources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a pass may take no time at all there is one turn in each, whoever is ready."""
    shared.turns.pass_s = -1.0
    monkeypatch.setattr("blockvirt.nbd.turns._GAP_S", 1e9)  # nobody has ever rested for long
    shared.limits.batch_requests = 4
    loop, passed, worked_in = asyncio.get_running_loop(), 0, list[int]()
    turn = Session._turn

    def noted(session: Session, now: float) -> None:
        worked_in.append(passed)
        turn(session, now)

    def count_a_pass() -> None:
        nonlocal passed
        passed += 1
        counter.append(loop.call_soon(count_a_pass))

    clients = [await bench.enter() for _ in range(8)]
    monkeypatch.setattr(Session, "_turn", noted)
    counter = [loop.call_soon(count_a_pass)]
    async with asyncio.timeout(PATIENCE_S):
        for read in [client.start(c.CMD_READ, 0, 512) for client in clients for _ in range(40)]:
            assert not (await read).error
    counter[-1].cancel()
    assert len(worked_in) >= 80
    assert len(set(worked_in)) == len(worked_in), "two turns in one pass"
