"""Metadata contexts in the handshake: listing, selecting, and what makes a selection count."""

import struct

import pytest

from blockvirt.device import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_SINCE, context_matches
from blockvirt.limits import NBD_MAX_CONTEXT_QUERIES, NBD_MAX_LISTED_CONTEXTS, NBD_MAX_NAME_BYTES
from blockvirt.nbd import constants as c
from blockvirt.nbd.handshake import FindContexts, Negotiated, OpenExport
from blockvirt.nbd.messages import pack_context_request
from tests.nbd.handshake_driver import CONTEXTS, INFO, Driver, begun, contexts, go, option

DIRTY_A, DIRTY_B = DIRTY_SINCE + "a", DIRTY_SINCE + "b"
BAD_CONTEXTS = {
    "empty": b"",
    "no count": pack_context_request("v", [])[:-1],
    "a name longer than the option": struct.pack(">I", 0xFFFFFFFF) + b"v\0\0\0\0",
    "more queries than bytes": pack_context_request("v", [])[:-4] + struct.pack(">I", 0x40000000),
    "one query too few": pack_context_request("v", ["base:allocation"])[:-1],
    "one query more than there are": pack_context_request("v", [])[:-4] + struct.pack(">II", 2, 6) + b"base:x",
    "a query longer than the option": pack_context_request("v", ["base:x"])[:-10] + b"\xff\xff\xff\xffbase:x",
    "trailing": pack_context_request("v", ["base:allocation"]) + b"x",
    "query not UTF-8": pack_context_request("v", ["base:x"])[:-1] + b"\xff",
    "query with a NUL": pack_context_request("v", ["base:allocation\0"]),
    "long query": pack_context_request("v", ["base:" + "x" * NBD_MAX_NAME_BYTES]),
}


def structured() -> Driver:
    driver = begun({"v": INFO, "other": INFO})
    driver.feed(option(c.OPT_STRUCTURED_REPLY))
    driver.replies()
    return driver


def context_replies(driver: Driver) -> list[tuple[int, str]]:
    """(id, name) of the contexts in the replies, which end with an ACK."""
    *replies, (_option, last, _payload) = driver.replies()
    assert last == c.REP_ACK
    assert {kind for _option, kind, _payload in replies} <= {c.REP_META_CONTEXT}
    return [(int.from_bytes(payload[:4]), payload[4:].decode()) for _option, _kind, payload in replies]


@pytest.mark.parametrize("data", BAD_CONTEXTS.values(), ids=BAD_CONTEXTS)
@pytest.mark.parametrize("number", [c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT])
def test_malformed_context_requests_are_invalid(number: int, data: bytes) -> None:
    driver = structured()
    driver.feed(contexts(c.OPT_SET_META_CONTEXT, "v", "base:allocation"))
    driver.replies()
    driver.feed(option(number, data))
    assert driver.kinds() == [c.REP_ERR_INVALID]
    driver.feed(go())
    # "replaces all previously-set metadata contexts (including when this command fails)"
    kept = ("base:allocation",) if number == c.OPT_LIST_META_CONTEXT else ()
    assert driver.last == Negotiated("v", structured=True, contexts=kept)


@pytest.mark.parametrize("number", [c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT])
def test_too_many_queries_are_too_big(number: int) -> None:
    driver = structured()
    driver.feed(contexts(number, "v", *[f"base:{n}" for n in range(NBD_MAX_CONTEXT_QUERIES)]))
    assert driver.kinds() == [c.REP_ACK]
    driver.feed(contexts(number, "v", *[f"base:{n}" for n in range(NBD_MAX_CONTEXT_QUERIES + 1)]))
    assert driver.kinds() == [c.REP_ERR_TOO_BIG]
    driver.feed(go())
    assert driver.last == Negotiated("v", structured=True)


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ((), CONTEXTS),
        (("base:",), (BASE_ALLOCATION,)),
        (("qemu:",), CONTEXTS[1:]),
        (("qemu:dirty-bitmap:",), (DIRTY_A, DIRTY_B)),
        (("base:allocation",), (BASE_ALLOCATION,)),
        ((DIRTY_B, "qemu:dirty-bitmap:x", "base:allocation"), (DIRTY_B, BASE_ALLOCATION)),
        (("qemu:", DIRTY_B, "qemu:", "base:"), (*CONTEXTS[1:], BASE_ALLOCATION)),
        (("base:other",), ()),
        (("qemu:dirty-bitmap",), ()),
        (("x-unknown:",), ()),
        (("no colon",), ()),
        (("",), ()),
        (("base",), ()),
        ((":",), ()),
    ],
)
def test_list_contexts(queries: tuple[str, ...], found: tuple[str, ...]) -> None:
    driver = structured()
    driver.feed(contexts(c.OPT_LIST_META_CONTEXT, "v", *queries))
    assert context_replies(driver) == [(0, context) for context in found]


@pytest.mark.parametrize("query", ["", "no colon"])
def test_a_query_without_a_namespace_is_not_passed_on(query: str) -> None:
    """To a directory "" means all."""
    driver = structured()
    for number in (c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT):
        driver.feed(contexts(number, "v", query, "base:"))
    assert driver.effects == [FindContexts("v", ("base:",))] * 2


def test_a_list_of_contexts_has_an_end_and_none_twice() -> None:
    driver = structured()
    driver.contexts = tuple(f"qemu:dirty-bitmap:{number}" for number in range(NBD_MAX_LISTED_CONTEXTS + 500))
    driver.feed(contexts(c.OPT_LIST_META_CONTEXT, "v", "qemu:", "qemu:dirty-bitmap:"))
    assert [name for _id, name in context_replies(driver)] == list(driver.contexts[:NBD_MAX_LISTED_CONTEXTS])
    driver.feed(contexts(c.OPT_SET_META_CONTEXT, "v", driver.contexts[-1]))
    assert context_replies(driver) == [(c.FIRST_CONTEXT_ID, driver.contexts[-1])]


@pytest.mark.parametrize("number", [c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT])
@pytest.mark.parametrize("queries", [(), ("base:allocation",), ("no colon",)])
def test_contexts_of_an_export_that_does_not_exist(number: int, queries: tuple[str, ...]) -> None:
    driver = structured()
    driver.feed(contexts(number, "nowhere", *queries))
    assert driver.kinds() == [c.REP_ERR_UNKNOWN]


@pytest.mark.parametrize(
    ("settings", "selected"),
    [
        ([("v", "base:allocation")], (BASE_ALLOCATION,)),
        ([("v", DIRTY_B, ALLOCATION_DEPTH, "base:allocation")], (DIRTY_B, ALLOCATION_DEPTH, BASE_ALLOCATION)),
        ([("v", DIRTY_A, DIRTY_A)], (DIRTY_A,)),
        ([("v", "base:")], ()),
        ([("v", "qemu:", "qemu:dirty-bitmap:", "", DIRTY_SINCE)], ()),
        ([("v",)], ()),
        ([("other", "base:allocation")], ()),
        ([("v", "base:allocation"), ("v",)], ()),
        ([("v", "base:allocation"), ("nowhere", "base:allocation")], ()),
        ([("v", "base:allocation"), ("other", DIRTY_A)], ()),
        ([("other", "base:allocation"), ("v", DIRTY_A)], (DIRTY_A,)),
        ([("v", "base:allocation", DIRTY_A), ("v", DIRTY_B)], (DIRTY_B,)),
        ([("v", "x:y"), ("v", "x:y", "base:allocation")], (BASE_ALLOCATION,)),
    ],
)
@pytest.mark.parametrize("begin", [go(), option(c.OPT_EXPORT_NAME, b"v")], ids=["GO", "EXPORT_NAME"])
def test_the_last_setting_of_contexts_for_this_export_counts(
    settings: list[tuple[str, ...]], selected: tuple[str, ...], begin: bytes
) -> None:
    driver = structured()
    for setting in settings:
        driver.feed(contexts(c.OPT_SET_META_CONTEXT, *setting))
    driver.feed(begin)
    assert driver.effects[-2:] == [OpenExport("v", selected), Negotiated("v", structured=True, contexts=selected)]


def test_listing_contexts_changes_no_selection() -> None:
    driver = structured()
    driver.feed(contexts(c.OPT_SET_META_CONTEXT, "v", DIRTY_A))
    driver.feed(contexts(c.OPT_LIST_META_CONTEXT, "v", "base:allocation"))
    driver.feed(go())
    assert driver.last == Negotiated("v", structured=True, contexts=(DIRTY_A,))


def test_a_selection_outlives_an_export_that_could_not_be_opened() -> None:
    driver = structured()
    driver.feed(contexts(c.OPT_SET_META_CONTEXT, "v", DIRTY_A))
    driver.feed(go("nowhere") + go("v"))
    assert driver.last == Negotiated("v", structured=True, contexts=(DIRTY_A,))


def test_set_contexts_numbers_what_it_selects() -> None:
    driver = structured()
    driver.feed(contexts(c.OPT_SET_META_CONTEXT, "v", DIRTY_A, "qemu:nothing", "base:allocation", DIRTY_A, DIRTY_B))
    assert context_replies(driver) == [(1, DIRTY_A), (2, BASE_ALLOCATION), (3, DIRTY_B)]


@pytest.mark.parametrize(
    ("context", "query", "matches"),
    [
        (DIRTY_A, "", True),
        (DIRTY_A, "qemu:", True),
        (DIRTY_A, "qemu:dirty-bitmap:", True),
        (DIRTY_A, DIRTY_A, True),
        (DIRTY_A, DIRTY_SINCE, False),
        (DIRTY_A, "qemu", False),
        (DIRTY_A, "base:", False),
        (DIRTY_A, DIRTY_A + "b", False),
        (DIRTY_A + "b", DIRTY_A, False),
    ],
)
def test_context_matches(context: str, query: str, matches: bool) -> None:
    assert context_matches(context, query) is matches
