"""The handshake machine, without a socket: options, refusals, framing, and bytes that arrive in any portions."""

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockvirt.device import Capabilities, ExportInfo
from blockvirt.errors import BlockvirtError, InvalidName, NotFound, PoolFull, ShuttingDown, VolumeStopped
from blockvirt.limits import NBD_MAX_NAME_BYTES, NBD_MAX_OPTION_BYTES, NBD_MAX_OPTIONS
from blockvirt.nbd import constants as c
from blockvirt.nbd.handshake import GREETING_BYTES, DescribeExport, Hangup, Negotiated, OpenExport
from blockvirt.nbd.messages import (
    CLIENT_FLAGS,
    OPTION,
    info_block_size,
    info_export,
    info_text,
    pack_context_request,
    pack_info_request,
)
from tests.nbd.handshake_driver import DF, FLAGS, INFO, RW_FLAGS, Driver, begun, contexts, go, option


def test_greeting_is_fixed_newstyle_without_zeroes() -> None:
    assert GREETING_BYTES == b"NBDMAGICIHAVEOPT\x00\x03"


@pytest.mark.parametrize("flags", [4, 1 << 31, 0xFFFFFFFF, 3 | 1 << 16])
def test_unknown_client_flags_end_the_connection(flags: int) -> None:
    driver = Driver()
    driver.feed(CLIENT_FLAGS.pack(flags))
    assert isinstance(driver.last, Hangup)
    assert not driver.output


def test_go_describes_opens_and_begins() -> None:
    driver = begun()
    driver.feed(go(requests=(c.INFO_NAME, c.INFO_DESCRIPTION, c.INFO_BLOCK_SIZE, 99)) + b"request")
    assert driver.effects == [OpenExport("v"), Negotiated("v", structured=False)]
    assert driver.replies() == [
        (c.OPT_GO, c.REP_INFO, info_export(1 << 30, RW_FLAGS)),
        (c.OPT_GO, c.REP_INFO, info_block_size(1, 4096, 32 << 20)),
        (c.OPT_GO, c.REP_INFO, info_text(c.INFO_NAME, "v")),
        (c.OPT_GO, c.REP_INFO, info_text(c.INFO_DESCRIPTION, "a volume")),
        (c.OPT_GO, c.REP_ACK, b""),
    ]
    assert driver.machine.leftover() == b"request"


def test_info_opens_nothing_and_goes_on() -> None:
    driver = begun()
    driver.feed(option(c.OPT_INFO, pack_info_request("v", ())))
    assert driver.effects == [DescribeExport("v")]
    assert driver.kinds() == [c.REP_INFO, c.REP_INFO, c.REP_ACK]
    driver.feed(go())
    assert isinstance(driver.last, Negotiated)


@pytest.mark.parametrize(
    ("capabilities", "structured", "flags"),
    [
        (Capabilities(), False, RW_FLAGS),
        (Capabilities(), True, RW_FLAGS | DF),
        (Capabilities(read_only=True), False, 0b0101_0000_1111),
        (Capabilities(fast_zero=False), False, RW_FLAGS & ~c.FLAG_SEND_FAST_ZERO),
        (Capabilities(multi_conn=False), False, RW_FLAGS & ~c.FLAG_CAN_MULTI_CONN),
    ],
)
def test_transmission_flags_follow_the_capabilities(capabilities: Capabilities, structured: bool, flags: int) -> None:
    driver = begun({"v": ExportInfo("v", "", 4096, 4096, capabilities)})
    if structured:
        driver.feed(option(c.OPT_STRUCTURED_REPLY))
        driver.replies()
    driver.feed(go())
    assert driver.replies()[0] == (c.OPT_GO, c.REP_INFO, info_export(4096, flags))


@pytest.mark.parametrize(("client_flags", "zeroes"), [(1, 124), (3, 0), (0, 124), (2, 0)])
def test_export_name(client_flags: int, zeroes: int) -> None:
    driver = Driver()
    driver.feed(CLIENT_FLAGS.pack(client_flags) + option(c.OPT_EXPORT_NAME, b"v"))
    assert driver.output == struct.pack(">QH", 1 << 30, RW_FLAGS) + bytes(zeroes)
    assert driver.last == Negotiated("v", structured=False)


@pytest.mark.parametrize("name", [b"other", b"", b"\xff", b"v\0", b"x" * (NBD_MAX_NAME_BYTES + 1)])
def test_export_name_that_cannot_be_satisfied_closes(name: bytes) -> None:
    driver = begun()
    driver.feed(option(c.OPT_EXPORT_NAME, name))
    assert isinstance(driver.last, Hangup)
    assert not driver.output


def test_list() -> None:
    driver = begun({"a": INFO, "b/lun0": INFO})
    driver.feed(option(c.OPT_LIST))
    assert driver.replies() == [
        (c.OPT_LIST, c.REP_SERVER, b"\0\0\0\x01a"),
        (c.OPT_LIST, c.REP_SERVER, b"\0\0\0\x06b/lun0"),
        (c.OPT_LIST, c.REP_ACK, b""),
    ]


@pytest.mark.parametrize("data", [b"", b"goodbye"])
def test_abort_is_acknowledged(data: bytes) -> None:
    driver = begun()
    driver.feed(option(c.OPT_ABORT, data))
    assert driver.kinds() == [c.REP_ACK]
    assert driver.last == Hangup("the client aborted the handshake", polite=True)


@pytest.mark.parametrize("number", [0, 4, c.OPT_STARTTLS, c.OPT_EXTENDED_HEADERS, 12, 0xFFFFFFFF])
@pytest.mark.parametrize("size", [0, 4, NBD_MAX_OPTION_BYTES])
def test_what_is_not_there_is_said_to_be_unsupported(number: int, size: int) -> None:
    driver = begun()
    driver.feed(option(number, bytes(size)))
    assert [(number, c.REP_ERR_UNSUP)] == [reply[:2] for reply in driver.replies()]
    driver.feed(go())
    assert isinstance(driver.last, Negotiated)


@pytest.mark.parametrize("size", [NBD_MAX_OPTION_BYTES + 1, 2 << 30, 0xFFFFFFFF])
@pytest.mark.parametrize("number", [c.OPT_GO, 77])
def test_a_giant_option_ends_the_connection_before_it_is_read(number: int, size: int) -> None:
    driver = begun()
    driver.feed(OPTION.pack(c.OPTION_MAGIC, number, size))
    assert isinstance(driver.last, Hangup)
    assert not driver.output


def test_a_wrong_option_magic_ends_the_connection() -> None:
    driver = begun()
    driver.feed(option(c.OPT_LIST, magic=c.OPTION_MAGIC + 1))
    assert isinstance(driver.last, Hangup)


def test_too_many_options_end_the_connection() -> None:
    driver = begun()
    driver.feed(option(c.OPT_LIST) * NBD_MAX_OPTIONS)
    assert not any(isinstance(effect, Hangup) for effect in driver.effects)
    driver.feed(option(c.OPT_LIST))
    assert isinstance(driver.last, Hangup)


def test_a_client_without_fixed_newstyle_may_only_name_its_export() -> None:
    driver = Driver()
    driver.feed(CLIENT_FLAGS.pack(0) + option(c.OPT_LIST))
    assert isinstance(driver.last, Hangup)
    assert not driver.output


INFO_V = pack_info_request("v", ())
MALFORMED = {
    "LIST with data": (c.OPT_LIST, b"x"),
    "STRUCTURED_REPLY with data": (c.OPT_STRUCTURED_REPLY, b"x"),
    "GO of nothing": (c.OPT_GO, b""),
    "GO with half a length": (c.OPT_GO, b"\0\0"),
    "GO truncated": (c.OPT_GO, INFO_V[:-1]),
    "GO trailing": (c.OPT_GO, INFO_V + b"x"),
    "GO name longer than the option": (c.OPT_GO, struct.pack(">I", 0xFFFFFFFF) + b"v\0\0"),
    "GO name eats the count": (c.OPT_GO, struct.pack(">I", 3) + b"v\0\0"),
    "GO with fewer requests than it says": (c.OPT_GO, pack_info_request("v", (1,))[:-2]),
    "GO with 65535 requests": (c.OPT_GO, INFO_V[:-2] + b"\xff\xff"),
    "GO with a NUL": (c.OPT_GO, pack_info_request("v\0", ())),
    "GO not UTF-8": (c.OPT_GO, struct.pack(">I", 1) + b"\xff" + b"\0\0"),
    "GO with a long name": (c.OPT_GO, pack_info_request("x" * (NBD_MAX_NAME_BYTES + 1), ())),
    "INFO truncated": (c.OPT_INFO, INFO_V[:-1]),
    "SET without structured replies": (c.OPT_SET_META_CONTEXT, pack_context_request("v", ["base:allocation"])),
    "LIST_META without structured replies": (c.OPT_LIST_META_CONTEXT, pack_context_request("v", [])),
}


@pytest.mark.parametrize("case", MALFORMED.values(), ids=MALFORMED)
def test_malformed_options_are_invalid_and_the_connection_lives(case: tuple[int, bytes]) -> None:
    driver = begun()
    driver.feed(option(*case))
    assert driver.kinds() == [c.REP_ERR_INVALID]
    assert not driver.effects
    driver.feed(go())
    assert isinstance(driver.last, Negotiated)


def test_structured_replies_twice_is_invalid() -> None:
    driver = begun()
    driver.feed(option(c.OPT_STRUCTURED_REPLY) * 2)
    assert driver.kinds() == [c.REP_ACK, c.REP_ERR_INVALID]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NotFound("x"), c.REP_ERR_UNKNOWN),
        (ShuttingDown("x"), c.REP_ERR_SHUTDOWN),
        (InvalidName("x"), c.REP_ERR_INVALID),
        (VolumeStopped("x"), c.REP_ERR_POLICY),
        (PoolFull("x", correction="make room"), c.REP_ERR_POLICY),
    ],
)
def test_an_export_that_cannot_be_had_is_refused_and_the_connection_lives(error: BlockvirtError, kind: int) -> None:
    driver = begun({"v": INFO, "bad": error})
    for number in (c.OPT_INFO, c.OPT_GO):
        driver.feed(option(number, pack_info_request("bad", ())))
        ((_option, refused, text),) = driver.replies()
        assert refused == kind
        assert text.startswith(b"x")
    driver.feed(go())
    assert isinstance(driver.last, Negotiated)


def test_a_long_error_text_is_cut() -> None:
    driver = begun({"bad": VolumeStopped("ä" * 5000)})
    driver.feed(go("bad"))
    ((_option, _kind, text),) = driver.replies()
    assert len(text) == NBD_MAX_NAME_BYTES
    assert text.decode() == "ä" * (NBD_MAX_NAME_BYTES // 2)


CONVERSATION = b"".join(
    [
        FLAGS,
        option(c.OPT_EXTENDED_HEADERS),
        option(c.OPT_STRUCTURED_REPLY),
        option(c.OPT_LIST),
        option(c.OPT_LIST, b"bad"),
        contexts(c.OPT_LIST_META_CONTEXT, "v"),
        contexts(c.OPT_SET_META_CONTEXT, "v", "base:allocation"),
        go("nowhere"),
        option(c.OPT_INFO, b"\0"),
        option(99, b"x" * 700),
        go(),
        b"the first request",
    ]
)


@given(st.lists(st.integers(0, len(CONVERSATION)), max_size=30))
def test_it_does_not_matter_how_bytes_arrive(cuts: list[int]) -> None:
    whole = Driver()
    whole.feed(CONVERSATION)
    parts = Driver()
    edges = [0, *sorted(cuts), len(CONVERSATION)]
    for start, end in itertools.pairwise(edges):
        parts.feed(CONVERSATION[start:end])
    assert parts.effects == whole.effects
    assert parts.output == whole.output
    assert parts.machine.leftover() == whole.machine.leftover() == b"the first request"


@given(st.binary(max_size=400))
def test_garbage_never_raises_and_never_opens(data: bytes) -> None:
    driver = begun({})
    driver.feed(data)
    assert not any(isinstance(effect, Negotiated) for effect in driver.effects)


@given(st.sampled_from([c.OPT_GO, c.OPT_INFO, c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT]), st.binary(max_size=80))
def test_garbage_in_an_option_gets_exactly_one_final_reply(number: int, data: bytes) -> None:
    driver = begun({})
    driver.feed(option(c.OPT_STRUCTURED_REPLY))
    driver.replies()
    driver.feed(option(number, data) + option(c.OPT_ABORT))
    kinds = driver.kinds()
    assert len([kind for kind in kinds if kind == c.REP_ACK or kind & c.REP_ERROR_BIT]) == 2
    assert kinds[-1] == c.REP_ACK
