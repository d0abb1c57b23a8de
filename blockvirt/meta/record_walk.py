"""A walk over the records of a pool that is served, a few at a time: which of them does a reader not understand?

Each step is one short read transaction, so none sees the middle of a change. What a record says is not compared with
others here: between two steps they change, and the offline proof does that. Tables whose rows carry no checksum have
nothing to compare.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from blockvirt.errors import BlockvirtError
from blockvirt.meta.keys import Table
from blockvirt.meta.records import (
    BranchRecord,
    DeviceRecord,
    FileRecord,
    HostRecord,
    IdempotencyRecord,
    JobRecord,
    PoolRecord,
    Record,
    ScheduleRecord,
    ScrubRecord,
    SnapshotRecord,
    UnitRecord,
    VolumeRecord,
    decode,
    punch_count,
    unseal,
)
from blockvirt.meta.store import Reader

_RECORDS: Mapping[Table, type[Record]] = {
    Table.POOL: PoolRecord,
    Table.DEVICES: DeviceRecord,
    Table.VOLUMES: VolumeRecord,
    Table.BRANCHES: BranchRecord,
    Table.FILES: FileRecord,
    Table.SNAPSHOTS: SnapshotRecord,
    Table.HOSTS: HostRecord,
    Table.UNITS: UnitRecord,
    Table.SCHEDULES: ScheduleRecord,
    Table.JOBS: JobRecord,
    Table.SCRUBS: ScrubRecord,
    Table.IDEMPOTENCY: IdempotencyRecord,
}
WALKED: tuple[Table, ...] = (*_RECORDS, Table.LEAVES, Table.CHECKSUMS, Table.PUNCH)
"""The tables whose rows carry checksums, in the order of the walk."""


@dataclass(frozen=True, slots=True)
class DamagedRow:
    """A row that cannot be understood."""

    table: Table
    key: bytes
    problem: str


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of a walk has seen."""

    rows: int
    damaged: tuple[DamagedRow, ...]
    next_key: bytes | None
    """Where the next one begins; None: that was all of the table."""


def walk(reader: Reader, table: Table, start: bytes, most: int, decode_leaf: Callable[[bytes], Any]) -> Step:
    """Decode ``most`` rows of a table from the key ``start`` on; ``decode_leaf`` raises DamagedRecord for no leaf."""
    damaged: list[DamagedRow] = []
    count, last = 0, start
    for key, stored in islice(reader.scan(table, start=start), most):
        count, last = count + 1, key
        try:
            _decode(table, key, stored, decode_leaf)
        except BlockvirtError as error:
            damaged.append(DamagedRow(table, key, f"{error.message}: {error.cause}".rstrip(": ")))
    return Step(count, tuple(damaged), last + b"\0" if count == most else None)


def _decode(table: Table, key: bytes, stored: bytes, decode_leaf: Callable[[bytes], Any]) -> None:
    if table in _RECORDS:
        decode(_RECORDS[table], key, stored)
    elif table is Table.LEAVES:
        decode_leaf(unseal(key, stored, what="a leaf"))
    elif table is Table.PUNCH:
        punch_count(key, stored)
    else:
        unseal(key, stored, what="a row of checksums")
