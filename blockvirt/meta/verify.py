"""The offline proof of the metadata: its pages, each record by itself, and the records against one another.

Whether addresses are where they must be, and files on the devices as the records say, is proven elsewhere
(``volumes.proof``): here nothing but one environment is read.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from blockvirt.errors import BlockvirtError, DamagedRecord
from blockvirt.limits import MAX_CHUNK_BYTES, MAX_VOLUME_BYTES, MIN_CHUNK_BYTES
from blockvirt.meta.datafile import DATA_FILE, structural_problems
from blockvirt.meta.findings import Finding, corrupt, leak
from blockvirt.meta.keys import (
    POOL_KEY,
    Table,
    born_key,
    leaf_key,
    number_key,
    pair_key,
    split_leaf,
    split_pair,
    unit_key,
    volume_unit_key,
)
from blockvirt.meta.records import (
    BranchRecord,
    DeviceRecord,
    FileRecord,
    HostRecord,
    IdempotencyRecord,
    PoolRecord,
    Record,
    UnitRecord,
    VolumeRecord,
    decode,
    unseal,
)
from blockvirt.meta.store import Reader

R = TypeVar("R", bound=Record)
DecodeLeaf = Callable[[bytes], Any]
_PUNCH_BYTES = 8


def verify_pages(metadata_dir: Path) -> Iterator[Finding]:
    """Walk every page of the environment without mapping it. Where this finds something, read no further."""
    try:
        problems = structural_problems(metadata_dir / DATA_FILE)
    except OSError as error:
        problems = [f"it cannot be read: {error.strerror}"]
    for problem in problems:
        yield corrupt("damaged-pages", f"metadata file {metadata_dir / DATA_FILE}", problem)


def verify_records(reader: Reader, decode_leaf: DecodeLeaf) -> Iterator[Finding]:
    """Prove every record and every index of one snapshot. ``decode_leaf`` raises DamagedRecord for what is no leaf."""
    return _Proof(reader, decode_leaf).findings()


class _Proof:
    """One walk over all tables. Catalogue records are kept (a few thousand), leaves and indexes only pass by."""

    def __init__(self, reader: Reader, decode_leaf: DecodeLeaf) -> None:
        self._reader = reader
        self._decode_leaf = decode_leaf
        self._pool: PoolRecord | None = None
        self._volumes: dict[str, VolumeRecord] = {}
        self._branches: dict[int, BranchRecord] = {}

    def findings(self) -> Iterator[Finding]:
        """Yield what is wrong, table by table."""
        yield from self._check_pool()
        yield from self._check_devices()
        yield from self._check_branches()
        yield from self._check_volumes()
        yield from self._check_files()
        yield from self._check_leaves()
        yield from self._check_born()
        yield from self._check_punches()
        yield from self._check_hosts()
        yield from self._check_units()
        for _, _, findings in self._records(IdempotencyRecord, Table.IDEMPOTENCY):
            yield from findings

    # --- reading ---------------------------------------------------------------------------------------------------

    def _records(self, cls: type[R], table: Table) -> Iterator[tuple[bytes, R | None, list[Finding]]]:
        """Yield each row of a catalogue table: its key, the record if it is intact, and what is wrong with it."""
        for key, stored in self._reader.scan(table):
            what = f"{cls.__name__.removesuffix('Record').lower()} {_shown(key)}"
            try:
                yield key, decode(cls, key, stored), []
            except BlockvirtError as error:
                code = "damaged-record" if isinstance(error, DamagedRecord) else "newer-record"
                yield key, None, [corrupt(code, what, f"{error.message}: {error.cause}".rstrip(": "))]
            except (ValueError, TypeError, LookupError) as error:
                yield key, None, [corrupt("damaged-record", what, f"its fields cannot be understood: {error}")]

    def _has(self, table: Table, key: bytes) -> bool:
        return self._reader.get(table, key) is not None

    def _going(self, branch: int) -> bool:
        """Tell whether a branch's volume is being deleted: its rows then go in steps, and some may be gone already."""
        record = self._branches.get(branch)
        volume = self._volumes.get(record.volume_id) if record is not None else None
        return volume is not None and volume.deleting

    # --- the catalogue ---------------------------------------------------------------------------------------------

    def _check_pool(self) -> Iterator[Finding]:
        for key, record, findings in self._records(PoolRecord, Table.POOL):
            yield from findings
            if key != POOL_KEY:
                yield corrupt("unknown-row", f"pool {_shown(key)}", "the pool has one record, under another key")
            else:
                self._pool = record
        if not self._has(Table.POOL, POOL_KEY):
            yield corrupt("missing-record", "pool", "there is no pool record")
        elif self._pool is not None:
            chunk_bytes = self._pool.chunk_bytes
            if not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES or chunk_bytes & (chunk_bytes - 1):
                yield corrupt("bad-value", "pool", f"{chunk_bytes} bytes is no size of a chunk")

    def _check_devices(self) -> Iterator[Finding]:
        names: dict[str, str] = {}
        for key, record, findings in self._records(DeviceRecord, Table.DEVICES):
            yield from findings
            if record is None:
                continue
            if record.id.encode() != key:
                yield corrupt("wrong-key", f"device {record.name}", f"it lies under the key {_shown(key)}")
            if record.name in names:
                yield corrupt("double-name", f"device {record.name}", f"device {names[record.name]} has the name too")
            names[record.name] = record.id

    def _check_branches(self) -> Iterator[Finding]:
        for key, record, findings in self._records(BranchRecord, Table.BRANCHES):
            yield from findings
            if record is None:
                continue
            what = f"branch {record.number}"
            if number_key(record.number) != key:
                yield corrupt("wrong-key", what, f"it lies under the key {_shown(key)}")
                continue
            self._branches[record.number] = record
            if not self._has(Table.VOLUMES, record.volume_id.encode()):
                yield leak("orphan-branch", what, f"its volume {record.volume_id} does not exist")
            if record.origin_branch and not self._has(Table.BRANCHES, number_key(record.origin_branch)):
                yield corrupt("missing-origin", what, f"its origin, branch {record.origin_branch}, does not exist")
            if self._pool is None:
                continue
            if record.number >= self._pool.next_branch:
                yield corrupt("counter", what, f"the pool's next branch is {self._pool.next_branch}")
            for epoch in (record.head_epoch, record.origin_epoch):
                if epoch > self._pool.epoch:
                    yield corrupt("counter", what, f"epoch {epoch} is beyond the pool's last, {self._pool.epoch}")

    def _check_volumes(self) -> Iterator[Finding]:
        for key, record, findings in self._records(VolumeRecord, Table.VOLUMES):
            yield from findings
            if record is None:
                continue
            what = f"volume {record.name}"
            if record.id.encode() != key:
                yield corrupt("wrong-key", what, f"it lies under the key {_shown(key)}")
            self._volumes[record.id] = record
            if not 0 < record.size_bytes <= MAX_VOLUME_BYTES:
                yield corrupt("bad-value", what, f"{record.size_bytes} bytes is no size of a volume")
            if not self._has(Table.BRANCHES, number_key(record.branch)):
                yield corrupt("missing-record", what, f"its branch {record.branch} does not exist")
            elif (branch := self._branches.get(record.branch)) is not None and branch.volume_id != record.id:
                yield corrupt("wrong-link", what, f"its branch {record.branch} belongs to volume {branch.volume_id}")
            if not record.deleting and self._reader.get(Table.VOLUME_NAMES, record.name.encode()) != key:
                yield corrupt("name-index", what, "the index of names does not lead to it")
        yield from self._check_names("volume", Table.VOLUME_NAMES, Table.VOLUMES, self._volumes)

    def _check_names(
        self, kind: str, index: Table, table: Table, records: "dict[str, VolumeRecord] | dict[str, HostRecord]"
    ) -> Iterator[Finding]:
        for key, stored in self._reader.scan(index):
            what = f"{kind} name {_shown(key)}"
            if not stored or not self._has(table, stored):
                yield corrupt("name-index", what, f"it leads to {_shown(stored)}, which does not exist")
                continue
            record = records.get(stored.decode(errors="replace"))
            if record is not None and record.name.encode() != key:
                yield corrupt("name-index", what, f"it leads to {_shown(stored)}, which is called {record.name}")

    def _check_hosts(self) -> Iterator[Finding]:
        hosts: dict[str, HostRecord] = {}
        for key, record, findings in self._records(HostRecord, Table.HOSTS):
            yield from findings
            if record is None:
                continue
            what = f"host {record.name}"
            hosts[record.id] = record
            if record.id.encode() != key:
                yield corrupt("wrong-key", what, f"it lies under the key {_shown(key)}")
            if self._reader.get(Table.HOST_NAMES, record.name.encode()) != key:
                yield corrupt("name-index", what, "the index of names does not lead to it")
        yield from self._check_names("host", Table.HOST_NAMES, Table.HOSTS, hosts)

    def _check_units(self) -> Iterator[Finding]:
        for key, record, findings in self._records(UnitRecord, Table.UNITS):
            yield from findings
            if record is None:
                continue
            what = f"logical unit {_shown(key)}"
            if unit_key(record.host_id, record.number) != key:
                yield corrupt("wrong-key", what, f"its record says host {record.host_id}, number {record.number}")
                continue
            if not self._has(Table.HOSTS, record.host_id.encode()):
                yield corrupt("wrong-link", what, f"its host {record.host_id} does not exist")
            volume = self._volumes.get(record.volume_id)
            if not self._has(Table.VOLUMES, record.volume_id.encode()) or (volume is not None and volume.deleting):
                yield corrupt("wrong-link", what, f"its volume {record.volume_id} does not exist")
            if not self._has(Table.VOLUME_UNITS, volume_unit_key(record.volume_id, record.host_id, record.number)):
                yield corrupt("unit-index", what, "it is missing from the index of its volume's units")
        for key, _ in self._reader.scan(Table.VOLUME_UNITS):
            what = f"index of units, {_shown(key)}"
            volume_id, _, unit = key.decode(errors="replace").partition("/")
            try:
                stored = self._reader.record(UnitRecord, Table.UNITS, unit.encode()) if unit else None
            except (BlockvirtError, ValueError, TypeError):
                continue  # named above
            if stored is None or stored.volume_id != volume_id:
                yield corrupt("unit-index", what, "there is no such logical unit of that volume")

    # --- the map ---------------------------------------------------------------------------------------------------

    def _check_files(self) -> Iterator[Finding]:
        owners: dict[int, int] = {}
        for key, record, findings in self._records(FileRecord, Table.FILES):
            yield from findings
            if record is None:
                continue
            what = f"file {record.number}"
            if number_key(record.number) != key:
                yield corrupt("wrong-key", what, f"it lies under the key {_shown(key)}")
                continue
            owners[record.number] = record.branch
            if self._pool is not None and record.number >= self._pool.next_file:
                yield corrupt("counter", what, f"the pool's next file is {self._pool.next_file}")
            if not self._has(Table.BRANCHES, number_key(record.branch)):
                yield leak("orphan-file", what, f"its branch {record.branch} does not exist")
            if not self._has(Table.DEVICES, record.device_id.encode()):
                yield corrupt("wrong-link", what, f"its device {record.device_id} does not exist")
            if not self._has(Table.BRANCH_FILES, pair_key(record.branch, record.number)):
                yield corrupt("file-index", what, f"it is missing from the index of branch {record.branch}'s files")
            if not 0 <= record.live_chunks <= record.used_chunks:
                yield corrupt("bad-value", what, f"{record.live_chunks} of {record.used_chunks} chunks are live")
        for key, _ in self._reader.scan(Table.BRANCH_FILES):
            if len(key) != len(pair_key(0, 0)):
                yield corrupt("unknown-row", f"index of files, {_shown(key)}", "its key has a wrong length")
                continue
            branch, number = split_pair(key)
            if not self._has(Table.FILES, number_key(number)) or owners.get(number, branch) != branch:
                yield corrupt("file-index", f"branch {branch}", f"file {number} in its index is none of its files")

    def _check_leaves(self) -> Iterator[Finding]:
        for key, stored in self._reader.scan(Table.LEAVES):
            if len(key) != len(leaf_key(0, 0, 0)):
                yield corrupt("unknown-row", f"leaf {_shown(key)}", "its key has a wrong length")
                continue
            branch, leaf, birth = split_leaf(key)
            what = f"leaf {leaf} of branch {branch}, born in epoch {birth}"
            try:
                self._decode_leaf(unseal(key, stored, what=what))
            except DamagedRecord as error:
                yield corrupt("damaged-leaf", what, f"{error.message}: {error.cause}".rstrip(": "))
            if not self._has(Table.BRANCHES, number_key(branch)):
                yield leak("orphan-leaf", what, "its branch does not exist")
                continue
            record = self._branches.get(branch)
            if record is not None and record.head_epoch and birth > record.head_epoch:
                yield corrupt("counter", what, f"the head of its branch is in epoch {record.head_epoch}")
            elif self._pool is not None and birth > self._pool.epoch:
                yield corrupt("counter", what, f"the pool's last epoch is {self._pool.epoch}")
            if not self._has(Table.BORN, born_key(branch, birth, leaf)):
                yield corrupt("born-index", what, "it is missing from the index of its epoch")

    def _check_born(self) -> Iterator[Finding]:
        for key, _ in self._reader.scan(Table.BORN):
            if len(key) != len(born_key(0, 0, 0)):
                yield corrupt("unknown-row", f"index of births, {_shown(key)}", "its key has a wrong length")
                continue
            branch, birth = split_pair(key[:16])
            leaf = int.from_bytes(key[16:], "big")
            if not self._has(Table.LEAVES, leaf_key(branch, leaf, birth)) and not self._going(branch):
                what = f"leaf {leaf} of branch {branch}, born in epoch {birth}"
                if self._has(Table.BRANCHES, number_key(branch)):
                    yield corrupt("born-index", what, "the index of births names it, but it does not exist")
                else:
                    yield leak("orphan-birth", what, "neither it nor its branch exists")

    def _check_punches(self) -> Iterator[Finding]:
        for key, stored in self._reader.scan(Table.PUNCH):
            if len(key) != len(pair_key(0, 0)):
                yield corrupt("unknown-row", f"punch {_shown(key)}", "its key has a wrong length")
                continue
            number, chunk = split_pair(key)
            what = f"punch of file {number} from chunk {chunk} on"
            try:
                payload = unseal(key, stored, what=what)
            except DamagedRecord as error:
                yield corrupt("damaged-record", what, f"{error.message}: {error.cause}")
                continue
            if len(payload) != _PUNCH_BYTES or not int.from_bytes(payload, "little"):
                yield corrupt("bad-value", what, "it says no number of chunks")
            elif not self._has(Table.FILES, number_key(number)):
                yield leak("orphan-punch", what, "its file does not exist")


def _shown(key: bytes) -> str:
    """Return a key for people: text where it is text, else hex."""
    with_text = key.decode("ascii", errors="replace")
    return with_text if with_text and with_text.isprintable() and "�" not in with_text else key.hex()
