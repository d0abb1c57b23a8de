"""The offline proof of one branch's map: every version of its leaves, and what each of its points sees of them.

An entry is looked at where it differs from that of the version before (of the origin's, before the first): what is
equal was proved there. So the cost is that of reading the versions, and of what changed between them.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, compress
from operator import ne
from typing import TYPE_CHECKING, Protocol

from blockvirt.errors import BlockvirtError, DamagedRecord
from blockvirt.limits import LEAF_CHUNKS
from blockvirt.lun.address import ADDRESS_MASK, FRESH, file_of
from blockvirt.lun.leaf import NO_ENTRIES, Leaf, mapped
from blockvirt.meta.keys import Table, number_key, split_leaf, split_pair
from blockvirt.meta.records import BranchRecord
from blockvirt.meta.store import Reader
from blockvirt.volumes.versions import branch_record, decoded, lineage, points_of, visible_through, visible_version

if TYPE_CHECKING:
    from array import array


@dataclass(frozen=True, slots=True)
class Place:
    """A slot of one version of a leaf."""

    branch: int
    leaf: int
    birth: int
    slot: int

    @property
    def chunk(self) -> int:
        """Which chunk of the volume that is."""
        return self.leaf * LEAF_CHUNKS + self.slot


class Listener(Protocol):
    """Who hears of what the walk finds."""

    def new(self, place: Place, address: int) -> None:
        """Hear that an address of the branch's own files is named where the version before has another, or none."""

    def foreign(self, place: Place, address: int, *, is_kept: bool) -> None:
        """Hear of an address of another branch; ``is_kept``: an origin keeps it for this one."""

    def shared(self, place: Place, address: int) -> None:
        """Hear that the head may overwrite an address in place which the version before, or another branch, holds."""

    def damaged(self, leaf: int, birth: int, error: BlockvirtError) -> None:
        """Hear that a version cannot be read."""

    def dead(self, leaf: int, birth: int) -> None:
        """Hear that no point sees a version, and no pending reclaim will come by it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the points of a branch see."""

    is_whole: bool
    """Everything could be read: the figures are exact."""
    mapped_chunks: Mapping[int, int]
    """By epoch of the point, origins included; the head's under its epoch."""
    inherited_chunks: int
    """How many of the head's lie in files of other branches."""


class BranchWalk:
    """One walk over all versions of a branch."""

    def __init__(
        self, reader: Reader, branch: BranchRecord, owner_of_file: Callable[[int], int | None], listener: Listener
    ) -> None:
        """``owner_of_file`` tells the branch of a backing file. Raises DamagedRecord where origins are damaged."""
        self._reader = reader
        self._branch = branch
        self._owner_of_file = owner_of_file
        self._on = listener
        self._kept = _kept_for(reader, branch)
        self._origins = lineage(reader, branch, 0)[1:]
        self._points = sorted({epoch for epoch, _ in points_of(reader, branch.number)} | {branch.head_epoch} - {0})
        rows = reader.scan(Table.RECLAIM, prefix=number_key(branch.number))
        self._pending = [split_pair(key)[1] for key, _ in rows]
        self._changes = [0] * (len(self._points) + 1)
        self._inherited = 0
        self._looked_up: dict[int, list[array[int] | None]] = {}
        self._replaced: set[int] = set()
        """Leaves whose head the store has, and the journal makes anew."""
        self._whole = True

    def run(self, replayed: Mapping[int, Leaf], origin_mapped: int | None) -> Seen:
        """Walk; ``replayed`` are leaves of the head that its journal makes anew.

        ``origin_mapped`` is how many chunks the origin sees; None: that is not known, so no figure is exact.
        """
        for leaf, versions in self._leaves(replayed):
            in_journal = leaf in replayed and leaf not in self._replaced
            self._leaf(leaf, versions, in_journal=in_journal)
        counts = accumulate(self._changes, initial=origin_mapped or 0)
        next(counts)
        figures = dict(zip(self._points, counts, strict=False))
        inherited = self._inherited + (origin_mapped or 0) if self._origins else 0
        return Seen(self._whole and origin_mapped is not None, figures, inherited)

    def _leaves(self, replayed: Mapping[int, Leaf]) -> "Iterator[tuple[int, list[tuple[int, array[int] | None]]]]":
        """Yield each leaf with its versions: (birth, entries, None where they are damaged)."""
        head = self._branch.head_epoch
        waiting = sorted(replayed, reverse=True)
        at, versions = -1, list[tuple[int, "array[int] | None"]]()
        for key, stored in self._reader.scan(Table.LEAVES, prefix=number_key(self._branch.number)):
            _, leaf, birth = split_leaf(key)
            if leaf != at:
                yield from self._group(at, versions, replayed)
                while waiting and waiting[-1] <= leaf:
                    if (other := waiting.pop()) != leaf:
                        yield other, [(head, replayed[other].entries)]
                at, versions = leaf, []
            if leaf in replayed and birth == head:
                self._replaced.add(leaf)
                continue
            try:
                versions.append((birth, decoded(key, stored)))
            except BlockvirtError as error:
                self._whole = False
                versions.append((birth, None))
                self._on.damaged(leaf, birth, error)
        yield from self._group(at, versions, replayed)
        for other in reversed(waiting):
            yield other, [(head, replayed[other].entries)]

    def _group(
        self, leaf: int, versions: "list[tuple[int, array[int] | None]]", replayed: Mapping[int, Leaf]
    ) -> "Iterator[tuple[int, list[tuple[int, array[int] | None]]]]":
        if leaf >= 0:
            head = [(self._branch.head_epoch, replayed[leaf].entries)] if leaf in replayed else []
            yield leaf, [*versions, *head]

    def _leaf(self, leaf: int, versions: "list[tuple[int, array[int] | None]]", *, in_journal: bool) -> None:
        """Prove one leaf; ``in_journal``: its last version is not stored yet. What that one supersedes goes with it."""
        self._looked_up = {}
        before = self._of_origin(leaf)
        inherited = count = mapped(before) if before is not NO_ENTRIES else 0
        first_seen = bisect_left(self._points, versions[0][0])
        self._changes[first_seen] -= count
        entries = before
        for place, (birth, found) in enumerate(versions):
            until = bisect_left(self._points, versions[place + 1][0]) if place + 1 < len(versions) else None
            seen = bisect_left(self._points, birth)
            if (until == seen and not (in_journal and place + 2 == len(versions))) or seen == len(self._points):
                self._dead(leaf, birth, seen)
            if found is None:
                continue
            entries = found
            count += self._version(leaf, birth, before, entries)
            self._changes[seen] += count
            self._changes[len(self._points) if until is None else until] -= count
            before = entries
        if self._origins:
            self._inherited += sum(1 for entry in entries if entry and not self._is_own(entry)) - inherited

    def _of_origin(self, leaf: int) -> "array[int]":
        if not self._origins:
            return NO_ENTRIES
        try:
            return visible_through(self._reader, self._origins, leaf)
        except DamagedRecord:  # named where its own branch is walked
            self._whole = False
            return NO_ENTRIES

    def _version(self, leaf: int, birth: int, before: "array[int]", entries: "array[int]") -> int:
        """Prove what differs from the version before; returns by how much more is mapped."""
        more = 0
        number = self._branch.number
        for slot in compress(range(LEAF_CHUNKS), map(ne, before, entries)):
            address, earlier = entries[slot] & ADDRESS_MASK, before[slot] & ADDRESS_MASK
            if address == earlier:
                continue
            if not address:
                more -= 1
                continue
            more += not earlier
            place = Place(number, leaf, birth, slot)
            if self._is_own(address):
                self._on.new(place, address)
            else:
                self._on.foreign(place, address, is_kept=self._is_kept(leaf, slot, address))
        if birth == self._branch.head_epoch and max(entries) >= FRESH:
            for slot, entry in enumerate(entries):
                if entry >= FRESH and (entry & ADDRESS_MASK == before[slot] & ADDRESS_MASK or not self._is_own(entry)):
                    self._on.shared(Place(number, leaf, birth, slot), entry & ADDRESS_MASK)
        return more

    def _is_own(self, entry: int) -> bool:
        return self._owner_of_file(file_of(entry)) == self._branch.number

    def _is_kept(self, leaf: int, slot: int, address: int) -> bool:
        """Tell whether a point that an origin keeps for this branch sees an address in the same slot."""
        owner = self._owner_of_file(file_of(address))
        if owner not in self._kept:
            return False
        if owner not in self._looked_up:
            self._looked_up[owner] = list(self._at_points(leaf, owner, self._kept[owner]))
        return any(entries is None or entries[slot] & ADDRESS_MASK == address for entries in self._looked_up[owner])

    def _at_points(self, leaf: int, owner: int, epochs: Iterable[int]) -> "Iterator[array[int] | None]":
        """Yield what points of an older branch see of a leaf; None where that is damaged."""
        for epoch in epochs:
            try:
                found = visible_version(self._reader, owner, leaf, epoch)
            except DamagedRecord:
                self._whole = False
                yield None
                continue
            if found is not None:
                yield found[1]

    def _dead(self, leaf: int, birth: int, seen: int) -> None:
        after = self._points[seen - 1] if seen else 0
        upto = self._points[seen] if seen < len(self._points) else None
        if not any(epoch > after and (upto is None or epoch < upto) for epoch in self._pending):
            self._on.dead(leaf, birth)


def _kept_for(reader: Reader, branch: BranchRecord) -> dict[int, set[int]]:
    """Return the epochs of older branches that are kept for a branch, whose addresses it may hold."""
    kept: dict[int, set[int]] = {}
    waiting = [branch]
    while waiting:
        record = waiting.pop()
        for number, epoch in [(record.origin_branch, record.origin_epoch), *record.pins]:
            if number >= record.number:
                raise DamagedRecord(
                    f"branch {record.number} comes from branch {number}, which is younger",
                    correction="bring back a copy of the metadata ('blockvirt check --restore-metadata')",
                )
            if number and epoch not in kept.setdefault(number, set()):
                kept[number].add(epoch)
                waiting.append(branch_record(reader, number))
    return kept
