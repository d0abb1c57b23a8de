"""Bounds on bytes in flight, against a model; the pool of buffers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockvirt.limits import NBD_MAX_PAYLOAD_BYTES
from blockvirt.nbd.budget import Budget, ConnectionBudget
from blockvirt.nbd.buffers import SIZES_BYTES, SMALL_BYTES, BufferPool, charge_for, charge_for_slow


def nothing() -> None:
    """Called when there may be room; this owner does not care."""


def test_a_lone_request_is_admitted_however_large() -> None:
    budget = Budget(100)
    assert budget.take("a", 1000, nothing)
    assert not budget.take("b", 1, nothing)
    budget.give(1000)
    assert budget.take("b", 1, nothing)


def test_first_come_first_served() -> None:
    budget, called = Budget(100), []
    assert budget.take("a", 60, nothing)
    assert not budget.take("big", 80, lambda: called.append("big"))
    assert not budget.take("small", 10, lambda: called.append("small")), "it would overtake"
    budget.give(60)
    assert called == ["big"]
    assert budget.take("big", 80, nothing)
    assert called == ["big", "small"], "whoever is next is called as soon as it is their turn"
    assert budget.take("small", 10, nothing)
    assert len(budget) == 0


def test_who_leaves_the_queue_lets_the_next_one_pass() -> None:
    budget, called = Budget(100), []
    assert budget.take("a", 60, nothing)
    assert not budget.take("gone", 80, nothing)
    assert not budget.take("b", 10, lambda: called.append("b"))
    budget.forget("gone")
    assert called == ["b"]
    assert budget.take("b", 10, nothing)


OPERATIONS = st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 120)), max_size=60)


@given(OPERATIONS)
def test_budget_model(operations: list[tuple[int, int]]) -> None:
    """Owners take (a positive amount), give back all (0) or leave (-1); nobody is forgotten, the sum never lies."""
    budget = Budget(100)
    held: dict[int, list[int]] = {}
    queue: dict[int, int] = {}
    for owner, amount in operations:
        if amount > 0:
            in_use = sum(map(sum, held.values()))
            free = in_use == 0 or in_use + amount <= 100
            expected = free and (not queue or next(iter(queue)) == owner)
            assert budget.take(owner, amount, nothing) is expected
            if expected:
                held.setdefault(owner, []).append(amount)
                queue.pop(owner, None)
            else:
                queue.setdefault(owner, amount)
        elif amount == 0:
            for taken in held.pop(owner, []):
                budget.give(taken)
        else:
            budget.forget(owner)
            queue.pop(owner, None)
        assert budget.used_bytes == sum(map(sum, held.values()))
        assert len(budget) == len(queue)


def test_a_connection_is_bounded_by_both_limits() -> None:
    total, called = Budget(100), []
    one = ConnectionBudget(total, 50, lambda: called.append("one"))
    other = ConnectionBudget(total, 50, lambda: called.append("other"))
    assert one.take(40)
    assert not one.take(20), "its own limit"
    assert len(total) == 0, "waiting for oneself does not stand in others' way"
    assert other.take(45)
    other.give(45)
    third = ConnectionBudget(total, 90, nothing)
    assert third.take(60)
    assert not other.take(10), "the common limit"
    third.give(60)
    assert called == ["other"]
    assert other.take(10)
    assert one.take(0)
    one.give(40)
    other.give(10)
    assert total.used_bytes == 0


def test_a_connection_that_is_called_but_cannot_take_stands_aside() -> None:
    total = Budget(100)
    filler = ConnectionBudget(total, 1000, nothing)
    one, other = ConnectionBudget(total, 50, nothing), ConnectionBudget(total, 50, nothing)
    assert one.take(30)
    assert filler.take(70)
    assert not one.take(15)
    assert not other.take(15)
    filler.give(70)
    assert not one.take(40), "its own limit now"
    assert other.take(15)


def test_thousands_may_stand_aside_at_once() -> None:
    """Each leaves when it is called, as sessions do at a shutdown; the last one takes."""
    total, called, waiting = Budget(100), list[str](), list[ConnectionBudget]()

    def stand_aside() -> None:
        called.append("left")
        waiting[len(called) - 1].stop_waiting()

    assert total.take("a", 100, nothing)
    for _ in range(5000):
        waiting.append(ConnectionBudget(total, 1000, stand_aside))
        assert not waiting[-1].take(10)
    assert not total.take("b", 10, lambda: called.append("b"))
    total.give(100)
    assert called == ["left"] * 5000 + ["b"]


def test_giving_too_much_back_is_found_out() -> None:
    with pytest.raises(AssertionError):
        Budget(100).give(1)


@pytest.mark.parametrize("length", [1, SMALL_BYTES, SMALL_BYTES + 1, 1 << 20, 4 << 20, NBD_MAX_PAYLOAD_BYTES])
def test_a_buffer_holds_its_payload_and_header(length: int) -> None:
    pool = BufferPool()
    buffer = pool.take(length + 28 if length > SMALL_BYTES else length)
    assert len(buffer.view) == buffer.capacity_bytes >= length
    assert buffer.charge_bytes == charge_for(length) == (0 if length <= SMALL_BYTES else buffer.capacity_bytes)
    slow = pool.take_for_slow(length)
    assert slow.charge_bytes == charge_for_slow(length) >= length, "hundreds of small ones count"
    assert len(slow.view) >= length
    pool.give(buffer)
    pool.give(slow)
    assert pool.lent == 0


def test_buffers_are_reused_last_in_first_out_and_kept_in_bounds() -> None:
    pool = BufferPool()
    lent = [pool.take(1) for _ in range(100)]
    for buffer in lent:
        pool.give(buffer)
    assert pool.kept_bytes == 32 * SMALL_BYTES
    assert pool.take(1) is lent[31]
    everything = [pool.take(size) for size in SIZES_BYTES for _ in range(20)]
    for buffer in everything:
        pool.give(buffer)
    assert pool.kept_bytes < 60 << 20


def test_trim_drops_what_was_not_needed_since_the_last_time() -> None:
    pool = BufferPool()
    for buffer in [pool.take(1 << 20) for _ in range(4)]:
        pool.give(buffer)
    pool.trim()
    assert pool.kept_bytes, "they were in use a moment ago"
    one = pool.take(1 << 20)
    pool.give(one)
    pool.trim()
    assert pool.kept_bytes == one.capacity_bytes
    pool.trim()
    assert pool.kept_bytes == 0
