"""Read-only exports, as snapshots are: what is refused, how their sessions are listed, and names with an @."""

import logging

import pytest

from blockvirt.device import BASE_ALLOCATION, Capabilities
from blockvirt.nbd import constants as c
from blockvirt.nbd.client import NbdClient, RequestFailed
from blockvirt.nbd.messages import REQUEST
from blockvirt.testing.memory_volume import MemoryDisk
from blockvirt.units import KIB, MIB
from tests.nbd.conftest import Bench

NAME = "v@monday"


@pytest.fixture
def snapshot(bench: Bench) -> MemoryDisk:
    """The disk of a read-only export."""
    disk = MemoryDisk(4 * MIB, capabilities=Capabilities(read_only=True))
    disk.store(MIB, memoryview(b"frozen"))
    bench.exports.disks[NAME] = disk
    return disk


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("now", [True, False], ids=["now", "slow"])
async def test_a_read_only_export_is_read(bench: Bench, snapshot: MemoryDisk, structured: bool, now: bool) -> None:
    snapshot.now = now
    client = await bench.enter(export=NAME, structured=structured)
    assert client.flags & c.FLAG_READ_ONLY
    assert client.flags & c.FLAG_CAN_MULTI_CONN
    assert client.flags & c.FLAG_SEND_FLUSH
    assert not client.flags & (c.FLAG_SEND_TRIM | c.FLAG_SEND_WRITE_ZEROES | c.FLAG_SEND_FAST_ZERO)
    assert await client.read(MIB, 6) == b"frozen"
    await client.flush()
    assert not (await client.start(c.CMD_CACHE, 0, MIB)).error
    if structured:
        assert len(await client.block_status(0, 4 * MIB)) == 3


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("now", [True, False], ids=["now", "slow"])
@pytest.mark.parametrize("flags", [0, c.CMD_FLAG_FUA])
async def test_a_read_only_export_is_not_changed(
    bench: Bench, snapshot: MemoryDisk, structured: bool, now: bool, flags: int
) -> None:
    """All at once, and the payloads of refused writes go by: what follows them is understood."""
    snapshot.now = now
    before = bytes(snapshot.data), bytes(snapshot.allocated)
    client = await bench.enter(export=NAME, structured=structured)
    refused = [
        client.start(c.CMD_WRITE, 0, 512, b"\xff" * 512, flags),
        client.start(c.CMD_WRITE, 0, 300 * KIB, b"\xff" * 300 * KIB, flags),
        client.start(c.CMD_WRITE, 4 * MIB, 512, b"\xff" * 512, flags),
        client.start(c.CMD_TRIM, 0, MIB, flags=flags),
        client.start(c.CMD_WRITE_ZEROES, MIB, MIB, flags=flags),
        client.start(c.CMD_WRITE_ZEROES, MIB, MIB, flags=flags | c.CMD_FLAG_NO_HOLE),
    ]
    read = client.start(c.CMD_READ, MIB, 6)
    assert [(await request).error for request in refused] == [1] * len(refused)
    assert (await read).data == b"frozen"
    assert (bytes(snapshot.data), bytes(snapshot.allocated)) == before
    assert not {"write", "write_fua", "zero", "settle"} & set(snapshot.calls)


@pytest.mark.parametrize("multi_conn", [True, False])
async def test_multi_conn_is_as_the_capability_says(bench: Bench, multi_conn: bool) -> None:
    bench.exports.disks[NAME] = MemoryDisk(MIB, capabilities=Capabilities(read_only=True, multi_conn=multi_conn))
    client = await bench.enter(export=NAME)
    assert bool(client.flags & c.FLAG_CAN_MULTI_CONN) is multi_conn


@pytest.mark.parametrize("name", [NAME, "@", "a@b@c", "web1/lun0@monday", "%40"])
@pytest.mark.parametrize("by_option", [c.OPT_GO, c.OPT_EXPORT_NAME])
async def test_an_export_name_reaches_the_directory_as_it_is(
    bench: Bench, snapshot: MemoryDisk, name: str, by_option: int
) -> None:
    bench.exports.disks[name] = snapshot
    client = await bench.connect()
    await client.ask_structured()
    assert await client.set_contexts(name, [BASE_ALLOCATION]) == [BASE_ALLOCATION]
    await (client.go(name) if by_option == c.OPT_GO else client.export_name(name))
    assert await client.read(MIB, 6) == b"frozen"
    (session,) = bench.server.sessions()
    assert (session.export, session.volume, session.read_only) == (name, name, True)
    with pytest.raises(RequestFailed) as failed:
        await client.write(0, b"x")
    assert failed.value.error == 1


@pytest.mark.parametrize("read_only", [(True, True), (True, False), (False, True)])
async def test_a_reader_is_no_second_writer(
    bench: Bench, caplog: pytest.LogCaptureFixture, read_only: tuple[bool, bool]
) -> None:
    """Two clients of one volume, whichever comes first: their file systems may disagree only if both write."""
    caplog.set_level(logging.WARNING, "blockvirt.nbd")
    bench.disk.capabilities = Capabilities(read_only=read_only[0])
    await bench.enter()
    bench.disk.capabilities = Capabilities(read_only=read_only[1])
    stranger = await NbdClient.connect_tcp(*bench.address)
    bench.clients.append(stranger)
    await stranger.go("v")
    await stranger.read(0, 1)
    assert [session.read_only for session in bench.server.sessions()] == list(read_only)
    assert not caplog.records


async def test_a_reader_does_not_wait_for_a_writer_of_the_origin(bench: Bench, snapshot: MemoryDisk) -> None:
    """The write's end would open the gate: the snapshot is opened and read before that."""
    bench.disk.now = False
    gate = bench.disk.block("write")
    writer = await bench.enter()
    write = writer.start(c.CMD_WRITE, 0, 5, b"later")
    await gate.arrived.wait()
    reader = await bench.enter(export=NAME)
    assert await reader.read(MIB, 6) == b"frozen"
    assert not write.done()
    gate.let_go()
    assert not (await write).error


async def test_a_request_of_zeros_is_no_write(bench: Bench, snapshot: MemoryDisk) -> None:
    """Framing is lost, as it would be on any other export."""
    client = await bench.enter(export=NAME)
    client.send_raw(REQUEST.pack(0, 0, 0, 1, 0, 16) + bytes(16))
    await bench.session_ended()
    assert not bench.server.stats().errors
    assert bench.server.stats().total.requests == [0] * len(c.COMMAND_NAMES)
