"""Sessions that no proper client has: what is sent, in which pieces, and how it ends, all of it from a seed. Pure.

A script knows the volume that is there to be hurt, and no name of any other.
"""

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from blockvirt.device import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_SINCE
from blockvirt.limits import NBD_MAX_OPTION_BYTES, NBD_MAX_OPTIONS, NBD_MAX_PAYLOAD_BYTES
from blockvirt.nbd import constants as c
from blockvirt.nbd.messages import CLIENT_FLAGS, OPTION, REQUEST, pack_context_request, pack_info_request
from blockvirt.units import KIB, MIB

VICTIM = "victim"
SNAPSHOTS = ("victim@old", "victim@new")
VICTIM_BYTES = 48 * MIB
TOO_MUCH_BYTES = 40 * MIB
"""More than a payload may have, although the volume is larger."""

_CONTEXTS = (BASE_ALLOCATION, ALLOCATION_DEPTH, f"{DIRTY_SINCE}old", "base:", "qemu:", "nowhere:nothing", "")
_OPTIONS = (c.OPT_LIST, c.OPT_INFO, c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT, c.OPT_STARTTLS, 0xDEAD)
_LARGEST_SENT_BYTES = 2 * MIB
_NUMBERS = (0, 1, 2, 511, 4095, NBD_MAX_OPTION_BYTES, NBD_MAX_PAYLOAD_BYTES, VICTIM_BYTES, 1 << 31, 1 << 32, 1 << 63)
_OPTION_FIELDS = ((0, 8), (8, 4), (12, 4), (16, 4))
_REQUEST_FIELDS = ((0, 4), (4, 2), (6, 2), (8, 8), (16, 8), (24, 4))


class Kind(StrEnum):
    """What a session is like."""

    FRAMED = "framed sessions"
    """Each message has the length that it says; contents may be wrong. Every request must be answered once."""
    DOOMED = "doomed sessions"
    """Ends with what no server may go on after: it must close the connection, although the client does not."""
    MUTATED = "mutated sessions"
    """Damaged anywhere. The server may do anything but harm."""


class Ending(StrEnum):
    """What the client does when all is sent."""

    WAIT = "ended by the server"
    FINISH = "half-closed"
    RESET = "reset"
    CLOSE = "closed"
    STALL = "stalled and closed"


@dataclass(frozen=True, slots=True)
class Script:
    """One session."""

    kind: Kind
    ending: Ending
    is_tcp: bool
    reads: bool
    """Takes replies while it sends."""
    pieces: tuple[bytes, ...]
    rest_s: float
    """That a client rests which stalls."""
    options: int = 0
    """Of a framed session: so many options are to be answered."""
    lengths: dict[int, int] = field(default_factory=dict)
    """Of a framed session: of each request by its cookie the bytes that a reply without an error brings."""
    is_structured: bool = False


@dataclass(slots=True)
class _Message:
    data: bytearray
    fields: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class _Plan:
    """A session that goes well."""

    options: list[_Message]
    requests: list[_Message]
    lengths: dict[int, int]
    is_structured: bool


def script_of(seed: int) -> Script:
    """Return the session of a seed."""
    dice = random.Random(seed)
    kind = dice.choices((Kind.FRAMED, Kind.DOOMED, Kind.MUTATED), (2, 1, 7))[0]
    plan = _plan(dice)
    is_tcp, reads, rest_s = dice.random() < 0.5, True, 0.0
    if kind is Kind.MUTATED:
        ending = dice.choices(tuple(Ending)[1:], (4, 3, 3, 1))[0]
        reads = ending is Ending.FINISH or dice.random() < 0.6
        rest_s = dice.uniform(0.0, 0.03)
        messages = [*plan.options, *plan.requests]
        for _ in range(dice.choice((1, 1, 2, 3, 6))):
            dice.choice(_MUTATIONS)(dice, messages)
        content = b"".join(each.data for each in messages)
        if dice.random() < 0.2:
            content = content[: dice.randrange(len(content) + 1)]
        flags = CLIENT_FLAGS.pack(3 if dice.random() < 0.95 else dice.getrandbits(32))
        return Script(kind, ending, is_tcp, reads, _pieces(dice, flags + content), rest_s)
    if kind is Kind.DOOMED:
        content = _doomed(dice, plan)
        return Script(kind, Ending.WAIT, is_tcp, reads, _pieces(dice, content), rest_s)
    content = CLIENT_FLAGS.pack(3) + b"".join(each.data for each in (*plan.options, *plan.requests))
    return Script(
        kind,
        Ending.WAIT,
        is_tcp,
        reads,
        _pieces(dice, content + _request(c.CMD_DISC)),
        rest_s,
        len(plan.options),
        plan.lengths,
        plan.is_structured,
    )


def _pieces(dice: random.Random, content: bytes) -> tuple[bytes, ...]:
    cuts = sorted(dice.randrange(len(content) + 1) for _ in range(dice.choice((0, 0, 1, 2, 7))))
    return tuple(content[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(content)], strict=True))


def _option(number: int, data: bytes = b"") -> _Message:
    return _Message(bytearray(OPTION.pack(c.OPTION_MAGIC, number, len(data)) + data), _OPTION_FIELDS)


def _request(command: int, cookie: int = 0, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
    return REQUEST.pack(c.REQUEST_MAGIC, flags, command, cookie, offset, length)


def _plan(dice: random.Random) -> _Plan:
    export = dice.choice((VICTIM, VICTIM, *SNAPSHOTS))
    is_structured = dice.random() < 0.6
    options = [_option(c.OPT_STRUCTURED_REPLY)] if is_structured else []
    options += [_some_option(dice, export) for _ in range(dice.choice((0, 1, 2, 5)))]
    options.append(_option(c.OPT_GO, pack_info_request(export, dice.sample(range(5), dice.randrange(4)))))
    requests, lengths = [], {}
    for cookie in range(1, dice.choice((1, 3, 8, 40)) + 1):
        message, length = _some_request(dice, cookie)
        requests.append(message)
        lengths[cookie] = length
    return _Plan(options, requests, lengths, is_structured)


def _some_option(dice: random.Random, export: str) -> _Message:
    number = dice.choice(_OPTIONS)
    data = b""
    if number == c.OPT_INFO:
        data = pack_info_request(dice.choice((export, "nobody", "../../etc")), range(dice.randrange(5)))
    elif number in (c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT):
        data = pack_context_request(export, dice.sample(_CONTEXTS, dice.randrange(4)))
    elif number == 0xDEAD:
        data = dice.randbytes(dice.choice((0, 3, 4096, NBD_MAX_OPTION_BYTES)))
    if dice.random() < 0.1:  # its outer length fits, its inside does not
        data = data[: dice.randrange(len(data) + 1)] + dice.randbytes(dice.randrange(4))
    return _option(number, data)


def _some_request(dice: random.Random, cookie: int) -> tuple[_Message, int]:
    """Return a request with its payload, and what comes back of a read that succeeds."""
    command = dice.choices((c.CMD_READ, c.CMD_WRITE, dice.randrange(3, 8), dice.getrandbits(16)), (6, 6, 6, 1))[0]
    if command == c.CMD_DISC:
        command = c.CMD_FLUSH
    offset = dice.choice((0, dice.randrange(VICTIM_BYTES), VICTIM_BYTES - dice.randrange(9000), dice.getrandbits(64)))
    length = dice.choice((0, 1, 512, 4 * KIB, 64 * KIB, dice.randrange(200 * KIB)))
    if dice.random() < 0.03:
        length = dice.randrange(_LARGEST_SENT_BYTES)
    if command != c.CMD_WRITE and dice.random() < 0.03:
        length = dice.choice((NBD_MAX_PAYLOAD_BYTES, TOO_MUCH_BYTES, 0xFFFF_FFFF, dice.getrandbits(32)))
    flags = dice.choice((0, 0, 0, 0, c.CMD_FLAG_FUA, 1 << dice.randrange(5), dice.getrandbits(16)))
    payload = (struct.pack(">Q", cookie) * (length // 8 + 1))[:length] if command == c.CMD_WRITE else b""
    data = bytearray(_request(command, cookie, offset & 0xFFFF_FFFF_FFFF_FFFF, length, flags) + payload)
    return _Message(data, _REQUEST_FIELDS), length if command == c.CMD_READ else 0


def _doomed(dice: random.Random, plan: _Plan) -> bytes:
    """Return what begins well and must make the server hang up, though more is sent."""
    flags = CLIENT_FLAGS.pack(3)
    before = b"".join(each.data for each in plan.options[:-1])
    whole = b"".join(each.data for each in (*plan.options, *plan.requests))
    wrong_magic = c.REQUEST_MAGIC ^ (1 << dice.randrange(32))
    endless = OPTION.pack(c.OPTION_MAGIC, dice.choice((7, 99)), dice.choice((NBD_MAX_OPTION_BYTES + 1, 0xFFFF_FFFF)))
    last = dice.choice(
        (
            CLIENT_FLAGS.pack(4 << dice.randrange(30)),
            flags + before + OPTION.pack(c.OPTION_MAGIC ^ (1 << dice.randrange(64)), c.OPT_GO, 0),
            flags + before + endless,
            flags + before + bytes(_option(c.OPT_INFO, pack_info_request(VICTIM, ())).data) * (NBD_MAX_OPTIONS + 1),
            flags + before + bytes(_option(c.OPT_EXPORT_NAME, b"nobody\xff").data),
            flags + before + bytes(_option(c.OPT_ABORT).data),
            flags + whole + struct.pack(">I", wrong_magic) + bytes(24),
            flags + whole + _request(c.CMD_DISC),
        )
    )
    return last + dice.randbytes(dice.choice((0, 1, 5000)))


def _flip(dice: random.Random, messages: list[_Message]) -> None:
    data = dice.choice(messages).data
    for _ in range(dice.choice((1, 1, 2, 8))):
        if data:
            data[dice.randrange(min(len(data), 200))] ^= 1 << dice.randrange(8)


def _set(dice: random.Random, messages: list[_Message]) -> None:
    message = dice.choice(messages)
    at, size = dice.choice(message.fields)
    number = dice.choice((dice.getrandbits(64), dice.choice(_NUMBERS) + dice.randrange(-1, 2)))
    message.data[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, "big")


def _cut(dice: random.Random, messages: list[_Message]) -> None:
    data = dice.choice(messages).data
    del data[dice.randrange(len(data) + 1) :]


def _lengthen(dice: random.Random, messages: list[_Message]) -> None:
    dice.choice(messages).data.extend(dice.randbytes(dice.choice((1, 3, 28, 5000))))


def _repeat(dice: random.Random, messages: list[_Message]) -> None:
    at = dice.randrange(len(messages))
    messages[at:at] = [messages[at]] * dice.choice((1, 2, 70 if len(messages[at].data) < 9000 else 1))


def _swap(dice: random.Random, messages: list[_Message]) -> None:
    one, other = dice.randrange(len(messages)), dice.randrange(len(messages))
    messages[one], messages[other] = messages[other], messages[one]


def _leave_out(dice: random.Random, messages: list[_Message]) -> None:
    if len(messages) > 1:
        del messages[dice.randrange(len(messages))]


def _garbage(dice: random.Random, messages: list[_Message]) -> None:
    data = bytearray(dice.randbytes(dice.choice((1, 20, 300, 70_000))))
    messages.insert(dice.randrange(len(messages) + 1), _Message(data, ((0, 8),)))


def _half(dice: random.Random, messages: list[_Message]) -> None:
    """Begin a write of any size and never end it."""
    length = dice.choice((4 * KIB, 200 * KIB, 1 * MIB, NBD_MAX_PAYLOAD_BYTES, TOO_MUCH_BYTES, 0xFFFF_FFFF))
    data = _request(c.CMD_WRITE, dice.getrandbits(64), 0, length) + bytes(dice.randrange(min(length, 300 * KIB)))
    messages.append(_Message(bytearray(data), _REQUEST_FIELDS))


_MUTATIONS: tuple[Callable[[random.Random, list[_Message]], None], ...] = (
    _flip,
    _set,
    _set,
    _cut,
    _lengthen,
    _repeat,
    _swap,
    _leave_out,
    _garbage,
    _half,
)
