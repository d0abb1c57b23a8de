"""CRC-32C of sealed chunks: rows of the checksum table, one for 512 neighbouring chunks of a backing file.

    value: 64 bytes, bit i of which says that chunk i of the group has a checksum | 512 x u32, little-endian

A chunk is sealed from the first snapshot that sees it on: it never changes again, so its checksum is computed once, in
the background. Copy-up, export, scrub and ``check --data`` compare; a chunk without a checksum yet is taken as it is.
"""

import logging
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from blockvirt.checksum import crc32c
from blockvirt.errors import DamagedRecord, DataDamaged
from blockvirt.limits import CHECKSUM_ROWS
from blockvirt.lun.address import chunk_of, file_of
from blockvirt.meta.keys import Table, pair_key
from blockvirt.meta.records import seal, unseal
from blockvirt.meta.store import Reader, Store, Writer

T = TypeVar("T")
log = logging.getLogger("blockvirt.volumes")

GROUP_BITS = 9
GROUP_CHUNKS = 1 << GROUP_BITS
_BITMAP_BYTES = GROUP_CHUNKS // 8
_CRC = struct.Struct("<I")
_EMPTY = bytes(_BITMAP_BYTES + GROUP_CHUNKS * _CRC.size)


def group_key(address: int) -> bytes:
    """Key of the row that has the checksum of an address."""
    return pair_key(file_of(address), chunk_of(address) >> GROUP_BITS)


def read_group(key: bytes, stored: bytes) -> dict[int, int]:
    """Return the checksums in a row, by place in the group; raises DamagedRecord."""
    payload = unseal(key, stored, what="a row of checksums")
    return {
        place: _CRC.unpack_from(payload, _BITMAP_BYTES + place * _CRC.size)[0]
        for place in range(GROUP_CHUNKS)
        if payload[place >> 3] >> (place & 7) & 1
    }


def find_checksum(reader: Reader, address: int) -> int | None:
    """Return the checksum of a chunk; None: it is not sealed, or has none yet. Raises DamagedRecord."""
    key = group_key(address)
    stored = reader.get(Table.CHECKSUMS, key)
    return _checksum_in(unseal(key, stored, what="a row of checksums"), address) if stored is not None else None


def _checksum_in(row: bytes, address: int) -> int | None:
    place = address & (GROUP_CHUNKS - 1)
    if not row[place >> 3] >> (place & 7) & 1:
        return None
    crc: int = _CRC.unpack_from(row, _BITMAP_BYTES + place * _CRC.size)[0]
    return crc


class SealedChecksums:
    """The checksums of sealed chunks, for who copies them one by one: the rows that it looked up stay in memory.

    A checksum never changes, since no address is ever reused; one that a row in memory does not have is looked up anew.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows: dict[int, bytes] = {}
        self._missing: dict[int, int] = {}
        """Groups that have no row, and after how many commits that was so: what is not sealed yet is copied most."""

    def find(self, address: int) -> int | None:
        """Return the checksum of a chunk; None: it is not sealed, has none yet, or its row is damaged."""
        group = address >> GROUP_BITS
        row = self._rows.get(group)
        crc = _checksum_in(row, address) if row is not None else None
        if crc is not None or self._missing.get(group) == self._store.commits:
            return crc
        row = self._look_up(group, address)
        return _checksum_in(row, address) if row is not None else None

    def _look_up(self, group: int, address: int) -> bytes | None:
        key, commits = group_key(address), self._store.commits
        with self._store.read() as reader:
            stored = reader.get(Table.CHECKSUMS, key)
        if stored is None:
            _keep(self._missing, group, commits)
            return None
        try:
            row = unseal(key, stored, what="a row of checksums")
        except DamagedRecord as error:  # copying goes on without; 'check' names the row
            log.error("%s", error)
            return None
        _keep(self._rows, group, row)
        return row


def _keep(kept: dict[int, T], group: int, value: T) -> None:
    kept.pop(group, None)
    if len(kept) >= CHECKSUM_ROWS:
        del kept[next(iter(kept))]
    kept[group] = value


def without_checksum(reader: Reader, addresses: Iterable[int], wanted: Callable[[int], bool]) -> list[int]:
    """Return those of ``addresses`` that have no checksum; a group at a time, of which ``wanted`` is asked for one.

    Addresses of a group are of one file. Raises DamagedRecord.
    """
    groups: dict[int, list[int]] = {}
    for each in addresses:
        groups.setdefault(each >> GROUP_BITS, []).append(each)
    missing: list[int] = []
    for members in groups.values():
        if not wanted(members[0]):
            continue
        key = group_key(members[0])
        stored = reader.get(Table.CHECKSUMS, key)
        if stored is None:
            missing += members
            continue
        bits = int.from_bytes(unseal(key, stored, what="a row of checksums")[:_BITMAP_BYTES], "little")
        missing += [each for each in members if not bits >> (each & (GROUP_CHUNKS - 1)) & 1]
    return missing


def put_checksums(writer: Writer, checksums: Mapping[int, int]) -> None:
    """Store checksums by address."""
    groups: dict[bytes, list[int]] = {}
    for address in checksums:
        groups.setdefault(group_key(address), []).append(address)
    for key, addresses in groups.items():
        payload = _payload(writer, key)
        for address in addresses:
            place = chunk_of(address) & (GROUP_CHUNKS - 1)
            payload[place >> 3] |= 1 << (place & 7)
            _CRC.pack_into(payload, _BITMAP_BYTES + place * _CRC.size, checksums[address])
        writer.put(Table.CHECKSUMS, key, seal(key, bytes(payload)))


def forget_checksums(writer: Writer, file: int, first_chunk: int, count: int) -> None:
    """Remove the checksums of chunks that were given back; a row without any goes as a whole."""
    chunk, end = first_chunk, first_chunk + count
    while chunk < end:
        group = chunk >> GROUP_BITS
        stop = min(end, (group + 1) << GROUP_BITS)
        key = pair_key(file, group)
        if writer.get(Table.CHECKSUMS, key) is not None:
            payload = _payload(writer, key)
            for place in range(chunk & (GROUP_CHUNKS - 1), ((stop - 1) & (GROUP_CHUNKS - 1)) + 1):
                payload[place >> 3] &= ~(1 << (place & 7))
            if any(payload[:_BITMAP_BYTES]):
                writer.put(Table.CHECKSUMS, key, seal(key, bytes(payload)))
            else:
                writer.delete(Table.CHECKSUMS, key)
        chunk = stop


def _payload(writer: Writer, key: bytes) -> bytearray:
    stored = writer.get(Table.CHECKSUMS, key)
    return bytearray(_EMPTY if stored is None else unseal(key, stored, what="a row of checksums"))


def check_content(content: "bytes | bytearray | memoryview", expected: int | None, what: str) -> None:
    """Return if a sealed chunk's content has the checksum it must have (None: not known); raises DataDamaged."""
    if expected is not None and (found := crc32c(bytes(content))) != expected:
        raise DataDamaged(
            f"{what} is damaged: its CRC-32C is {found:08x}, it was {expected:08x} when it was sealed",
            cause="the disk changed or lost what was written",
            correction="restore it from a copy; 'blockvirt scrub start --wait' names everything that is damaged",
        )
