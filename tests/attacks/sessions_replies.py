"""What must come back in a session whose messages have the lengths that they say. Pure."""

import struct

from blockvirt.nbd import constants as c
from blockvirt.nbd.messages import CHUNK, GREETING, OPTION_REPLY, SIMPLE_REPLY
from tests.attacks.sessions_script import Script

ERRORS = frozenset({1, 5, 12, 22, 28, 75, 95})
"""What docs/protocol.md says may go out; ESHUTDOWN does not."""


def wrong_replies(script: Script, received: bytes) -> str:
    """Say what is wrong with all that came back in a framed session; nothing: each request was answered once."""
    try:
        at = _after_options(script, received)
        answered = _structured(received, at) if script.is_structured else _simple(script, received, at)
    except struct.error:
        return f"the replies end in the middle of one, after {len(received)} bytes"
    except ValueError as error:
        return str(error)
    if sorted(answered) != sorted(script.lengths):
        missing, more = set(script.lengths) - set(answered), [one for one in answered if answered.count(one) > 1]
        return f"each request is answered once: {sorted(missing)} are not, {more} more than once"
    return ""


def _after_options(script: Script, received: bytes) -> int:
    magic, options, _ = GREETING.unpack_from(received)
    if (magic, options) != (c.INIT_MAGIC, c.OPTION_MAGIC):
        raise ValueError("no greeting")
    at, left = GREETING.size, script.options
    while left:
        magic, _, kind, length = OPTION_REPLY.unpack_from(received, at)
        if magic != c.OPTION_REPLY_MAGIC:
            raise ValueError(f"no option reply at byte {at}: magic {magic:#x}")
        left -= kind == c.REP_ACK or bool(kind & c.REP_ERROR_BIT)
        at += OPTION_REPLY.size + length
    return at


def _simple(script: Script, received: bytes, at: int) -> list[int]:
    answered = []
    while at < len(received):
        magic, error, cookie = SIMPLE_REPLY.unpack_from(received, at)
        if magic != c.SIMPLE_REPLY_MAGIC or cookie not in script.lengths:
            raise ValueError(f"no reply at byte {at}: magic {magic:#x}, cookie {cookie}")
        _known(error)
        at += SIMPLE_REPLY.size + (0 if error else script.lengths[cookie])
        answered.append(cookie)
    if at != len(received):
        raise ValueError(f"{at - len(received)} bytes of data are missing at the end")
    return answered


def _structured(received: bytes, at: int) -> list[int]:
    answered = []
    while at < len(received):
        (magic,) = struct.unpack_from(">I", received, at)
        if magic == c.SIMPLE_REPLY_MAGIC:
            _, error, cookie = SIMPLE_REPLY.unpack_from(received, at)
            _known(error)
            at += SIMPLE_REPLY.size
            answered.append(cookie)
            continue
        magic, flags, kind, cookie, length = CHUNK.unpack_from(received, at)
        if magic != c.STRUCTURED_REPLY_MAGIC:
            raise ValueError(f"no reply at byte {at}: magic {magic:#x}")
        if kind & c.REPLY_ERROR_BIT:
            _known(struct.unpack_from(">I", received, at + CHUNK.size)[0])
        at += CHUNK.size + length
        if flags & c.REPLY_FLAG_DONE:
            answered.append(cookie)
    if at != len(received):
        raise ValueError(f"{at - len(received)} bytes of a chunk are missing at the end")
    return answered


def _known(error: int) -> None:
    if error and error not in ERRORS:
        raise ValueError(f"error {error} must not go out")
