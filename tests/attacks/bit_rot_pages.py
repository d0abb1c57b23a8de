"""Which bytes of LMDB's ``data.mdb`` mean something: a walk over all pages in use. Pure: bytes in, spans out.

LMDB 0.9, data version 1, 64 bits, little-endian; layout as in liblmdb's mdb.c (struct MDB_page, MDB_node, MDB_db,
MDB_meta). What lies between nodes, or behind the last one, means nothing, and neither do free pages.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

_HEADER_BYTES = 16
_BRANCH, _LEAF, _OVERFLOW = 1, 2, 4
_BIG, _SUB = 1, 2  # of a node: its value is on pages of its own; it is a table
_NODE = struct.Struct("<HHHH")
_DB = struct.Struct("<IHHQQQQQ")  # pad, flags, depth, branch pages, leaf pages, overflow pages, entries, root
_NO_PAGE = (1 << 64) - 1


class Part(StrEnum):
    """What a span is."""

    META = "meta page"
    HEADER = "page header"
    NODE = "node header"
    KEY = "key"
    VALUE = "value"
    TABLE = "table record"
    FREE_LIST = "free list"


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of the file that mean something."""

    part: Part
    start: int
    length: int
    table: str = ""
    """Of a key or a value: the table's name."""
    key: bytes = b""
    """Of a value: its row's key."""
    between: tuple[bytes, bytes] | None = None
    """Of a branch page's key: the last key of the subtree before it, and the first of its own."""


class DataFile:
    """The spans of a data file."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.page_bytes: int = struct.unpack_from("<I", content, _HEADER_BYTES + 24)[0]
        metas = [self._meta_at(page) for page in (0, 1)]
        self._meta = max(metas, key=lambda at: struct.unpack_from("<Q", content, at + 128)[0])
        self._used = {0, 1}
        self.spans = list(self._walk())

    def _meta_at(self, page: int) -> int:
        return page * self.page_bytes + _HEADER_BYTES

    def free_pages(self) -> list[int]:
        """Return the pages that nothing uses."""
        return [page for page in range(len(self._content) // self.page_bytes) if page not in self._used]

    def _walk(self) -> Iterator[Span]:
        at = self._meta
        yield Span(Part.META, at, 8)  # magic, version; the address behind them means nothing, nor does the map's size
        yield Span(Part.META, at + 24, 8)  # page size and flags, in the free list's record
        for record in (at + 24, at + 72):
            yield Span(Part.META, record + 6, 42)
        yield Span(Part.META, at + 120, 16)  # last page, transaction
        yield from self._tree(at + 24, "", is_free_list=True)
        yield from self._tree(at + 72, "", is_free_list=False)

    def _tree(self, record: int, table: str, *, is_free_list: bool) -> Iterator[Span]:
        root = _DB.unpack_from(self._content, record)[7]
        if root != _NO_PAGE:
            yield from self._page(root, table, is_free_list=is_free_list)

    def _page(self, page: int, table: str, *, is_free_list: bool) -> Iterator[Span]:
        self._used.add(page)
        base = page * self.page_bytes
        flags, lower = struct.unpack_from("<HH", self._content, base + 10)
        yield Span(Part.HEADER, base, 8, table)
        yield Span(Part.HEADER, base + 10, lower - 10, table)  # with the offsets of the nodes
        for number, offset in enumerate(struct.unpack_from(f"<{(lower - 16) // 2}H", self._content, base + 16)):
            node = base + offset
            low, high, node_flags, key_bytes = _NODE.unpack_from(self._content, node)
            yield Span(Part.NODE, node, 8, table)
            if key_bytes and (flags & _LEAF or number):  # LMDB never looks at a branch page's first key
                between = (self._edge(page, number - 1, -1), self._edge(page, number, 0)) if flags & _BRANCH else None
                part = Part.FREE_LIST if is_free_list else Part.KEY
                yield Span(part, node + 8, key_bytes, table, between=between)
            value = node + 8 + key_bytes
            if flags & _BRANCH:
                yield from self._page(low | high << 16 | node_flags << 32, table, is_free_list=is_free_list)
                continue
            key = self._content[node + 8 : value]
            length = low | high << 16
            if node_flags & _SUB:
                yield Span(Part.TABLE, value + 4, 44, key.decode())
                yield from self._tree(value, key.decode(), is_free_list=False)
            else:
                yield from self._value(value, length, node_flags, Span(_part(is_free_list), 0, 0, table, key))

    def _edge(self, page: int, number: int, place: int) -> bytes:
        """Return the first (0) or last (-1) key on the leaves below a node of a page."""
        base = page * self.page_bytes
        flags, lower = struct.unpack_from("<HH", self._content, base + 10)
        node = base + struct.unpack_from(f"<{(lower - 16) // 2}H", self._content, base + 16)[number]
        low, high, top, key_bytes = _NODE.unpack_from(self._content, node)
        if flags & _BRANCH:
            return self._edge(low | high << 16 | top << 32, place, place)
        return self._content[node + 8 : node + 8 + key_bytes]

    def _value(self, at: int, length: int, flags: int, like: Span) -> Iterator[Span]:
        if flags & _BIG:
            (page,) = struct.unpack_from("<Q", self._content, at)
            (count,) = struct.unpack_from("<I", self._content, page * self.page_bytes + 12)
            self._used |= set(range(page, page + count))
            yield Span(Part.NODE, at, 8, like.table)
            yield Span(Part.HEADER, page * self.page_bytes, 8)
            yield Span(Part.HEADER, page * self.page_bytes + 10, 6)
            at = page * self.page_bytes + _HEADER_BYTES
        if length:
            yield Span(like.part, at, length, like.table, like.key)


def _part(is_free_list: bool) -> Part:
    return Part.FREE_LIST if is_free_list else Part.VALUE
