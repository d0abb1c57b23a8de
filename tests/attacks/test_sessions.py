"""The pure parts of the malformed sessions: what a seed sends, and what may come back."""

import struct
from collections import Counter

import pytest

from blockvirt.nbd import constants as c
from blockvirt.nbd.messages import CHUNK, GREETING, OPTION_REPLY, SIMPLE_REPLY
from tests.attacks.sessions_daemon import Standing
from tests.attacks.sessions_replies import wrong_replies
from tests.attacks.sessions_script import Ending, Kind, Script, script_of

GREETED = GREETING.pack(c.INIT_MAGIC, c.OPTION_MAGIC, 3) + OPTION_REPLY.pack(c.OPTION_REPLY_MAGIC, 7, c.REP_ACK, 0)


def framed(lengths: dict[int, int], *, is_structured: bool) -> Script:
    return Script(Kind.FRAMED, Ending.WAIT, False, True, (), 0.0, 1, lengths, is_structured)


def simple(cookie: int, data: bytes = b"", error: int = 0) -> bytes:
    return SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, error, cookie) + data


def chunk(cookie: int, kind: int, payload: bytes, flags: int = c.REPLY_FLAG_DONE) -> bytes:
    return CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(payload)) + payload


def test_a_seed_is_one_session_and_many_are_of_every_kind() -> None:
    scripts = [script_of(seed) for seed in range(300)]
    assert scripts == [script_of(seed) for seed in range(300)]
    assert len({script.pieces for script in scripts}) == 300
    assert set(Counter(script.kind for script in scripts)) == set(Kind)
    assert set(Counter(script.ending for script in scripts)) == set(Ending)
    assert any(not script.reads for script in scripts)


def test_replies_in_any_order_are_right() -> None:
    script = framed({1: 4, 2: 0, 3: 9}, is_structured=False)
    assert not wrong_replies(script, GREETED + simple(3, error=22) + simple(1, b"abcd") + simple(2))
    script = framed({1: 4, 2: 0, 3: 9}, is_structured=True)
    status = chunk(2, c.REPLY_BLOCK_STATUS, bytes(12), 0) + chunk(2, c.REPLY_BLOCK_STATUS, bytes(12))
    error = chunk(3, c.REPLY_ERROR, struct.pack(">IH", 22, 0))
    assert not wrong_replies(script, GREETED + status + error + simple(1))


@pytest.mark.parametrize(
    ("received", "what"),
    [
        (b"", "in the middle"),
        (GREETED, "each request is answered once"),
        (GREETED + simple(1, b"abcd") * 2, "more than once"),
        (GREETED + simple(1, b"abc"), "missing"),
        (GREETED + simple(1, b"abcd") + b"x", "in the middle"),
        (GREETED + simple(2), "no reply"),
        (GREETED + simple(1, error=108), "must not go out"),
        (GREETED[:-20] + bytes(20), "no option reply"),
    ],
)
@pytest.mark.parametrize("is_structured", [False, True])
def test_what_is_wrong_with_replies_is_said(received: bytes, what: str, is_structured: bool) -> None:
    if is_structured and what in ("missing", "more than once", "no reply"):
        data = chunk(1, c.REPLY_OFFSET_DATA, bytes(12))
        received = {"missing": GREETED + data[:-1], "more than once": GREETED + data * 2}.get(what, GREETED + bytes(28))
    assert what in wrong_replies(framed({1: 4}, is_structured=is_structured), received)


def test_a_daemon_that_holds_more_is_not_at_rest() -> None:
    rested = Standing({"connections": 0}, 20, 9, {"Session": 1}, 100_000, 50 << 20)
    assert rested.is_idle
    assert not rested.more_than(rested)
    assert not Standing({"connections": 0}, 18, 8, {"Buffer": 51}, 104_000, 100 << 20).more_than(rested)
    more = Standing({"connections": 1}, 21, 10, {"Session": 2, "Buffer": 52, "Slow": 1}, 106_000, 120 << 20)
    assert not more.is_idle
    for what in ("connections", "descriptors", "tasks", "Session", "Buffer", "Slow", "blocks", "memory"):
        assert f"{what}: " in more.more_than(rested) or f"{what} of memory: " in more.more_than(rested)
