"""What one walk over the metadata reads through, and what it remembers from table to table."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from blockvirt.errors import BlockvirtError, DamagedRecord, InvalidName
from blockvirt.ids import check_name
from blockvirt.limits import MAX_LABEL_CHARS, MAX_LABELS
from blockvirt.meta.findings import Finding, corrupt
from blockvirt.meta.keys import MARK_BYTES, MARKED, VALUELESS, Table, number_key, shown
from blockvirt.meta.records import BranchRecord, PoolRecord, Record, VolumeRecord, decode
from blockvirt.meta.store import Reader

R = TypeVar("R", bound=Record)


@dataclass(slots=True)
class Rows:
    """One read transaction, and the records that later tables are proved against (a few thousand)."""

    reader: Reader
    pool: PoolRecord | None = None
    volumes: dict[str, VolumeRecord] = field(default_factory=dict)
    branches: dict[int, BranchRecord] = field(default_factory=dict)

    def records(self, cls: type[R], table: Table) -> Iterator[tuple[bytes, R | None, list[Finding]]]:
        """Yield each row of a catalogue table: its key, the record if it is intact, and what is wrong with it."""
        for key, stored in self.reader.scan(table):
            what = f"{cls.__name__.removesuffix('Record').lower()} {shown(key)}"
            try:
                yield key, decode(cls, key, stored), []
            except BlockvirtError as error:
                code = "damaged-record" if isinstance(error, DamagedRecord) else "newer-record"
                yield key, None, [corrupt(code, what, f"{error.message}: {error.cause}".rstrip(": "))]

    def has(self, table: Table, key: bytes) -> bool:
        """Tell whether a row is there, be it damaged or not."""
        return self.reader.get(table, key) is not None

    def points(self, branch: int) -> bool:
        """Tell whether anything but a head keeps a branch."""
        return any(True for _ in self.reader.scan(Table.POINTS, prefix=number_key(branch)))

    def going(self, branch: int) -> bool:
        """Tell whether nothing keeps a branch any more: its rows then go in steps, and some may be gone already."""
        record = self.branches.get(branch)
        return record is not None and not record.head_epoch and not self.points(branch)

    def volume_name(self, volume_id: str) -> str:
        """Return what people call a volume; its id where its record is not to be had."""
        record = self.volumes.get(volume_id)
        return record.name if record is not None else volume_id


def check_values(rows: Rows) -> Iterator[Finding]:
    """Prove that rows which are only keys have no value, and a mark has its length."""
    for table in VALUELESS:
        for key, stored in rows.reader.scan(table):
            if stored and not (table in MARKED and len(stored) == MARK_BYTES):
                yield corrupt("bad-value", f"row {shown(key)} of {table.value.decode()}", "it has a value of its own")


def names_lead_back(
    rows: Rows, kind: str, index: Table, table: Table, names: dict[bytes, str], gone: frozenset[bytes] = frozenset()
) -> Iterator[Finding]:
    """Prove an index of names against its records: ``names`` by their keys; those in ``gone`` have no name there."""
    for key, stored in rows.reader.scan(index):
        what = f"{kind} name {shown(key)}"
        if not stored or not rows.has(table, stored):
            yield corrupt("name-index", what, f"it leads to {shown(stored)}, which does not exist")
        elif stored in gone:
            yield corrupt("name-index", what, f"it leads to {shown(stored)}, which was deleted and has no name")
        elif stored in names and names[stored].encode() != key:
            yield corrupt("name-index", what, f"it leads to {shown(stored)}, which is called {names[stored]}")


def fit_for_people(what: str, kind: str, name: str, labels: dict[str, str]) -> Iterator[Finding]:
    """Prove that a name and labels are such as could have been given."""
    try:
        check_name(name, what=kind)
    except InvalidName as error:
        yield corrupt("bad-value", what, error.message)
    lengths = [len(text) for pair in labels.items() for text in pair]
    if len(labels) > MAX_LABELS or max(lengths, default=0) > MAX_LABEL_CHARS:
        yield corrupt("bad-value", what, f"its {len(labels)} labels are more, or longer, than labels may be")
