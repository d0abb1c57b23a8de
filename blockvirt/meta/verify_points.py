"""The offline proof of snapshots and points: what a branch must keep readable, for whom, and what is to be freed."""

from collections.abc import Iterator
from dataclasses import replace

from blockvirt.errors import BlockvirtError
from blockvirt.limits import MAX_HOLDS, MAX_VOLUME_BYTES
from blockvirt.meta.findings import Finding, corrupt, leak
from blockvirt.meta.keys import (
    Table,
    number_key,
    pair_key,
    shown,
    snapshot_name_key,
    snapshot_point_key,
    split_pair,
    split_point,
)
from blockvirt.meta.records import SnapshotRecord
from blockvirt.meta.verify_rows import Rows, fit_for_people

_SNAPSHOT, _CHILD = b"s", b"c"


def check_snapshots(rows: Rows) -> Iterator[Finding]:
    """Prove snapshots with the rows that find and keep them, and those rows; after volumes and branches.

    A million snapshots are too many to remember: each index is proved by looking its records up again.
    """
    for key, record, findings in rows.records(SnapshotRecord, Table.SNAPSHOTS):
        if record is None:
            name = _name_of(rows, key)
            yield from (replace(finding, what=f"snapshot {name}") if name else finding for finding in findings)
            continue
        what = f"snapshot {rows.volume_name(record.volume_id)}@{record.name}"
        if record.id.encode() != key:
            yield corrupt("wrong-key", what, f"it lies under the key {shown(key)}")
            continue
        if rows.reader.get(Table.SNAPSHOT_NAMES, snapshot_name_key(record.volume_id, record.name)) != key:
            yield corrupt("name-index", what, "the index of its volume's snapshots does not lead to it")
        if not rows.has(Table.POINTS, snapshot_point_key(record.branch, record.epoch, record.id)):
            message = f"nothing keeps epoch {record.epoch} of branch {record.branch} for it"
            yield corrupt("point-index", what, message)
        if not rows.has(Table.VOLUMES, record.volume_id.encode()):
            yield corrupt("wrong-link", what, f"its volume {record.volume_id} does not exist")
        yield from _check_place(rows, record, what)
        yield from _check_values(record, what)
    yield from _check_names(rows)


def _check_place(rows: Rows, record: SnapshotRecord, what: str) -> Iterator[Finding]:
    branch = rows.branches.get(record.branch)
    if not rows.has(Table.BRANCHES, number_key(record.branch)):
        yield corrupt("wrong-link", what, f"its branch {record.branch} does not exist")
    if branch is not None and branch.volume_id != record.volume_id:
        yield corrupt("wrong-link", what, f"its branch {record.branch} belongs to volume {branch.volume_id}")
    if branch is not None and record.epoch < branch.first_epoch:
        yield corrupt("counter", what, f"it closed epoch {record.epoch}, its branch began in {branch.first_epoch}")
    if branch is not None and branch.head_epoch and record.epoch >= branch.head_epoch:
        message = f"it closed epoch {record.epoch}, and the head of its branch is in epoch {branch.head_epoch}"
        yield corrupt("counter", what, message)
    elif rows.pool is not None and record.epoch > rows.pool.epoch:
        yield corrupt("counter", what, f"it closed epoch {record.epoch}, the pool's last is {rows.pool.epoch}")


def _check_values(record: SnapshotRecord, what: str) -> Iterator[Finding]:
    if not 0 < record.size_bytes <= MAX_VOLUME_BYTES:
        yield corrupt("bad-value", what, f"{record.size_bytes} bytes is no size of a volume")
    if record.mapped_chunks < 0:
        yield corrupt("bad-value", what, f"{record.mapped_chunks} mapped chunks are recorded")
    if len(set(record.holds)) != len(record.holds) or len(record.holds) > MAX_HOLDS or "" in record.holds:
        yield corrupt("bad-value", what, f"its {len(record.holds)} holds are empty, double or too many")
    yield from fit_for_people(what, "snapshot", record.name, record.labels)


def _check_names(rows: Rows) -> Iterator[Finding]:
    for key, stored in rows.reader.scan(Table.SNAPSHOT_NAMES):
        volume_id, _, name = key.decode(errors="replace").partition("/")
        what = f"snapshot name {rows.volume_name(volume_id)}@{name}"
        if not stored or not rows.has(Table.SNAPSHOTS, stored):
            yield corrupt("name-index", what, f"it leads to {shown(stored)}, which does not exist")
            continue
        record = _intact(rows, stored)
        if record is not None and snapshot_name_key(record.volume_id, record.name) != key:
            called = f"{rows.volume_name(record.volume_id)}@{record.name}"
            yield corrupt("name-index", what, f"it leads to {shown(stored)}, which is called {called}")


def _name_of(rows: Rows, snapshot_key: bytes) -> str:
    """Return what people call a snapshot whose record does not tell it; empty: the index does not either."""
    for key, stored in rows.reader.scan(Table.SNAPSHOT_NAMES):
        if stored == snapshot_key:
            volume_id, _, name = key.decode(errors="replace").partition("/")
            return f"{rows.volume_name(volume_id)}@{name}"
    return ""


def _intact(rows: Rows, key: bytes) -> SnapshotRecord | None:
    """Return a snapshot's record; None where it is damaged, which its own row's proof says."""
    try:
        return rows.reader.record(SnapshotRecord, Table.SNAPSHOTS, key)
    except (BlockvirtError, ValueError, TypeError, LookupError):
        return None


def check_points(rows: Rows) -> Iterator[Finding]:
    """Prove that each point is one of a branch that exists, and that somebody asked for it; after the branches."""
    sizes = {_SNAPSHOT: None, _CHILD: len(pair_key(0, 0)) + 1 + len(number_key(0))}
    for key, _ in rows.reader.scan(Table.POINTS):
        kind = key[16:17]
        if kind not in sizes or sizes[kind] not in (None, len(key)):
            yield corrupt("unknown-row", f"point {shown(key)}", "its key cannot be understood")
            continue
        try:
            branch, epoch, who = split_point(key)
        except UnicodeDecodeError:
            yield corrupt("unknown-row", f"point {shown(key)}", "it is kept for a snapshot whose id is no text")
            continue
        what = f"point at epoch {epoch} of branch {branch}"
        if not rows.has(Table.BRANCHES, number_key(branch)):
            yield corrupt("wrong-link", what, "its branch does not exist")
        if isinstance(who, str):
            yield from _check_snapshot_point(rows, what, branch, epoch, who)
        else:
            yield from _check_child_point(rows, what, branch, epoch, who)


def _check_snapshot_point(rows: Rows, what: str, branch: int, epoch: int, snapshot_id: str) -> Iterator[Finding]:
    if not rows.has(Table.SNAPSHOTS, snapshot_id.encode()):
        yield corrupt("point-index", what, f"snapshot {snapshot_id}, which it is kept for, does not exist")
        return
    record = _intact(rows, snapshot_id.encode())
    if record is not None and (record.branch, record.epoch) != (branch, epoch):
        name = f"{rows.volume_name(record.volume_id)}@{record.name}"
        message = f"snapshot {name}, which it is kept for, is at epoch {record.epoch} of branch {record.branch}"
        yield corrupt("point-index", what, message)


def _check_child_point(rows: Rows, what: str, branch: int, epoch: int, child: int) -> Iterator[Finding]:
    record = rows.branches.get(child)
    if not rows.has(Table.BRANCHES, number_key(child)):
        yield corrupt("point-index", what, f"branch {child}, which it is kept for, does not exist")
    elif record is not None and (branch, epoch) not in [(record.origin_branch, record.origin_epoch), *record.pins]:
        yield corrupt("point-index", what, f"branch {child}, which it is kept for, does not come from there")


def check_pending(rows: Rows) -> Iterator[Finding]:
    """Prove that what is to be reclaimed, and what is to get checksums, belongs to branches that exist."""
    for table, code in ((Table.RECLAIM, "orphan-reclaim"), (Table.SEALS, "orphan-seal")):
        for key, _ in rows.reader.scan(table):
            what = f"{table.name.lower()} {shown(key)}"
            if len(key) != len(pair_key(0, 0)):
                yield corrupt("unknown-row", what, "its key has a wrong length")
                continue
            branch, epoch = split_pair(key)
            if not rows.has(Table.BRANCHES, number_key(branch)):
                yield leak(code, f"{table.name.lower()} of branch {branch}, epoch {epoch}", "there is no such branch")
