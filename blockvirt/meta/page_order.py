"""What LMDB's own verifier leaves out: rows that a lookup does not reach, meta pages out of turn, fields for writers.

A lookup goes down from branch page to branch page by their keys alone. Where such a key is wrong, a scan still yields
every row in order, and a lookup of one of them ends on a page that does not have it. Where a page's nodes begin, how
long a value is that nobody reads, and what kind a table is are for writers: the next change would move what is sound.
Layout: liblmdb's mdb.c (0.9), struct MDB_page, MDB_node, MDB_db.
"""

import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_HEADER_BYTES = 16
_META_DBS = _HEADER_BYTES + 24  # in a meta page: the free list's record, then the main table's
_DB_BYTES = 48
_ROOT_AT = 40  # in a record
_FLAGS_AT = 4  # in a record
_TRANSACTION_AT = _META_DBS + 2 * _DB_BYTES + 8
_BRANCH_PAGE = 1
_BIG_NODE, _TABLE_NODE = 1, 2
_NODE_FLAGS = (0, _BIG_NODE, _TABLE_NODE)  # no table of ours has several values to a key
_PLAIN, _INTEGER_KEYS = 0, 8  # flags of a table
_NO_PAGE = (1 << 64) - 1
_HEADER = struct.Struct("=10xHHH")  # flags, end of the offsets of nodes, start of the nodes
_NODE = struct.Struct("=HHHH")  # in a branch page the first three are the child's number; then the key's length
_U16, _U64 = struct.Struct("=H"), struct.Struct("=Q")

_Order = Callable[[bytes], Any]
_Record = tuple[str, _Order, int]
"""Of a tree: what it is called, how its keys are ordered, its root page."""


def page_order_problems(data_file: Path, page_bytes: int) -> list[str]:
    """Return what is wrong, in words, in a file whose pages ``lmdb.verify`` has found sound. Raises OSError."""
    with data_file.open("rb") as file:
        return list(_Walk(file, page_bytes).run())


class _Walk:
    def __init__(self, file: BinaryIO, page_bytes: int) -> None:
        self._file = file
        self._page_bytes = page_bytes

    def run(self) -> Iterator[str]:
        metas = [self._page(0), self._page(1)]
        numbers = [_U64.unpack_from(meta, _TRANSACTION_AT)[0] for meta in metas]
        # Each commit writes the page whose turn it is: the two are always neighbours (or nothing was committed yet).
        if abs(numbers[0] - numbers[1]) != 1 and any(numbers):
            yield f"its meta pages are of transactions {numbers[0]} and {numbers[1]}, which do not follow one another"
        newest = metas[numbers[1] > numbers[0]]
        free, main = (_U64.unpack_from(newest, _META_DBS + each * _DB_BYTES + _ROOT_AT)[0] for each in (0, 1))
        yield from _strange_flags("the free list", newest, _META_DBS, _INTEGER_KEYS)
        yield from _strange_flags("the table of tables", newest, _META_DBS + _DB_BYTES, _PLAIN)
        trees: list[_Record] = [("the free list", _number, free), ("the table of tables", bytes, main)]
        while trees:
            name, order, root = trees.pop()
            if root != _NO_PAGE:
                yield from self._tree(name, order, root, trees)

    def _tree(self, name: str, order: _Order, root: int, trees: list[_Record]) -> Iterator[str]:
        """Prove that every key lies where its branch pages lead; tables that are named there join ``trees``."""
        below: list[tuple[int, bytes, bytes]] = [(root, b"", b"")]  # page, least key, first key behind it (none: "")
        while below:
            number, least, behind = below.pop()
            page = self._page(number)
            flags, end, nodes_at = _HEADER.unpack_from(page)
            if (end - _HEADER_BYTES) % 2:
                yield f"page {number} of {name} has half an offset of a node"
                return
            offsets = [at for (at,) in struct.iter_unpack("=H", page[_HEADER_BYTES:end])]
            if not _is_packed(page, offsets, nodes_at, is_branch=bool(flags & _BRANCH_PAGE)):
                yield f"page {number} of {name} has nodes that do not lie side by side from byte {nodes_at} to its end"
                return
            keys = []
            for place, at in enumerate(offsets):
                low, high, top, key_bytes = _NODE.unpack_from(page, at)
                key = page[at + _NODE.size : at + _NODE.size + key_bytes]
                if flags & _BRANCH_PAGE:  # the first key of a branch page is never looked at
                    keys.append((least if not place else key, low | high << 16 | top << 32))
                    continue
                if (least and order(key) < order(least)) or (behind and order(key) >= order(behind)):
                    yield f"page {number} of {name} has a key that no lookup finds there: {key.hex()}"
                    return
                if top not in _NODE_FLAGS:
                    yield f"page {number} of {name} has a node of no kind that there is: {top:#x}"
                    return
                if top == _TABLE_NODE:
                    record = at + _NODE.size + key_bytes
                    yield from _strange_flags(f"table {key!r}", page, record, _PLAIN)
                    trees.append((f"table {key!r}", bytes, _U64.unpack_from(page, record + _ROOT_AT)[0]))
            for place, (key, child) in enumerate(keys):
                below.append((child, key, keys[place + 1][0] if place + 1 < len(keys) else behind))

    def _page(self, number: int) -> bytes:
        self._file.seek(number * self._page_bytes)
        return self._file.read(self._page_bytes)


def _is_packed(page: bytes, offsets: list[int], nodes_at: int, *, is_branch: bool) -> bool:
    at = nodes_at
    for offset in sorted(offsets):
        if offset != at:
            return False
        low, high, flags, key_bytes = _NODE.unpack_from(page, at)
        value_bytes = 0 if is_branch else _U64.size if flags & _BIG_NODE else low | high << 16
        at += _NODE.size + key_bytes + value_bytes
        at += at % 2
    return at == len(page)


def _strange_flags(name: str, page: bytes, record: int, expected: int) -> Iterator[str]:
    (flags,) = _U16.unpack_from(page, record + _FLAGS_AT)
    if flags != expected:
        yield f"{name} has the flags {flags:#x}, and is made with {expected:#x}"


def _number(key: bytes) -> int:
    return int.from_bytes(key, sys.byteorder)
