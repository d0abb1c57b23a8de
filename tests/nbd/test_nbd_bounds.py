"""Clients that do not read, that send half, or that all come at once: memory stays bounded and others are served."""

import asyncio
import random

import pytest

from blockvirt.nbd import constants as c
from blockvirt.nbd.buffers import SIZES_BYTES, SMALL_BYTES
from blockvirt.nbd.client import NbdClient
from blockvirt.nbd.messages import OPTION, OPTION_REPLY, REQUEST, pack_info_request
from blockvirt.nbd.session import Session
from blockvirt.nbd.shared import SharedResources
from blockvirt.units import KIB, MIB
from tests.nbd.conftest import PATIENCE_S, Bench, read_request, sessions, until_starved
from tests.volumes.conftest import until


@pytest.mark.parametrize("now", [True, False], ids=["now", "slow"])
async def test_a_client_that_never_reads_replies_costs_little(bench: Bench, shared: SharedResources, now: bool) -> None:
    """3000 reads of 1 MiB: no more of them are started than the budget allows."""
    bench.disk.now = now
    shared.limits.connection_budget_bytes = 8 * MIB
    client = await bench.enter()
    client._writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send_raw(b"".join(read_request(1000 + n, MIB) for n in range(3000)))
    (session,) = sessions(bench)
    await until_starved(session)
    for _ in range(200):  # whatever else wants to happen may happen
        await asyncio.sleep(0)
        assert shared.budget.used_bytes <= 8 * MIB
        assert session._outgoing.pending_bytes <= 8 * MIB
        assert session.in_flight <= 8
    assert session.traffic.requests[c.CMD_READ] < 20
    neighbour = await bench.enter()
    assert await neighbour.read(0, MIB) == bytes(MIB)
    bench.server.drop(bench.server.sessions()[0].id)


async def test_a_session_that_cannot_send_leaves_the_loop_alone(
    bench: Bench, shared: SharedResources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slow replies have filled the socket while it was waiting for requests; then one more comes."""
    bench.disk.now = False
    client = await bench.enter()
    client._writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send_raw(b"".join(read_request(1000 + n, MIB) for n in range(12)))
    (session,) = sessions(bench)
    await until(lambda: bool(session._outgoing.pending) and not session.in_flight)
    turns, turn = list[None](), session._turn
    monkeypatch.setattr(session, "_turn", lambda now: turns.append(turn(now)))
    client.send_raw(read_request(99, 4096))
    for _ in range(200):
        await asyncio.sleep(0)
    assert len(turns) == 1, "the one that found that it has to wait"
    bench.server.drop(bench.server.sessions()[0].id)


async def test_a_slow_reader_is_dropped(bench: Bench, shared: SharedResources) -> None:
    shared.limits.slow_reader_s = 0.05
    client = await bench.enter()
    client._writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send_raw(b"".join(read_request(1000 + n, MIB) for n in range(10)))
    await bench.session_ended()
    assert bench.server.stats().stalled_clients_dropped_total == 1


async def test_a_reader_that_gets_on_is_not_dropped(bench: Bench, shared: SharedResources) -> None:
    """One reply takes longer than the limit in all, but no step of it does."""
    shared.limits.slow_reader_s = 0.4
    connection = await bench.raw()
    info = pack_info_request("v", ())
    connection.send(OPTION.pack(c.OPTION_MAGIC, c.OPT_GO, len(info)) + info + read_request(1, 32 * MIB))
    await connection.exactly(3 * OPTION_REPLY.size + 12 + 14 + 16)
    for _ in range(16):
        await asyncio.sleep(0.05)
        assert await connection.exactly(2 * MIB) == bytes(2 * MIB)
    await connection.close()


async def test_half_a_large_write_does_not_hold_its_buffer_for_ever(bench: Bench, shared: SharedResources) -> None:
    shared.limits.slow_reader_s = 0.05
    client = await bench.enter()
    client.send_raw(REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_WRITE, 1, 0, 8 * MIB) + bytes(MIB))
    await bench.session_ended()
    assert bench.server.stats().stalled_clients_dropped_total == 1
    assert not bench.disk.calls


async def test_half_a_small_write_may_wait(bench: Bench, shared: SharedResources) -> None:
    shared.limits.slow_reader_s = 0.02
    client = await bench.enter()
    write = client.start(c.CMD_WRITE, 0, 4096, b"x" * 1000)
    await asyncio.sleep(0.2)
    client.send_raw(b"y" * 3096)
    assert not (await write).error
    assert bytes(bench.disk.data[:4096]) == b"x" * 1000 + b"y" * 3096


@pytest.mark.parametrize("length", [512, MIB])
async def test_slow_requests_are_bounded_in_number(bench: Bench, shared: SharedResources, length: int) -> None:
    shared.limits.inflight_requests = 5
    bench.disk.now = False
    gate = bench.disk.block("read")
    client = await bench.enter()
    reads = [client.start(c.CMD_READ, n * 512, length) for n in range(50)]
    await gate.arrivals(5)
    (session,) = sessions(bench)
    await until_starved(session)
    assert session.in_flight == 5
    gate.let_go()
    assert [len((await read).data) for read in reads] == [length] * 50


@pytest.mark.parametrize("now", [True, False], ids=["now", "slow"])
async def test_everybody_gets_through_a_tiny_budget(bench: Bench, shared: SharedResources, now: bool) -> None:
    """Six clients with requests of all sizes share a budget that holds hardly more than one: nobody waits for ever."""
    bench.disk.now = now
    shared.budget.limit_bytes = SIZES_BYTES[-1]
    shared.limits.connection_budget_bytes = 5 * MIB
    clients = [await bench.enter(structured=bool(n % 2)) for n in range(6)]

    async def traffic(number: int, client: NbdClient) -> None:
        chance, base = random.Random(number), number * 10 * MIB
        for _round in range(4):
            offset = base + chance.randrange(MIB)
            length = chance.choice([512, 64 * KIB, 200 * KIB, MIB, 5 * MIB])
            data = chance.randbytes(length)
            reads = [client.start(c.CMD_READ, base + MIB, chance.choice([512, MIB, 3 * MIB])) for _ in range(4)]
            await client.write(offset, data)
            reads.append(client.start(c.CMD_READ, offset, length))
            for read in reads[:-1]:
                assert not (await read).error
            assert (await reads[-1]).data == data
        await client.disconnect()

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for number, client in enumerate(clients):
            group.create_task(traffic(number, client))


async def test_the_largest_requests_pass_one_after_the_other(bench: Bench, shared: SharedResources) -> None:
    """Pipelined reads and writes of 32 MiB on one connection, with the default budgets."""
    bench.disk.now = False
    client = await bench.enter()
    payload = b"\xa5" * (32 * MIB)
    requests = [
        client.start(c.CMD_READ, 0, 32 * MIB),
        client.start(c.CMD_WRITE, 0, 32 * MIB, payload),
        client.start(c.CMD_READ, 32 * MIB, 32 * MIB),
        client.start(c.CMD_WRITE, 32 * MIB, 32 * MIB, payload),
        client.start(c.CMD_READ, 0, 32 * MIB),
    ]
    async with asyncio.timeout(PATIENCE_S):
        assert [(await request).error for request in requests] == [0] * 5
    assert bench.disk.data.count(0xA5) == 64 * MIB


async def test_idle_connections_hold_no_buffers(bench: Bench, shared: SharedResources) -> None:
    """1,000 of them after some traffic each: counted in bytes of buffers, which is what could grow."""
    clients = [await bench.enter(structured=False) for _ in range(1000)]
    for number, client in enumerate(clients):
        await client.write(number * 512, bytes(512))
        assert len(await client.read(0, 64 * KIB)) == 64 * KIB
    await clients[0].write(0, bytes(8 * MIB))
    async with asyncio.timeout(PATIENCE_S):
        while shared.pool.lent:  # noqa: ASYNC110 - the last session rests when its turn ends
            await asyncio.sleep(0)
    assert len(bench.server.sessions()) == 1000
    assert sum(session.held_bytes for session in sessions(bench)) == 0
    assert shared.budget.used_bytes == 0
    assert shared.pool.kept_bytes < 40 * MIB
    shared.pool.trim()
    shared.pool.trim()
    assert shared.pool.kept_bytes == 0


async def test_who_worked_alone_keeps_small_buffers_until_another_has_a_turn(
    bench: Bench, shared: SharedResources
) -> None:
    other = await bench.enter()
    (others_session,) = sessions(bench)
    client = await bench.enter()
    (session,) = set(sessions(bench)) - {others_session}
    for _ in range(20):
        assert len(await client.read(0, 64 * KIB)) == 64 * KIB
    for _ in range(5):
        await asyncio.sleep(0)
    assert (shared.pool.lent, session.held_bytes, others_session.held_bytes) == (2, 2 * SMALL_BYTES, 0)
    await client.read(0, 4 * MIB)  # a large one it gives back
    async with asyncio.timeout(PATIENCE_S):
        while shared.budget.used_bytes:  # noqa: ASYNC110 - nothing announces that a session rests
            await asyncio.sleep(0)
    for _ in range(20):
        await client.read(0, 4 * KIB)
    await other.read(0, 4 * KIB)
    async with asyncio.timeout(PATIENCE_S):
        while shared.pool.lent:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert session.held_bytes == others_session.held_bytes == 0
    assert len(await client.read(0, 64 * KIB)) == 64 * KIB  # and goes on


async def test_a_partial_request_is_parked_small(bench: Bench, shared: SharedResources) -> None:
    client = await bench.enter()
    write = client.start(c.CMD_WRITE, 0, 64 * KIB, bytes(1000))
    (session,) = sessions(bench)
    async with asyncio.timeout(PATIENCE_S):
        while session.held_bytes != 1028:  # noqa: ASYNC110 - nothing announces that a session rests
            await asyncio.sleep(0)
    assert shared.pool.lent == 0
    client.send_raw(bytes(64 * KIB - 1000))
    assert not (await write).error


async def test_a_busy_neighbour_leaves_turns_to_others(
    bench: Bench, shared: SharedResources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much one client pipelines, a turn ends after its batch, and others' turns lie between."""
    shared.limits.batch_requests = 8
    shared.limits.batch_s = 1e9
    turns: list[tuple[Session, int]] = []
    turn = Session._turn

    def counted(session: Session, now: float) -> None:
        before = sum(session.traffic.requests)
        turn(session, now)
        turns.append((session, sum(session.traffic.requests) - before))

    monkeypatch.setattr(Session, "_turn", counted)
    greedy, modest = await bench.enter(), await bench.enter()
    one, other = sessions(bench)
    flood = [greedy.start(c.CMD_READ, 0, 512) for _ in range(5000)]
    for _ in range(20):
        await modest.read(0, 512)
    for read in flood:
        assert not (await read).error
    assert max(served for _session, served in turns) == 8
    between = [session for session, _served in turns]
    last_of_other = len(between) - 1 - between[::-1].index(other)
    assert one in between[last_of_other:], "the modest client had to wait until the flood was over"


def test_the_small_buffer_holds_what_its_name_promises() -> None:
    assert SMALL_BYTES // (4096 + REQUEST.size) == 32
