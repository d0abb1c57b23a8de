"""What the transmission phase makes of a request, and how it answers. Pure.

``judge`` gives the verdict on a request header; ``SimpleReplies`` and ``StructuredReplies`` build the answers. Errors
follow proto.md, "Error values", and where that is silent what most servers do (``docs/protocol.md`` has the table).
"""

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from blockvirt.errors import BlockvirtError
from blockvirt.limits import NBD_MAX_PAYLOAD_BYTES
from blockvirt.nbd import constants as c
from blockvirt.nbd.messages import CHUNK, DATA_CHUNK, SIMPLE_REPLY, error_chunk

OK = 0

# What is answered on the spot, in great numbers: SIMPLE_REPLY and DATA_CHUNK with all that is always the same in one
# piece, and the cookie as it came.
SUCCESS_HEAD = struct.pack(">II", c.SIMPLE_REPLY_MAGIC, OK)
SUCCESS = struct.Struct(">8s8s")
"""SUCCESS_HEAD, cookie."""
DATA_HEAD = struct.pack(">IHH", c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE, c.REPLY_OFFSET_DATA)
DATA = struct.Struct(">8s8sIQ")
"""DATA_HEAD, cookie, payload length (the offset's 8 bytes more than the data's), offset."""


@dataclass(frozen=True, slots=True)
class ExportView:
    """What a session knows of its export; fixed at NBD_OPT_GO (a grown volume shows its size to new sessions)."""

    size_bytes: int
    read_only: bool
    fast_zero: bool
    structured: bool
    status: bool
    """Whether the client may ask for block status (it selected a metadata context of this export)."""


_ALLOWED_FLAGS = {
    # FUA: "in which case the server MUST accept all commands with this bit set (even by ignoring the bit)"
    c.CMD_READ: c.CMD_FLAG_FUA | c.CMD_FLAG_DF,
    c.CMD_WRITE: c.CMD_FLAG_FUA,
    c.CMD_FLUSH: c.CMD_FLAG_FUA,
    c.CMD_TRIM: c.CMD_FLAG_FUA,
    c.CMD_CACHE: c.CMD_FLAG_FUA,
    c.CMD_WRITE_ZEROES: c.CMD_FLAG_FUA | c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FAST_ZERO,
    c.CMD_BLOCK_STATUS: c.CMD_FLAG_FUA | c.CMD_FLAG_REQ_ONE,
}
_CHANGES = frozenset({c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES})
_PAST_END = {  # "SHOULD return NBD_ENOSPC if it receives a write request including ... beyond the size of the device"
    c.CMD_WRITE: errno.ENOSPC,
    c.CMD_WRITE_ZEROES: errno.ENOSPC,
}


def judge(export: ExportView, flags: int, command: int, offset: int, length: int) -> tuple[int, str]:
    """Return (errno, text for people) for a request; errno 0 means that it may be carried out.

    Offsets and lengths are as they came (64 and 32 bits, unsigned); Python's integers do not wrap. NBD_CMD_DISC is not
    judged: it has no reply.
    """
    allowed = _ALLOWED_FLAGS.get(command)
    if allowed is None:  # "SHOULD return NBD_EINVAL if it receives an unknown command"
        return errno.EINVAL, f"unknown command {command}"
    if flags & ~allowed:  # "SHOULD return NBD_EINVAL if it receives an unknown command flag"
        return errno.EINVAL, f"command flags {flags:#x} are not allowed for {c.COMMAND_NAMES[command]}"
    if flags & c.CMD_FLAG_DF and not export.structured:  # "MUST NOT be set unless the flags include SEND_DF"
        return errno.EINVAL, "the DF flag needs structured replies"
    if flags & c.CMD_FLAG_FAST_ZERO and not export.fast_zero:
        return errno.EINVAL, "fast zeroing was not advertised"
    if command in _CHANGES and export.read_only:  # "SHOULD return NBD_EPERM ... on a read-only export"
        return errno.EPERM, "the export is read-only"
    if command == c.CMD_FLUSH:  # offset and length are "reserved"; other servers ignore them, so do we
        return OK, ""
    if command in (c.CMD_READ, c.CMD_WRITE) and length > NBD_MAX_PAYLOAD_BYTES:
        return errno.EINVAL, f"a payload of {length} bytes: at most {NBD_MAX_PAYLOAD_BYTES} are allowed"
    if command == c.CMD_BLOCK_STATUS and not export.status:
        return errno.EINVAL, "no metadata context was negotiated"
    if command == c.CMD_BLOCK_STATUS and length == 0:
        return errno.EINVAL, "block status of nothing"
    if offset + length > export.size_bytes:
        text = f"{length} bytes at {offset} reach past the end at {export.size_bytes}"
        return _PAST_END.get(command, errno.EINVAL), text
    return OK, ""


def wire_error(code: int) -> int:
    """Return the NBD error value for an errno: only those of proto.md, "Error values", ever go out."""
    return c.WIRE_ERRORS.get(code, c.WIRE_ERRORS[errno.EIO])


def explain(error: BaseException) -> tuple[int, str]:
    """Return (errno, text for people) for what a volume raised. A surprise is EIO, without its inner details."""
    if isinstance(error, BlockvirtError):
        text = f"{error.message} ({error.correction})" if error.correction else error.message
        return error.nbd_errno, text
    if isinstance(error, OSError) and error.errno in c.WIRE_ERRORS:
        return error.errno, error.strerror or ""
    if isinstance(error, MemoryError):
        return errno.ENOMEM, "out of memory"
    return errno.EIO, "internal error; the server's log has the details"


class Replies(Protocol):
    """How a session's replies look; one kind for all of a session."""

    def data(self, cookie: int, offset: int, length: int) -> bytes:
        """Return what goes out before the ``length`` bytes read at ``offset``; length is not 0."""

    def no_data(self, cookie: int) -> bytes:
        """Return the reply to a read of nothing."""

    def error(self, cookie: int, code: int, text: str) -> bytes:
        """Return the reply that says that the request failed with errno ``code``."""


def done(cookie: int) -> bytes:
    """Return the reply to a request other than READ and BLOCK_STATUS that succeeded.

    "If structured replies have been negotiated, a simple reply MAY be used as a reply to any request other than
    NBD_CMD_READ, but only if the reply has no data payload": it is the shorter one.
    """
    return SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, OK, cookie)


def all_done(cookies: Sequence[bytes]) -> bytes:
    """Return ``done`` for each of some cookies, which are as they came."""
    return SUCCESS_HEAD + SUCCESS_HEAD.join(cookies)


class SimpleReplies:
    """ "Simple reply message": the only kind that the Linux kernel's client knows."""

    def data(self, cookie: int, offset: int, length: int) -> bytes:
        """Return the header before the data."""
        return SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, OK, cookie)

    def no_data(self, cookie: int) -> bytes:
        """Return the reply to a read of nothing."""
        return SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, OK, cookie)

    def error(self, cookie: int, code: int, text: str) -> bytes:
        """Return an error; a simple reply has no room for the text."""
        return SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, wire_error(code), cookie)


class StructuredReplies:
    """ "Structured reply chunk message": one OFFSET_DATA chunk with DONE per read, so DF is always honoured."""

    def data(self, cookie: int, offset: int, length: int) -> bytes:
        """Return the chunk header and offset before the data."""
        return DATA_CHUNK.pack(
            c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE, c.REPLY_OFFSET_DATA, cookie, length + 8, offset
        )

    def no_data(self, cookie: int) -> bytes:
        """Return a NONE chunk: "each chunk MUST describe at least one byte", and a read MUST NOT be answered simply."""
        return CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE, c.REPLY_NONE, cookie, 0)

    def error(self, cookie: int, code: int, text: str) -> bytes:
        """Return an ERROR chunk: "SHOULD prefer sending errors via a structured reply", for the text in it."""
        return error_chunk(cookie, wire_error(code), text)
