"""NBD messages as bytes: the layouts of proto.md, packed and parsed. Pure.

All numbers are in network byte order. Parsers of client data raise ``Malformed``; they never read past what they were
given and never allocate from a length that they have not checked.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from blockvirt.device import Capabilities
from blockvirt.limits import NBD_MAX_CONTEXT_QUERIES, NBD_MAX_NAME_BYTES
from blockvirt.nbd import constants as c

GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
EXPORT_NAME_REPLY = struct.Struct(">QH")
REQUEST = struct.Struct(">IHHQQI")
"""magic, command flags, type, cookie, offset, length."""
REQUEST_HEAD = struct.Struct(">Q8sQI")
"""The same with magic, command flags and type as one number, which one comparison tells, and the cookie as it came."""
SIMPLE_REPLY = struct.Struct(">IIQ")
"""magic, error, cookie."""
CHUNK = struct.Struct(">IHHQI")
"""magic, flags, type, cookie, payload length."""
DATA_CHUNK = struct.Struct(">IHHQIQ")
"""A chunk's header and the offset that begins an OFFSET_DATA payload."""
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_INFO_EXPORT = struct.Struct(">HQH")
_INFO_BLOCK_SIZE = struct.Struct(">HIII")
_ERROR_PAYLOAD = struct.Struct(">IH")
_DESCRIPTOR = struct.Struct(">II")

MAX_DESCRIPTOR_BYTES = 0xFFFF_F000
"""The longest extent in one 32-bit descriptor, cut to a multiple of 4 KiB."""


class Malformed(Exception):
    """A client message whose inside contradicts itself; its outer length was right, so framing is intact."""


class TooBig(Malformed):
    """A client message that asks for more than a limit allows."""


def request_head(flags: int, command: int) -> int:
    """Return the first number of REQUEST_HEAD."""
    return c.REQUEST_MAGIC << 32 | flags << 16 | command


def transmission_flags(capabilities: Capabilities, *, structured: bool) -> int:
    """Return the transmission flags of an export with ``capabilities`` ("Transmission flags").

    FLUSH and FUA are always offered: without SEND_FLUSH the Linux client turns a guest's fsync into nothing.
    """
    flags = c.FLAG_HAS_FLAGS | c.FLAG_SEND_FLUSH | c.FLAG_SEND_FUA | c.FLAG_SEND_CACHE
    if capabilities.read_only:
        flags |= c.FLAG_READ_ONLY
    else:
        flags |= c.FLAG_SEND_TRIM | c.FLAG_SEND_WRITE_ZEROES
        if capabilities.fast_zero:
            flags |= c.FLAG_SEND_FAST_ZERO
    if capabilities.multi_conn:
        flags |= c.FLAG_CAN_MULTI_CONN
    if structured:  # "MUST leave this flag clear if structured replies have not been negotiated"
        flags |= c.FLAG_SEND_DF
    return flags


def option_reply(option: int, reply_type: int, payload: bytes = b"") -> bytes:
    """Return one option reply ("Fixed newstyle negotiation")."""
    return OPTION_REPLY.pack(c.OPTION_REPLY_MAGIC, option, reply_type, len(payload)) + payload


def clip_text(text: str) -> bytes:
    """Return ``text`` as UTF-8 of at most 4096 bytes, cut between characters; the bound of every string we send."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= NBD_MAX_NAME_BYTES:
        return encoded
    return encoded[:NBD_MAX_NAME_BYTES].decode("utf-8", "ignore").encode()


def info_export(size_bytes: int, flags: int) -> bytes:
    """Return the payload of NBD_INFO_EXPORT."""
    return _INFO_EXPORT.pack(c.INFO_EXPORT, size_bytes, flags)


def info_block_size(minimum: int, preferred: int, maximum: int) -> bytes:
    """Return the payload of NBD_INFO_BLOCK_SIZE; all in bytes."""
    return _INFO_BLOCK_SIZE.pack(c.INFO_BLOCK_SIZE, minimum, preferred, maximum)


def info_text(kind: int, text: str) -> bytes:
    """Return the payload of NBD_INFO_NAME or NBD_INFO_DESCRIPTION."""
    return _U16.pack(kind) + clip_text(text)


def server_entry(name: str) -> bytes:
    """Return the payload of one NBD_REP_SERVER."""
    encoded = name.encode()
    return _U32.pack(len(encoded)) + encoded


def meta_context(context_id: int, name: str) -> bytes:
    """Return the payload of one NBD_REP_META_CONTEXT."""
    return _U32.pack(context_id) + name.encode()


def parse_name(raw: bytes) -> str:
    """Return an export name or query; raises Malformed if it is no string in the sense of proto.md, "Conventions"."""
    if len(raw) > NBD_MAX_NAME_BYTES:
        raise Malformed(f"a name of {len(raw)} bytes: at most {NBD_MAX_NAME_BYTES} are allowed")
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("a name that is not UTF-8") from None
    if "\0" in name:
        raise Malformed("a name with a NUL in it")
    return name


def _counted(data: bytes, at: int) -> tuple[str, int]:
    if len(data) - at < 4:
        raise Malformed("the option ends before a length")
    (length,) = _U32.unpack_from(data, at)
    at += 4
    if length > len(data) - at:
        raise Malformed(f"a string of {length} bytes where {len(data) - at} are left")
    return parse_name(data[at : at + length]), at + length


def parse_info_request(data: bytes) -> tuple[str, frozenset[int]]:
    """Return (export name, information requests) of NBD_OPT_INFO or NBD_OPT_GO; raises Malformed."""
    name, at = _counted(data, 0)
    if len(data) - at < 2:
        raise Malformed("the option ends before the number of information requests")
    (count,) = _U16.unpack_from(data, at)
    at += 2
    if len(data) - at != 2 * count:
        raise Malformed(f"{count} information requests in {len(data) - at} bytes")
    return name, frozenset(struct.unpack_from(f">{count}H", data, at))


def parse_context_request(data: bytes) -> tuple[str, tuple[str, ...]]:
    """Return (export name, queries) of NBD_OPT_LIST_META_CONTEXT or NBD_OPT_SET_META_CONTEXT.

    Raises Malformed, and TooBig for more than NBD_MAX_CONTEXT_QUERIES.
    """
    name, at = _counted(data, 0)
    if len(data) - at < 4:
        raise Malformed("the option ends before the number of queries")
    (count,) = _U32.unpack_from(data, at)
    at += 4
    if count > (len(data) - at) // 4:  # each query has at least its length: bounds the loop by what was received
        raise Malformed(f"{count} queries in {len(data) - at} bytes")
    if count > NBD_MAX_CONTEXT_QUERIES:
        raise TooBig(f"{count} queries: at most {NBD_MAX_CONTEXT_QUERIES} are allowed")
    queries = []
    for _ in range(count):
        query, at = _counted(data, at)
        queries.append(query)
    if at != len(data):
        raise Malformed(f"{len(data) - at} bytes after the last query")
    return name, tuple(queries)


def pack_info_request(name: str, requests: Sequence[int]) -> bytes:
    """Return the payload of NBD_OPT_INFO or NBD_OPT_GO (the client's side)."""
    encoded = name.encode()
    return _U32.pack(len(encoded)) + encoded + struct.pack(f">H{len(requests)}H", len(requests), *requests)


def pack_context_request(name: str, queries: Sequence[str]) -> bytes:
    """Return the payload of NBD_OPT_LIST_META_CONTEXT or NBD_OPT_SET_META_CONTEXT (the client's side)."""
    encoded = name.encode()
    parts = [_U32.pack(len(encoded)), encoded, _U32.pack(len(queries))]
    for query in queries:
        parts += [_U32.pack(len(query.encode())), query.encode()]
    return b"".join(parts)


def error_chunk(cookie: int, wire_error: int, message: str) -> bytes:
    """Return a final NBD_REPLY_TYPE_ERROR chunk."""
    text = clip_text(message)
    payload = _ERROR_PAYLOAD.pack(wire_error, len(text)) + text
    return CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE, c.REPLY_ERROR, cookie, len(payload)) + payload


def status_chunk(cookie: int, context_id: int, descriptors: Sequence[tuple[int, int]], *, last: bool = True) -> bytes:
    """Return an NBD_REPLY_TYPE_BLOCK_STATUS chunk of (length in bytes, status) descriptors.

    ``last`` if no other context's chunk follows in this reply.
    """
    assert descriptors, "a block status reply has at least one descriptor"
    flat = [number for descriptor in descriptors for number in descriptor]
    payload = struct.pack(f">I{len(flat)}I", context_id, *flat)
    flags = c.REPLY_FLAG_DONE if last else 0
    return CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, flags, c.REPLY_BLOCK_STATUS, cookie, len(payload)) + payload


def descriptors_of(extents: Iterable[tuple[int, int]], *, most: int) -> list[tuple[int, int]]:
    """Return up to ``most`` block descriptors for (length in bytes, status) extents.

    Empty extents are left out, those past 32 bits split.
    """
    found: list[tuple[int, int]] = []
    for length_bytes, status in extents:
        left = length_bytes
        while left > 0 and len(found) < most:
            step = min(left, MAX_DESCRIPTOR_BYTES)
            found.append((step, status))
            left -= step
        if len(found) >= most:
            break
    return found


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """A structured reply chunk's header, as a client reads it."""

    flags: int
    kind: int
    cookie: int
    length_bytes: int

    @property
    def done(self) -> bool:
        """Whether this is the last chunk of its reply."""
        return bool(self.flags & c.REPLY_FLAG_DONE)
