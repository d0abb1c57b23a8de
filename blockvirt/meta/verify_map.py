"""The offline proof of the map's rows: branches, backing files, versions of leaves, and what waits to be punched."""

from collections.abc import Callable, Iterator
from typing import Any

from blockvirt.errors import DamagedRecord
from blockvirt.meta.findings import Finding, corrupt, leak
from blockvirt.meta.keys import (
    Table,
    born_key,
    child_point_key,
    leaf_key,
    number_key,
    pair_key,
    shown,
    split_born,
    split_leaf,
    split_pair,
    split_volume_branch,
    volume_branch_key,
)
from blockvirt.meta.records import BranchRecord, FileRecord, unseal
from blockvirt.meta.verify_rows import Rows

DecodeLeaf = Callable[[bytes], Any]
_PUNCH_BYTES = 8
_CHECKSUMS_BYTES = 512 // 8 + 512 * 4  # a bit and a u32 for each chunk of a group


def check_branches(rows: Rows) -> Iterator[Finding]:
    """Prove branches, their origins and the index of each volume's; ``rows.branches`` are they from then on."""
    for key, record, findings in rows.records(BranchRecord, Table.BRANCHES):
        yield from findings
        if record is None:
            continue
        what = f"branch {record.number}"
        if number_key(record.number) != key:
            yield corrupt("wrong-key", what, f"it lies under the key {shown(key)}")
            continue
        rows.branches[record.number] = record
        if not rows.has(Table.VOLUME_BRANCHES, volume_branch_key(record.volume_id, record.number)):
            yield corrupt("branch-index", what, f"it is missing from the index of volume {record.volume_id}'s branches")
        if not 0 <= record.inherited_chunks <= record.mapped_chunks:
            message = f"{record.inherited_chunks} of {record.mapped_chunks} mapped chunks are inherited"
            yield corrupt("bad-value", what, message)
        yield from _check_origins(rows, record, what)
        yield from _check_epochs(rows, record, what)
    for record in rows.branches.values():
        yield from _check_kept(rows, record)
    for key, _ in rows.reader.scan(Table.VOLUME_BRANCHES):
        what = f"index of branches, {shown(key)}"
        try:
            volume_id, number = split_volume_branch(key)
        except ValueError:
            yield corrupt("unknown-row", what, "its key cannot be understood")
            continue
        branch = rows.branches.get(number)
        if branch is not None and branch.volume_id != volume_id:
            yield corrupt("branch-index", what, f"branch {number} belongs to volume {branch.volume_id}")
        elif not rows.has(Table.BRANCHES, number_key(number)):
            yield corrupt("branch-index", what, "there is no such branch")


def _check_origins(rows: Rows, record: BranchRecord, what: str) -> Iterator[Finding]:
    origins = [(record.origin_branch, record.origin_epoch)] if record.origin_branch else []
    for origin, epoch in [*origins, *record.pins]:
        if not rows.has(Table.BRANCHES, number_key(origin)):
            yield corrupt("missing-origin", what, f"its origin, branch {origin}, does not exist")
        elif origin >= record.number:  # walking up such a line might never end
            yield corrupt("wrong-link", what, f"its origin, branch {origin}, is not older than itself")
        elif not rows.has(Table.POINTS, child_point_key(origin, epoch, record.number)):
            message = f"nothing keeps epoch {epoch} of branch {origin} for it, which it comes from"
            yield corrupt("point-index", what, message)


def _check_epochs(rows: Rows, record: BranchRecord, what: str) -> Iterator[Finding]:
    if record.head_epoch and record.head_epoch < record.first_epoch:
        yield corrupt(
            "counter", what, f"its head is in epoch {record.head_epoch}, and it began in {record.first_epoch}"
        )
    if record.origin_branch and record.origin_epoch >= record.first_epoch:
        message = f"it comes from epoch {record.origin_epoch}, and began in epoch {record.first_epoch}"
        yield corrupt("counter", what, message)
    if rows.pool is None:
        return
    if record.number >= rows.pool.next_branch:
        yield corrupt("counter", what, f"the pool's next branch is {rows.pool.next_branch}")
    for epoch in {record.head_epoch, record.origin_epoch, record.first_epoch}:
        if epoch > rows.pool.epoch:
            yield corrupt("counter", what, f"epoch {epoch} is beyond the pool's last, {rows.pool.epoch}")


def _check_kept(rows: Rows, record: BranchRecord) -> Iterator[Finding]:
    """Prove that a branch is some volume's head, or kept by a point, or on its way out."""
    what = f"branch {record.number}"
    volume = rows.volumes.get(record.volume_id)
    if record.head_epoch:
        if volume is not None and volume.branch != record.number:
            yield corrupt("two-heads", what, f"it has a head, and that of its volume {volume.name} is {volume.branch}")
        elif not rows.has(Table.VOLUMES, record.volume_id.encode()):
            yield corrupt("wrong-link", what, f"it has a head, and its volume {record.volume_id} does not exist")
    elif volume is not None and volume.branch == record.number:
        yield corrupt("missing-head", f"volume {volume.name}", f"its branch {record.number} has no head")
    elif rows.going(record.number) and not _reclaimed(rows, record.number):
        yield leak("orphan-branch", what, "nothing keeps it, and nothing is going to free it")


def _reclaimed(rows: Rows, branch: int) -> bool:
    return any(True for _ in rows.reader.scan(Table.RECLAIM, prefix=number_key(branch)))


def check_volume_branches(rows: Rows) -> Iterator[Finding]:
    """Prove that the branch each volume names is its own; after the branches."""
    for volume in rows.volumes.values():
        branch = rows.branches.get(volume.branch)
        if branch is not None and branch.volume_id != volume.id:
            message = f"its branch {volume.branch} belongs to volume {branch.volume_id}"
            yield corrupt("wrong-link", f"volume {volume.name}", message)


def check_files(rows: Rows) -> Iterator[Finding]:
    """Prove backing files and the index of each branch's."""
    owners: dict[int, int] = {}
    for key, record, findings in rows.records(FileRecord, Table.FILES):
        yield from findings
        if record is None:
            continue
        what = f"file {record.number}"
        if number_key(record.number) != key:
            yield corrupt("wrong-key", what, f"it lies under the key {shown(key)}")
            continue
        owners[record.number] = record.branch
        if rows.pool is not None and record.number >= rows.pool.next_file:
            yield corrupt("counter", what, f"the pool's next file is {rows.pool.next_file}")
        if not rows.has(Table.BRANCHES, number_key(record.branch)):
            yield leak("orphan-file", what, f"its branch {record.branch} does not exist")
        if not rows.has(Table.DEVICES, record.device_id.encode()):
            yield corrupt("wrong-link", what, f"its device {record.device_id} does not exist")
        if not rows.has(Table.BRANCH_FILES, pair_key(record.branch, record.number)):
            yield corrupt("file-index", what, f"it is missing from the index of branch {record.branch}'s files")
        if not 0 <= record.live_chunks <= record.used_chunks:
            yield corrupt("bad-value", what, f"{record.live_chunks} of {record.used_chunks} chunks are live")
    for key, _ in rows.reader.scan(Table.BRANCH_FILES):
        if len(key) != len(pair_key(0, 0)):
            yield corrupt("unknown-row", f"index of files, {shown(key)}", "its key has a wrong length")
            continue
        branch, number = split_pair(key)
        if not rows.has(Table.FILES, number_key(number)) or owners.get(number, branch) != branch:
            yield corrupt("file-index", f"branch {branch}", f"file {number} in its index is none of its files")


def check_leaves(rows: Rows, decode_leaf: DecodeLeaf) -> Iterator[Finding]:
    """Prove every version of every leaf by itself; ``decode_leaf`` raises DamagedRecord for what is no leaf."""
    for key, stored in rows.reader.scan(Table.LEAVES):
        if len(key) != len(leaf_key(0, 0, 0)):
            yield corrupt("unknown-row", f"leaf {shown(key)}", "its key has a wrong length")
            continue
        branch, leaf, birth = split_leaf(key)
        what = f"leaf {leaf} of branch {branch}, born in epoch {birth}"
        try:
            decode_leaf(unseal(key, stored, what=what))
        except DamagedRecord as error:
            yield corrupt("damaged-leaf", what, f"{error.message}: {error.cause}".rstrip(": "))
        if not rows.has(Table.BRANCHES, number_key(branch)):
            yield leak("orphan-leaf", what, "its branch does not exist")
            continue
        record = rows.branches.get(branch)
        if record is not None and record.head_epoch and birth > record.head_epoch:
            yield corrupt("counter", what, f"the head of its branch is in epoch {record.head_epoch}")
        elif rows.pool is not None and birth > rows.pool.epoch:
            yield corrupt("counter", what, f"the pool's last epoch is {rows.pool.epoch}")
        elif record is not None and birth < record.first_epoch:
            yield corrupt("counter", what, f"its branch began in epoch {record.first_epoch}")
        if not rows.has(Table.BORN, born_key(branch, birth, leaf)):
            yield corrupt("born-index", what, "it is missing from the index of its epoch")


def check_born(rows: Rows) -> Iterator[Finding]:
    """Prove the index of births."""
    for key, _ in rows.reader.scan(Table.BORN):
        if len(key) != len(born_key(0, 0, 0)):
            yield corrupt("unknown-row", f"index of births, {shown(key)}", "its key has a wrong length")
            continue
        branch, birth, leaf = split_born(key)
        if not rows.has(Table.LEAVES, leaf_key(branch, leaf, birth)) and not rows.going(branch):
            what = f"leaf {leaf} of branch {branch}, born in epoch {birth}"
            if rows.has(Table.BRANCHES, number_key(branch)):
                yield corrupt("born-index", what, "the index of births names it, but it does not exist")
            else:
                yield leak("orphan-birth", what, "neither it nor its branch exists")


def check_punches(rows: Rows) -> Iterator[Finding]:
    """Prove the rows of what waits to be punched."""
    for key, stored in rows.reader.scan(Table.PUNCH):
        if len(key) != len(pair_key(0, 0)):
            yield corrupt("unknown-row", f"punch {shown(key)}", "its key has a wrong length")
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
        elif not rows.has(Table.FILES, number_key(number)):
            yield leak("orphan-punch", what, "its file does not exist")


def check_checksums(rows: Rows) -> Iterator[Finding]:
    """Prove the rows of checksums."""
    for key, stored in rows.reader.scan(Table.CHECKSUMS):
        if len(key) != len(pair_key(0, 0)):
            yield corrupt("unknown-row", f"checksums {shown(key)}", "its key has a wrong length")
            continue
        number, group = split_pair(key)
        what = f"checksums of file {number}, group {group}"
        try:
            payload = unseal(key, stored, what=what)
        except DamagedRecord as error:
            yield corrupt("damaged-record", what, f"{error.message}: {error.cause}")
            continue
        if len(payload) != _CHECKSUMS_BYTES:
            yield corrupt("bad-value", what, f"it has {len(payload)} bytes, not {_CHECKSUMS_BYTES}")
        elif not rows.has(Table.FILES, number_key(number)):
            yield leak("orphan-checksums", what, "its file does not exist")
