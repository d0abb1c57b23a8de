"""How sessions end: vanished clients and the fence before their successors, lost volumes, drops, and the shutdown."""

import asyncio
import logging
from typing import Any

import pytest

from blockvirt.errors import ShuttingDown
from blockvirt.nbd import constants as c
from blockvirt.nbd.client import NbdClientError, RefusedOption, RequestFailed
from blockvirt.nbd.messages import OPTION, pack_info_request
from blockvirt.testing.memory_volume import MemoryDisk
from blockvirt.units import MIB
from tests.nbd.conftest import PATIENCE_S, Bench
from tests.volumes.conftest import until


@pytest.mark.parametrize("verb", ["write", "zero"])
@pytest.mark.parametrize("begin", [c.OPT_GO, c.OPT_EXPORT_NAME])
async def test_a_successor_waits_for_the_writes_of_a_vanished_client(bench: Bench, verb: str, begin: int) -> None:
    """The old write is older than what the client re-sends: it must not land on top of that."""
    bench.disk.now = False
    gate = bench.disk.block(verb)
    old = await bench.enter()
    command = c.CMD_WRITE if verb == "write" else c.CMD_WRITE_ZEROES
    stalled = old.start(command, 0, 5, b"older" if verb == "write" else b"")
    await gate.arrived.wait()
    old.abort()
    with pytest.raises(NbdClientError):
        await stalled

    new = await bench.connect()
    entering = asyncio.ensure_future(new.go("v") if begin == c.OPT_GO else new.export_name("v"))
    other = await bench.connect()
    await other.info("v")  # the server has worked on since: the newcomer had its chance
    await other.info("v")
    assert not entering.done()
    assert bench.disk.open_handles == 1, "the vanished client's: the new one's is not opened before"
    del bench.disk.gates[verb]
    gate.let_go()
    await entering
    await new.write(0, b"newer")
    assert bytes(bench.disk.data[:5]) == b"newer"


async def test_nobody_else_waits_for_a_vanished_client(bench: Bench) -> None:
    bench.exports.disks["other"] = MemoryDisk(MIB)
    bench.disk.now = False
    gate = bench.disk.block("write")
    old = await bench.enter()
    stalled = old.start(c.CMD_WRITE, 0, 5, b"older")
    await gate.arrived.wait()
    old.abort()
    with pytest.raises(NbdClientError):
        await stalled
    neighbour = await bench.enter(export="other")
    await neighbour.write(0, b"x")
    reader = await bench.connect()
    await reader.info("v")
    gate.let_go()


async def test_reads_of_a_vanished_client_hold_nobody_up(bench: Bench) -> None:
    bench.disk.now = False
    gate = bench.disk.block("read")
    old = await bench.enter()
    stalled = old.start(c.CMD_READ, 0, 5)
    await gate.arrived.wait()
    old.abort()
    with pytest.raises(NbdClientError):
        await stalled
    new = await bench.enter()
    await new.write(0, b"x")
    assert bench.disk.open_handles == 2, "the old handle stays open until its read has ended"
    gate.let_go()
    async with asyncio.timeout(PATIENCE_S):
        while bench.disk.open_handles > 1:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0)


async def test_the_fence_is_bounded_by_the_handshake_limit(bench: Bench) -> None:
    bench.server._handshake_s = 0.1
    bench.disk.now = False
    gate = bench.disk.block("write")
    old = await bench.enter(structured=False)
    stalled = old.start(c.CMD_WRITE, 0, 5, b"older")
    await gate.arrived.wait()
    new = await bench.connect()
    with pytest.raises(NbdClientError, match="closed the connection"):
        await new.go("v")
    gate.let_go()
    assert not (await stalled).error


async def test_what_had_not_started_when_the_client_vanished_is_not_started(bench: Bench) -> None:
    bench.disk.now = False
    client = await bench.enter()
    (session,) = [one.session for one in bench.server._connections.values()]
    assert session is not None
    client.start(c.CMD_WRITE, 0, 5, b"never").add_done_callback(lambda future: future.exception())
    async with asyncio.timeout(PATIENCE_S):
        while not session.in_flight:  # noqa: ASYNC110 - its task exists but has not run: the moment is the point
            await asyncio.sleep(0)
    if bench.disk.calls.get("write"):
        pytest.fail("the write began at once: this test looks at the wrong moment")
    session.abandon("vanished")
    await bench.session_ended()
    assert "write" not in bench.disk.calls


async def test_a_lost_volume_closes_without_a_reply(bench: Bench) -> None:
    bench.disk.now = False
    gate = bench.disk.block("write")
    client = await bench.enter()
    write = client.start(c.CMD_WRITE, 0, 5, b"fence")
    await gate.arrived.wait()
    bench.exports.handles[0].lost.set_result(None)
    with pytest.raises(NbdClientError, match="closed the connection"):
        await write
    assert bench.server.sessions() == []
    gate.let_go()
    await bench.session_ended()


async def test_drop(bench: Bench) -> None:
    one, other = await bench.enter(), await bench.enter()
    first, second = bench.server.sessions()
    assert bench.server.drop(first.id)
    assert not bench.server.drop(first.id)
    assert not bench.server.drop("nobody")
    with pytest.raises(NbdClientError):
        await one.read(0, 1)
    assert await other.read(0, 1) == b"\0"
    assert [session.id for session in bench.server.sessions()] == [second.id]


async def test_a_grown_volume_shows_its_size_to_new_sessions(bench: Bench) -> None:
    old = await bench.enter()
    size = bench.disk.size_bytes
    bench.disk.data += bytes(MIB)
    bench.disk.allocated += bytes(16)
    bench.disk.size_bytes += MIB
    with pytest.raises(RequestFailed):
        await old.read(size, 1)
    new = await bench.enter()
    assert new.size_bytes == size + MIB
    assert await new.read(size, MIB) == bytes(MIB)


async def test_a_second_writer_from_elsewhere_is_warned_about(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "blockvirt.nbd")
    await bench.enter()
    await bench.enter()
    assert not caplog.records, "several connections of one client are multi-conn"
    from blockvirt.nbd.client import NbdClient

    stranger = await NbdClient.connect_tcp(*bench.address)
    bench.clients.append(stranger)
    await stranger.go("v")
    (record,) = caplog.records
    assert "127.0.0.1" in record.getMessage()
    assert "unix:pid" in record.getMessage()


async def test_stop_answers_what_has_started(bench: Bench) -> None:
    """...reads no more requests, and says nothing that a guest would take for an I/O error."""
    bench.disk.now = False
    gate = bench.disk.block("write")
    client, idle = await bench.enter(), await bench.enter()
    handshaking = await bench.connect()
    writes = [client.start(c.CMD_WRITE, n, 1, b"w") for n in range(10)]
    await gate.arrivals(10)
    stopping = asyncio.ensure_future(bench.server.stop(PATIENCE_S))
    with pytest.raises(NbdClientError, match="closed"):
        await idle.read(0, 1)
    with pytest.raises(NbdClientError, match="closed"):
        await handshaking.go("v")
    late = client.start(c.CMD_READ, 0, 1)
    with pytest.raises(OSError, match=r"\[Errno"):
        await bench.connect()
    assert not stopping.done()
    gate.let_go()
    assert [(await write).error for write in writes] == [0] * 10
    with pytest.raises(NbdClientError, match="closed"):
        await late
    await stopping
    assert bytes(bench.disk.data[:11]) == b"w" * 10 + b"\0"


@pytest.mark.parametrize(("verb", "request_"), [("write", (c.CMD_WRITE, 0, 1, b"w")), ("flush", (c.CMD_FLUSH,))])
async def test_stop_does_not_wait_for_ever(bench: Bench, verb: str, request_: Any) -> None:
    bench.disk.now = False
    gate = bench.disk.block(verb)
    client = await bench.enter()
    request = client.start(*request_)
    await gate.arrived.wait()
    async with asyncio.timeout(PATIENCE_S):
        await bench.server.stop(0.02)
    with pytest.raises(NbdClientError):
        await request
    stats = bench.server.stats()
    assert (stats.connections, stats.in_flight) == (0, 0)
    gate.let_go()  # what ends late is nobody's any more
    await asyncio.sleep(0)
    assert bench.server.stats().in_flight == 0


async def test_a_volume_is_let_go_behind_the_flushes_of_a_client_that_has_gone(bench: Bench) -> None:
    gate = bench.disk.block("flush")
    client = await bench.enter()
    for _ in range(3):
        client.start(c.CMD_FLUSH)
    await gate.arrivals(3)
    await client.close()
    async with asyncio.timeout(PATIENCE_S):
        await until(lambda: not bench.server.stats().sessions)
    for _ in range(10):  # much longer than it takes to close a handle
        await asyncio.sleep(0)
    assert bench.disk.open_handles == 1
    gate.let_go()
    await bench.session_ended()
    assert bench.disk.open_handles == 0


async def test_no_export_is_opened_while_the_server_stops(bench: Bench) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()
    inner = bench.exports.describe

    async def describe(name: str) -> object:
        asked.set()
        await answer.wait()
        return await inner(name)

    bench.exports.describe = describe  # type: ignore[method-assign, assignment]
    client = await bench.connect()
    info = pack_info_request("v", ())
    client.send_raw(OPTION.pack(c.OPTION_MAGIC, c.OPT_GO, len(info)) + info)
    await asked.wait()
    stopping = asyncio.ensure_future(bench.server.stop(PATIENCE_S))
    await asyncio.sleep(0)
    answer.set()
    await stopping
    assert bench.exports.handles == []


async def test_an_export_opened_for_a_client_that_is_gone_is_closed_again(bench: Bench) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()
    inner = bench.exports.open

    async def open_later(*asked_for: Any) -> object:
        asked.set()
        await answer.wait()
        return await inner(*asked_for)

    bench.exports.open = open_later  # type: ignore[method-assign, assignment]
    client = await bench.connect()
    info = pack_info_request("v", ())
    client.send_raw(OPTION.pack(c.OPTION_MAGIC, c.OPT_GO, len(info)) + info)
    await asked.wait()
    client.abort()
    answer.set()
    await bench.session_ended()
    assert len(bench.exports.handles) == 1
    assert bench.disk.open_handles == 0
    assert bench.server.stats().handshakes_failed_total == 1


async def test_a_directory_that_fails_is_an_answer(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    async def refuse(*_asked_for: Any) -> object:
        raise errors.pop(0)

    errors: list[Exception] = [ShuttingDown("bye"), OSError(5, "broken")]
    opened = bench.exports.open
    bench.exports.open = refuse  # type: ignore[method-assign, assignment]
    client = await bench.connect()
    for kind in (c.REP_ERR_SHUTDOWN, c.REP_ERR_POLICY):
        with pytest.raises(RefusedOption) as refused:
            await client.go("v")
        assert refused.value.reply_type == kind
    bench.exports.open = opened  # type: ignore[method-assign]
    await client.go("v")
    assert await client.read(0, 1) == b"\0"
    assert "looking up an export failed" in caplog.text


async def test_a_bug_in_one_connection_stays_there(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    victim, other = await bench.enter(), await bench.enter()
    session = next(iter(bench.server._connections.values())).session
    assert session is not None
    session._dispatch.serve = None  # type: ignore[method-assign, assignment]
    with pytest.raises(NbdClientError):
        await victim.read(0, 1)
    assert "a session failed" in caplog.text
    assert await other.read(0, 1) == b"\0"
