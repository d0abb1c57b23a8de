"""The snapshot stream: what it consists of, and the encoder. Pure; ``stream_reader`` is the way back.

A stream carries one snapshot: whole, or as its differences from a base that the receiver has. It is a preamble, then
frames, little-endian (``docs/stream-format.md`` is the specification):

    preamble:   magic 8 bytes | format version u32 | crc u32 over the 12 bytes before it
    frame:      crc u32 | kind u8 | body length u32 | body

A frame's ``crc`` is a CRC-32C over everything behind it, continued from the crc of the frame before (of the preamble,
for the first): a frame that is altered, dropped, repeated or moved does not fit, and is found out where it stands.

    HEADER      JSON: what the stream carries; exactly once, first
    RAW         offset u64, length u32, length bytes: they lie there now
    ZSTD        offset u64, length u32, one zstd frame that holds them
    ZERO        offset u64, length u64: reads as zeros now
    TRAILER     counts u64 of frames, data bytes and zero bytes, SHA-256 over all before; exactly once, last
"""

import hashlib
import json
import struct
import sys
from dataclasses import asdict, dataclass
from enum import IntEnum

from blockvirt.checksum import crc32c
from blockvirt.limits import STREAM_MAX_DATA_BYTES, STREAM_MAX_HEADER_BYTES

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAGIC = b"\x89BVS\r\n\x1a\n"
"""As PNG's: a byte that is not ASCII, and line ends that a transfer in text mode would change."""
FORMAT_VERSION = 1
DEFAULT_LEVEL = 3
"""zstd's own default: level 1 is little faster, higher ones are slower than most links."""

PREAMBLE = struct.Struct("<8sII")
FRAME_HEAD = struct.Struct("<IBI")
RANGE = struct.Struct("<QI")
ZERO_RANGE = struct.Struct("<QQ")
TRAILER = struct.Struct("<QQQ32s")
_CRC = struct.Struct("<I")
# No more window than the largest content: a decompressor allocates it before it has seen a byte of that.
_DECOMPRESSION: dict[int, int] = {zstd.DecompressionParameter.window_log_max: STREAM_MAX_DATA_BYTES.bit_length() - 1}


class Kind(IntEnum):
    """What a frame holds."""

    HEADER = 1
    RAW = 2
    ZSTD = 3
    ZERO = 4
    TRAILER = 5


BODY_BYTES: dict[int, tuple[int, int]] = {
    Kind.HEADER: (2, STREAM_MAX_HEADER_BYTES),
    Kind.RAW: (RANGE.size + 1, RANGE.size + STREAM_MAX_DATA_BYTES),
    # At least a byte shorter than what it holds: it would be RAW otherwise.
    Kind.ZSTD: (RANGE.size + 1, RANGE.size + STREAM_MAX_DATA_BYTES - 1),
    Kind.ZERO: (ZERO_RANGE.size, ZERO_RANGE.size),
    Kind.TRAILER: (TRAILER.size, TRAILER.size),
}
"""The shortest and the longest body that a frame of a kind may have."""


@dataclass(frozen=True, slots=True)
class StreamSnapshot:
    """The snapshot that a stream carries."""

    id: str
    name: str
    created_s: float
    labels: dict[str, str]
    size_bytes: int
    """Of the volume when the snapshot was taken; all frames lie inside."""


@dataclass(frozen=True, slots=True)
class StreamBase:
    """The snapshot that the receiver must have for the differences to make sense."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class StreamHeader:
    """What a stream says about itself before its first byte of data."""

    stream_id: str
    """A new id for each stream: two exports of one snapshot can be told apart."""
    volume_name: str
    volume_size_bytes: int
    """Of the volume when the stream was made."""
    chunk_bytes: int
    """Of the pool that the stream comes from; the receiver's may differ, frames are ranges of bytes."""
    changed_bytes: int
    """How many bytes all data and zero frames together cover: what progress is measured against."""
    snapshot: StreamSnapshot
    base: StreamBase | None
    """None: a full stream; what no frame covers reads as zeros. Otherwise it reads as in the base."""

    def encode(self) -> bytes:
        """Return the header frame's body: JSON in UTF-8, keys sorted, no spaces."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode()


@dataclass(slots=True)
class Coverage:
    """Which part of a stream's ranges has gone by; the rule for them is the same on both sides."""

    header: StreamHeader
    next_offset_bytes: int = 0
    """Where the last range ended; the next begins there or later."""
    frames: int = 0
    data_bytes: int = 0
    zero_bytes: int = 0

    @property
    def covered_bytes(self) -> int:
        """How many bytes the ranges so far cover, of ``header.changed_bytes``."""
        return self.data_bytes + self.zero_bytes

    def objection(self, offset_bytes: int, length_bytes: int) -> str:
        """Return why no range may follow there; empty where it may."""
        if length_bytes < 1:
            return "a range is empty"
        if offset_bytes < self.next_offset_bytes:
            return f"a range begins at {offset_bytes}, before the end of the one before ({self.next_offset_bytes})"
        if offset_bytes + length_bytes > self.header.snapshot.size_bytes:
            return f"a range ends at {offset_bytes + length_bytes}, outside the {self.header.snapshot.size_bytes} bytes"
        if self.covered_bytes + length_bytes > self.header.changed_bytes:
            return f"its ranges cover more than the {self.header.changed_bytes} changed bytes that it announced"
        return ""

    def add(self, offset_bytes: int, length_bytes: int, *, zero: bool) -> None:
        """Count a range that no objection was raised to."""
        self.next_offset_bytes = offset_bytes + length_bytes
        self.frames += 1
        if zero:
            self.zero_bytes += length_bytes
        else:
            self.data_bytes += length_bytes


def preamble(version: int = FORMAT_VERSION) -> bytes:
    """Return the 16 bytes that a stream begins with, in every version of the format."""
    start = PREAMBLE.pack(MAGIC, version, 0)[: -_CRC.size]
    return start + _CRC.pack(crc32c(start))


def frame_crc(kind: int, body: bytes, chain: int) -> int:
    """Return the crc of a frame; ``chain`` is the crc of the frame, or of the preamble, before it."""
    return crc32c(body, crc32c(FRAME_HEAD.pack(0, kind, len(body))[_CRC.size :], chain))


def decompress(payload: bytes, length_bytes: int) -> bytes | None:
    """Return the ``length_bytes`` that ``payload`` is the one zstd frame of; None where it is anything else.

    Allocates little more than ``length_bytes`` and STREAM_MAX_DATA_BYTES, whatever the payload asks for.
    """
    decompressor = zstd.ZstdDecompressor(options=_DECOMPRESSION)
    try:
        # A byte more than announced, so that a payload that holds more is seen to, and stopped there.
        content = decompressor.decompress(payload, max_length=length_bytes + 1)
    except zstd.ZstdError:
        return None
    whole = decompressor.eof and not decompressor.unused_data
    return content if whole and len(content) == length_bytes else None


class StreamEncoder:
    """Makes the bytes of one stream: ``begin``, then ``data`` and ``zeros`` in ascending order, then ``end``.

    All that is returned is to be sent, in order. Holds a compressor (about 3 MiB), no data.
    """

    def __init__(self, header: StreamHeader, *, level: int = DEFAULT_LEVEL) -> None:
        """``level``: zstd's, 1 (fast) to 22 (small)."""
        self.coverage = Coverage(header)
        self._compressor = zstd.ZstdCompressor(level=level)
        self._digest = hashlib.sha256()
        self._chain = 0

    def begin(self) -> bytes:
        """Return the preamble and the header."""
        start = preamble()
        self._chain = _CRC.unpack(start[-_CRC.size :])[0]
        self._digest.update(start)
        return start + self._frame(Kind.HEADER, self.coverage.header.encode())

    def data(self, offset_bytes: int, content: bytes) -> bytes:
        """Return the frame for ``content``, 1 to STREAM_MAX_DATA_BYTES bytes that lie at ``offset_bytes``."""
        assert len(content) <= STREAM_MAX_DATA_BYTES
        self._cover(offset_bytes, len(content), zero=False)
        # The whole frame in one call: zstd then knows its size, and asks readers for no larger window than that.
        payload = self._compressor.compress(content, self._compressor.FLUSH_FRAME)
        place = RANGE.pack(offset_bytes, len(content))
        if len(payload) < len(content):
            return self._frame(Kind.ZSTD, place + payload)
        return self._frame(Kind.RAW, place + content)

    def zeros(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Return the frame that says that ``length_bytes`` from ``offset_bytes`` on read as zeros."""
        self._cover(offset_bytes, length_bytes, zero=True)
        return self._frame(Kind.ZERO, ZERO_RANGE.pack(offset_bytes, length_bytes))

    def end(self) -> bytes:
        """Return the trailer; the ranges must cover exactly the changed bytes that the header announced."""
        done = self.coverage
        assert done.covered_bytes == done.header.changed_bytes, "the header announced something else"
        counts = (done.frames, done.data_bytes, done.zero_bytes)
        return self._frame(Kind.TRAILER, TRAILER.pack(*counts, self._digest.digest()))

    def _cover(self, offset_bytes: int, length_bytes: int, *, zero: bool) -> None:
        objection = self.coverage.objection(offset_bytes, length_bytes)
        assert not objection, objection
        self.coverage.add(offset_bytes, length_bytes, zero=zero)

    def _frame(self, kind: Kind, body: bytes) -> bytes:
        least, most = BODY_BYTES[kind]
        assert least <= len(body) <= most
        self._chain = frame_crc(kind, body, self._chain)
        frame = FRAME_HEAD.pack(self._chain, kind, len(body)) + body
        self._digest.update(frame)
        return frame
