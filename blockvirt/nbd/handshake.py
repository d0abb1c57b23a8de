"""The handshake phase as a pure state machine: bytes in, replies and effects out.

``receive`` takes what the client sent, ``advance`` works on it until it needs something from outside (an ``Effect``) or
more bytes (None). Whoever drives it sends ``take_output()``, carries the effect out, and calls one of the ``answer_*``
methods. proto.md, "Fixed newstyle negotiation" and "Option types".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import chain, islice

from blockvirt.device import ExportInfo
from blockvirt.errors import BlockvirtError, InvalidRequest, NotFound, ShuttingDown
from blockvirt.limits import (
    NBD_MAX_LISTED_CONTEXTS,
    NBD_MAX_OPTION_BYTES,
    NBD_MAX_OPTIONS,
    NBD_MAX_PAYLOAD_BYTES,
    NBD_MIN_BLOCK_BYTES,
    NBD_PREFERRED_BLOCK_BYTES,
)
from blockvirt.nbd import constants as c
from blockvirt.nbd.messages import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    GREETING,
    OPTION,
    Malformed,
    TooBig,
    clip_text,
    info_block_size,
    info_export,
    info_text,
    meta_context,
    option_reply,
    parse_context_request,
    parse_info_request,
    parse_name,
    server_entry,
    transmission_flags,
)

GREETING_BYTES = GREETING.pack(c.INIT_MAGIC, c.OPTION_MAGIC, c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)


@dataclass(frozen=True, slots=True)
class ListExports:
    """Answer with ``answer_names``."""


@dataclass(frozen=True, slots=True)
class DescribeExport:
    """Answer with ``answer_export`` or ``answer_error``; nothing may be opened."""

    name: str


@dataclass(frozen=True, slots=True)
class FindContexts:
    """Answer with ``answer_contexts`` or ``answer_error``. A query of "" finds all contexts of the export."""

    name: str
    queries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OpenExport:
    """Open the export for this client and answer with ``answer_export`` or ``answer_error``."""

    name: str
    contexts: tuple[str, ...] = ()
    """The metadata contexts that the client selected for this export."""


@dataclass(frozen=True, slots=True)
class Hangup:
    """Send the output and close the connection. ``reason`` is for the log; ``polite`` if the client asked for it."""

    reason: str
    polite: bool = False


@dataclass(frozen=True, slots=True)
class Negotiated:
    """The result: transmission begins once the output is sent."""

    export: str
    structured: bool
    contexts: tuple[str, ...] = ()
    """The metadata contexts of block status replies, numbered from FIRST_CONTEXT_ID."""


Question = ListExports | DescribeExport | FindContexts | OpenExport
Effect = Question | Hangup | Negotiated


class _State(Enum):
    CLIENT_FLAGS = auto()
    OPTIONS = auto()
    WAITING = auto()
    OVER = auto()


class Handshake:
    """One connection's handshake. Its memory is bounded by one option and what ``receive`` is given at once."""

    def __init__(self) -> None:
        self._state = _State.CLIENT_FLAGS
        self._input = bytearray()
        self._output: list[bytes] = [GREETING_BYTES]
        self._options = 0
        self._fixed = False
        self._no_zeroes = False
        self._structured = False
        self._selected: tuple[str, tuple[str, ...]] = ("", ())
        self._option = 0
        self._finding: FindContexts | None = None
        self._answer: Callable[[ExportInfo], Effect | None] | None = None
        self._handlers: dict[int, Callable[[bytes], Effect | None]] = {
            c.OPT_EXPORT_NAME: self._export_name,
            c.OPT_ABORT: self._abort,
            c.OPT_LIST: self._list,
            c.OPT_INFO: self._info,
            c.OPT_GO: self._go,
            c.OPT_STRUCTURED_REPLY: self._structured_reply,
            c.OPT_LIST_META_CONTEXT: self._list_contexts,
            c.OPT_SET_META_CONTEXT: self._set_contexts,
        }

    def receive(self, data: bytes) -> None:
        """Take bytes from the client."""
        self._input += data

    def take_output(self) -> bytes:
        """Return what is to be sent now, and forget it."""
        output = b"".join(self._output)
        self._output.clear()
        return output

    def leftover(self) -> bytes:
        """Return what the client sent behind its last option: the beginning of its first requests."""
        return bytes(self._input)

    def advance(self) -> Effect | None:
        """Work on what has been received. None: more bytes are needed (or nothing is left to do)."""
        while self._state in (_State.CLIENT_FLAGS, _State.OPTIONS):
            step = self._client_flags if self._state is _State.CLIENT_FLAGS else self._next_option
            progressed, effect = step()
            if effect is not None:
                return effect
            if not progressed:
                return None
        return None

    def _client_flags(self) -> tuple[bool, Effect | None]:
        if len(self._input) < CLIENT_FLAGS.size:
            return False, None
        (flags,) = CLIENT_FLAGS.unpack_from(self._input)
        del self._input[: CLIENT_FLAGS.size]
        if flags & ~(c.CLIENT_FIXED_NEWSTYLE | c.CLIENT_NO_ZEROES):
            # "the server MUST drop the TCP connection if the client sets an unknown flag"
            return True, self._hangup(f"unknown client flags {flags:#x}")
        self._fixed = bool(flags & c.CLIENT_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & c.CLIENT_NO_ZEROES)
        self._state = _State.OPTIONS
        return True, None

    def _next_option(self) -> tuple[bool, Effect | None]:
        if len(self._input) < OPTION.size:
            return False, None
        magic, option, length = OPTION.unpack_from(self._input)
        if magic != c.OPTION_MAGIC:
            return True, self._hangup(f"an option with magic {magic:#x}: framing is lost")
        if length > NBD_MAX_OPTION_BYTES:
            return True, self._hangup(f"option {option} of {length} bytes: at most {NBD_MAX_OPTION_BYTES} are allowed")
        if len(self._input) < OPTION.size + length:
            return False, None
        data = bytes(self._input[OPTION.size : OPTION.size + length])
        del self._input[: OPTION.size + length]
        self._options += 1
        if self._options > NBD_MAX_OPTIONS:
            return True, self._hangup(f"more than {NBD_MAX_OPTIONS} options")
        self._option = option
        return True, self._handle(option, data)

    def _handle(self, option: int, data: bytes) -> Effect | None:
        if not self._fixed and option != c.OPT_EXPORT_NAME:
            # "This is the only valid option in nonfixed newstyle negotiation"
            return self._hangup(f"option {option} from a client without fixed newstyle")
        handler = self._handlers.get(option)
        if handler is None:
            # "Baseline": "Servers that receive messages which they do not implement MUST reply ... ERR_UNSUP". STARTTLS
            # ("NOTLS mode") and EXTENDED_HEADERS, with which every newer client begins, come here too.
            return self._refuse(c.REP_ERR_UNSUP, f"option {option} is not supported")
        try:
            return handler(data)
        except Malformed as error:
            if option == c.OPT_EXPORT_NAME:
                return self._hangup(f"EXPORT_NAME with {error}")
            return self._refuse(c.REP_ERR_TOO_BIG if isinstance(error, TooBig) else c.REP_ERR_INVALID, str(error))

    # --- options -------------------------------------------------------------------------------------------------

    def _export_name(self, data: bytes) -> Effect | None:
        name = parse_name(data)

        def opened(info: ExportInfo) -> Effect | None:
            flags = transmission_flags(info.capabilities, structured=self._structured)
            self._output.append(EXPORT_NAME_REPLY.pack(info.size_bytes, flags))
            if not self._no_zeroes:
                self._output.append(bytes(124))
            return self._begin(name)

        return self._ask(OpenExport(name, self._contexts_of(name)), opened)

    def _abort(self, data: bytes) -> Effect | None:
        self._reply(c.REP_ACK)  # "a server SHOULD ignore any data sent by the client"
        return self._hangup("the client aborted the handshake", polite=True)

    def _list(self, data: bytes) -> Effect | None:
        if data:
            raise Malformed("NBD_OPT_LIST has no data")
        self._state = _State.WAITING
        return ListExports()

    def _info(self, data: bytes) -> Effect | None:
        name, requests = parse_info_request(data)

        def described(info: ExportInfo) -> Effect | None:
            self._describe(info, requests)
            self._reply(c.REP_ACK)
            return None

        return self._ask(DescribeExport(name), described)

    def _go(self, data: bytes) -> Effect | None:
        name, requests = parse_info_request(data)

        def opened(info: ExportInfo) -> Effect | None:
            self._describe(info, requests)
            self._reply(c.REP_ACK)
            return self._begin(name)

        return self._ask(OpenExport(name, self._contexts_of(name)), opened)

    def _structured_reply(self, data: bytes) -> Effect | None:
        if data:
            raise Malformed("NBD_OPT_STRUCTURED_REPLY has no data")
        if self._structured:
            raise Malformed("structured replies were negotiated before")
        self._structured = True
        self._reply(c.REP_ACK)
        return None

    def _list_contexts(self, data: bytes) -> Effect | None:
        name, queries = self._context_request(data)
        # "If zero queries are sent, then the server MUST return all the metadata contexts"
        return self._find_contexts(name, _proper(queries) if queries else ("",))

    def _set_contexts(self, data: bytes) -> Effect | None:
        self._selected = "", ()  # "replaces all previously-set metadata contexts (including when this command fails)"
        name, queries = self._context_request(data)
        return self._find_contexts(name, _proper(queries))

    def _context_request(self, data: bytes) -> tuple[str, tuple[str, ...]]:
        if not self._structured:  # "a server SHOULD send NBD_REP_ERR_INVALID"
            raise Malformed("metadata contexts need structured replies: negotiate them first")
        return parse_context_request(data)

    def _find_contexts(self, name: str, queries: tuple[str, ...]) -> Effect:
        self._state = _State.WAITING
        self._finding = FindContexts(name, queries)
        return self._finding

    # --- answers from outside ------------------------------------------------------------------------------------

    def answer_names(self, names: Sequence[str]) -> None:
        """Answer ``ListExports``."""
        assert self._state is _State.WAITING
        for name in names:
            self._reply(c.REP_SERVER, server_entry(name))
        self._reply(c.REP_ACK)
        self._state = _State.OPTIONS

    def answer_export(self, info: ExportInfo) -> Effect | None:
        """Answer ``DescribeExport`` or ``OpenExport``; returns Negotiated where that was the last thing missing."""
        assert self._state is _State.WAITING
        assert self._answer is not None
        answer, self._answer = self._answer, None
        self._state = _State.OPTIONS
        return answer(info)

    def answer_contexts(self, found: Sequence[Sequence[str]]) -> None:
        """Answer ``FindContexts``: for each of its queries the names of the contexts that match it."""
        assert self._state is _State.WAITING
        assert self._finding is not None
        finding, self._finding = self._finding, None
        self._state = _State.OPTIONS
        if self._option == c.OPT_LIST_META_CONTEXT:
            for context in islice(dict.fromkeys(chain.from_iterable(found)), NBD_MAX_LISTED_CONTEXTS):
                self._reply(c.REP_META_CONTEXT, meta_context(0, context))  # "reserved and SHOULD be set to zero"
        else:
            # A wildcard "SHOULD NOT select any contexts": what selects a context is its own name
            selected = tuple(query for query, names in zip(finding.queries, found, strict=True) if query in names)
            for context_id, context in enumerate(selected, c.FIRST_CONTEXT_ID):
                self._reply(c.REP_META_CONTEXT, meta_context(context_id, context))
            self._selected = finding.name, selected
        self._reply(c.REP_ACK)

    def answer_error(self, error: BlockvirtError) -> Effect | None:
        """Answer ``DescribeExport``, ``FindContexts`` or ``OpenExport`` with what went wrong."""
        assert self._state is _State.WAITING
        self._answer = self._finding = None
        self._state = _State.OPTIONS
        if self._option == c.OPT_EXPORT_NAME:
            # "If the server is unwilling to allow the export, it MUST terminate the session"
            return self._hangup(f"EXPORT_NAME: {error.message}")
        if isinstance(error, NotFound):
            reply_type = c.REP_ERR_UNKNOWN
        elif isinstance(error, ShuttingDown):
            reply_type = c.REP_ERR_SHUTDOWN
        elif isinstance(error, InvalidRequest):
            reply_type = c.REP_ERR_INVALID
        else:
            reply_type = c.REP_ERR_POLICY
        text = f"{error.message} ({error.correction})" if error.correction else error.message
        return self._refuse(reply_type, text)

    # --- building replies ----------------------------------------------------------------------------------------

    def _ask(self, effect: Effect, answer: Callable[[ExportInfo], Effect | None]) -> Effect:
        self._state = _State.WAITING
        self._answer = answer
        return effect

    def _describe(self, info: ExportInfo, requests: frozenset[int]) -> None:
        flags = transmission_flags(info.capabilities, structured=self._structured)
        self._reply(c.REP_INFO, info_export(info.size_bytes, flags))
        # Our sizes are the defaults of "Size constraints"; to say so unasked is allowed, and useful in nbdinfo.
        self._reply(c.REP_INFO, info_block_size(NBD_MIN_BLOCK_BYTES, NBD_PREFERRED_BLOCK_BYTES, NBD_MAX_PAYLOAD_BYTES))
        if c.INFO_NAME in requests:
            self._reply(c.REP_INFO, info_text(c.INFO_NAME, info.name))
        if c.INFO_DESCRIPTION in requests and info.description:
            self._reply(c.REP_INFO, info_text(c.INFO_DESCRIPTION, info.description))

    def _contexts_of(self, name: str) -> tuple[str, ...]:
        # They count only "where the final time it was sent, it referred to the same export name"
        selected_of, contexts = self._selected
        return contexts if selected_of == name else ()

    def _begin(self, name: str) -> Negotiated:
        self._state = _State.OVER
        return Negotiated(name, self._structured, self._contexts_of(name))

    def _reply(self, reply_type: int, payload: bytes = b"") -> None:
        self._output.append(option_reply(self._option, reply_type, payload))

    def _refuse(self, reply_type: int, text: str) -> Effect | None:
        self._reply(reply_type, clip_text(text))
        return None

    def _hangup(self, reason: str, *, polite: bool = False) -> Hangup:
        self._state = _State.OVER
        return Hangup(reason, polite)


def _proper(queries: tuple[str, ...]) -> tuple[str, ...]:
    """Return each query once, without those that lack the colon behind a namespace: they find nothing."""
    return tuple(dict.fromkeys(query for query in queries if ":" in query))
