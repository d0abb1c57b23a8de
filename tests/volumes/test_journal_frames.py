"""Journal frames: what is read back is exactly the intact prefix, whatever became of the rest."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockvirt.errors import DamagedRecord
from blockvirt.volumes.journal_frames import (
    CHANGE,
    MARK_FRAME_BYTES,
    Change,
    Kind,
    data_frame_bytes,
    frame_bytes,
    is_followed,
    pack,
    pack_data,
    pack_mark,
    read_frames,
)

changes = st.lists(
    st.builds(Change, st.integers(0, 1 << 30), st.integers(1, 1000), st.integers(0, 1 << 55)), max_size=5
)


def log_of(batches: list[list[Change]], generation: int, chain: int) -> tuple[bytes, list[int]]:
    log, ends = b"", []
    for sequence, batch in enumerate(batches, start=8):
        body = b"".join(CHANGE.pack(change.chunk, change.count, change.entry) for change in batch)
        frame, chain = pack(Kind.MAP, generation, sequence, body, chain)
        assert len(frame) == frame_bytes(len(batch))
        log += frame
        ends.append(len(log))
    return log, ends


@given(st.lists(changes, min_size=1, max_size=6), st.data())
def test_a_damaged_byte_ends_the_log_at_its_frame(batches: list[list[Change]], data: st.DataObject) -> None:
    log, ends = log_of(batches, 3, 77)
    whole = list(read_frames(log + bytes(100), 3, 8, 77))
    assert [list(frame.changes()) for frame in whole] == batches
    at = data.draw(st.integers(0, len(log) - 1))
    torn = bytearray(log)
    torn[at] ^= data.draw(st.integers(1, 255))
    intact = sum(1 for end in ends if end <= at)
    assert [list(frame.changes()) for frame in read_frames(bytes(torn), 3, 8, 77)] == batches[:intact]
    assert list(read_frames(log[:at], 3, 8, 77)) == whole[:intact]


def test_frames_of_another_generation_chain_or_sequence_do_not_fit() -> None:
    log, _ = log_of([[Change(1, 1, 5)], [Change(2, 1, 6)]], 3, 77)
    assert len(list(read_frames(log, 3, 8, 77))) == 2
    assert not list(read_frames(log, 5, 8, 77))
    assert not list(read_frames(log, 3, 9, 77))
    assert not list(read_frames(log, 3, 8, 78))


def test_the_chain_reaches_from_generation_to_generation() -> None:
    first, _ = log_of([[Change(1, 1, 5)]], 3, 77)
    (last,) = read_frames(first, 3, 8, 77)
    frame, _ = pack(Kind.MAP, 4, 9, CHANGE.pack(2, 1, 6), last.crc)
    assert [found.sequence for found in read_frames(frame, 4, 9, last.crc)] == [9]
    assert not list(read_frames(frame, 4, 9, 77))


def test_a_mark_says_what_it_speaks_for() -> None:
    frame, crc = pack_mark(4, 9, 7, 1)
    assert len(frame) == MARK_FRAME_BYTES
    (found,) = read_frames(frame, 4, 9, 1)
    assert (found.kind, found.marked(), found.crc) == (Kind.MARK, 7, crc)


@given(st.lists(st.tuples(st.integers(1, 1 << 26), st.integers(0, 1 << 45), st.binary(max_size=50)), max_size=5))
def test_data_is_read_back_as_it_was_packed(parts: list[tuple[int, int, bytes]]) -> None:
    frame, crc = pack_data(4, 9, 7, parts, 1)
    assert len(frame) == data_frame_bytes(len(parts), sum(len(data) for _, _, data in parts))
    (found,) = read_frames(frame, 4, 9, 1)
    assert (found.kind, found.marked(), found.crc) == (Kind.DATA, 7, crc)
    assert list(found.data()) == parts


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Kind.MAP, bytes(CHANGE.size + 1)),
        (Kind.MARK, b"1"),
        (Kind.DATA, bytes(8)),
        (Kind.DATA, struct.pack("<QQ", 7, 1 << 60)),
        (Kind.DATA, struct.pack("<QQQQQ", 7, 1, 1, 0, 5) + b"four"),
        (Kind.DATA, struct.pack("<QQQQQ", 7, 1, 1, 0, 3) + b"four"),
    ],
)
def test_a_body_that_no_frame_has_is_damage(kind: Kind, body: bytes) -> None:
    (found,) = read_frames(pack(kind, 4, 9, body, 1)[0], 4, 9, 1)
    with pytest.raises(DamagedRecord):
        list({Kind.MAP: found.changes, Kind.DATA: found.data}.get(kind, lambda: [found.marked()])())


@given(st.lists(changes, min_size=3, max_size=6), st.integers(0, 5), st.data())
def test_a_damaged_frame_is_told_from_a_torn_one(batches: list[list[Change]], split: int, data: st.DataObject) -> None:
    """Frames are appended one after the other: what is intact behind a frame shows that this one was whole once."""
    first, second = batches[: 1 + split % (len(batches) - 1)], batches[1 + split % (len(batches) - 1) :]
    log, ends = log_of(first, 3, 77)
    chain = [frame.crc for frame in read_frames(log, 3, 8, 77)][-1]
    later = b""
    for sequence, batch in enumerate(second, start=8 + len(first)):
        body = b"".join(CHANGE.pack(change.chunk, change.count, change.entry) for change in batch)
        frame, chain = pack(Kind.MAP, 4, sequence, body, chain)
        later += frame
    log, later = log + bytes(200), later + bytes(200)
    at = data.draw(st.integers(0, ends[-1] - 1))
    damaged = bytearray(log)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    intact = list(read_frames(bytes(damaged), 3, 8, 77))
    chain = intact[-1].crc if intact else 77
    start = sum(len(frame.body) + frame_bytes(0) for frame in intact)
    if len(intact) == len(first):
        return  # a byte that means nothing
    assert is_followed(bytes(damaged), start, 3, 8 + len(intact), chain, later)
    torn = log[: data.draw(st.integers(start, at))] + bytes(400)
    assert not is_followed(torn, start, 3, 8 + len(intact), chain, bytes(400))


def test_what_ends_where_it_must_is_not_followed() -> None:
    log, ends = log_of([[Change(1, 1, 5)], [Change(2, 1, 6)]], 3, 77)
    chain = list(read_frames(log, 3, 8, 77))[-1].crc
    stale, _ = log_of([[Change(1, 1, 5)], [Change(2, 1, 6)], [Change(3, 1, 7)]], 1, 5)
    assert not is_followed(log + stale[ends[-1] :], ends[-1], 3, 10, chain, stale)
