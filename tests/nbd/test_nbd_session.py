"""Requests over a real socket: simple and structured replies, volumes that answer at once and volumes that do not."""

import asyncio
import random

import pytest

from blockvirt.device import Capabilities, Extent, ExtentState
from blockvirt.errors import PoolFull, ShuttingDown, VolumeStopped
from blockvirt.limits import NBD_MAX_EXTENTS_PER_REPLY, NBD_MAX_PAYLOAD_BYTES
from blockvirt.nbd import constants as c
from blockvirt.nbd.client import NbdClient, NbdClientError, Reply, RequestFailed
from blockvirt.nbd.messages import REQUEST
from blockvirt.testing.memory_volume import MemoryDisk
from blockvirt.units import GIB, KIB, MIB
from tests.nbd.conftest import PATIENCE_S, Bench, both_kinds, both_paths, noise


@both_kinds
@both_paths
@pytest.mark.parametrize("size", [1, 511, 4096, 128 * KIB, 128 * KIB + 1, MIB, 5 * MIB + 3, NBD_MAX_PAYLOAD_BYTES])
async def test_what_is_written_is_read(bench: Bench, structured: bool, now: bool, size: int) -> None:
    bench.disk.now = now
    client = await bench.enter(structured=structured)
    data = noise(size)
    await client.write(12345, data)
    assert await client.read(12345, size) == data
    assert bytes(bench.disk.data[12345 : 12345 + size]) == data
    assert await client.read(0, 12345) == bytes(12345)
    await client.disconnect()


@both_kinds
@both_paths
async def test_a_model_of_the_disk(bench: Bench, structured: bool, now: bool) -> None:
    """Pipelined writes, zeroes, trims and reads on disjoint ranges, all in flight at once, against a bytearray."""
    bench.disk.now = now
    client = await bench.enter(structured=structured)
    chance = random.Random(7)
    model = bytearray(bench.disk.size_bytes)
    for _round in range(6):
        cells = chance.sample(range(len(model) // (256 * KIB)), 40)
        writes: list[asyncio.Future[Reply]] = []
        for cell in cells:
            offset = cell * 256 * KIB + chance.randrange(1000)
            length = chance.choice([1, 512, 4096, 65536, 200_000])
            command = chance.choice([c.CMD_WRITE, c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES])
            data = noise(length, cell) if command == c.CMD_WRITE else b""
            model[offset : offset + length] = data or bytes(length)
            writes.append(client.start(command, offset, length, data))
        for write in writes:
            assert not (await write).error
        reads = [client.start(c.CMD_READ, cell * 256 * KIB, 256 * KIB) for cell in cells]
        for cell, read in zip(cells, reads, strict=True):
            assert (await read).data == model[cell * 256 * KIB : (cell + 1) * 256 * KIB]
    await client.flush()
    assert bench.disk.data == model


@both_kinds
@both_paths
async def test_small_requests_arrive_in_any_portions(bench: Bench, structured: bool, now: bool) -> None:
    bench.disk.now = now
    client = await bench.enter(structured=structured)
    chance = random.Random(3)
    stream = bytearray()
    for cookie in range(100):
        stream += REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_WRITE, 1000 + cookie, cookie * 600, 600) + noise(600, cookie)
    while stream:
        step = chance.choice([1, 5, 27, 28, 29, 600, 3000])
        client.send_raw(bytes(stream[:step]))
        del stream[:step]
        await asyncio.sleep(0)
    # A reply to a cookie that the client did not start ends the client, not the server: so ask on a second connection
    other = await bench.enter()
    async with asyncio.timeout(PATIENCE_S):
        while bench.server.stats().total.requests[c.CMD_WRITE] < 100:
            await other.read(0, 1)
    await other.flush()
    assert bytes(bench.disk.data[:60000]) == b"".join(noise(600, cookie) for cookie in range(100))


@both_kinds
@both_paths
async def test_requests_about_nothing_succeed(bench: Bench, structured: bool, now: bool) -> None:
    bench.disk.now = now
    client = await bench.enter(structured=structured)
    size = bench.disk.size_bytes
    for offset in (0, size):
        assert await client.read(offset, 0) == b""
        await client.write(offset, b"")
        await client.trim(offset, 0)
        await client.zero(offset, 0)
    assert bench.disk.calls.keys() <= {"settle"}


@both_kinds
async def test_errors_leave_the_connection_usable(bench: Bench, structured: bool) -> None:
    client = await bench.enter(structured=structured)
    size = bench.disk.size_bytes
    for request, error in [
        (client.read(size - 1, 2), 22),
        (client.read(2**64 - 512, 1024), 22),
        (client.write(size - 1, b"ab"), 28),
        (client.write(2**64 - 512, bytes(1024)), 28),
        (client.write(0, bytes(NBD_MAX_PAYLOAD_BYTES + 1)), 22),
        (client.write(0, bytes(512), flags=1 << 14), 22),
        (client.zero(size - 1, 2), 28),
        (client.trim(size, 1), 22),
        (client.read(0, NBD_MAX_PAYLOAD_BYTES + 1), 22),
        (client.read(0, 512, flags=1 << 9), 22),
    ]:
        with pytest.raises(RequestFailed) as failed:
            await request
        assert failed.value.error == error
        assert bool(failed.value.text) is structured
    assert not (await client.start(c.CMD_CACHE, 0, size)).error
    assert (await client.start(8)).error == 22
    assert await client.read(0, 3) == bytes(3)
    assert bench.server.stats().errors == {22: 8, 28: 3}
    assert not any(bench.disk.data)


async def test_read_only(bench: Bench) -> None:
    bench.exports.disks["ro"] = MemoryDisk(MIB, capabilities=Capabilities(read_only=True))
    client = await bench.enter(export="ro")
    assert client.flags & c.FLAG_READ_ONLY
    for request in (client.write(0, b"x"), client.zero(0, 1), client.trim(0, 1)):
        with pytest.raises(RequestFailed) as failed:
            await request
        assert failed.value.error == 1
    assert await client.read(0, 1) == b"\0"
    await client.flush()
    (session,) = bench.server.sessions()
    assert session.read_only


@both_paths
async def test_fua_and_flush_reach_the_volume(bench: Bench, now: bool) -> None:
    bench.disk.now = now
    client = await bench.enter()
    await client.write(0, b"durable", flags=c.CMD_FLAG_FUA)
    await client.flush()
    await client.read(0, 7, flags=c.CMD_FLAG_FUA | c.CMD_FLAG_DF)
    assert bench.disk.calls["write_fua"] == 1
    assert bench.disk.calls["flush"] == 1
    assert bytes(bench.disk.data[:7]) == b"durable"


async def test_zeroes_allocate_or_punch_as_asked(bench: Bench) -> None:
    client = await bench.enter()
    await client.write(0, noise(256 * KIB))
    await client.trim(0, 64 * KIB)
    await client.zero(64 * KIB, 64 * KIB)
    await client.zero(128 * KIB, 64 * KIB, flags=c.CMD_FLAG_NO_HOLE)
    await client.zero(1024 * KIB, 64 * KIB, flags=c.CMD_FLAG_NO_HOLE)
    await client.zero(192 * KIB, 64 * KIB, flags=c.CMD_FLAG_FAST_ZERO)
    hole = ExtentState.HOLE | ExtentState.ZERO
    assert await client.block_status(0, 2 * MIB) == [
        Extent(128 * KIB, hole),
        Extent(64 * KIB, ExtentState.DATA),
        Extent((1024 - 192) * KIB, hole),
        Extent(64 * KIB, ExtentState.DATA),
        Extent((2048 - 1088) * KIB, hole),
    ]
    with pytest.raises(RequestFailed) as failed:
        await client.zero(0, 512, flags=c.CMD_FLAG_FAST_ZERO | c.CMD_FLAG_NO_HOLE)
    assert failed.value.error == 95
    assert await client.read(0, 256 * KIB) == bytes(256 * KIB)


async def test_block_status_of_one_extent(bench: Bench) -> None:
    client = await bench.enter()
    await client.write(64 * KIB, b"x")
    hole = ExtentState.HOLE | ExtentState.ZERO
    assert await client.block_status(0, MIB, flags=c.CMD_FLAG_REQ_ONE) == [Extent(64 * KIB, hole)]
    assert await client.block_status(0, 512, flags=c.CMD_FLAG_REQ_ONE) == [Extent(512, hole)]


async def test_block_status_is_cut_and_always_gets_on(bench: Bench) -> None:
    """Every other block of 512 bytes is allocated: more extents than one reply may hold."""
    size = 48 * MIB
    bench.exports.disks["comb"] = disk = MemoryDisk(size, block_bytes=512)
    disk.allocated[::2] = b"\1" * len(disk.allocated[::2])
    client = await bench.enter(export="comb")
    at, replies = 0, 0
    while at < size:
        extents = await client.block_status(at, size - at)
        assert 0 < len(extents) <= NBD_MAX_EXTENTS_PER_REPLY
        assert all(extent.length_bytes == 512 for extent in extents)
        at += 512 * len(extents)
        replies += 1
    assert at == size
    assert replies == 2
    assert disk.most_asked == 512 * NBD_MAX_EXTENTS_PER_REPLY, "no more is looked up than one reply can say"


async def test_a_giant_zeroing_stalls_nobody(bench: Bench) -> None:
    """Nearly 4 GiB in one request; a neighbour's read in the middle of it is answered."""
    bench.exports.disks["big"] = disk = MemoryDisk(0, block_bytes=MIB)
    disk.size_bytes = 5 * GIB
    disk.allocated = bytearray(5 * 1024)
    gate = disk.block("zero")
    disk.data = _Nothing()
    client, neighbour = await bench.enter(export="big"), await bench.enter(export="big")
    zeroing = client.start(c.CMD_WRITE_ZEROES, 0, 2**32 - 512, flags=c.CMD_FLAG_NO_HOLE)
    await gate.arrived.wait()
    assert await neighbour.block_status(4 * GIB, MIB) == [Extent(MIB, ExtentState.HOLE | ExtentState.ZERO)]
    assert await client.block_status(4 * GIB, MIB)
    assert not zeroing.done()
    gate.let_go()
    assert not (await zeroing).error
    assert await client.block_status(0, MIB) == [Extent(MIB, ExtentState.DATA)]


class _Nothing(bytearray):
    """Takes any write and keeps none of it."""

    def __setitem__(self, _key: object, _value: object) -> None:
        return


async def test_replies_leave_out_of_order(bench: Bench) -> None:
    client = await bench.enter()
    gate = bench.disk.block("flush")
    flush = client.start(c.CMD_FLUSH)
    await gate.arrived.wait()
    assert await client.read(0, 4096) == bytes(4096)
    assert not flush.done()
    gate.let_go()
    assert not (await flush).error


async def test_a_slow_write_keeps_its_bytes(bench: Bench) -> None:
    """The receive buffer is used again while the write waits: small ones are copied, large ones take it along."""
    bench.disk.now = False
    gate = bench.disk.block("write")
    client = await bench.enter()
    pieces = [(0, 4096), (MIB, 4096), (2 * MIB, 3 * MIB), (8 * MIB, 700_000), (16 * MIB, 100)]
    writes = [client.start(c.CMD_WRITE, offset, size, noise(size, offset)) for offset, size in pieces]
    await gate.arrivals(len(pieces))
    bench.disk.now = True
    for _ in range(3):
        await client.write(40 * MIB, b"\xee" * 2 * MIB)
    assert not any(write.done() for write in writes)
    gate.let_go()
    for write, (offset, size) in zip(writes, pieces, strict=True):
        assert not (await write).error
        assert bytes(bench.disk.data[offset : offset + size]) == noise(size, offset)


@both_kinds
@both_paths
@pytest.mark.parametrize(
    ("error", "number"),
    [(PoolFull("full"), 28), (VolumeStopped("stopped"), 5), (OSError(5, "broken"), 5), (KeyError("a bug"), 5)],
    ids=["full", "stopped", "OSError", "bug"],
)
async def test_what_the_volume_raises_is_answered(
    bench: Bench, structured: bool, now: bool, error: Exception, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    disk = bench.disk
    disk.now = now
    client = await bench.enter(structured=structured)
    for verb in ("read_now", "write_now", "read", "write", "write_fua", "zero", "flush", "extents"):
        disk.fail(verb, error)
    payload = bytes(512)
    requests = [
        client.start(c.CMD_READ, 0, 512),
        client.start(c.CMD_WRITE, 0, 512, payload),
        client.start(c.CMD_WRITE, 0, 512, payload, c.CMD_FLAG_FUA),
        client.start(c.CMD_WRITE, 0, MIB, bytes(MIB)),
        client.start(c.CMD_FLUSH),
        client.start(c.CMD_TRIM, 0, 512),
        *([client.start(c.CMD_BLOCK_STATUS, 0, 512)] if structured else []),
        client.start(c.CMD_READ, 512, 512),
    ]
    assert [(await request).error for request in requests] == [number] * len(requests)
    disk.failures.clear()
    assert await client.read(0, 512) == payload
    assert ("Traceback" in caplog.text) is isinstance(error, KeyError)


async def test_a_failed_settle_acknowledges_no_write_of_its_batch(bench: Bench) -> None:
    client = await bench.enter()
    bench.disk.fail("settle", VolumeStopped("the journal is gone"))
    requests = [client.start(c.CMD_WRITE, n * 512, 512, bytes(512)) for n in range(20)]
    reads = [client.start(c.CMD_READ, n * 512, 512) for n in range(20)]
    assert {(await request).error for request in requests} == {5}
    assert {(await request).text for request in requests} == {"the journal is gone"}
    assert {(await read).error for read in reads} == {0}
    bench.disk.fail("settle", None)
    await client.write(0, b"x")


@pytest.mark.parametrize("length", [512, MIB])
@pytest.mark.parametrize("verb", ["read_now", "write_now", "settle", "flush", "read", "write"])
async def test_shutting_down_is_not_said_to_a_guest(
    bench: Bench, verb: str, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    """NBD_ESHUTDOWN is an I/O error in the guest; a closed connection is a reconnect."""
    bench.disk.now = verb not in ("read", "write")
    client = await bench.enter()
    bench.disk.fail(verb, ShuttingDown("bye"))
    requests = [
        client.start(c.CMD_WRITE, 0, length, bytes(length)),
        client.start(c.CMD_READ, 0, length),
        client.start(c.CMD_FLUSH),
    ]
    outcomes = [await _outcome(request) for request in requests]
    assert NbdClientError in outcomes
    assert 108 not in outcomes
    assert not caplog.records
    await bench.session_ended()


async def _outcome(request: "asyncio.Future[Reply]") -> object:
    try:
        return (await request).error
    except NbdClientError as error:
        return type(error)


async def test_disconnect_answers_everything_first(bench: Bench) -> None:
    bench.disk.now = False
    gates = [bench.disk.block(verb) for verb in ("read", "write", "flush")]
    client = await bench.enter()
    requests = [client.start(c.CMD_READ, n * 4096, 4096) for n in range(16)]
    requests += [client.start(c.CMD_WRITE, MIB + n, 1, b"w") for n in range(16)]
    requests.append(client.start(c.CMD_FLUSH))
    leaving = asyncio.ensure_future(client.disconnect())
    for gate in gates:
        await gate.arrived.wait()
    assert not leaving.done()
    for gate in gates:
        gate.let_go()
    assert [(await request).error for request in requests] == [0] * 33
    await leaving
    await bench.session_ended()


async def test_two_connections_read_each_others_writes(bench: Bench) -> None:
    one, other = await bench.enter(), await bench.enter(structured=False)
    assert one.flags & other.flags & c.FLAG_CAN_MULTI_CONN
    for number in range(200):
        writer, reader = (one, other) if number % 2 else (other, one)
        data = noise(512, number)
        await writer.write(number * 100, data)
        assert await reader.read(number * 100, 512) == data


async def test_requests_sent_ahead_of_the_handshake_replies_are_served(bench: Bench) -> None:
    """libnbd does not, but nothing forbids a client to be in a hurry: what follows GO in one packet is a request."""
    from blockvirt.nbd.messages import OPTION, pack_info_request

    client = await bench.connect()
    info = pack_info_request("v", ())
    client.send_raw(OPTION.pack(c.OPTION_MAGIC, c.OPT_GO, len(info)) + info)
    future = client.start(c.CMD_WRITE, 0, 5, b"early")
    for _ in range(3):
        await client.option_reply()
    client.begin()
    assert not (await future).error
    assert bytes(bench.disk.data[:5]) == b"early"


async def test_statistics(bench: Bench) -> None:
    client: NbdClient = await bench.enter()
    await client.write(0, bytes(1000))
    await client.read(0, 300)
    await client.read(0, 300)
    await client.flush()
    bench.disk.now = False
    await client.write(0, bytes(24))
    (session,) = bench.server.sessions()
    assert (session.export, session.volume, session.read_only) == ("v", "v", False)
    assert (session.bytes_read, session.bytes_written, session.requests, session.in_flight) == (600, 1024, 5, 0)
    assert session.peer.startswith("unix:pid=")
    stats = bench.server.stats()
    assert (stats.connections, stats.sessions, stats.accepted_total) == (1, 1, 1)
    assert stats.exports["v"].requests[: c.CMD_FLUSH + 1] == [2, 2, 0, 1]
    assert [histogram.count for histogram in stats.latency[: c.CMD_FLUSH + 1]] == [2, 2, 0, 1]
    assert stats.total.bytes_written == 1024
    await client.disconnect()
    await bench.session_ended()
    after = bench.server.stats()
    assert after.total.requests[: c.CMD_FLUSH + 1] == [2, 2, 1, 1]
    assert after.exports == {}
    assert after.sessions == after.connections == 0
