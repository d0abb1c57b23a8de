"""When replies to slow requests are sent: at once where one is alone, else together."""

import asyncio
from collections.abc import Sequence

import pytest

from blockvirt.nbd import constants as c
from blockvirt.nbd.buffers import Buffer
from blockvirt.nbd.outgoing import Part
from blockvirt.nbd.session import Session
from blockvirt.units import KIB
from tests.nbd.conftest import PATIENCE_S, Bench


async def alones(bench: Bench, monkeypatch: pytest.MonkeyPatch, requests: int) -> list[bool]:
    """Have so many reads answered that the disk makes wait; return which replies were alone."""
    bench.disk.now = False
    client, seen, slow_reply = await bench.enter(), list[bool](), Session.slow_reply

    def noted(session: Session, parts: Sequence[Part], buffer: Buffer | None, *, alone: bool) -> None:
        slow_reply(session, parts, buffer, alone=alone)
        seen.append(alone)
        assert bool(session._outgoing._late) is not alone

    monkeypatch.setattr(Session, "slow_reply", noted)
    async with asyncio.timeout(PATIENCE_S):
        for read in [client.start(c.CMD_READ, number * 256 * KIB, 256 * KIB) for number in range(requests)]:
            assert not (await read).error
        assert not (await client.start(c.CMD_FLUSH, 0, 0)).error
    return seen


async def test_a_reply_that_is_alone_waits_for_nobody(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await alones(bench, monkeypatch, 1) == [True, True]


async def test_replies_that_may_come_together_do(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await alones(bench, monkeypatch, 3) == [False, False, True, True]
