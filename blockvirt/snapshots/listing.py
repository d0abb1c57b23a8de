"""Pages of snapshots. A page costs what is on it, however many snapshots there are.

The order is that of the points: volumes by their ids, in each its branches, in each their epochs. Branches and epochs
are numbered upwards, so within a volume that is the order in which its snapshots came to be, and it is stored sorted.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from blockvirt.errors import DamagedRecord, InvalidRequest
from blockvirt.ids import canonical_id, is_id
from blockvirt.meta.keys import (
    Table,
    number_key,
    snapshot_point_key,
    split_point,
    split_volume_branch,
    volume_branch_key,
)
from blockvirt.meta.records import SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Reader
from blockvirt.snapshots.views import Snapshot, parent_of

log = logging.getLogger("blockvirt.snapshots")

LOOKED_AT = 1000  # snapshots in one go, where labels leave most of them out: some 20 ms


@dataclass(frozen=True, slots=True)
class Page:
    """Some snapshots in order, and the place to go on after (empty: that was all)."""

    snapshots: tuple[Snapshot, ...]
    next_after: str
    damaged: tuple[str, ...] = ()
    """'VOLUME@NAME' of those that would be among them, and whose records are damaged."""


class _Place(NamedTuple):
    """Where a snapshot is, or was, in the order of all."""

    volume_id: str
    branch: int
    epoch: int
    snapshot_id: str

    def text(self) -> str:
        return f"{self.volume_id}/{self.branch:x}/{self.epoch:x}/{self.snapshot_id}"


def page(
    reader: Reader,
    volume_id: str | None,
    labels: Mapping[str, str],
    after: str,
    limit: int,
    shown: Callable[[SnapshotRecord, str], Snapshot],
) -> Page:
    """Return up to ``limit`` snapshots, of one volume or of all, that carry all of ``labels``, behind a place.

    ``after`` is the ``next_after`` of the page before, empty for the first one; it leads on even where all around it
    were deleted. There may be fewer than ``limit`` and still a page behind them. ``shown`` makes the view of a
    snapshot from its record and its parent's id. Raises InvalidRequest where ``after`` is no place, DamagedRecord for
    the volume that is asked for; of others the log says it.
    """
    behind = _parsed(after) if after else None
    found: list[Snapshot] = []
    damaged: list[str] = []
    looked_at = 0
    for volume in _volumes(reader, volume_id, behind.volume_id if behind is not None else ""):
        for place in _places(reader, volume.id, behind):
            if len(found) == limit or looked_at == LOOKED_AT:
                return Page(tuple(found), after, tuple(damaged))
            after = place.text()
            looked_at += 1
            try:
                record = reader.record(SnapshotRecord, Table.SNAPSHOTS, place.snapshot_id.encode())
            except DamagedRecord as error:
                damaged.append(f"{volume.name}@{_name(reader, place)}")
                log.error("snapshot %s is not listed: %s", damaged[-1], error.message)
                continue
            if record is not None and labels.items() <= record.labels.items():
                found.append(shown(record, parent_of(reader, place.branch, place.epoch)))
    return Page(tuple(found), "", tuple(damaged))


def _parsed(text: str) -> _Place:
    try:
        volume_id, branch, epoch, snapshot_id = text.split("/")
        place = _Place(volume_id, int(branch, 16), int(epoch, 16), snapshot_id)
    except ValueError:
        place = None
    if (
        place is None
        or not all(is_id(each) and canonical_id(each) == each for each in (place.volume_id, place.snapshot_id))
        or not all(0 <= number < 1 << 64 for number in (place.branch, place.epoch))
    ):
        raise InvalidRequest("the place to go on after is none", correction="begin with the first page")
    return place


def _volumes(reader: Reader, volume_id: str | None, start_id: str) -> Iterator[VolumeRecord]:
    """Yield one volume, or all that have snapshots from ``start_id`` on, unless they are deleted."""
    keys = (
        [volume_id.encode()]
        if volume_id is not None
        else (key for key, _ in reader.scan(Table.VOLUMES, start=start_id.encode()) if _has_snapshots(reader, key))
    )
    for key in keys:
        try:
            record = reader.record(VolumeRecord, Table.VOLUMES, key)
        except DamagedRecord as error:
            if volume_id is not None:
                raise
            log.error("the snapshots of volume %s are not listed: %s", key.decode(errors="replace"), error.message)
            continue
        if record is not None and not record.trashed_s and not record.deleting:
            yield record


def _has_snapshots(reader: Reader, volume_key: bytes) -> bool:
    return any(True for _ in reader.scan(Table.SNAPSHOT_NAMES, prefix=volume_key + b"/"))


def _places(reader: Reader, volume_id: str, behind: _Place | None) -> Iterator[_Place]:
    """Yield the places of a volume's snapshots, in order; those behind ``behind`` where that is one of its own."""
    if behind is not None and behind.volume_id != volume_id:
        behind = None
    first_branch = volume_branch_key(volume_id, behind.branch) if behind is not None else b""
    for key, _ in reader.scan(Table.VOLUME_BRANCHES, start=first_branch, prefix=f"{volume_id}/".encode()):
        number = split_volume_branch(key)[1]
        start = b""
        if behind is not None and behind.branch == number:
            start = snapshot_point_key(number, behind.epoch, behind.snapshot_id) + b"\0"  # the next key there can be
        for point, _ in reader.scan(Table.POINTS, start=start, prefix=number_key(number)):
            _, epoch, who = split_point(point)
            if isinstance(who, str):
                yield _Place(volume_id, number, epoch, who)


def _name(reader: Reader, place: _Place) -> str:
    """Return the name of a snapshot whose record does not tell it; its id where the index does not either."""
    for key, stored in reader.scan(Table.SNAPSHOT_NAMES, prefix=f"{place.volume_id}/".encode()):
        if stored == place.snapshot_id.encode():
            return key.decode().partition("/")[2]
    return place.snapshot_id
