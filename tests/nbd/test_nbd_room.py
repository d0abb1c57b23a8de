"""Who waits for room in a budget gets it when there is some, and nobody stands in the way who needs or takes none."""

import asyncio
from collections.abc import Sequence

import pytest

from blockvirt.nbd import constants as c
from blockvirt.nbd.buffers import Buffer
from blockvirt.nbd.messages import REQUEST
from blockvirt.nbd.outgoing import Part
from blockvirt.nbd.session import Session
from blockvirt.nbd.shared import SharedResources
from blockvirt.units import KIB, MIB
from tests.nbd.conftest import PATIENCE_S, Bench, noise, read_request, sessions, until_starved


async def test_a_request_that_waits_for_room_goes_on_when_a_reply_has_left(
    bench: Bench, shared: SharedResources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn may come between the end of a slow request and its reply, which holds its room until it was sent."""
    bench.disk.now = False
    shared.limits.connection_budget_bytes = MIB
    client = await bench.enter()
    slow_reply = Session.slow_reply

    def behind_a_turn(session: Session, parts: Sequence[Part], buffer: Buffer | None, *, alone: bool) -> None:
        session._schedule()
        slow_reply(session, parts, buffer, alone=alone)

    monkeypatch.setattr(Session, "slow_reply", behind_a_turn)
    async with asyncio.timeout(PATIENCE_S):
        for read in [client.start(c.CMD_READ, 0, MIB) for _ in range(4)]:
            assert not (await read).error


async def test_who_gave_back_in_vain_keeps_its_place(bench: Bench, shared: SharedResources) -> None:
    """What it gives back calls it, as the first who waits; that is not enough, and the rest comes later."""
    client = await bench.enter()
    await client.write(0, noise(MIB))  # next time there will be a large buffer for what is received
    shared.budget.limit_bytes = 8 * MIB
    assert shared.budget.take("another connection", 6 * MIB, lambda: None)
    read = client.start(c.CMD_READ, 0, 3 * MIB)
    (session,) = sessions(bench)
    await until_starved(session)
    for _ in range(10):  # what it has called for happens
        await asyncio.sleep(0)
    shared.budget.give(6 * MIB)
    async with asyncio.timeout(PATIENCE_S):
        assert (await read).data[:MIB] == noise(MIB)


async def test_who_cannot_send_does_not_wait_for_budget(bench: Bench, shared: SharedResources) -> None:
    """It could not take its turn, and those behind it would wait for its client."""
    shared.budget.limit_bytes = 8 * MIB
    assert shared.budget.take("another connection", 6 * MIB, lambda: None)
    write = REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_WRITE, 0, 0, 4 * MIB)
    blocked = 0
    for replies in range(1, 40):  # one of them fills the socket in the turn in which the write asks for room
        client = await bench.enter()
        client._writer.transport.pause_reading()  # type: ignore[attr-defined]
        session = sessions(bench)[-1]
        client.send_raw(read_request(1, 64 * KIB) * replies + write)
        await until_starved(session)
        if session._outgoing.pending:
            blocked += 1
            assert not shared.budget._waiting, f"after {replies} replies"
        else:
            assert len(shared.budget) == 1
        session.abandon("the test is over")
        assert not shared.budget._waiting
    assert blocked
    shared.budget.give(6 * MIB)


@pytest.mark.parametrize("others", [0, 1])
async def test_who_needs_no_room_any_more_leaves_the_queue(bench: Bench, shared: SharedResources, others: int) -> None:
    """A look in vain has the kernel read what it missed, so the next one needs no buffer to read into."""
    shared.budget.limit_bytes = MIB
    assert shared.budget.take("another connection", MIB, lambda: None)
    bench.disk.now = False
    one, two = await bench.enter(), await bench.enter()
    read = one.start(c.CMD_READ, 0, 4096)
    await until_starved(sessions(bench)[0])
    bench.disk.now = True
    if others:
        client = await bench.enter()
        assert not shared.budget.take("a third connection", 4096, lambda: None)
        assert await client.read(0, 512) == bytes(512), "who needs none of it does not wait"
    shared.budget.give(4096)
    assert not (await read).error
    shared.budget.give(MIB - 4096)
    async with asyncio.timeout(PATIENCE_S):
        while len(shared.budget) > others:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0)
    shared.budget.forget("a third connection")
    bench.disk.now = False
    async with asyncio.timeout(PATIENCE_S):
        assert await two.read(0, 4096) == bytes(4096)


async def test_nothing_is_held_after_a_reply_in_pieces(bench: Bench, shared: SharedResources) -> None:
    """A reply larger than what the socket takes, read to its end by a client that asks for nothing more."""
    client = await bench.enter()
    assert len(await client.read(0, 32 * MIB)) == 32 * MIB
    async with asyncio.timeout(PATIENCE_S):
        while shared.pool.lent or shared.budget.used_bytes:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0)
