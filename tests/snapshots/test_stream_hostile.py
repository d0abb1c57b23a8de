"""Streams that somebody made with intent: every checksum fits, what they say does not, and they ask for a lot."""

import json
import struct
import sys
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockvirt.errors import StreamDamaged
from blockvirt.limits import MAX_LABEL_CHARS, MAX_LABELS, STREAM_MAX_DATA_BYTES, STREAM_MAX_HEADER_BYTES
from blockvirt.snapshots.stream_format import FRAME_HEAD, Kind, StreamHeader, preamble
from blockvirt.snapshots.stream_header import decode_header
from blockvirt.snapshots.stream_reader import StreamDecoder, StreamEnd
from tests.snapshots.streams import (
    KIB,
    SIZE_BYTES,
    Frame,
    chained,
    compressed,
    events_of,
    header_for,
    raw,
    read_until_error,
    with_trailer,
    zeros,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MIB = KIB * KIB
HEADER = header_for([], size_bytes=SIZE_BYTES)
WORD = b"word " * 200
PAYLOAD = zstd.compress(WORD)
SUMMED = zstd.compress(WORD, options={zstd.CompressionParameter.checksum_flag: 1})


def headed(changed_bytes: int = SIZE_BYTES) -> Frame:
    """A header frame that announces so much."""
    return Kind.HEADER, json.dumps(json.loads(HEADER.encode()) | {"changed_bytes": changed_bytes}).encode()


def refused(stream: bytes) -> StreamDamaged:
    """The error that ends it, without an end of the stream before."""
    events, error = read_until_error(stream)
    assert isinstance(error, StreamDamaged)
    assert not [event for event in events if isinstance(event, StreamEnd)]
    return error


# --- frames ----------------------------------------------------------------------------------------------------------


def test_the_hostile_writer_can_also_write_a_true_stream() -> None:
    """Otherwise its streams would be refused for another reason than the one that is tested."""
    frames = [headed(1000 + 9 + 512), compressed(0, 1000, PAYLOAD), raw(1000, b"blockvirt"), zeros(4096, 512)]
    assert len(events_of([with_trailer(frames, (3, 1009, 512))])) == 5


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([zeros(512, 512), zeros(0, 512)], "before the end"),
        ([zeros(0, 512), raw(511, b"a")], "before the end"),
        ([zeros(0, 512), zeros(0, 512)], "before the end"),
        ([zeros(0, SIZE_BYTES + 1)], "outside"),
        ([raw(SIZE_BYTES, b"a")], "outside"),
        ([zeros(2**64 - 1, 2**64 - 1)], "outside"),
        ([zeros(0, 0)], "empty"),
        ([compressed(0, 0, PAYLOAD)], "empty"),
        ([compressed(0, 999, PAYLOAD)], "does not hold"),
        ([compressed(0, 1001, PAYLOAD)], "does not hold"),
        ([compressed(0, 1000, PAYLOAD[:-1])], "does not hold"),
        ([compressed(0, 1000, SUMMED[:-1])], "does not hold"),  # all of the content, not all of its frame
        ([compressed(0, 1000, PAYLOAD + b"x")], "does not hold"),
        ([compressed(0, 2000, PAYLOAD + PAYLOAD)], "does not hold"),
        ([compressed(0, 1000, b"not compressed")], "does not hold"),
        ([compressed(0, 9, b"\x50\x2a\x4d\x18\0\0\0\0")], "does not hold"),  # a skippable zstd frame
        ([compressed(0, 4, zstd.compress(b"abcd"))], "does not hold"),  # longer than what it holds
        ([(Kind.RAW, struct.pack("<QI", 0, 5) + b"four")], "does not hold"),
        ([(Kind.RAW, struct.pack("<QI", 0, 3) + b"four")], "does not hold"),
        ([headed()], "header is not where"),
        ([(0, b"body")], "unknown kind"),
        ([(6, b"body")], "unknown kind"),
        ([(255, b"")], "unknown kind"),
        ([(Kind.ZERO, bytes(15))], "cannot have 15"),
        ([(Kind.ZERO, bytes(17))], "cannot have 17"),
        ([(Kind.RAW, bytes(12))], "cannot have 12"),
        ([(Kind.TRAILER, bytes(55))], "cannot have 55"),
    ],
)
def test_frames_that_say_nonsense_are_refused(frames: list[Frame], reason: str) -> None:
    """Wherever the stream has a true beginning."""
    error = refused(chained([headed(), *frames]))
    assert reason in error.message
    assert error.details["at_byte"] == len(chained([headed(), *frames[:-1]]))


@pytest.mark.parametrize(
    "frame", [zeros(0, 512), raw(0, b"a"), compressed(0, 1000, PAYLOAD), (Kind.TRAILER, bytes(56))]
)
def test_the_header_comes_first(frame: Frame) -> None:
    assert "header is not where" in refused(chained([frame])).message


@pytest.mark.parametrize(
    "counts", [(0, 9, 512), (2, 10, 512), (2, 9, 0), (2, 521, 0), (3, 9, 512), (2**64 - 1, 9, 512)]
)
def test_a_trailer_that_counts_otherwise_is_refused(counts: tuple[int, int, int]) -> None:
    frames = [headed(9 + 512), raw(0, b"blockvirt"), zeros(4096, 512)]
    assert "counts" in refused(with_trailer(frames, counts)).message
    assert events_of([with_trailer(frames, (2, 9, 512))])


def test_a_trailer_with_another_digest_is_refused() -> None:
    """The checksums of the frames are no proof against intent; the digest is what a receiver may compare."""
    trailer = struct.pack("<QQQ32s", 0, 0, 0, bytes(32))
    assert "SHA-256" in refused(chained([headed(0), (Kind.TRAILER, trailer)])).message


def test_more_or_less_than_announced_is_refused() -> None:
    frames = [zeros(0, 512), zeros(512, 512)]
    assert "cover more" in refused(with_trailer([headed(1023), *frames], (2, 0, 1024))).message
    assert "cover less" in refused(with_trailer([headed(1025), *frames], (2, 0, 1024))).message


# --- lengths and bombs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*Kind, 0, 77])
@pytest.mark.parametrize("body_bytes", [0, 1, 2 * MIB, 2**31, 2**32 - 1])
def test_a_length_is_refused_before_anything_is_allocated_for_it(kind: int, body_bytes: int) -> None:
    """The head of a frame is enough: a receiver would wait, and make room, for what never comes."""
    start = preamble() if kind == Kind.HEADER else chained([headed()])
    decoder = StreamDecoder()
    list(decoder.feed(start))
    tracemalloc.start()
    try:
        with pytest.raises(StreamDamaged) as refusal:
            list(decoder.feed(FRAME_HEAD.pack(0, kind, body_bytes)))
        assert tracemalloc.get_traced_memory()[1] < 256 * KIB
    finally:
        tracemalloc.stop()
    assert refusal.value.details["at_byte"] == len(start)


@pytest.mark.parametrize("announced_bytes", [4096, STREAM_MAX_DATA_BYTES, STREAM_MAX_DATA_BYTES + 1, 2**32 - 1])
def test_a_decompression_bomb_stops_at_what_it_announced(announced_bytes: int) -> None:
    """64 MiB in a few KiB; the pool's volume is large enough for all of it."""
    header = header_for([], size_bytes=1 << 40)
    bomb = zstd.compress(bytes(64 * MIB), options={zstd.CompressionParameter.window_log: 20})
    body = json.dumps(json.loads(header.encode()) | {"changed_bytes": 1 << 33}).encode()
    stream = chained([(Kind.HEADER, body), compressed(0, announced_bytes, bomb)])
    assert len(stream) < 16 * KIB
    tracemalloc.start()
    try:
        assert "does not hold" in refused(stream).message
        assert tracemalloc.get_traced_memory()[1] < 3 * MIB
    finally:
        tracemalloc.stop()


def test_a_window_beyond_the_largest_content_is_refused() -> None:
    """A decompressor allocates the window that a payload asks for, however short its content is."""
    payloads = []
    for window_log in (20, 21, 27):
        options: dict[int, int] = {
            zstd.CompressionParameter.window_log: window_log,
            zstd.CompressionParameter.content_size_flag: 0,
        }
        compressor = zstd.ZstdCompressor(options=options)
        # In two calls: knowing the size, zstd would choose a smaller window.
        payloads.append(compressor.compress(WORD) + compressor.flush())
    largest, *beyond = [with_trailer([headed(1000), compressed(0, 1000, it)], (1, 1000, 0)) for it in payloads]
    assert len(events_of([largest])) == 3
    for stream in beyond:
        assert "does not hold" in refused(stream).message


# --- headers ---------------------------------------------------------------------------------------------------------

TRUE: dict[str, Any] = json.loads(HEADER.encode())


def changed(path: str, value: object) -> bytes:
    """The header with one of its fields, 'snapshot.name' for an inner one, set to something else."""
    values = json.loads(HEADER.encode())
    *outer, field = path.split(".")
    inner = values
    for name in outer:
        inner = inner[name]
    inner[field] = value
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("stream_id", [None, 7, "", "0" * 36, TRUE["stream_id"].upper(), TRUE["stream_id"].replace("-", "")]),
        ("volume_name", [None, "", "a@b", "../etc", "a\0b", "x" * 64, TRUE["stream_id"], ["a"]]),
        ("snapshot.name", [None, "", "a/b", "vol@snap", "x" * 300, 3]),
        ("base.name", ["", "..", None]),
        ("base.id", ["monday", None]),
        ("base", [{}, [], "", 0, False, {"id": TRUE["base"]["id"]}]),
        ("snapshot", [None, [], {}, "tuesday"]),
        ("volume_size_bytes", [0, -512, 513, 2**70, 512.0, "512", True, None]),
        ("snapshot.size_bytes", [0, 511, 2**63, None]),
        ("chunk_bytes", [0, 512, 65537, 96 * KIB, 2**21, None]),
        ("changed_bytes", [-1, SIZE_BYTES + 1, 0.5, True, None]),
        ("snapshot.created_s", [-1, "now", None, True, float("nan"), float("inf"), 253_402_300_800]),
        ("snapshot.labels", [None, [], {"a": 1}, {"a": None}, {"a": "x" * (MAX_LABEL_CHARS + 1)}, {"a": "\ud800"}]),
        ("snapshot.labels", [{"x" * (MAX_LABEL_CHARS + 1): ""}, {str(i): "" for i in range(MAX_LABELS + 1)}]),
        ("surprise", [1]),
        ("snapshot.surprise", [1]),
        ("base.surprise", [1]),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(path: str, values: list[object]) -> None:
    """Its fields become names, sizes and labels here: nothing that our own API would refuse comes in this way."""
    for value in values:
        with pytest.raises(ValueError, match=r"."):
            decode_header(changed(path, value))
        assert "header makes no sense" in refused(chained([(Kind.HEADER, changed(path, value))])).message


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe{}",
        HEADER.encode().decode().encode("utf-16"),
        HEADER.encode() + b"}",
        HEADER.encode()[:-1],
        HEADER.encode()[:-1] + b',"stream_id":"' + TRUE["stream_id"].encode() + b'"}',  # twice
        changed("snapshot.created_s", 0).replace(b'"created_s": 0', b'"created_s": 1e999'),
        b"9" * 200_000,
        b"[" * 200_000,
        b'{"a":' * 40_000,
        b"[" + b"[]," * 87_000 + b"[]]",
        b"[" + b"{}," * 87_000 + b"{}]",
    ],
    ids=lambda body: body[:12].decode("ascii", "replace"),
)
def test_a_header_that_is_no_header_is_refused_cheaply(body: bytes) -> None:
    """Also one that is made to exhaust the parser."""
    assert len(body) <= STREAM_MAX_HEADER_BYTES
    stream = chained([(Kind.HEADER, body)])
    tracemalloc.start()
    try:
        assert "header makes no sense" in refused(stream).message
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


def test_the_largest_header_that_we_could_write_can_be_read() -> None:
    """As many labels as there may be, as long as they may be, of what JSON makes longest."""
    labels = {"\x01" * (MAX_LABEL_CHARS - 2) + f"{i:02}": "\x01" * MAX_LABEL_CHARS for i in range(MAX_LABELS)}
    body = changed("snapshot.labels", labels)
    assert 190 * KIB < len(body) < STREAM_MAX_HEADER_BYTES
    header = decode_header(body)
    assert header.snapshot.labels == labels
    assert events_of([with_trailer([(Kind.HEADER, header.encode())], (0, 0, 0))])[0] == header


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(TRUE)), json_values)
def test_no_header_gets_round_the_error_tree(field: str, value: object) -> None:
    """It is a header, or a ValueError with a reason; never anything else."""
    try:
        header = decode_header(changed(field, value))
    except ValueError:
        return
    assert isinstance(header, StreamHeader)


@given(st.lists(st.tuples(st.integers(0, 6), st.binary(max_size=80)), max_size=5), st.booleans())
def test_no_frames_get_round_the_error_tree(frames: list[Frame], headless: bool) -> None:
    """Whatever they hold, there is an error of the tree, or a whole stream."""
    events, error = read_until_error(chained(frames if headless else [headed(), *frames]))
    assert isinstance(error, StreamDamaged) or isinstance(events[-1], StreamEnd)
