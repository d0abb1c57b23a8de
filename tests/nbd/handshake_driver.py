"""A handshake machine in the hands of a test: fed with bytes, its effects answered from a table of exports."""

from blockvirt.device import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_SINCE, Capabilities, ExportInfo, context_matches
from blockvirt.errors import BlockvirtError, NotFound
from blockvirt.nbd import constants as c
from blockvirt.nbd.handshake import (
    GREETING_BYTES,
    DescribeExport,
    Effect,
    FindContexts,
    Handshake,
    ListExports,
    OpenExport,
)
from blockvirt.nbd.messages import CLIENT_FLAGS, OPTION, OPTION_REPLY, pack_context_request, pack_info_request

FLAGS = CLIENT_FLAGS.pack(c.CLIENT_FIXED_NEWSTYLE | c.CLIENT_NO_ZEROES)
INFO = ExportInfo("v", "a volume", 1 << 30, 65536, Capabilities())
RW_FLAGS = 0b1101_0110_1101  # everything but read-only, rotational, DF, resize
DF = 1 << 7
CONTEXTS = (BASE_ALLOCATION, ALLOCATION_DEPTH, DIRTY_SINCE + "a", DIRTY_SINCE + "b")
"""What every export of a driver has."""


def option(number: int, data: bytes = b"", magic: int = c.OPTION_MAGIC) -> bytes:
    return OPTION.pack(magic, number, len(data)) + data


def go(name: str = "v", requests: tuple[int, ...] = ()) -> bytes:
    return option(c.OPT_GO, pack_info_request(name, requests))


def contexts(number: int, name: str, *queries: str) -> bytes:
    return option(number, pack_context_request(name, queries))


class Driver:
    """Feeds a machine and answers its effects from a table of exports."""

    def __init__(self, exports: dict[str, ExportInfo | BlockvirtError] | None = None) -> None:
        self.exports = {"v": INFO} if exports is None else exports
        self.contexts: tuple[str, ...] = CONTEXTS
        self.machine = Handshake()
        assert self.machine.take_output() == GREETING_BYTES
        self.effects: list[Effect] = []
        self.output = b""

    def feed(self, data: bytes) -> None:
        self.machine.receive(data)
        effect = self.machine.advance()
        while effect is not None:
            self.effects.append(effect)
            if isinstance(effect, ListExports):
                self.machine.answer_names(sorted(self.exports))
                effect = self.machine.advance()
            elif isinstance(effect, DescribeExport | FindContexts | OpenExport):
                found = self.exports.get(effect.name, NotFound(f"no {effect.name}"))
                if isinstance(found, ExportInfo) and isinstance(effect, FindContexts):
                    self.machine.answer_contexts([self.matching(query) for query in effect.queries])
                    effect = self.machine.advance()
                elif isinstance(found, ExportInfo):
                    effect = self.machine.answer_export(found) or self.machine.advance()
                else:
                    effect = self.machine.answer_error(found) or self.machine.advance()
            else:
                effect = None
        self.output += self.machine.take_output()

    def matching(self, query: str) -> list[str]:
        """The contexts that a directory would find."""
        return [context for context in self.contexts if context_matches(context, query)]

    def replies(self) -> list[tuple[int, int, bytes]]:
        """(option, type, payload) of each reply sent since the last call."""
        found, at = [], 0
        while at < len(self.output):
            magic, number, kind, length = OPTION_REPLY.unpack_from(self.output, at)
            assert magic == c.OPTION_REPLY_MAGIC
            at += OPTION_REPLY.size
            found.append((number, kind, self.output[at : at + length]))
            at += length
        assert at == len(self.output)
        self.output = b""
        return found

    def kinds(self) -> list[int]:
        return [kind for _option, kind, _payload in self.replies()]

    @property
    def last(self) -> Effect:
        return self.effects[-1]


def begun(exports: dict[str, ExportInfo | BlockvirtError] | None = None) -> Driver:
    driver = Driver(exports)
    driver.feed(FLAGS)
    return driver
