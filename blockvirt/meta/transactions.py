"""Reading and writing inside one LMDB transaction: raw rows, and catalogue records with their checksums."""

import secrets
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from blockvirt.meta.keys import MARK_BYTES, Table
from blockvirt.meta.records import Record, decode, encode

R = TypeVar("R", bound=Record)
MAX_KEY_BYTES = 511  # of LMDB 0.9
_LARGE_BYTES = 1_024  # values from about 2 KiB on have pages of their own
_BATCH_ROWS = 256  # rows that a Writer's scan holds, so that what it has yielded may be changed


class Reader:
    """One snapshot of the store. Valid only inside the ``with`` that gave it; what it returns are copies."""

    __slots__ = ("_tables", "_transaction")

    def __init__(self, transaction: Any, tables: Mapping[Table, Any]) -> None:
        self._transaction = transaction
        self._tables = tables

    def end(self) -> None:
        """End the snapshot and let go of its transaction; nothing may be read afterwards.

        py-lmdb gives a reader's slot back only when the transaction object goes, and there are 126 slots: a coroutine
        that still has the Reader in a variable while it waits must not hold one.
        """
        transaction, self._transaction = self._transaction, None
        transaction.abort()

    def get(self, table: Table, key: bytes) -> bytes | None:
        """Return the stored value, or None."""
        if not key:  # LMDB takes it for a fault, and nothing can be stored under it: names from outside may be empty
            return None
        value: bytes | None = self._transaction.get(key, db=self._tables[table])
        return value

    def record(self, cls: type[R], table: Table, key: bytes) -> R | None:
        """Return the catalogue record under ``key``, or None; raises DamagedRecord, MetadataFault if it is newer."""
        stored = self.get(table, key)
        return None if stored is None else decode(cls, key, stored)

    def scan(
        self, table: Table, *, start: bytes = b"", prefix: bytes = b"", reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """Yield the rows whose key begins with ``prefix``, in order of their keys.

        From the first key at or after ``start`` on; with ``reverse`` downwards from the last key, or, if ``start`` is
        given, from the last key at or before it.
        """
        cursor = self._transaction.cursor(self._tables[table])
        if not _position(cursor, start, prefix, reverse=reverse):
            return
        rows = cursor.iterprev(keys=True, values=True) if reverse else cursor.iternext(keys=True, values=True)
        if not prefix:
            yield from rows
            return
        for key, value in rows:
            if not key.startswith(prefix):
                return
            yield key, value

    def floor(self, table: Table, key: bytes, prefix: bytes = b"") -> tuple[bytes, bytes] | None:
        """Return the row with the greatest key at or before ``key`` that begins with ``prefix``, or None."""
        cursor = self._transaction.cursor(self._tables[table])
        if not cursor.set_range(key):
            if not cursor.last():
                return None
        elif cursor.key() != key and not cursor.prev():
            return None
        row: tuple[bytes, bytes] = cursor.item()
        return row if row[0].startswith(prefix) else None

    def count(self, table: Table) -> int:
        """Return the number of rows; constant time."""
        return int(self._transaction.stat(self._tables[table])["entries"])


class Writer(Reader):
    """A Reader that also changes; it sees its own changes. All of them become durable, or none."""

    __slots__ = ("_large",)

    def __init__(self, transaction: Any, tables: Mapping[Table, Any], large: set[tuple[Table, bytes]]) -> None:
        """``large`` holds the rows with large values that were put since the outermost transaction began."""
        super().__init__(transaction, tables)
        self._large = large

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        """Store ``value`` under ``key`` (1 to 511 bytes), replacing what is there."""
        assert 0 < len(key) <= MAX_KEY_BYTES, key
        if self._large and (table, key) in self._large:
            # mdb_cursor_put leaves a smaller value on the pages of its own that the transaction gave the larger one,
            # more than it needs: no damage, but nobody could tell it from that.
            self._transaction.delete(key, db=self._tables[table])
        if len(value) > _LARGE_BYTES:
            self._large.add((table, key))
        self._transaction.put(key, value, db=self._tables[table])

    def mark(self, table: Table, key: bytes) -> None:
        """Put a row of which the key says all, with a value that it never had: who works on it sees there is more."""
        self.put(table, key, secrets.token_bytes(MARK_BYTES))

    def put_record(self, table: Table, key: bytes, record: Record) -> None:
        """Store a catalogue record with its checksum."""
        self.put(table, key, encode(key, record))

    def delete(self, table: Table, key: bytes) -> bool:
        """Remove a row; tell whether it was there."""
        return bool(self._transaction.delete(key, db=self._tables[table]))

    def scan(
        self, table: Table, *, start: bytes = b"", prefix: bytes = b"", reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """As Reader.scan; rows may be changed meanwhile, also the one just yielded.

        Works in batches: a change further ahead may or may not be seen.
        """
        while True:
            rows = []
            for row in Reader.scan(self, table, start=start, prefix=prefix, reverse=reverse):
                rows.append(row)
                if len(rows) == _BATCH_ROWS:
                    break
            yield from rows
            if len(rows) < _BATCH_ROWS:
                return
            last = rows[-1][0]
            if not reverse:
                start = last + b"\0"
            elif (before := self._key_before(table, last)) is None:
                return
            else:
                start = before

    def _key_before(self, table: Table, key: bytes) -> bytes | None:
        cursor = self._transaction.cursor(self._tables[table])
        found = cursor.prev() if cursor.set_range(key) else cursor.last()
        return bytes(cursor.key()) if found else None


def _position(cursor: Any, start: bytes, prefix: bytes, *, reverse: bool) -> bool:
    """Put ``cursor`` on the first row of a scan; False where there is none."""
    if not reverse:
        first = max(start, prefix)
        return bool(cursor.set_range(first) if first else cursor.first())
    end = _after_prefix(prefix)
    if start and (end is None or start < end):
        found = cursor.set_range(start)
        return bool(cursor.last() if not found else cursor.key() == start or cursor.prev())
    return bool(cursor.prev() if end is not None and cursor.set_range(end) else cursor.last())


def _after_prefix(prefix: bytes) -> bytes | None:
    """Return the first key behind all that begin with ``prefix``; None where there is no such key."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else None
