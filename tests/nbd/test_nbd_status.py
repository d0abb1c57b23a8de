"""Block status in several metadata contexts at once, over real sockets: chunks, bounds, errors, what is pinned."""

import itertools
import struct

import pytest

from blockvirt.device import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_SINCE, STATE_DIRTY
from blockvirt.errors import BlockvirtError, DeviceFault, NotFound, ShuttingDown, VolumeStopped
from blockvirt.limits import NBD_MAX_CONTEXT_QUERIES, NBD_MAX_EXTENTS_PER_REPLY
from blockvirt.nbd import constants as c
from blockvirt.nbd.client import NbdClientError, RefusedOption, RequestFailed
from blockvirt.nbd.messages import pack_context_request
from blockvirt.testing.memory_volume import MemoryDisk
from blockvirt.units import KIB, MIB
from tests.nbd.conftest import Bench

DIRTY_A, DIRTY_B = DIRTY_SINCE + "a", DIRTY_SINCE + "b"
ALL = [BASE_ALLOCATION, ALLOCATION_DEPTH, DIRTY_A, DIRTY_B]
BLOCK = 64 * KIB
HOLE_AND_ZERO = 3


def layered() -> MemoryDisk:
    """Blocks 0 and 1 were written before mark a, 1 and 2 after it, 2 and 3 after mark b; block 4 was trimmed then."""
    disk = MemoryDisk(8 * BLOCK)
    for number in (0, 1, 4):
        disk.store(number * BLOCK, memoryview(b"1"))
    disk.mark("a")
    for number in (1, 2):
        disk.store(number * BLOCK, memoryview(b"2"))
    disk.mark("b")
    for number in (2, 3):
        disk.store(number * BLOCK, memoryview(b"3"))
    disk.clear(4 * BLOCK, BLOCK, punch=True)
    return disk


EXPECTED = {
    BASE_ALLOCATION: [(4 * BLOCK, 0), (4 * BLOCK, HOLE_AND_ZERO)],
    ALLOCATION_DEPTH: [(BLOCK, 3), (BLOCK, 2), (2 * BLOCK, 1), (4 * BLOCK, 0)],
    DIRTY_A: [(BLOCK, 0), (4 * BLOCK, STATE_DIRTY), (3 * BLOCK, 0)],
    DIRTY_B: [(2 * BLOCK, 0), (3 * BLOCK, STATE_DIRTY), (3 * BLOCK, 0)],
}


@pytest.fixture
def layers(bench: Bench) -> MemoryDisk:
    """The disk of the export "layers"."""
    bench.exports.disks["layers"] = disk = layered()
    return disk


async def test_contexts_are_listed(bench: Bench, layers: MemoryDisk) -> None:
    client = await bench.connect()
    with pytest.raises(RefusedOption) as refused:
        await client.list_contexts("layers")
    assert refused.value.reply_type == c.REP_ERR_INVALID, "they need structured replies"
    await client.ask_structured()
    assert await client.list_contexts("layers") == ALL
    assert await client.list_contexts("layers", ["qemu:"]) == ALL[1:]
    assert await client.list_contexts("layers", ["qemu:dirty-bitmap:"]) == [DIRTY_A, DIRTY_B]
    assert await client.list_contexts("layers", [DIRTY_B, "base:", "x-other:y"]) == [DIRTY_B, BASE_ALLOCATION]
    assert await client.list_contexts("v") == [BASE_ALLOCATION, ALLOCATION_DEPTH]
    for wanted in ([], ["no namespace"], ["base:"]):
        for number in (c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT):
            with pytest.raises(RefusedOption) as refused:
                await client.option(number, pack_context_request("nowhere", wanted))
            assert refused.value.reply_type == c.REP_ERR_UNKNOWN


@pytest.mark.parametrize("wanted", [ALL, ALL[::-1], [DIRTY_B], [ALLOCATION_DEPTH, DIRTY_A], [DIRTY_A, BASE_ALLOCATION]])
async def test_each_selected_context_has_a_chunk(bench: Bench, layers: MemoryDisk, wanted: list[str]) -> None:
    client = await bench.connect()
    await client.ask_structured()
    assert await client.set_contexts("layers", [*wanted, "qemu:dirty-bitmap:since-never"]) == wanted
    await client.go("layers")
    assert bench.exports.handles[-1].contexts == tuple(wanted)
    reply = await client.start(c.CMD_BLOCK_STATUS, 0, 8 * BLOCK)
    assert [kind for kind, _payload in reply.chunks] == [c.REPLY_BLOCK_STATUS] * len(wanted)
    assert [struct.unpack_from(">I", payload)[0] for _kind, payload in reply.chunks] == [*range(1, len(wanted) + 1)]
    assert await client.statuses(0, 8 * BLOCK) == {context: EXPECTED[context] for context in wanted}
    # inside a block, to the middle of another
    middle = await client.statuses(BLOCK // 2, BLOCK)
    assert [sum(size for size, _status in runs) for runs in middle.values()] == [BLOCK] * len(wanted)


async def test_one_extent_of_each_context(bench: Bench, layers: MemoryDisk) -> None:
    client = await bench.connect()
    await client.ask_structured()
    await client.set_contexts("layers", ALL)
    await client.go("layers")
    one = {context: runs[:1] for context, runs in EXPECTED.items()}
    assert await client.statuses(0, 8 * BLOCK, c.CMD_FLAG_REQ_ONE) == one
    assert await client.statuses(0, 512, c.CMD_FLAG_REQ_ONE) == {
        context: [(512, runs[0][1])] for context, runs in one.items()
    }


async def test_contexts_reach_an_export_by_its_old_option(bench: Bench, layers: MemoryDisk) -> None:
    client = await bench.connect()
    await client.ask_structured()
    await client.set_contexts("layers", [DIRTY_A])
    await client.export_name("layers")
    assert await client.statuses(0, 8 * BLOCK) == {DIRTY_A: EXPECTED[DIRTY_A]}


async def test_contexts_share_the_bound_of_a_reply(bench: Bench) -> None:
    """Every other block is allocated and dirty: all contexts together say no more than one alone may."""
    block = 512
    bench.exports.disks["comb"] = disk = MemoryDisk(48 * MIB, block_bytes=block)
    for number in range(NBD_MAX_CONTEXT_QUERIES - 2):
        disk.mark(f"{number}")
    comb = b"\1\0" * (len(disk.allocated) // 2)
    disk.allocated[:] = comb
    for changed in disk.dirty.values():
        changed[:] = comb
    client = await bench.connect()
    await client.ask_structured()
    wanted = await client.list_contexts("comb")
    assert len(wanted) == NBD_MAX_CONTEXT_QUERIES
    assert await client.set_contexts("comb", wanted) == wanted
    await client.go("comb")
    at, share = 0, NBD_MAX_EXTENTS_PER_REPLY // NBD_MAX_CONTEXT_QUERIES
    for _ in range(3):
        statuses = await client.statuses(at, disk.size_bytes - at)
        assert [len(runs) for runs in statuses.values()] == [share] * NBD_MAX_CONTEXT_QUERIES
        assert {size for runs in statuses.values() for size, _status in runs} == {block}
        at += share * block
    assert disk.most_asked == share * block, "no more is looked up than one reply can say"


async def test_without_a_context_there_is_no_block_status(bench: Bench, layers: MemoryDisk) -> None:
    settings: list[tuple[str, list[str]]] = [
        ("layers", []),
        ("layers", ["qemu:", "qemu:dirty-bitmap:", "qemu:dirty-bitmap:since-never"]),
        ("v", [BASE_ALLOCATION]),
    ]
    for name, wanted in settings:
        client = await bench.connect()
        await client.ask_structured()
        await client.set_contexts("layers", ALL)
        await client.set_contexts(name, wanted)
        await client.go("layers")
        assert bench.exports.handles[-1].contexts == ()
        with pytest.raises(RequestFailed) as failed:
            await client.statuses(0, BLOCK)
        assert failed.value.error == 22
        assert await client.read(0, 1) == b"1"


async def test_only_what_was_selected_is_answered(bench: Bench, layers: MemoryDisk) -> None:
    """Whoever wants to know what is dirty gets no allocation, and the volume is not asked for it."""
    client = await bench.connect()
    await client.ask_structured()
    await client.set_contexts("layers", [DIRTY_A])
    await client.go("layers")
    await client.statuses(0, 8 * BLOCK)
    assert layers.calls == {"block_status": 1}


@pytest.mark.parametrize(
    ("error", "number"), [(VolumeStopped("stopped"), 5), (DeviceFault("gone"), 5), (KeyError("a bug"), 5)]
)
@pytest.mark.parametrize("verb", ["extents", "block_status"])
async def test_a_context_that_fails_is_an_error_and_never_a_status(
    bench: Bench, layers: MemoryDisk, verb: str, error: Exception, number: int
) -> None:
    """A client that copies by a bitmap must not take half an answer for a whole one."""
    client = await bench.connect()
    await client.ask_structured()
    await client.set_contexts("layers", ALL)
    await client.go("layers")
    layers.fail(verb, error)
    reply = await client.start(c.CMD_BLOCK_STATUS, 0, 8 * BLOCK)
    assert reply.error == number
    assert [kind for kind, _payload in reply.chunks] == [c.REPLY_ERROR]
    layers.fail(verb, None)
    assert await client.statuses(0, 8 * BLOCK) == EXPECTED


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NotFound("the snapshot of the context is gone"), c.REP_ERR_UNKNOWN),
        (VolumeStopped("stopped"), c.REP_ERR_POLICY),
        (ShuttingDown("bye"), c.REP_ERR_SHUTDOWN),
    ],
)
async def test_a_context_that_cannot_be_pinned_refuses_the_export(
    bench: Bench, layers: MemoryDisk, error: BlockvirtError, kind: int
) -> None:
    client = await bench.connect()
    await client.ask_structured()
    await client.set_contexts("layers", [DIRTY_A])
    layers.fail("open", error)
    with pytest.raises(RefusedOption) as refused:
        await client.go("layers")
    assert (refused.value.reply_type, refused.value.text) == (kind, error.message)
    assert not bench.server.sessions()
    layers.fail("open", None)
    await client.go("layers")
    assert await client.statuses(0, 8 * BLOCK) == {DIRTY_A: EXPECTED[DIRTY_A]}


LIES = {
    "a query that is too long": pack_context_request("layers", ["qemu:" + "x" * 4096]),
    "a query not UTF-8": pack_context_request("layers", ["qemu:x"])[:-1] + b"\xff",
    "a query beyond the option": pack_context_request("layers", [])[:-4] + struct.pack(">II", 1, 999) + b"qemu:x",
    "two billion queries": pack_context_request("layers", [])[:-4] + struct.pack(">I", 1 << 31),
    "a name beyond the option": struct.pack(">I", 1 << 30) + b"layers",
    "more queries than may be": pack_context_request("layers", [BASE_ALLOCATION] * (NBD_MAX_CONTEXT_QUERIES + 1)),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
@pytest.mark.parametrize("number", [c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT])
async def test_a_malformed_context_request_costs_only_itself(
    bench: Bench, layers: MemoryDisk, number: int, lie: bytes
) -> None:
    client = await bench.connect()
    await client.ask_structured()
    with pytest.raises(RefusedOption) as refused:
        await client.option(number, lie)
    kind = c.REP_ERR_TOO_BIG if lie is LIES["more queries than may be"] else c.REP_ERR_INVALID
    assert refused.value.reply_type == kind
    await client.set_contexts("layers", [DIRTY_B])
    await client.go("layers")
    assert await client.statuses(0, 8 * BLOCK) == {DIRTY_B: EXPECTED[DIRTY_B]}


async def test_a_bitmap_leads_an_incremental_copy(bench: Bench, layers: MemoryDisk) -> None:
    """What is dirty since b, copied over the state at b, gives the present state."""
    before = bytearray(layers.size_bytes)
    for number, byte in ((0, b"1"), (1, b"2"), (2, b"2"), (4, b"1")):
        before[number * BLOCK : number * BLOCK + 1] = byte
    client = await bench.connect()
    await client.ask_structured()
    await client.set_contexts("layers", [DIRTY_B])
    await client.go("layers")
    runs = (await client.statuses(0, layers.size_bytes))[DIRTY_B]
    starts = itertools.accumulate((size for size, _status in runs), initial=0)
    for at, (size, status) in zip(starts, runs, strict=False):
        if status & STATE_DIRTY:
            before[at : at + size] = await client.read(at, size)
    assert before == layers.data


async def test_the_client_tells_a_chunk_that_nobody_asked_for(bench: Bench, layers: MemoryDisk) -> None:
    client = await bench.connect()
    await client.ask_structured()
    await client.set_contexts("layers", [DIRTY_B])
    await client.go("layers")
    client.contexts.clear()
    with pytest.raises(NbdClientError, match="context id 1"):
        await client.statuses(0, BLOCK)
