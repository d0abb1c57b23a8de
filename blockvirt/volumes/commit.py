"""What a checkpoint or a recovery writes: a branch's new state, its files' marks, leaf versions, and what that frees.

Runs inside one metadata transaction. Records are read and changed there, field by field: the background works on other
fields of the same records (live counts, origins).

All commits of the pool wait for that transaction, so it frees a bounded number of older versions. Mostly there are
none; once snapshots have gone there may be thousands behind a leaf, and what is too much is left to a reclaim.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from blockvirt.errors import DamagedRecord
from blockvirt.lun.address import ADDRESS_MASK
from blockvirt.lun.leaf import SLOT_BITS, SLOT_MASK, encode
from blockvirt.meta.keys import POOL_KEY, Table, born_key, leaf_key, number_key
from blockvirt.meta.records import BranchRecord, FileRecord, PoolRecord, seal
from blockvirt.meta.store import Writer
from blockvirt.volumes.leaf_map import FrozenLeaf
from blockvirt.volumes.reclaim import leave_behind
from blockvirt.volumes.versions import (
    branch_record,
    free_gap,
    has_version_between,
    previous_point,
    release,
    visible_version,
)

log = logging.getLogger("blockvirt.volumes")


@dataclass(frozen=True, slots=True)
class FileChange:
    """A backing file's new marks."""

    number: int
    used_chunks: int
    sealed: bool
    live_change: int
    """How many more of its chunks are named since the last commit."""


@dataclass(frozen=True, slots=True)
class MapChange:
    """One branch's map state at one instant, as far as it differs from what the store holds."""

    branch: int
    epoch: int
    """That the leaves were changed in."""
    head_epoch: int
    """That the head goes on in: greater than ``epoch`` where a snapshot closes that."""
    covered_generation: int
    covered_sequence: int
    journal_chain: int
    mapped_chunks: int
    inherited_chunks: int
    files: Sequence[FileChange]
    leaves: list[FrozenLeaf]
    freed: list[int]
    """Addresses that the head alone had allocated and dropped again; their live counts are in ``files``."""
    dropped: list[tuple[int, int]]
    """(chunk, address of the branch's own) that the head dropped and an older version may still hold."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a change came to."""

    branch: BranchRecord
    """As stored."""
    versions_removed: int
    """How many older versions went."""
    has_freed: bool
    """There are new rows in the punch table."""
    has_queued: bool
    """There is a new job: wake the board once the transaction is committed."""


Rows = list[tuple[int, bytes, bytes, bytes]]


def leaf_rows(branch: int, epoch: int, leaves: Sequence[FrozenLeaf]) -> Rows:
    """Encode leaves: (leaf number, leaf key, sealed value, born key). In an I/O thread, not in the store's."""
    rows = []
    for item in leaves:
        key = leaf_key(branch, item.number, epoch)
        rows.append((item.number, key, seal(key, encode(item.entries)), born_key(branch, epoch, item.number)))
    return rows


def write_map(writer: Writer, change: MapChange, rows: Rows, most: int) -> Written:
    """Store a branch's new state and release what it frees.

    At most ``most`` older versions are removed; the others are left to a reclaim.
    """
    stored = branch_record(writer, change.branch)
    branch = replace(
        stored,
        head_epoch=change.head_epoch,
        covered_generation=change.covered_generation,
        covered_sequence=change.covered_sequence,
        journal_chain=change.journal_chain,
        mapped_chunks=change.mapped_chunks,
        inherited_chunks=change.inherited_chunks,
    )
    writer.put_record(Table.BRANCHES, number_key(branch.number), branch)
    if change.head_epoch > change.epoch:  # with or without a snapshot: that may still be refused
        _raise_epoch(writer, change.head_epoch)
    for mark in change.files:
        file = writer.record(FileRecord, Table.FILES, number_key(mark.number))
        assert file is not None, "a file's record is durable before anything is written to it"
        live_chunks = file.live_chunks + mark.live_change
        file = replace(file, used_chunks=mark.used_chunks, sealed=mark.sealed, live_chunks=live_chunks)
        writer.put_record(Table.FILES, number_key(file.number), file)
    release(writer, change.freed, counted=True)
    dropped = _no_longer_held(writer, change)
    release(writer, dropped)
    for _, key, value, born in rows:
        writer.put(Table.LEAVES, key, value)
        writer.put(Table.BORN, born, b"")
    removed = freed = 0
    has_queued = False
    if stored.first_epoch != change.epoch:  # else there are no older versions
        leaves = [leaf for leaf, _, _, _ in rows]
        removed, freed, is_left = _free_superseded(writer, change, leaves, most)
        has_queued = is_left and leave_behind(writer, branch, change.epoch)
    return Written(branch, removed, bool(change.freed or dropped or freed), has_queued)


def _raise_epoch(writer: Writer, epoch: int) -> None:
    pool = writer.record(PoolRecord, Table.POOL, POOL_KEY)
    assert pool is not None, "a volume is open, so its pool has a record"
    if pool.epoch < epoch:
        writer.put_record(Table.POOL, POOL_KEY, replace(pool, epoch=epoch))


def _no_longer_held(writer: Writer, change: MapChange) -> list[int]:
    """Return the dropped addresses that the version before the head's does not hold: nobody does then."""
    by_leaf: dict[int, list[tuple[int, int]]] = {}
    for chunk, address in change.dropped:
        by_leaf.setdefault(chunk >> SLOT_BITS, []).append((chunk & SLOT_MASK, address))
    free: list[int] = []
    for leaf, slots in by_leaf.items():
        try:
            before = visible_version(writer, change.branch, leaf, change.epoch - 1)
        except DamagedRecord as error:
            log.error("what leaf %d of branch %d dropped is not freed: %s", leaf, change.branch, error)
            continue
        free += [address for slot, address in slots if before is None or before[1][slot] & ADDRESS_MASK != address]
    return free


def _free_superseded(writer: Writer, change: MapChange, leaves: Sequence[int], most: int) -> tuple[int, int, bool]:
    """Remove at most ``most`` versions behind the last point that nobody sees now that the head has its own of them.

    Returns how many went, how many addresses that freed, and whether there are more.
    """
    point = previous_point(writer, change.branch, change.epoch)
    removed = freed = 0
    for place, leaf in enumerate(leaves):
        try:
            count, addresses = free_gap(writer, change.branch, leaf, point, change.epoch, most - removed)
        except DamagedRecord as error:
            log.error("older versions of leaf %d of branch %d are not freed: %s", leaf, change.branch, error)
            continue
        release(writer, addresses)
        removed += count
        freed += len(addresses)
        if removed == most:
            epochs = point, change.epoch
            is_left = any(has_version_between(writer, change.branch, each, *epochs) for each in leaves[place:])
            return removed, freed, is_left
    return removed, freed, False
