"""The snapshot stream between honest ends: what goes in comes out, and any accident on the way is found."""

import itertools
import random
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockvirt.errors import StreamDamaged, StreamVersion
from blockvirt.limits import (
    MAX_LABEL_CHARS,
    MAX_LABELS,
    MAX_VOLUME_BYTES,
    STREAM_MAX_DATA_BYTES,
    STREAM_MAX_HEADER_BYTES,
)
from blockvirt.snapshots.stream_format import FRAME_HEAD, MAGIC, Kind, StreamEncoder, StreamHeader, preamble
from blockvirt.snapshots.stream_reader import StreamData, StreamDecoder, StreamEnd, StreamZeros
from tests.snapshots.streams import (
    RANGES,
    SIZE_BYTES,
    Range,
    cut,
    events_of,
    header_for,
    length_of,
    read_until_error,
    stream_of,
)

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "stream-format.md"
OTHER_STREAM_ID = "5d3e1c56-22fb-4f0e-9f07-0f1d2c3b4a59"
STREAM = stream_of(header_for(RANGES), RANGES)
EVENTS = events_of([STREAM])

contents = st.one_of(
    st.binary(min_size=1, max_size=700),
    st.builds(lambda word, times: word * times, st.binary(min_size=1, max_size=9), st.integers(1, 500)),
)


@st.composite
def range_lists(draw: st.DrawFn) -> list[Range]:
    """Ranges in ascending order, some touching, inside the snapshot."""
    ranges: list[Range] = []
    at = 0
    for _ in range(draw(st.integers(0, 7))):
        at += draw(st.sampled_from([0, 1, 512, 5_000]))
        if draw(st.booleans()):
            part: Range = StreamData(at, draw(contents))
        else:
            part = StreamZeros(at, draw(st.integers(1, 9_000)))
        if at + length_of(part) > SIZE_BYTES:
            break
        ranges.append(part)
        at += length_of(part)
    return ranges


def in_pieces(stream: bytes, ends: list[int]) -> list[bytes]:
    """The stream, cut at these places."""
    places = sorted({0, len(stream), *(end % (len(stream) + 1) for end in ends)})
    return [stream[start:end] for start, end in itertools.pairwise(places)]


# --- what goes in comes out ------------------------------------------------------------------------------------------


@given(range_lists(), st.lists(st.integers(0, 1 << 20), max_size=40))
def test_what_goes_in_comes_out_however_it_arrives(ranges: list[Range], ends: list[int]) -> None:
    """Pieces end anywhere: within numbers, between frames, behind a single byte."""
    header = header_for(ranges)
    stream = stream_of(header, ranges)
    first, *middle, last = events_of(in_pieces(stream, ends))
    assert first == header
    assert middle == ranges
    data_bytes = sum(len(part.content) for part in ranges if isinstance(part, StreamData))
    zero_bytes = header.changed_bytes - data_bytes
    assert isinstance(last, StreamEnd)
    assert (last.frames, last.data_bytes, last.zero_bytes) == (len(ranges), data_bytes, zero_bytes)
    assert last.end_byte == len(stream)


def test_byte_by_byte_says_the_same_as_at_once() -> None:
    assert events_of(bytes([byte]) for byte in STREAM) == EVENTS


@pytest.mark.parametrize("content", [bytes(STREAM_MAX_DATA_BYTES), random.Random(3).randbytes(STREAM_MAX_DATA_BYTES)])
def test_the_longest_content_fits_in_one_frame(content: bytes) -> None:
    """Compressed by far, and not at all."""
    data = StreamData(0, content)
    header = header_for([data], size_bytes=STREAM_MAX_DATA_BYTES)
    stream = stream_of(header, [data])
    assert events_of([stream])[:2] == [header, data]
    assert len(stream) < STREAM_MAX_DATA_BYTES + 1_000


def test_what_zstd_cannot_shorten_goes_as_it_is() -> None:
    kinds = [FRAME_HEAD.unpack_from(frame)[1] for frame in cut(STREAM)[1:]]
    assert kinds == [Kind.HEADER, Kind.RAW, Kind.ZERO, Kind.ZSTD, Kind.ZSTD, Kind.ZERO, Kind.TRAILER]


def test_progress_is_measured_against_what_the_header_announced() -> None:
    """The decoder knows how far it has come after every event, and forgets it between two streams."""
    decoder = StreamDecoder()
    seen = [decoder.coverage.covered_bytes if decoder.coverage else None for _ in decoder.feed(STREAM)]
    expected = list(itertools.accumulate(map(length_of, RANGES), initial=0))
    assert seen == [*expected, None]
    assert expected[-1] == header_for(RANGES).changed_bytes


def test_streams_lie_one_behind_the_other() -> None:
    """As 'cat a b > c' makes them; each says where it ended, and counts for itself."""
    second = stream_of(header_for([], OTHER_STREAM_ID, base=None), [])
    events = events_of([STREAM + second + STREAM])
    ends = [event.end_byte for event in events if isinstance(event, StreamEnd)]
    assert ends == [len(STREAM), len(STREAM + second), len(STREAM + second + STREAM)]
    assert events[: len(EVENTS) - 1] == events[-len(EVENTS) : -1] == EVENTS[:-1]


def test_a_frame_is_decompressed_when_it_is_asked_for() -> None:
    """A small piece may stand for a great deal: no more than one frame of it is there at a time."""
    megabyte = bytes(STREAM_MAX_DATA_BYTES)
    ranges: list[Range] = [StreamData(i * len(megabyte), megabyte) for i in range(64)]
    stream = stream_of(header_for(ranges, size_bytes=64 * len(megabyte)), ranges)
    decoder = StreamDecoder()
    assert len(stream) < 32_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in decoder.feed(stream)) == len(ranges) + 2
        assert tracemalloc.get_traced_memory()[1] < 6 * STREAM_MAX_DATA_BYTES
    finally:
        tracemalloc.stop()


# --- accidents -------------------------------------------------------------------------------------------------------


def test_no_byte_can_be_altered_unnoticed() -> None:
    """Every bit of a whole stream: what came out before is true, and the end never comes."""
    for at, bit in itertools.product(range(len(STREAM)), range(8)):
        altered = bytearray(STREAM)
        altered[at] ^= 1 << bit
        events, error = read_until_error(bytes(altered))
        assert isinstance(error, StreamDamaged), (at, bit)
        assert events == EVENTS[: len(events)]
        assert len(events) < len(EVENTS)
        assert error.details["at_byte"] <= len(STREAM)


def test_no_end_can_be_cut_off_unnoticed() -> None:
    """Every prefix: no error while more may come, then one that says where the input ended."""
    for length in range(len(STREAM)):
        events, error = read_until_error(STREAM[:length])
        assert error is not None
        assert error.details["at_byte"] == length
        assert events == EVENTS[: len(events)]
        assert len(events) < len(EVENTS)


def test_frames_cannot_be_dropped_repeated_or_moved() -> None:
    """Found at the first frame that stands where it does not belong, or at the end of what there is."""
    start, *frames = cut(STREAM)
    numbers = range(len(frames))
    orders = [[i for i in numbers if i != dropped] for dropped in numbers]
    orders += [[*range(i + 1), *range(i, len(frames))] for i in numbers]
    for i, j in itertools.combinations(numbers, 2):
        orders.append([*range(i), j, *range(i + 1, j), i, *range(j + 1, len(frames))])
    for order in orders:
        wrong_from = next((at for at, number in enumerate(order) if at != number), len(order))
        events, error = read_until_error(start + b"".join(frames[number] for number in order))
        assert isinstance(error, StreamDamaged), order
        assert events == EVENTS[:wrong_from]
        assert error.details["at_byte"] == len(start) + sum(len(frame) for frame in frames[:wrong_from])


def test_a_frame_of_another_stream_does_not_fit() -> None:
    """Two exports of one snapshot differ in nothing but their ids."""
    other = cut(stream_of(header_for(RANGES, OTHER_STREAM_ID), RANGES))
    mine = cut(STREAM)
    assert [part[4:] for part in mine[2:-1]] == [part[4:] for part in other[2:-1]]
    for at in range(2, len(mine)):
        _, error = read_until_error(b"".join([*mine[:at], other[at], *mine[at + 1 :]]))
        assert isinstance(error, StreamDamaged)
        assert error.details["at_byte"] == sum(map(len, mine[:at]))


@pytest.mark.parametrize("rest", [b"\0", b"\n", STREAM[:16], STREAM[20:], preamble()[:-1], b"x" * 100])
def test_behind_a_stream_comes_another_or_nothing(rest: bytes) -> None:
    events, error = read_until_error(STREAM + rest)
    assert events == EVENTS
    assert isinstance(error, StreamDamaged)
    assert len(STREAM) <= error.details["at_byte"] <= len(STREAM + rest)


@pytest.mark.parametrize("text", [b"", b"PK\x03\x04" * 10, b"{}", b"\0" * 16, STREAM.replace(b"\r\n", b"\n", 1)])
def test_what_is_no_stream_is_called_so(text: bytes) -> None:
    events, error = read_until_error(text)
    assert not events
    assert isinstance(error, StreamDamaged)
    assert ("no snapshot stream begins" if text else "nothing at all") in error.message


def test_a_newer_version_names_itself() -> None:
    """Also behind a stream that can be read; what a newer version holds is not looked at."""
    events, error = read_until_error(STREAM + preamble(7) + b"who knows")
    assert events == EVENTS
    assert isinstance(error, StreamVersion)
    assert error.details == {"version": 7, "newest_version": 1, "at_byte": len(STREAM)}
    assert "format 7" in error.message


def test_an_error_stays() -> None:
    """A receiver that goes on feeding gets no end of the stream from it."""
    start, header, _, *rest = cut(STREAM)
    decoder = StreamDecoder()
    with pytest.raises(StreamDamaged) as first:
        list(decoder.feed(start + header + rest[0]))
    with pytest.raises(StreamDamaged) as second:
        list(decoder.feed(b"".join(rest)))
    assert first.value.message == second.value.message
    with pytest.raises(StreamDamaged):
        decoder.finish()


# --- mistakes of our own ---------------------------------------------------------------------------------------------


def test_the_encoder_writes_nothing_that_a_reader_refuses() -> None:
    """Ranges out of order, outside, empty, too long, more or fewer than announced: never silently."""
    encoder = StreamEncoder(header_for(RANGES))
    encoder.begin()
    encoder.zeros(512, 512)
    with pytest.raises(AssertionError):
        encoder.data(1023, b"again")
    with pytest.raises(AssertionError):
        encoder.data(SIZE_BYTES - 1, b"ab")
    with pytest.raises(AssertionError):
        encoder.data(4096, b"")
    with pytest.raises(AssertionError):
        encoder.zeros(1024, SIZE_BYTES - 1024)
    with pytest.raises(AssertionError):
        encoder.end()
    too_long = StreamData(0, bytes(STREAM_MAX_DATA_BYTES + 1))
    with pytest.raises(AssertionError):
        StreamEncoder(header_for([too_long], size_bytes=1 << 30)).data(0, too_long.content)


def test_events_must_be_taken() -> None:
    """Bytes whose events nobody asked for would be missing from the stream."""
    decoder = StreamDecoder()
    events = decoder.feed(STREAM)
    next(events)
    with pytest.raises(AssertionError):
        decoder.feed(STREAM)
    with pytest.raises(AssertionError):
        decoder.finish()
    assert [EVENTS[0], *events] == EVENTS
    decoder.finish()


# --- the document ----------------------------------------------------------------------------------------------------

EXAMPLE: list[Range] = [StreamData(4096, b"blockvirt"), StreamZeros(65536, 65536)]


def bytes_of_example() -> bytes:
    """The worked example: lines of hexadecimal bytes before a bar, and lines of JSON that continue one another."""
    (block,) = re.findall(r"```text\n(89 .*?)```", DOCUMENT.read_text(), re.DOTALL)
    stream = b""
    for line in block.splitlines():
        octets, bar, _ = line.partition("|")
        stream += bytes.fromhex(octets) if bar else line.encode()
    return stream


def test_the_worked_example_is_what_the_code_writes() -> None:
    stream = bytes_of_example()
    header, *ranges, end = events_of([stream])
    assert ranges == EXAMPLE
    assert isinstance(header, StreamHeader)
    assert isinstance(end, StreamEnd)
    assert stream_of(header, EXAMPLE) == stream


def test_the_document_names_the_bounds_and_the_magic() -> None:
    text = DOCUMENT.read_text()
    assert MAGIC.hex(" ") in text
    for most in (STREAM_MAX_DATA_BYTES, STREAM_MAX_HEADER_BYTES, MAX_LABELS, MAX_LABEL_CHARS, MAX_VOLUME_BYTES):
        assert str(most) in text
    for kind in Kind:
        assert re.search(rf"^\| {kind.value} \| {kind.name} \|", text, re.MULTILINE), kind
