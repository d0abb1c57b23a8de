"""How far back the chunks that a point sees lie: in its own branch, in the one that it came from, and so on."""

from collections.abc import Callable
from typing import TypeVar

from blockvirt.limits import NBD_STATUS_CHUNKS
from blockvirt.lun.address import ADDRESS_MASK, UNMAPPED, file_of
from blockvirt.lun.leaf import NO_ENTRIES, SLOT_BITS, SLOT_MASK
from blockvirt.meta.keys import Table, number_key
from blockvirt.meta.records import FileRecord
from blockvirt.meta.store import Store
from blockvirt.volumes.leaf_map import LeafMap
from blockvirt.volumes.versions import branch_record, lineage

T = TypeVar("T")


class Layers:
    """Numbers the layers of a point as ``qemu:allocation-depth`` does. As of now: made anew for each question."""

    def __init__(self, store: Store, branch: int, epoch: int) -> None:
        """The point is ``epoch`` of ``branch``; raises DamagedRecord."""
        self._store = store
        with store.read() as reader:
            self._branches = [number for number, _ in lineage(reader, branch_record(reader, branch), epoch)]
        self._depths: dict[int, int] = {}

    def depth(self, entry: int) -> int:
        """Return 0 for a chunk that lies nowhere, 1 for one of the point's own branch, 2 for the origin's ..."""
        if not entry & ADDRESS_MASK:
            return 0
        file = file_of(entry)
        if file not in self._depths:
            self._depths[file] = self._depth_of_file(file)
        return self._depths[file]

    def _depth_of_file(self, number: int) -> int:
        with self._store.read() as reader:
            record = reader.record(FileRecord, Table.FILES, number_key(number))
        if record is None or record.branch not in self._branches:
            return len(self._branches) + 1  # what an origin of its origins had left to it
        return self._branches.index(record.branch) + 1


def runs(
    leaf_map: LeafMap, state_of: Callable[[int], T], offset: int, length: int, chunk_shift: int
) -> list[tuple[int, T]]:
    """Describe a range of bytes: (length in bytes, state) in order, neighbours alike merged.

    ``state_of`` tells the state of a map entry. Describes the beginning alone where much is mapped, so that no more
    than a few ms pass. Raises DamagedRecord.
    """
    end = offset + length
    found: list[tuple[int, T]] = []

    def extend(stop: int, state: T) -> int:
        if found and found[-1][1] == state:
            found[-1] = (found[-1][0] + stop - at, state)
        else:
            found.append((stop - at, state))
        return stop

    at, looked_at = offset, 0
    while at < end and looked_at < NBD_STATUS_CHUNKS:
        leaf = at >> chunk_shift >> SLOT_BITS
        leaf_end = min(end, (leaf + 1) << SLOT_BITS << chunk_shift)
        entries = leaf_map.leaf(leaf).entries
        if entries is NO_ENTRIES:
            at = extend(leaf_end, state_of(UNMAPPED))
            continue
        first, last = at >> chunk_shift, (leaf_end - 1) >> chunk_shift
        for chunk in range(first, last + 1):
            at = extend(min(leaf_end, (chunk + 1) << chunk_shift), state_of(entries[chunk & SLOT_MASK]))
        looked_at += last + 1 - first
    return found
