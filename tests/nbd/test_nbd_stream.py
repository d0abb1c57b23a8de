"""A session on a socket pair, fed with any requests in any portions, against a model of the disk and of the replies."""

import asyncio
import itertools
import socket
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockvirt.nbd import constants as c
from blockvirt.nbd.handshake import Negotiated
from blockvirt.nbd.messages import REQUEST, SIMPLE_REPLY
from blockvirt.nbd.session import Session
from blockvirt.nbd.shared import SessionLimits, SharedResources
from blockvirt.testing.memory_volume import MemoryDisk, MemoryVolume
from blockvirt.units import KIB

DISK_BYTES = 1024 * KIB


@dataclass(frozen=True)
class Request:
    """One request of a random stream."""

    command: int
    flags: int
    offset: int
    length: int

    def encode(self, cookie: int) -> bytes:
        payload = bytes([cookie % 255 + 1]) * self.length if self.command == c.CMD_WRITE else b""
        return REQUEST.pack(c.REQUEST_MAGIC, self.flags, self.command, cookie, self.offset, self.length) + payload


OFFSETS = st.one_of(st.integers(0, DISK_BYTES), st.sampled_from([DISK_BYTES - 1, 2**64 - 1, 2**63]))
LENGTHS = st.one_of(st.integers(0, 9000), st.sampled_from([0, 4096, 128 * KIB, 128 * KIB + 1, 300 * KIB]))
REQUESTS = st.lists(
    st.builds(
        Request,
        st.sampled_from([c.CMD_READ, c.CMD_WRITE, c.CMD_WRITE, c.CMD_CACHE, 9]),
        st.sampled_from([0, 0, 0, 0, c.CMD_FLAG_NO_HOLE, 1 << 12]),
        OFFSETS,
        LENGTHS,
    ),
    max_size=25,
)


def expected(requests: list[Request]) -> tuple[bytearray, dict[int, tuple[int, bytes]]]:
    """The disk afterwards, and (error, data) by cookie, when requests are done in order."""
    disk, replies = bytearray(DISK_BYTES), {}
    for cookie, one in enumerate(requests):
        if one.flags or one.command == 9:
            replies[cookie] = 22, b""
        elif one.offset + one.length > DISK_BYTES:
            replies[cookie] = (28 if one.command == c.CMD_WRITE else 22), b""
        else:
            end = one.offset + one.length
            if one.command == c.CMD_WRITE:
                disk[one.offset : end] = one.encode(cookie)[REQUEST.size :]
            replies[cookie] = 0, bytes(disk[one.offset : end]) if one.command == c.CMD_READ else b""
    return disk, replies


def parse(received: bytes, requests: list[Request]) -> dict[int, tuple[int, bytes]]:
    """(error, data) by cookie, from simple replies."""
    found: dict[int, tuple[int, bytes]] = {}
    at = 0
    while at < len(received):
        magic, error, cookie = SIMPLE_REPLY.unpack_from(received, at)
        assert magic == c.SIMPLE_REPLY_MAGIC
        at += SIMPLE_REPLY.size
        one = requests[cookie]
        size = one.length if one.command == c.CMD_READ and not error else 0
        assert cookie not in found, "answered twice"
        found[cookie] = error, received[at : at + size]
        at += size
    return found


async def converse(stream: bytes, cuts: list[int], disk: MemoryDisk, shared: SharedResources) -> bytes:
    """Send ``stream`` in the portions that ``cuts`` make of it and return all that comes back."""
    ours, theirs = socket.socketpair()
    for one in (ours, theirs):
        one.setblocking(False)
    # Small socket buffers, so that replies too leave in portions
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * KIB)
    session = Session("s", theirs, MemoryVolume(disk), Negotiated("v", structured=False), shared)
    session.start()
    loop = asyncio.get_running_loop()
    received = bytearray()

    async def receive() -> None:
        while data := await loop.sock_recv(ours, 64 * KIB):
            received.extend(data)

    with ours, theirs:
        async with asyncio.TaskGroup() as group:
            group.create_task(receive())
            edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
            for start, end in itertools.pairwise(edges):
                if start < end:
                    await loop.sock_sendall(ours, stream[start:end])
                    await asyncio.sleep(0)
            assert await session.ended == "the client disconnected"
    await session.close()
    return bytes(received)


@settings(max_examples=150)
@given(REQUESTS, st.lists(st.integers(0, 1 << 24), max_size=20), st.sampled_from([1, 2, 64]), st.sampled_from([0, 40]))
def test_any_stream_in_any_portions(requests: list[Request], cuts: list[int], batch: int, spins: int) -> None:
    disk = MemoryDisk(DISK_BYTES, block_bytes=4 * KIB)
    shared = SharedResources(limits=SessionLimits(batch_requests=batch, spins=spins))
    stream = b"".join(one.encode(cookie) for cookie, one in enumerate(requests))
    stream += REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_DISC, 0, 0, 0)
    received = asyncio.run(converse(stream, cuts, disk, shared))
    content, replies = expected(requests)
    assert parse(received, requests) == replies
    assert disk.data == content
    assert (disk.open_handles, disk.unsettled_handles) == (0, 0)
    assert (shared.pool.lent, shared.budget.used_bytes) == (0, 0)


async def test_a_session_spins_only_while_it_is_alone() -> None:
    """Whoever had the last turns may look at its socket again; a second client's turn ends that at once."""
    shared = SharedResources()
    pairs = [socket.socketpair() for _ in range(2)]
    disk = MemoryDisk(DISK_BYTES)
    sessions = []
    for ours, theirs in pairs:
        ours.setblocking(False)
        theirs.setblocking(False)
        negotiated = Negotiated("v", structured=False)
        sessions.append(Session("s", theirs, MemoryVolume(disk), negotiated, shared))
        sessions[-1].start()
    one, other = sessions
    assert [one._may_spin() for _ in range(12)] == [False] * 8 + [True] * 4
    assert not other._may_spin()
    assert [one._may_spin() for _ in range(10)] == [False] * 8 + [True] * 2
    shared.stats.in_flight = 1
    assert not one._may_spin(), "a thread's result is due"
    shared.stats.in_flight = 0
    assert one._may_spin()
    for session, (ours, _theirs) in zip(sessions, pairs, strict=True):
        ours.close()
        await session.ended
        await session.close()


@pytest.mark.parametrize("spins", [0, 10**9])
async def test_spinning_ends_with_the_turn(spins: int) -> None:
    """Even an absurd number of looks cannot keep the loop from others: a turn is bounded in time."""
    shared = SharedResources(limits=SessionLimits(spins=spins))
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    disk = MemoryDisk(DISK_BYTES)
    session = Session("s", theirs, MemoryVolume(disk), Negotiated("v", structured=False), shared)
    session.start()
    loop = asyncio.get_running_loop()
    for cookie in range(50):
        await loop.sock_sendall(ours, REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_READ, cookie, 0, 4))
        reply = await loop.sock_recv(ours, 100)
        assert reply == SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, 0, cookie) + bytes(4)
    ours.close()
    await session.ended
    await session.close()


async def test_a_turn_that_runs_out_of_time_has_not_looked_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client at queue depth 1 that is served for a whole turn finds the session awake in the next one, too."""
    clock = iter(itertools.count(step=80e-6))  # the third look at it is the end of a turn of 200 us
    monkeypatch.setattr("blockvirt.nbd.session.perf_counter", lambda: next(clock))
    shared = SharedResources()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    session = Session("s", theirs, MemoryVolume(MemoryDisk(DISK_BYTES)), Negotiated("v", structured=False), shared)
    shared.turns.last, shared.turns.in_a_row = session, 100
    rested: list[bool] = []
    monkeypatch.setattr(session, "_rest", rested.append)
    ours.sendall(REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_READ, 1, 0, 4))
    session._turn(next(clock))
    assert len(ours.recv(100)) == SIMPLE_REPLY.size + 4
    assert (rested, session._scheduled, session._spins) == ([], True, shared.limits.spins)
    session._turn(next(clock))  # nothing comes in this one
    assert rested == [True]
    session.abandon("the test is over")
    await session.close()
    ours.close()
