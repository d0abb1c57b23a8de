"""The head's map in memory: leaves loaded on demand from the metadata store, dirty ones kept until a checkpoint."""

from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from blockvirt.limits import LEAF_CHUNKS
from blockvirt.lun.address import ADDRESS_MASK
from blockvirt.lun.leaf import NO_ENTRIES, SLOT_BITS, SLOT_MASK, Leaf
from blockvirt.meta.records import BranchRecord
from blockvirt.meta.store import Reader, Store
from blockvirt.volumes.versions import branch_record, lineage, visible_version

# Entries, and what was measured around them: 16 of malloc's and 80 of their array, 80 for the Leaf, 32 for its number,
# 72 for its place in the cache's ring, and up to 120 for that in its volume's dictionary. The last one twice: both
# tables are there while a dictionary moves to a new one, and the process keeps the room that the old one had.
LEAF_MEMORY_BYTES = 8 * LEAF_CHUNKS + 520
_SWEEP = 32  # how many leaves one load looks at to make room: bounds the time of a load


class LeafCache:
    """The budget of resident leaves over all volumes, swept like a clock: used since the last look means stay.

    Only changed leaves, which wait for a checkpoint, may exceed it.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._limit = max(1, budget_bytes // LEAF_MEMORY_BYTES)
        # Where all were used nothing leaves until a sweep came round, and each of its steps is a load that adds one.
        self._sweep_from = self._limit - self._limit // (_SWEEP + 1)
        self._ring: deque[tuple[LeafMap, int]] = deque()

    def __len__(self) -> int:
        return len(self._ring)

    def admit(self, owner: "LeafMap", number: int) -> None:
        """Note that ``owner`` loaded a leaf, and evict others where the budget is used up."""
        self._ring.append((owner, number))
        # Never as far as the new one, however small the budget: its owner is about to change it.
        for _ in range(min(_SWEEP, len(self._ring) - 1)):
            held = len(self._ring)
            if held <= self._sweep_from:
                return
            other, candidate = self._ring.popleft()
            leaf = other.leaves.get(candidate)
            if leaf is None or (other is owner and candidate == number):
                continue  # its place of before: that of now is behind
            # Use saves no leaf beyond the limit: what is used between any two loads would never leave.
            if (leaf.touched and held <= self._limit) or leaf.dirty or leaf.frozen:
                leaf.touched = False
                if leaf.dirty:
                    other.ask_checkpoint()  # only that makes it leave: the budget holds for changed leaves too (I9)
                self._ring.append((other, candidate))
            else:
                del other.leaves[candidate]

    def forget(self, owner: "LeafMap") -> None:
        """Drop all leaves of a volume that closes."""
        owner.leaves.clear()
        self._ring = deque(item for item in self._ring if item[0] is not owner)


@dataclass(frozen=True, slots=True)
class FrozenLeaf:
    """A leaf as a checkpoint writes it."""

    number: int
    leaf: Leaf
    entries: "array[int]"


class LeafMap:
    """The map of one branch's head in ``epoch``."""

    def __init__(
        self, store: Store, branch: BranchRecord, cache: LeafCache, ask_checkpoint: Callable[[], None] = lambda: None
    ) -> None:
        """``ask_checkpoint`` is called when the cache needs memory that changed leaves hold."""
        self.branch = branch.number
        self.epoch = branch.head_epoch
        self.leaves: dict[int, Leaf] = {}
        self.dirty: dict[int, Leaf] = {}
        self._store = store
        with store.read() as reader:
            self._lineage = lineage(reader, branch, branch.head_epoch)
        self._cache = cache
        self.ask_checkpoint = ask_checkpoint

    def leaf(self, number: int) -> Leaf:
        """Return a leaf, from memory or by one seek in the metadata store (3 to 5 us)."""
        leaf = self.leaves.get(number)
        if leaf is None:
            with self._store.read() as reader:
                leaf = self._load(reader, number)
            self.leaves[number] = leaf
            self._cache.admit(self, number)
        leaf.touched = True
        return leaf

    def _load(self, reader: Reader, number: int) -> Leaf:
        for branch, epoch in self._lineage:
            found = visible_version(reader, branch, number, epoch)
            if found is not None:
                birth, entries = found
                return Leaf(entries, birth if branch == self.branch else 0)
        return Leaf(NO_ENTRIES, self.epoch, shared=True)

    def readable(self, chunk: int) -> int:
        """Return the entry of a chunk, for a read."""
        return self.leaf(chunk >> SLOT_BITS).entries[chunk & SLOT_MASK]

    def writable(self, chunk: int) -> int:
        """Return the entry of a chunk with FRESH only where the head may overwrite it in place."""
        leaf = self.leaf(chunk >> SLOT_BITS)
        entry = leaf.entries[chunk & SLOT_MASK]
        return entry if leaf.birth == self.epoch else entry & ADDRESS_MASK

    def put(self, chunk: int, entry: int) -> int:
        """Change one entry; returns the old one, with FRESH only if the head had allocated it in this epoch."""
        number = chunk >> SLOT_BITS
        leaf = self.leaf(number)
        if leaf.shared or leaf.birth != self.epoch:
            leaf.own(self.epoch)
        slot = chunk & SLOT_MASK
        old = leaf.entries[slot]
        leaf.entries[slot] = entry
        if not leaf.dirty:
            leaf.dirty = True
            self.dirty[number] = leaf
        return old

    def put_run(self, chunk: int, count: int, entry: int) -> list[tuple[int, int]]:
        """Change the entries of ``count`` chunks to ``entry``, the one behind it and so on; returns what ``put`` would.

        As (chunk, old entry), without those that had none.
        """
        replaced: list[tuple[int, int]] = []
        while count:
            slot = chunk & SLOT_MASK
            here = min(count, LEAF_CHUNKS - slot)
            first = self.put(chunk, entry)  # makes the leaf writable
            if first:
                replaced.append((chunk, first))
            if here > 1:
                entries = self.leaves[chunk >> SLOT_BITS].entries
                old = entries[slot + 1 : slot + here]
                entries[slot + 1 : slot + here] = array("Q", range(entry + 1, entry + here))
                replaced += [(chunk + 1 + place, each) for place, each in enumerate(old) if each]
            chunk, count, entry = chunk + here, count - here, entry + here
        return replaced

    def freeze(self) -> list[FrozenLeaf]:
        """Take the dirty leaves for a checkpoint; what changes from now on is copied first and dirty anew."""
        frozen = []
        for number, leaf in self.dirty.items():
            leaf.dirty, leaf.frozen, leaf.shared = False, True, True
            frozen.append(FrozenLeaf(number, leaf, leaf.entries))
        self.dirty = {}
        return frozen

    def committed(self, frozen: list[FrozenLeaf]) -> None:
        """Note that the store now holds these leaves: they may leave memory."""
        for item in frozen:
            item.leaf.frozen = False
            if item.leaf.entries is item.entries and item.entries is not NO_ENTRIES:
                item.leaf.shared = False

    def step(self, epoch: int) -> None:
        """Go on in a later epoch: whatever the head allocated before may not be overwritten any more."""
        assert epoch > self.epoch
        self.epoch = epoch
        self._lineage[0] = (self.branch, epoch)

    def comes_from(self, branch: int) -> bool:
        """Tell whether the map is looked up in a branch."""
        return any(number == branch for number, _ in self._lineage)

    def look_up_anew(self) -> None:
        """Forget what was loaded of other branches, or of this one's older versions: they were copied or replaced."""
        with self._store.read() as reader:
            record = branch_record(reader, self.branch)
            self._lineage = lineage(reader, record, self.epoch)
        for number in [number for number, leaf in self.leaves.items() if not (leaf.dirty or leaf.frozen)]:
            del self.leaves[number]

    def close(self) -> None:
        """Give the memory back."""
        self._cache.forget(self)
