"""The client that keeps many connections busy in benchmarks counts what a real server answers."""

import asyncio
from socket import socket

import pytest

from benchmarks.measure import MeasurementFailed
from benchmarks.scale import load
from blockvirt.nbd import constants as c
from blockvirt.nbd.messages import SIMPLE_REPLY
from blockvirt.testing.memory_volume import MemoryDisk
from blockvirt.units import MIB
from tests.nbd.conftest import PATIENCE_S, Bench


def replies(requests: list[bytes], sock: socket) -> int:
    """Send requests one after the other and count the replies until there are as many; nothing may be left over."""
    count, left = 0, b""
    for request in requests:
        sock.sendall(request)
        while len(left) < SIMPLE_REPLY.size or not load.count_replies(left)[0]:
            left += sock.recv(1 << 16)
        more, used = load.count_replies(left)
        count, left = count + more, left[used:]
    assert not left
    return count


async def test_each_packed_request_is_answered_once(bench: Bench) -> None:
    def converse() -> int:
        sock, size_bytes = load.connect(bench.path, "v")
        with sock:
            assert size_bytes == 64 * MIB
            return replies(load.pack_requests(size_bytes)[:200], sock)

    async with asyncio.timeout(PATIENCE_S):
        assert await asyncio.to_thread(converse) == 200
        await bench.session_ended()
    assert bench.server.stats().total.bytes_read == bench.server.stats().total.bytes_written == 100 * load.BLOCK_BYTES


async def test_every_connection_is_kept_busy(bench: Bench) -> None:
    bench.exports.disks["w"] = MemoryDisk(64 * MIB)

    def count_turns() -> list[int]:
        sock, size_bytes = load.connect(bench.path, "w")
        requests = load.pack_requests(size_bytes)
        with sock:
            loop = load.ClosedLoop(sock, requests, first=load.REQUESTS - 2, depth=4)  # goes round to the first request
            while loop.replies < 100:
                loop.turn()
            return [loop.replies, loop.asked]

    async with asyncio.timeout(PATIENCE_S):
        answered, asked = await asyncio.to_thread(count_turns)
        await bench.session_ended()
    assert asked == answered + 4


async def test_an_export_that_is_not_there_cannot_be_measured(bench: Bench) -> None:
    with pytest.raises(MeasurementFailed, match="nothing was refused"):
        await asyncio.to_thread(load.connect, bench.path, "nothing")


def test_replies_are_counted_however_they_are_cut() -> None:
    read = SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, 0, 2) + bytes(load.BLOCK_BYTES)
    written = SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, 0, 3)
    stream = written + read + read + written
    for cut in range(len(stream) + 1):
        count, used = load.count_replies(stream[:cut])
        rest, all_used = load.count_replies(stream[used:])
        assert (count + rest, used + all_used) == (4, len(stream))


def test_an_error_is_no_reply_to_count() -> None:
    with pytest.raises(MeasurementFailed, match="error 5"):
        load.count_replies(SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, 5, 2))
