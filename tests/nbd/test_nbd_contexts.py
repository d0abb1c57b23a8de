"""Metadata contexts in the handshake: listing, selecting, and what makes a selection count."""

import struct

import pytest

from blockvirt.limits import NBD_MAX_NAME_BYTES
from blockvirt.nbd import constants as c
from blockvirt.nbd.handshake import Negotiated
from blockvirt.nbd.messages import pack_context_request
from tests.nbd.handshake_driver import INFO, begun, contexts, go, option

BAD_CONTEXTS = {
    "empty": b"",
    "no count": pack_context_request("v", [])[:-1],
    "more queries than bytes": pack_context_request("v", [])[:-4] + struct.pack(">I", 0x40000000),
    "one query too few": pack_context_request("v", ["base:allocation"])[:-1],
    "trailing": pack_context_request("v", ["base:allocation"]) + b"x",
    "query not UTF-8": pack_context_request("v", ["base:x"])[:-1] + b"\xff",
    "long query": pack_context_request("v", ["base:" + "x" * NBD_MAX_NAME_BYTES]),
}


@pytest.mark.parametrize("data", BAD_CONTEXTS.values(), ids=BAD_CONTEXTS)
@pytest.mark.parametrize("number", [c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT])
def test_malformed_context_requests_are_invalid(number: int, data: bytes) -> None:
    driver = begun()
    driver.feed(option(c.OPT_STRUCTURED_REPLY))
    driver.feed(contexts(c.OPT_SET_META_CONTEXT, "v", "base:allocation"))
    driver.replies()
    driver.feed(option(number, data))
    assert driver.kinds() == [c.REP_ERR_INVALID]
    driver.feed(go())
    # "replaces all previously-set metadata contexts (including when this command fails)"
    assert driver.last == Negotiated("v", structured=True, status=number == c.OPT_LIST_META_CONTEXT)


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ((), True),
        (("base:",), True),
        (("base:allocation",), True),
        (("qemu:dirty-bitmap:x", "base:allocation"), True),
        (("base:other",), False),
        (("x-unknown:",), False),
        (("no colon",), False),
    ],
)
def test_list_contexts(queries: tuple[str, ...], found: bool) -> None:
    driver = begun()
    driver.feed(option(c.OPT_STRUCTURED_REPLY))
    driver.replies()
    driver.feed(contexts(c.OPT_LIST_META_CONTEXT, "v", *queries))
    expected = [(c.OPT_LIST_META_CONTEXT, c.REP_META_CONTEXT, b"\0\0\0\0base:allocation")] if found else []
    assert driver.replies() == [*expected, (c.OPT_LIST_META_CONTEXT, c.REP_ACK, b"")]


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ([("v", "base:allocation")], True),
        ([("v", "base:")], False),
        ([("v",)], False),
        ([("other", "base:allocation")], False),
        ([("v", "base:allocation"), ("v",)], False),
        ([("v", "base:allocation"), ("nowhere", "base:allocation")], False),
        ([("v", "x:y"), ("v", "x:y", "base:allocation")], True),
    ],
)
@pytest.mark.parametrize("begin", [go(), option(c.OPT_EXPORT_NAME, b"v")], ids=["GO", "EXPORT_NAME"])
def test_the_last_setting_of_contexts_for_this_export_counts(
    settings: list[tuple[str, ...]], status: bool, begin: bytes
) -> None:
    driver = begun({"v": INFO, "other": INFO})
    driver.feed(option(c.OPT_STRUCTURED_REPLY))
    for setting in settings:
        driver.feed(contexts(c.OPT_SET_META_CONTEXT, *setting))
    driver.feed(begin)
    assert driver.last == Negotiated("v", structured=True, status=status)


def test_set_contexts_numbers_what_it_selects() -> None:
    driver = begun()
    driver.feed(option(c.OPT_STRUCTURED_REPLY))
    driver.replies()
    driver.feed(contexts(c.OPT_SET_META_CONTEXT, "v", "base:allocation"))
    assert driver.replies()[0][2] == b"\0\0\0\x01base:allocation"
