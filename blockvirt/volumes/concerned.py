"""Whom a piece of damage concerns, in words that users know: volumes by their names, snapshots as ``volume@snapshot``.

For the offline check: each answer may walk over the points of several branches.
"""

from collections.abc import Iterator
from itertools import islice

from blockvirt.errors import BlockvirtError, DamagedRecord
from blockvirt.lun.address import ADDRESS_MASK
from blockvirt.meta.keys import Table, leaf_prefix, split_leaf
from blockvirt.meta.records import SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Reader
from blockvirt.volumes.versions import branch_record, decoded, points_of

NAMES = 5  # in one message: enough to go on with


def told(names: Iterator[str]) -> str:
    """Return the end of a message that tells whom it concerns; only the first few by name."""
    listed = list(islice(names, NAMES + 1))
    if not listed:
        return "; no volume and no snapshot sees it"
    more = " and others" if len(listed) > NAMES else ""
    return f"; concerns {', '.join(listed[:NAMES])}{more}"


def first_names(names: Iterator[str]) -> tuple[str, ...]:
    """Return the first few of those whom damage concerns, and a last one, 'and others', where there are more."""
    listed = tuple(islice(names, NAMES + 1))
    return (*listed[:NAMES], "and others") if len(listed) > NAMES else listed


def users(reader: Reader, branch: int) -> Iterator[str]:
    """Yield everything that may see what is in a branch: its volume, its snapshots, and what comes from it."""
    return _seeing(reader, branch, None, 0, 0, 0)


def viewers(reader: Reader, branch: int, leaf: int, birth: int) -> Iterator[str]:
    """Yield everything that sees one version of a leaf."""
    return _seeing(reader, branch, leaf, birth, 0, 0)


def holders(reader: Reader, branch: int, leaf: int, birth: int, slot: int, address: int) -> Iterator[str]:
    """Yield everything that sees an address in a slot of a leaf, first named by the version born in ``birth``."""
    return _seeing(reader, branch, leaf, birth, slot, address)


def snapshot_name(reader: Reader, snapshot_id: str) -> str:
    """Return ``volume@snapshot``, or the id where a record is missing or damaged."""
    try:
        snapshot = reader.record(SnapshotRecord, Table.SNAPSHOTS, snapshot_id.encode())
    except BlockvirtError:
        snapshot = None
    return f"{volume_name(reader, snapshot.volume_id)}@{snapshot.name}" if snapshot is not None else snapshot_id


def volume_name(reader: Reader, volume_id: str) -> str:
    """Return the name of a volume, or its id where its record is missing or damaged."""
    try:
        volume = reader.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
    except BlockvirtError:
        volume = None
    return volume.name if volume is not None else volume_id


def _seeing(reader: Reader, number: int, leaf: int | None, birth: int, slot: int, address: int) -> Iterator[str]:
    try:
        branch = branch_record(reader, number)
    except BlockvirtError:
        yield f"whatever is in branch {number}"
        return
    end = _end(reader, number, leaf, birth, slot, address) if leaf is not None else None
    if branch.head_epoch and (end is None or branch.head_epoch < end):
        yield volume_name(reader, branch.volume_id)
    for epoch, who in sorted(points_of(reader, number), key=lambda point: isinstance(point[1], int)):  # own ones first
        if epoch < birth or (end is not None and epoch >= end):
            continue
        if isinstance(who, str):
            yield snapshot_name(reader, who)
        elif who > number:  # else the records are wrong, and going on might never end
            yield from _seeing(reader, who, leaf, 0, slot, address)


def _end(reader: Reader, branch: int, leaf: int, birth: int, slot: int, address: int) -> int | None:
    """Return the birth of the first version after ``birth`` that does not hold an address; None: there is none.

    Without an address no later version does.
    """
    for key, stored in reader.scan(Table.LEAVES, prefix=leaf_prefix(branch, leaf)):
        born = split_leaf(key)[2]
        if born <= birth:
            continue
        try:
            if not address or decoded(key, stored)[slot] & ADDRESS_MASK != address:
                return born
        except DamagedRecord:
            return born
    return None
