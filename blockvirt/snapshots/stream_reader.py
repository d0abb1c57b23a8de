"""The snapshot stream's decoder: bytes in, in pieces of any size; what they say out, as events. Pure.

The bytes may come from anybody. Every length has a bound that is looked at before anything is allocated for it, at most
one frame is held, and no event is made of a frame whose checksum does not fit. What the events say is whole and
unaltered only when ``StreamEnd`` has come: until then a receiver must be able to drop all of it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from blockvirt.errors import StreamDamaged, StreamVersion
from blockvirt.limits import STREAM_MAX_DATA_BYTES
from blockvirt.snapshots.stream_format import (
    BODY_BYTES,
    FORMAT_VERSION,
    FRAME_HEAD,
    MAGIC,
    PREAMBLE,
    RANGE,
    TRAILER,
    ZERO_RANGE,
    Coverage,
    Kind,
    StreamHeader,
    decompress,
    frame_crc,
    preamble,
)
from blockvirt.snapshots.stream_header import decode_header

_NO_STREAM = "no snapshot stream begins there"


@dataclass(frozen=True, slots=True)
class StreamData:
    """These bytes lie at ``offset_bytes`` in the snapshot; 1 to STREAM_MAX_DATA_BYTES of them."""

    offset_bytes: int
    content: bytes


@dataclass(frozen=True, slots=True)
class StreamZeros:
    """``length_bytes`` (at least 1) from ``offset_bytes`` on read as zeros in the snapshot."""

    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """The stream is whole and unaltered. Another may begin at once."""

    end_byte: int
    """How many bytes of the input, streams before it included, lie before its end."""
    frames: int
    """Data and zero frames."""
    data_bytes: int
    zero_bytes: int
    sha256: bytes
    """Over the stream up to its trailer."""


StreamEvent = StreamHeader | StreamData | StreamZeros | StreamEnd


class StreamDecoder:
    """Reads streams, one behind the other: ``feed`` what arrives, ``finish`` when nothing more does."""

    def __init__(self) -> None:
        self.coverage: Coverage | None = None
        """How far the stream that is being read has come; None between two streams, and before a header."""
        self._input = memoryview(b"")
        self._held = bytearray()
        """The beginning of the preamble or frame that is to be read next, and no more than that."""
        self._wanted_bytes = PREAMBLE.size
        self._at_byte = 0
        """Where in the input ``_held`` begins."""
        self._inside = False
        self._digest = hashlib.sha256()
        self._chain = 0

    def feed(self, piece: bytes) -> Iterator[StreamEvent]:
        """Take the next ``piece`` of the input and yield what has become readable with it.

        The iterator is to be run to its end before the next call; it decompresses one frame at a time. Raises
        StreamDamaged where the input is not a stream that somebody finished, StreamVersion where a newer blockvirt
        made it. Nothing that comes behind such a place is ever read.
        """
        assert not self._input, "the events of the piece before were not taken"
        self._input = memoryview(piece)
        return self._events()

    def finish(self) -> None:
        """Say that the input ended; raises StreamDamaged unless it ended where a stream did."""
        assert not self._input, "the events of the last piece were not taken"
        end = self._at_byte + len(self._held)
        if not self._inside and not MAGIC.startswith(self._held[: len(MAGIC)]):
            raise _damaged(self._at_byte, _NO_STREAM)
        if self._inside or self._held:
            raise _damaged(end, "it is cut off there")
        if end == 0:
            raise _damaged(end, "there is nothing at all")

    def _events(self) -> Iterator[StreamEvent]:
        try:
            while self._hold():
                # Each step looks first and changes something only when all is well: fed again, it fails again.
                if not self._inside:
                    self._read_preamble()
                elif self._wanted_bytes == FRAME_HEAD.size:
                    self._wanted_bytes += self._body_bytes()
                else:
                    yield self._read_frame()
        except (StreamDamaged, StreamVersion):
            self._input = memoryview(b"")  # what lies behind is nobody's
            raise

    def _hold(self) -> bool:
        """Hold what is wanted next, as far as it is there; tell whether it is."""
        missing = self._wanted_bytes - len(self._held)
        self._held += self._input[:missing]
        self._input = self._input[missing:]
        return len(self._held) == self._wanted_bytes

    def _read_preamble(self) -> None:
        magic, version, crc = PREAMBLE.unpack(self._held)
        if magic != MAGIC:
            raise _damaged(self._at_byte, _NO_STREAM)
        if self._held != preamble(version) or version == 0:
            raise _damaged(self._at_byte, "its first 16 bytes were altered")
        if version > FORMAT_VERSION:
            raise StreamVersion(
                f"the snapshot stream at byte {self._at_byte} has format {version}, this blockvirt reads up to "
                f"{FORMAT_VERSION}",
                correction="import it with the blockvirt version that made it, or a newer one",
                version=version,
                newest_version=FORMAT_VERSION,
                at_byte=self._at_byte,
            )
        self._inside, self._chain = True, crc
        self._digest = hashlib.sha256()
        self._next(FRAME_HEAD.size)

    def _body_bytes(self) -> int:
        """Return how long the body of the frame is whose head is held; nothing was allocated for it yet."""
        _, kind, body_bytes = FRAME_HEAD.unpack(self._held)
        if kind not in BODY_BYTES:
            raise _damaged(self._at_byte, f"a frame is of an unknown kind ({kind})")
        if (kind == Kind.HEADER) is not (self.coverage is None):
            raise _damaged(self._at_byte, "the header is not where it belongs")
        least, most = BODY_BYTES[kind]
        if not least <= body_bytes <= most:
            raise _damaged(self._at_byte, f"a frame of kind {kind} cannot have {body_bytes} bytes")
        return int(body_bytes)

    def _read_frame(self) -> StreamEvent:
        crc, kind, _ = FRAME_HEAD.unpack_from(self._held)
        body = bytes(memoryview(self._held)[FRAME_HEAD.size :])
        if frame_crc(kind, body, self._chain) != crc:
            raise _damaged(self._at_byte, "a frame was altered, or others were dropped, repeated or moved before it")
        event: StreamEvent
        if self.coverage is None:
            event = self._header(body)
            self.coverage = Coverage(event)
        elif kind == Kind.TRAILER:
            event = self._end(self.coverage, body)
            self.coverage, self._inside = None, False
        else:
            event = self._range(self.coverage, kind, body)
        self._chain = crc
        self._next(FRAME_HEAD.size if self._inside else PREAMBLE.size)
        return event

    def _header(self, body: bytes) -> StreamHeader:
        try:
            return decode_header(body)
        except ValueError as error:
            raise _damaged(self._at_byte, f"its header makes no sense: {error}") from error

    def _range(self, coverage: Coverage, kind: int, body: bytes) -> StreamData | StreamZeros:
        zero = kind == Kind.ZERO
        offset_bytes, length_bytes = ZERO_RANGE.unpack(body) if zero else RANGE.unpack_from(body)
        if objection := coverage.objection(offset_bytes, length_bytes):
            raise _damaged(self._at_byte, objection)
        event: StreamData | StreamZeros
        if zero:
            event = StreamZeros(offset_bytes, length_bytes)
        else:
            content = _content(kind, body[RANGE.size :], length_bytes)
            if content is None:
                raise _damaged(self._at_byte, f"a frame does not hold the {length_bytes} bytes that it announces")
            event = StreamData(offset_bytes, content)
        coverage.add(offset_bytes, length_bytes, zero=zero)
        return event

    def _end(self, coverage: Coverage, body: bytes) -> StreamEnd:
        frames, data_bytes, zero_bytes, sha256 = TRAILER.unpack(body)
        if (frames, data_bytes, zero_bytes) != (coverage.frames, coverage.data_bytes, coverage.zero_bytes):
            raise _damaged(self._at_byte, "its trailer counts other frames than there were")
        if sha256 != self._digest.digest():
            raise _damaged(self._at_byte, "the SHA-256 in its trailer does not fit")
        if coverage.covered_bytes != coverage.header.changed_bytes:
            raise _damaged(self._at_byte, "its ranges cover less than the changed bytes that its header announced")
        return StreamEnd(self._at_byte + len(self._held), frames, data_bytes, zero_bytes, sha256)

    def _next(self, wanted_bytes: int) -> None:
        """Let go of what is held, and of nothing before: ``wanted_bytes`` of what follows come next."""
        self._digest.update(self._held)
        self._at_byte += len(self._held)
        self._held = bytearray()
        self._wanted_bytes = wanted_bytes


def _content(kind: int, payload: bytes, length_bytes: int) -> bytes | None:
    """Return the ``length_bytes`` bytes that a frame's payload stands for; None where it stands for anything else."""
    if kind == Kind.RAW:
        return payload if len(payload) == length_bytes else None
    if not len(payload) < length_bytes <= STREAM_MAX_DATA_BYTES:
        return None
    return decompress(payload, length_bytes)


def _damaged(at_byte: int, reason: str) -> StreamDamaged:
    return StreamDamaged(
        f"the snapshot stream is damaged at byte {at_byte}: {reason}",
        correction="transfer it again, or export the snapshot again; nothing of a damaged stream may be kept",
        at_byte=at_byte,
    )
