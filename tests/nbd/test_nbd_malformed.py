"""What no proper client sends, over real sockets: the connection lives where framing is intact and ends where not."""

import asyncio
import struct

import pytest

from blockvirt.limits import NBD_MAX_OPTION_BYTES, NBD_MAX_OPTIONS, NBD_MAX_PAYLOAD_BYTES
from blockvirt.nbd import constants as c
from blockvirt.nbd.messages import CHUNK, OPTION, OPTION_REPLY, REQUEST, SIMPLE_REPLY, pack_info_request
from tests.nbd.conftest import PATIENCE_S, Bench, RawConnection

GO = pack_info_request("v", ())
GO_REPLIES_BYTES = 3 * OPTION_REPLY.size + 12 + 14
HUGE_PAYLOAD = 40 << 20


def option(number: int, data: bytes = b"", *, magic: int = c.OPTION_MAGIC, length: int | None = None) -> bytes:
    return OPTION.pack(magic, number, len(data) if length is None else length) + data


def request(command: int, offset: int = 0, length: int = 0, *, flags: int = 0, magic: int = c.REQUEST_MAGIC) -> bytes:
    return REQUEST.pack(magic, flags, command, 77, offset, length)


async def replied(connection: RawConnection) -> int:
    """The type of the next option reply."""
    magic, _option, kind, length = OPTION_REPLY.unpack(await connection.exactly(OPTION_REPLY.size))
    assert magic == c.OPTION_REPLY_MAGIC
    await connection.exactly(length)
    return int(kind)


async def in_transmission(bench: Bench, *, structured: bool = False) -> RawConnection:
    connection = await bench.raw()
    if structured:
        connection.send(option(c.OPT_STRUCTURED_REPLY))
        assert await replied(connection) == c.REP_ACK
    connection.send(option(c.OPT_GO, GO))
    await connection.exactly(GO_REPLIES_BYTES)
    return connection


async def error_of(connection: RawConnection, *, structured: bool = False) -> int:
    """The error in the next reply, of whichever kind the session has."""
    if structured:
        magic, flags, kind, cookie, length = CHUNK.unpack(await connection.exactly(CHUNK.size))
        assert (magic, flags, kind, cookie) == (c.STRUCTURED_REPLY_MAGIC, 1, c.REPLY_ERROR, 77)
        return int(struct.unpack_from(">I", await connection.exactly(length))[0])
    magic, error, cookie = SIMPLE_REPLY.unpack(await connection.exactly(SIMPLE_REPLY.size))
    assert (magic, cookie) == (c.SIMPLE_REPLY_MAGIC, 77)
    return int(error)


async def still_works(connection: RawConnection) -> None:
    connection.send(request(c.CMD_FLUSH))
    assert await error_of(connection) == 0
    await connection.close()


async def still_serves(bench: Bench) -> None:
    """Others are not impressed."""
    client = await bench.enter()
    assert await client.read(bench.disk.size_bytes - 1, 1) == b"\0"


@pytest.mark.parametrize("flags", [4, 0xFFFFFFFF])
async def test_unknown_client_flags(bench: Bench, flags: int) -> None:
    connection = await bench.raw(flags=flags)
    assert await connection.rest() == b""
    await connection.close()
    await still_serves(bench)


@pytest.mark.parametrize(
    "data",
    [
        option(c.OPT_GO, GO, magic=c.OPTION_MAGIC ^ 1),
        option(c.OPT_GO, length=2 << 30),
        option(99, length=NBD_MAX_OPTION_BYTES + 1),
        option(c.OPT_EXPORT_NAME, b"nowhere"),
        option(c.OPT_EXPORT_NAME, b"\xff\xfe"),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),  # a TLS ClientHello
    ],
    ids=["option magic", "2 GiB option", "64 KiB + 1 option", "unknown name", "name not UTF-8", "HTTP", "TLS"],
)
async def test_framing_lost_in_the_handshake(bench: Bench, data: bytes) -> None:
    connection = await bench.raw()
    connection.send(data)
    assert await connection.rest() == b""
    await connection.close()
    await still_serves(bench)


async def test_malformed_options_then_a_session(bench: Bench) -> None:
    """Every refusal in one handshake, consuming exactly what each option has, and transmission after them."""
    connection = await bench.raw()
    for data, kind in [
        (option(c.OPT_LIST, b"x"), c.REP_ERR_INVALID),
        (option(c.OPT_GO), c.REP_ERR_INVALID),
        (option(c.OPT_GO, GO[:-1]), c.REP_ERR_INVALID),
        (option(c.OPT_GO, GO + b"x"), c.REP_ERR_INVALID),
        (option(c.OPT_GO, pack_info_request("v\0", ())), c.REP_ERR_INVALID),
        (option(c.OPT_GO, pack_info_request("x" * 4097, ())), c.REP_ERR_INVALID),
        (option(c.OPT_GO, pack_info_request("x" * 4096, ())), c.REP_ERR_UNKNOWN),
        (option(c.OPT_GO, pack_info_request("", ())), c.REP_ERR_UNKNOWN),
        (option(c.OPT_GO, pack_info_request("../../etc", ())), c.REP_ERR_UNKNOWN),
        (option(c.OPT_STARTTLS), c.REP_ERR_UNSUP),
        (option(c.OPT_EXTENDED_HEADERS), c.REP_ERR_UNSUP),
        (option(0xDEAD, bytes(NBD_MAX_OPTION_BYTES)), c.REP_ERR_UNSUP),
        (option(c.OPT_SET_META_CONTEXT, GO), c.REP_ERR_INVALID),
    ]:
        connection.send(data)
        assert await replied(connection) == kind
    connection.send(option(c.OPT_GO, GO))
    await connection.exactly(GO_REPLIES_BYTES)
    await still_works(connection)


async def test_a_flood_of_options(bench: Bench) -> None:
    connection = await bench.raw()
    connection.send(option(99) * (NBD_MAX_OPTIONS + 1))
    answered = await connection.rest()
    assert answered.count(struct.pack(">Q", c.OPTION_REPLY_MAGIC)) == NBD_MAX_OPTIONS
    await connection.close()
    await still_serves(bench)


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
@pytest.mark.parametrize("now", [True, False], ids=["now", "slow"])
async def test_malformed_requests_get_errors(bench: Bench, structured: bool, now: bool) -> None:
    bench.disk.now = now
    size = bench.disk.size_bytes
    connection = await in_transmission(bench, structured=structured)
    cases = [
        (request(8), 22),
        (request(0xFFFF, 1, 2), 22),
        (request(c.CMD_READ, 0, 512, flags=1 << 15), 22),
        (request(c.CMD_READ, size, 1), 22),
        (request(c.CMD_READ, 2**64 - 512, 1024), 22),
        (request(c.CMD_READ, 0, NBD_MAX_PAYLOAD_BYTES + 1), 22),
        (request(c.CMD_READ, 0, 0xFFFFFFFF), 22),
        (request(c.CMD_WRITE, size, 512) + bytes(512), 28),
        (request(c.CMD_WRITE, 2**64 - 512, 1024) + bytes(1024), 28),
        (request(c.CMD_WRITE, 0, 512, flags=c.CMD_FLAG_NO_HOLE) + bytes(512), 22),
        (request(c.CMD_WRITE, 0, HUGE_PAYLOAD) + bytes(HUGE_PAYLOAD), 22),
        (request(c.CMD_WRITE_ZEROES, 2**64 - 512, 1024), 28),
        (request(c.CMD_TRIM, 2**64 - 512, 1024), 22),
        (request(c.CMD_BLOCK_STATUS, 0, 512), 22),
        (request(c.CMD_CACHE, size, 1), 22),
    ]
    if not structured:
        cases.append((request(c.CMD_READ, 0, 512, flags=c.CMD_FLAG_DF), 22))
    for data, error in cases:
        connection.send(data)
        assert await error_of(connection, structured=structured) == error
    connection.send(b"".join(data for data, _error in cases))
    assert sorted([await error_of(connection, structured=structured) for _case in cases]) == sorted(
        error for _data, error in cases
    )
    await still_works(connection)
    assert not any(bench.disk.data)


@pytest.mark.parametrize("magic", [0, 0x25609514, 0x21E41C71, 0x12560953])
async def test_a_wrong_request_magic_ends_the_session_after_what_came_before(bench: Bench, magic: int) -> None:
    """0x21E41C71 begins an extended request, which was not negotiated: its length is another, so framing is lost."""
    connection = await in_transmission(bench)
    connection.send(request(c.CMD_WRITE, 0, 4) + b"good" + request(c.CMD_READ, 0, 4, magic=magic) + bytes(1000))
    assert await error_of(connection) == 0
    assert await connection.rest() == b""
    await connection.close()
    await bench.session_ended()
    assert bytes(bench.disk.data[:4]) == b"good"
    await still_serves(bench)


HANDSHAKE = (
    struct.pack(">I", 3)
    + option(c.OPT_STRUCTURED_REPLY)
    + option(c.OPT_LIST)
    + option(c.OPT_GO, GO)
    + request(c.CMD_WRITE, 0, 8)
    + b"all of i"
)


async def test_a_client_may_vanish_after_any_byte(bench: Bench) -> None:
    """Of the handshake and of its first write: a half-received payload changes nothing."""
    for sent in range(len(HANDSHAKE)):
        reader, writer = await asyncio.open_unix_connection(bench.path)
        writer.write(HANDSHAKE[:sent])
        if sent % 3 == 0:
            await reader.readexactly(18)
        if sent % 2:
            writer.transport.abort()
        else:
            writer.close()
    await bench.session_ended()
    assert not any(bench.disk.data[:8])
    connection = RawConnection(*await asyncio.open_unix_connection(bench.path))
    connection.send(HANDSHAKE + request(c.CMD_DISC))
    assert (await connection.rest()).endswith(SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, 0, 77))
    await connection.close()
    assert bytes(bench.disk.data[:8]) == b"all of i"


async def test_a_large_half_received_write_changes_nothing(bench: Bench) -> None:
    connection = await in_transmission(bench)
    connection.send(request(c.CMD_WRITE, 0, 8 << 20) + b"x" * ((8 << 20) - 1))
    await connection.writer.drain()
    await connection.close()
    await bench.session_ended()
    assert not any(bench.disk.data[: 8 << 20])


async def test_a_client_that_does_not_finish_its_handshake_is_cut_off(bench: Bench) -> None:
    """Whatever it waits with: before its flags, in the middle of an option, or while it does not read replies."""
    bench.server._handshake_s = 0.05
    silent = RawConnection(*await asyncio.open_unix_connection(bench.path))
    assert len(await silent.rest()) == 18
    midway = await bench.raw()
    midway.send(option(c.OPT_GO, GO)[:-1])
    assert await midway.rest() == b""
    deaf = await bench.raw()
    for name in range(2000):
        bench.exports.disks[f"{name}-" + "x" * 1000] = bench.disk
    deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
    deaf.send(option(c.OPT_LIST) * 3)
    async with asyncio.timeout(PATIENCE_S):
        await bench.server.all_closed()
    assert bench.server.stats().handshakes_failed_total == 3
    bench.server._handshake_s = 10.0
    for connection in (silent, midway, deaf):
        await connection.close()
    await still_serves(bench)
