"""Snapshot streams for tests: made by the encoder, or put together from frames that it would never make."""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace

from blockvirt.errors import StreamDamaged, StreamVersion
from blockvirt.snapshots.stream_format import (
    FRAME_HEAD,
    PREAMBLE,
    RANGE,
    TRAILER,
    ZERO_RANGE,
    Kind,
    StreamBase,
    StreamEncoder,
    StreamHeader,
    StreamSnapshot,
    frame_crc,
    preamble,
)
from blockvirt.snapshots.stream_reader import StreamData, StreamDecoder, StreamEvent, StreamZeros

Range = StreamData | StreamZeros
Frame = tuple[int, bytes]

KIB = 1024
SIZE_BYTES = 64 * KIB
BASE = StreamBase("7b0c9d2e-35d1-4b8a-9c59-0f6f3e8a1d11", "monday")
SNAPSHOT = StreamSnapshot("c2a4be5e-8d0f-4a61-b9a7-64c1f0f6b522", "tuesday", 1795312800.5, {"team": "web"}, SIZE_BYTES)
STREAM_ID = "0f8f4a3c-6c1b-4f0e-8a54-3d1f3b7e9c33"

RANGES: list[Range] = [
    StreamData(512, b"a thing said once"),  # too short to become shorter
    StreamZeros(4 * KIB, 8 * KIB),
    StreamData(16 * KIB, b"again " * 100),
    StreamData(32 * KIB, b"and again " * 100),
    StreamZeros(63 * KIB, 1 * KIB),
]


def length_of(part: Range) -> int:
    """How many bytes a range covers."""
    return part.length_bytes if isinstance(part, StreamZeros) else len(part.content)


def header_for(
    ranges: Iterable[Range],
    stream_id: str = STREAM_ID,
    *,
    base: StreamBase | None = BASE,
    size_bytes: int = SIZE_BYTES,
) -> StreamHeader:
    """A header that announces these ranges."""
    snapshot = replace(SNAPSHOT, size_bytes=size_bytes)
    return StreamHeader(stream_id, "debian", size_bytes, 64 * KIB, sum(map(length_of, ranges)), snapshot, base)


def stream_of(header: StreamHeader, ranges: Iterable[Range]) -> bytes:
    """The stream that the encoder makes of them."""
    encoder = StreamEncoder(header)
    pieces = [encoder.begin()]
    for part in ranges:
        if isinstance(part, StreamZeros):
            pieces.append(encoder.zeros(part.offset_bytes, part.length_bytes))
        else:
            pieces.append(encoder.data(part.offset_bytes, part.content))
    return b"".join([*pieces, encoder.end()])


def events_of(pieces: Iterable[bytes]) -> list[StreamEvent]:
    """What the decoder says to them; the input ends behind the last one."""
    decoder = StreamDecoder()
    events = [event for piece in pieces for event in decoder.feed(piece)]
    decoder.finish()
    return events


def read_until_error(stream: bytes) -> tuple[list[StreamEvent], StreamDamaged | StreamVersion | None]:
    """The events that came out, and the error that ended them."""
    decoder = StreamDecoder()
    events: list[StreamEvent] = []
    try:
        events.extend(decoder.feed(stream))  # keeps what came before an error
        decoder.finish()
    except (StreamDamaged, StreamVersion) as error:
        return events, error
    return events, None


def cut(stream: bytes) -> list[bytes]:
    """The preamble and the frames of one whole stream, checked by nothing."""
    parts, at = [stream[: PREAMBLE.size]], PREAMBLE.size
    while at < len(stream):
        end = at + FRAME_HEAD.size + FRAME_HEAD.unpack_from(stream, at)[2]
        parts.append(stream[at:end])
        at = end
    return parts


def chained(frames: Sequence[Frame]) -> bytes:
    """A stream of these frames, whatever they hold, with checksums that fit: a hostile writer's."""
    stream = preamble()
    chain = struct.unpack("<I", stream[-4:])[0]
    for kind, body in frames:
        chain = frame_crc(kind, body, chain)
        stream += FRAME_HEAD.pack(chain, kind, len(body)) + body
    return stream


def with_trailer(frames: Sequence[Frame], counts: tuple[int, int, int]) -> bytes:
    """The same with a trailer that counts so, and a SHA-256 that fits."""
    trailer = TRAILER.pack(*counts, hashlib.sha256(chained(frames)).digest())
    return chained([*frames, (Kind.TRAILER, trailer)])


def raw(offset_bytes: int, content: bytes) -> Frame:
    """A frame of bytes as they are."""
    return Kind.RAW, RANGE.pack(offset_bytes, len(content)) + content


def compressed(offset_bytes: int, length_bytes: int, payload: bytes) -> Frame:
    """A frame that announces so many bytes, whatever its payload holds."""
    return Kind.ZSTD, RANGE.pack(offset_bytes, length_bytes) + payload


def zeros(offset_bytes: int, length_bytes: int) -> Frame:
    """A frame of zeros."""
    return Kind.ZERO, ZERO_RANGE.pack(offset_bytes, length_bytes)
