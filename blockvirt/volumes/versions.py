"""The versions of a branch's leaves in the metadata store: the newest one that a point sees, and those nobody sees.

The points of a branch are rows of their own (snapshots, and children that have their origin there) and its head.
Everything that frees addresses is judged here, inside the transaction that drops the last version that held them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from blockvirt.errors import DamagedRecord
from blockvirt.lun.address import chunk_of, file_of
from blockvirt.lun.leaf import NO_ENTRIES, decode
from blockvirt.lun.leaf_diff import NOTHING, planes
from blockvirt.lun.versions import freed_addresses
from blockvirt.meta.keys import (
    Table,
    born_key,
    leaf_key,
    leaf_prefix,
    number_key,
    pair_key,
    split_leaf,
    split_pair,
    split_point,
)
from blockvirt.meta.records import BranchRecord, FileRecord, seal, unseal
from blockvirt.meta.store import Reader, Writer

if TYPE_CHECKING:
    from array import array


def branch_record(reader: Reader, number: int) -> BranchRecord:
    """Return the record of a branch that must exist; raises DamagedRecord where it does not."""
    record = reader.record(BranchRecord, Table.BRANCHES, number_key(number))
    if record is None:
        raise DamagedRecord(f"branch {number} is missing from the metadata", correction="run 'blockvirt check'")
    return record


def note_stopped(writer: Writer, number: int, reason: str) -> None:
    """Keep in a branch's record why its volume has stopped; "": it has not. Nothing where the branch is gone."""
    stored = writer.record(BranchRecord, Table.BRANCHES, number_key(number))
    if stored is not None:
        writer.put_record(Table.BRANCHES, number_key(number), replace(stored, stopped=reason))


def lineage(reader: Reader, branch: BranchRecord, epoch: int) -> list[tuple[int, int]]:
    """Return where the map of a point is looked up, nearest first: (branch, newest epoch visible there)."""
    chain = [(branch.number, epoch)]
    while branch.origin_branch:
        chain.append((branch.origin_branch, branch.origin_epoch))
        branch = branch_record(reader, branch.origin_branch)
    return chain


def visible_version(reader: Reader, branch: int, leaf: int, epoch: int) -> "tuple[int, array[int]] | None":
    """Return (birth, entries) of the newest version of a leaf born in ``epoch`` or before, in this branch alone."""
    found = reader.floor(Table.LEAVES, leaf_key(branch, leaf, epoch), prefix=leaf_prefix(branch, leaf))
    if found is None:
        return None
    key, stored = found
    return split_leaf(key)[2], decoded(key, stored)


def visible_through(reader: Reader, chain: Sequence[tuple[int, int]], leaf: int) -> "array[int]":
    """Return the entries of a leaf as a point sees it; ``chain`` is its ``lineage``. Not to be changed."""
    for branch, epoch in chain:
        found = visible_version(reader, branch, leaf, epoch)
        if found is not None:
            return found[1]
    return NO_ENTRIES


def planes_through(reader: Reader, chain: Sequence[tuple[int, int]], leaf: int) -> bytes:
    """Return a leaf as a point sees it, in the form that ``lun.leaf_diff`` compares; raises DamagedRecord."""
    for branch, epoch in chain:
        found = reader.floor(Table.LEAVES, leaf_key(branch, leaf, epoch), prefix=leaf_prefix(branch, leaf))
        if found is not None:
            return planes(unseal(*found, what=f"leaf {leaf} of branch {branch}"))
    return NOTHING


def leaf_births(reader: Reader, branch: int) -> Iterator[tuple[int, int]]:
    """Yield (leaf number, birth) of every version in a branch, in order."""
    for key, _ in Reader.scan(reader, Table.LEAVES, prefix=number_key(branch)):
        yield split_leaf(key)[1:]


def decoded(key: bytes, stored: bytes) -> "array[int]":
    """Return the entries of a stored version; raises DamagedRecord."""
    branch, leaf, birth = split_leaf(key)
    return decode(unseal(key, stored, what=f"leaf {leaf} of branch {branch}, born in epoch {birth}"))


# --- points ----------------------------------------------------------------------------------------------------------


def previous_point(reader: Reader, branch: int, epoch: int) -> int:
    """Return the greatest epoch before ``epoch`` that a snapshot or a child keeps readable; 0: there is none."""
    found = reader.floor(Table.POINTS, pair_key(branch, epoch), prefix=number_key(branch))
    return split_pair(found[0][:16])[1] if found is not None else 0


def next_point(reader: Reader, branch: BranchRecord, epoch: int) -> int | None:
    """Return the smallest epoch from ``epoch`` on that something keeps readable, the head included; None: nothing."""
    start = pair_key(branch.number, epoch)
    for key, _ in Reader.scan(reader, Table.POINTS, start=start, prefix=number_key(branch.number)):
        return split_pair(key[:16])[1]
    return branch.head_epoch or None


def points_of(reader: Reader, branch: int) -> list[tuple[int, str | int]]:
    """Return the points of a branch in order: (epoch, snapshot id or number of the child branch)."""
    return [split_point(key)[1:] for key, _ in reader.scan(Table.POINTS, prefix=number_key(branch))]


def is_pinned(reader: Reader, branch: int) -> bool:
    """Tell whether anything but a head keeps the branch."""
    return any(True for _ in Reader.scan(reader, Table.POINTS, prefix=number_key(branch)))


# --- freeing ---------------------------------------------------------------------------------------------------------


def owner_of(reader: Reader, branch: int) -> Callable[[int], bool]:
    """Return a test whether an address lies in one of the branch's own files."""
    own = {split_pair(key)[1] for key, _ in reader.scan(Table.BRANCH_FILES, prefix=number_key(branch))}
    return lambda address: file_of(address) in own


def dead_in_gap(
    reader: Reader, branch: int, leaf: int, after_epoch: int, upto_epoch: int | None, most: int | None = None
) -> tuple[list[int], list[int]]:
    """Return the births of a leaf's versions that nobody sees between two neighbouring points, and what they free.

    ``after_epoch`` is the earlier point (0: there is none), ``upto_epoch`` the later one (None: there is none, so
    nothing later is seen). Of more than ``most`` the oldest are returned: the next one is then what they are compared
    with, since an address that it does not hold is in none behind it. Raises DamagedRecord where a version that must
    be compared is damaged.
    """
    whole = True
    found: list[tuple[int, bytes, bytes]] = []
    start = leaf_key(branch, leaf, after_epoch + 1)
    # As a plain reader, which takes no rows ahead: nothing is changed meanwhile.
    for key, stored in Reader.scan(reader, Table.LEAVES, start=start, prefix=leaf_prefix(branch, leaf)):
        birth = split_leaf(key)[2]
        if upto_epoch is not None and birth > upto_epoch:
            break
        found.append((birth, key, stored))
        if most is not None and len(found) > most:
            whole = False
            break
    after = found.pop() if found and (upto_epoch is not None or not whole) else None
    if not found:
        return [], []
    before = visible_version(reader, branch, leaf, after_epoch) if after_epoch else None
    freed = freed_addresses(
        before[1] if before is not None else None,
        [decoded(key, stored) for _, key, stored in found],
        decoded(*after[1:]) if after is not None else None,
        owner_of(reader, branch),
    )
    return [birth for birth, _, _ in found], freed


def has_version_between(reader: Reader, branch: int, leaf: int, after_epoch: int, before_epoch: int) -> bool:
    """Tell whether a leaf has a version that was born after the one epoch and before the other."""
    found = reader.floor(Table.LEAVES, leaf_key(branch, leaf, before_epoch - 1), prefix=leaf_prefix(branch, leaf))
    return found is not None and split_leaf(found[0])[2] > after_epoch


def free_gap(
    writer: Writer, branch: int, leaf: int, after_epoch: int, upto_epoch: int | None, most: int | None = None
) -> tuple[int, list[int]]:
    """Remove the versions that ``dead_in_gap`` finds; returns how many, and the addresses that are to be released."""
    births, freed = dead_in_gap(writer, branch, leaf, after_epoch, upto_epoch, most)
    for birth in births:
        writer.delete(Table.LEAVES, leaf_key(branch, leaf, birth))
        writer.delete(Table.BORN, born_key(branch, birth, leaf))
    return len(births), freed


def release(writer: Writer, freed: Sequence[int], *, counted: bool = False) -> None:
    """Queue addresses for punching, neighbours merged, and take them off their files' live counts.

    ``counted`` says that the live counts have been changed already.
    """
    lost: dict[int, int] = {}
    run_start = run_count = 0
    for entry in [*sorted(freed), 0]:
        if run_count and entry == run_start + run_count:
            run_count += 1
            continue
        if run_count:
            key = pair_key(file_of(run_start), chunk_of(run_start))
            writer.put(Table.PUNCH, key, seal(key, run_count.to_bytes(8, "little")))
            lost[file_of(run_start)] = lost.get(file_of(run_start), 0) + run_count
        run_start, run_count = entry, 1
    if counted:
        return
    for number, count in lost.items():
        file = writer.record(FileRecord, Table.FILES, number_key(number))
        assert file is not None, "what a branch frees lies in a file of its own"
        assert file.live_chunks >= count, (file, count)
        writer.put_record(Table.FILES, number_key(number), replace(file, live_chunks=file.live_chunks - count))
