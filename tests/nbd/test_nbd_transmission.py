"""What a request is judged to be, which errors go out, and the sizes of memory and budget behind it: no sockets."""

import asyncio
import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockvirt.device import Capabilities
from blockvirt.errors import NotFound, NotSupported, PoolFull, ReadOnly, ShuttingDown
from blockvirt.limits import NBD_MAX_PAYLOAD_BYTES
from blockvirt.nbd import constants as c
from blockvirt.nbd.messages import CHUNK, MAX_DESCRIPTOR_BYTES, descriptors_of, error_chunk, status_chunk
from blockvirt.nbd.transmission import (
    ExportView,
    SimpleReplies,
    StructuredReplies,
    explain,
    judge,
    wire_error,
)

SIZE = 1 << 20
PLAIN = ExportView(SIZE, read_only=False, fast_zero=True, structured=True, status=True)
READ_ONLY = ExportView(SIZE, read_only=True, fast_zero=True, structured=True, status=True)
SIMPLE = ExportView(SIZE, read_only=False, fast_zero=False, structured=False, status=False)
TINY = ExportView(0, read_only=False, fast_zero=True, structured=True, status=True)
HUGE = ExportView(1 << 45, read_only=False, fast_zero=True, structured=True, status=True)
WRAP = (1 << 64) - 512
PAYLOAD = NBD_MAX_PAYLOAD_BYTES
UINT32 = 0xFFFFFFFF
FUA, NO_HOLE, DF, REQ_ONE, FAST = (1 << bit for bit in range(5))


@pytest.mark.parametrize(
    ("view", "flags", "command", "offset", "length", "code"),
    [
        # inside
        (PLAIN, 0, c.CMD_READ, 0, SIZE, 0),
        (PLAIN, 0, c.CMD_READ, SIZE - 1, 1, 0),
        (PLAIN, FUA | DF, c.CMD_READ, 0, 1, 0),
        (PLAIN, FUA, c.CMD_WRITE, SIZE - 512, 512, 0),
        (PLAIN, FUA, c.CMD_TRIM, 0, SIZE, 0),
        (PLAIN, FUA | NO_HOLE | FAST, c.CMD_WRITE_ZEROES, 0, SIZE, 0),
        (PLAIN, FUA, c.CMD_CACHE, 0, SIZE, 0),
        (PLAIN, REQ_ONE, c.CMD_BLOCK_STATUS, 0, SIZE, 0),
        (HUGE, 0, c.CMD_TRIM, 0, UINT32, 0),
        (HUGE, 0, c.CMD_WRITE_ZEROES, 512, UINT32 - 511, 0),
        (HUGE, 0, c.CMD_BLOCK_STATUS, 0, UINT32, 0),
        (HUGE, 0, c.CMD_CACHE, 0, UINT32, 0),
        # nothing, and the ends of nothing
        (PLAIN, 0, c.CMD_READ, SIZE, 0, 0),
        (PLAIN, 0, c.CMD_WRITE, 0, 0, 0),
        (PLAIN, 0, c.CMD_TRIM, 0, 0, 0),
        (PLAIN, 0, c.CMD_BLOCK_STATUS, 0, 0, errno.EINVAL),
        (PLAIN, 0, c.CMD_READ, SIZE + 1, 0, errno.EINVAL),
        (TINY, 0, c.CMD_READ, 0, 1, errno.EINVAL),
        # past the end; the sum does not wrap
        (PLAIN, 0, c.CMD_READ, SIZE - 1, 2, errno.EINVAL),
        (PLAIN, 0, c.CMD_READ, WRAP, 1024, errno.EINVAL),
        (PLAIN, 0, c.CMD_WRITE, SIZE, 1, errno.ENOSPC),
        (PLAIN, 0, c.CMD_WRITE, WRAP, 1024, errno.ENOSPC),
        (PLAIN, 0, c.CMD_WRITE_ZEROES, WRAP, 1024, errno.ENOSPC),
        (PLAIN, 0, c.CMD_TRIM, WRAP, 1024, errno.EINVAL),
        (PLAIN, 0, c.CMD_CACHE, SIZE, 1, errno.EINVAL),
        (PLAIN, 0, c.CMD_BLOCK_STATUS, WRAP, 1024, errno.EINVAL),
        # too long
        (HUGE, 0, c.CMD_READ, 0, PAYLOAD, 0),
        (HUGE, 0, c.CMD_READ, 0, PAYLOAD + 1, errno.EINVAL),
        (HUGE, 0, c.CMD_WRITE, 0, PAYLOAD + 1, errno.EINVAL),
        # read-only
        (READ_ONLY, 0, c.CMD_WRITE, 0, 512, errno.EPERM),
        (READ_ONLY, 0, c.CMD_WRITE, WRAP, 1024, errno.EPERM),
        (READ_ONLY, 0, c.CMD_TRIM, 0, 512, errno.EPERM),
        (READ_ONLY, NO_HOLE, c.CMD_WRITE_ZEROES, 0, 512, errno.EPERM),
        (READ_ONLY, 0, c.CMD_READ, 0, 512, 0),
        (READ_ONLY, 0, c.CMD_FLUSH, 0, 0, 0),
        # flush: the reserved fields are ignored
        (PLAIN, FUA, c.CMD_FLUSH, 0, 0, 0),
        (PLAIN, 0, c.CMD_FLUSH, WRAP, 1024, 0),
        # commands and flags that are not there
        (PLAIN, 0, 8, 0, 0, errno.EINVAL),
        (PLAIN, 0, 0xFFFF, 0, 0, errno.EINVAL),
        (PLAIN, 1 << 15, c.CMD_READ, 0, 512, errno.EINVAL),
        (PLAIN, 1 << 5, c.CMD_WRITE, 0, 512, errno.EINVAL),
        (PLAIN, NO_HOLE, c.CMD_TRIM, 0, 512, errno.EINVAL),
        (PLAIN, DF, c.CMD_WRITE, 0, 512, errno.EINVAL),
        (PLAIN, REQ_ONE, c.CMD_READ, 0, 512, errno.EINVAL),
        (PLAIN, NO_HOLE, c.CMD_FLUSH, 0, 0, errno.EINVAL),
        (PLAIN, NO_HOLE, c.CMD_CACHE, 0, 512, errno.EINVAL),
        # not negotiated, not advertised
        (SIMPLE, DF, c.CMD_READ, 0, 512, errno.EINVAL),
        (SIMPLE, 0, c.CMD_BLOCK_STATUS, 0, 512, errno.EINVAL),
        (SIMPLE, FAST, c.CMD_WRITE_ZEROES, 0, 512, errno.EINVAL),
    ],
)
def test_judge(view: ExportView, flags: int, command: int, offset: int, length: int, code: int) -> None:
    found, text = judge(view, flags, command, offset, length)
    assert errno.errorcode.get(found) == errno.errorcode.get(code), text
    assert bool(text) == bool(code)


@given(
    st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.integers(0, (1 << 64) - 1), st.integers(0, UINT32), st.booleans()
)
def test_what_is_allowed_lies_inside_and_changes_nothing_read_only(
    flags: int, command: int, offset: int, length: int, read_only: bool
) -> None:
    view = READ_ONLY if read_only else PLAIN
    code, _text = judge(view, flags, command, offset, length)
    assert code in (0, errno.EINVAL, errno.EPERM, errno.ENOSPC)
    if not code and command != c.CMD_FLUSH:
        assert offset + length <= SIZE
        assert not (read_only and command in (c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES))


@pytest.mark.parametrize("code", [*sorted(errno.errorcode), 0, 4711, -1])
def test_only_errors_of_the_protocol_go_out(code: int) -> None:
    assert wire_error(code) in {1, 5, 12, 22, 28, 75, 95, 108}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PoolFull("full"), 28),
        (ReadOnly("no"), 1),
        (NotSupported("slow"), 95),
        (NotFound("gone"), 22),
        (ShuttingDown("bye"), 108),
        (OSError(errno.ENOSPC, "full"), 28),
        (OSError(errno.EDQUOT, "quota"), 28),
        (OSError(errno.EFBIG, "big"), 28),
        (OSError(errno.EROFS, "remounted"), 1),
        (OSError(errno.ENODEV, "unplugged"), 5),
        (OSError("no errno"), 5),
        (MemoryError(), 12),
        (ValueError("a bug"), 5),
        (asyncio.InvalidStateError("a bug"), 5),
    ],
)
def test_what_a_volume_raises(error: Exception, code: int) -> None:
    found, text = explain(error)
    assert wire_error(found) == code
    assert "a bug" not in text  # a surprise keeps its details to the log


def test_simple_replies() -> None:
    replies = SimpleReplies()
    assert replies.data(7, 512, 3) == struct.pack(">IIQ", 0x67446698, 0, 7)
    assert replies.no_data(7) == struct.pack(">IIQ", 0x67446698, 0, 7)
    assert replies.error(7, errno.ENODEV, "text") == struct.pack(">IIQ", 0x67446698, 5, 7)


def test_structured_replies() -> None:
    replies = StructuredReplies()
    assert replies.data(7, 512, 3) == struct.pack(">IHHQIQ", 0x668E33EF, 1, 1, 7, 11, 512)
    assert replies.no_data(7) == struct.pack(">IHHQI", 0x668E33EF, 1, 0, 7, 0)
    assert replies.error(7, errno.EPERM, "no") == struct.pack(">IHHQIIH", 0x668E33EF, 1, 0x8001, 7, 8, 1, 2) + b"no"


def test_an_error_text_stays_a_protocol_string() -> None:
    chunk = error_chunk(1, 5, "é" * 100_000)
    assert len(chunk) == CHUNK.size + 6 + 4096


def test_status_chunk() -> None:
    for last in (True, False):
        assert status_chunk(9, 1, [(4096, 0), (512, 3)], last=last) == struct.pack(
            ">IHHQIIIIII", 0x668E33EF, last, 5, 9, 20, 1, 4096, 0, 512, 3
        )


STATUSES = st.sampled_from([0, 1, 3, UINT32])
EXTENTS = st.lists(st.tuples(st.sampled_from([0, 1, 512, 1 << 32, (1 << 32) - 1, 1 << 40, 9 << 31]), STATUSES))


@given(EXTENTS, st.integers(1, 3000))
def test_descriptors_say_the_same_as_the_extents(extents: list[tuple[int, int]], most: int) -> None:
    found = descriptors_of(extents, most=most)
    assert len(found) <= most
    assert all(0 < length <= MAX_DESCRIPTOR_BYTES for length, _state in found)
    wanted = list(extents)
    at = 0
    for length, state in found:  # walk the wanted extents along
        while wanted[at][0] == 0:
            at += 1
        assert wanted[at][1] == state
        assert length <= wanted[at][0]
        wanted[at] = wanted[at][0] - length, state
    if len(found) < most:
        assert not any(left for left, _state in wanted)


def test_descriptors_at_four_gibibytes() -> None:
    assert descriptors_of([(1 << 32, 0)], most=10) == [(0xFFFFF000, 0), (4096, 0)]
    assert descriptors_of([(1 << 32, 0)], most=1) == [(0xFFFFF000, 0)]


def test_default_capabilities_are_what_a_guest_wants() -> None:
    assert Capabilities() == Capabilities(read_only=False, multi_conn=True, fast_zero=True)
