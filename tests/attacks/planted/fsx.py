"""Bugs for the attack "fsx": bytes that end up in a wrong place, or are not what they were."""

from typing import Any

import pytest

from blockvirt.lun.address import ADDRESS_MASK
from blockvirt.lun.leaf import SLOT_BITS, SLOT_MASK, Leaf
from blockvirt.meta.records import BranchRecord
from blockvirt.meta.store import Reader
from blockvirt.snapshots import changed_blocks, changes
from blockvirt.volumes import leaf_map, versions, volume
from blockvirt.volumes.leaf_map import LeafMap
from blockvirt.volumes.slow_path import SlowPath
from blockvirt.volumes.transfer import Transfer
from blockvirt.volumes.volume import Volume
from tests.attacks.planted.bugs import Bug, replacing


def _stage(self: Volume, chunk: int, count: int, entry: int) -> None:
    """Stage the last chunk of what crosses a leaf one slot too far."""
    last = chunk + count - 1
    if entry and chunk >> SLOT_BITS != last >> SLOT_BITS:
        _STAGE(self, chunk, count - 1, entry)
        _STAGE(self, last + 1, 1, entry + count - 1)
    else:
        _STAGE(self, chunk, count, entry)


_STAGE = Volume.stage


async def _zero_part(self: SlowPath, start: int, end: int, punch: bool) -> None:
    chunk_bytes = self._volume.chunk_bytes
    first = start // chunk_bytes * chunk_bytes
    await _ZERO_PART(self, first, min(first + chunk_bytes, self._volume.size_bytes), punch)


_ZERO_PART = SlowPath._zero_part


async def _zero(self: SlowPath, offset: int, length: int, **how: bool) -> None:
    """Take a range that ends in the volume's last chunk for one that ends where the volume does."""
    size, mask = self._volume.size_bytes, self._volume.chunk_bytes - 1
    end = offset + length
    await _ZERO(self, offset, (size if how["punch"] and end > size & ~mask else end) - offset, **how)


_ZERO = SlowPath.zero


def _keep_leaves(patch: pytest.MonkeyPatch) -> None:
    kept: dict[str, tuple[int, dict[int, Leaf]]] = {}
    begin, close = LeafMap.__init__, LeafMap.close

    def made(self: LeafMap, store: Any, branch: BranchRecord, *others: Any) -> None:
        begin(self, store, branch, *others)
        number, leaves = kept.get(branch.volume_id, (branch.number, {}))
        if number != branch.number and 0 in leaves:
            self.leaves[0] = Leaf(leaves[0].entries[:], 0)
        self.volume_id = branch.volume_id  # type: ignore[attr-defined]

    def closed(self: LeafMap) -> None:
        kept[self.volume_id] = self.branch, dict(self.leaves)  # type: ignore[attr-defined]
        close(self)

    patch.setattr(LeafMap, "__init__", made)
    patch.setattr(LeafMap, "close", closed)


def _forget_tails(patch: pytest.MonkeyPatch) -> None:
    """Copy what lies before the new data, and forget what lies behind it: inside one chunk, and in steps."""
    run, write = Transfer.run, Volume._write_new_chunk

    def forgetful_run(self: Transfer) -> None:
        end = self.within + len(self.data)
        if self.content is not None:
            self.content[end:] = bytes(len(self.content) - end)
        run(self)

    def forgetful_write(self: Volume, chunk: int, within: int, old: int, data: memoryview) -> bool:
        fill_old = self._fill_old

        def cut(entry: int, content: memoryview) -> bool:
            filled = fill_old(entry, content)
            content[within + len(data) :] = bytes(self.chunk_bytes - within - len(data))
            return filled

        with pytest.MonkeyPatch.context() as cutting:
            cutting.setattr(self, "_fill_old", cut)
            return write(self, chunk, within, old, data)

    patch.setattr(Transfer, "run", forgetful_run)
    patch.setattr(Volume, "_write_new_chunk", forgetful_write)


def _miss_the_last_leaf(patch: pytest.MonkeyPatch) -> None:
    right = changes.changed_leaves

    def wrong(*arguments: Any) -> list[int]:
        leaves = right(*arguments)
        return leaves[:-1] if len(leaves) > 1 else leaves

    for module in (changes, changed_blocks):
        patch.setattr(module, "changed_leaves", wrong)


def _writable(self: LeafMap, chunk: int) -> int:
    leaf = self.leaf(chunk >> SLOT_BITS)
    entry = leaf.entries[chunk & SLOT_MASK]
    return entry if leaf.birth else entry & ADDRESS_MASK


def _lineage(reader: Reader, branch: BranchRecord, epoch: int) -> list[tuple[int, int]]:
    """See of what a branch comes from all that came later, too."""
    first, *others = _LINEAGE(reader, branch, epoch)
    return [first, *((number, closed + 1) for number, closed in others)]


_LINEAGE = versions.lineage


def _see_later(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(leaf_map, "lineage", _lineage)


BUGS: tuple[Bug, ...] = (
    Bug(
        "leaf-crossing-one-slot-too-far",
        "a write over the border of two leaves has its last chunk mapped one slot too far",
        ("I4",),
        "fsx",
        replacing(Volume, "stage", _stage),
    ),
    Bug(
        "part-zeroed-as-a-whole",
        "zeroing less than a chunk zeroes the whole chunk",
        ("I4",),
        "fsx",
        replacing(SlowPath, "_zero_part", _zero_part),
        is_quick=False,
    ),
    Bug(
        "trim-goes-on-to-the-end",
        "a trim that ends inside the volume's last chunk trims up to the volume's end",
        ("I4",),
        "fsx",
        replacing(SlowPath, "zero", _zero),
        is_quick=False,
    ),
    Bug(
        "stale-leaf-after-revert",
        "after a revert a leaf of the map before it is still in memory",
        ("I4", "I5"),
        "fsx",
        _keep_leaves,
        is_quick=False,
    ),
    Bug(
        "copy-up-forgets-the-tail",
        "copy-on-write leaves zeros behind the new data",
        ("I4",),
        "fsx",
        _forget_tails,
    ),
    Bug(
        "changed-blocks-miss-a-leaf",
        "lists of changed blocks leave out the last leaf that changed",
        ("I5",),
        "fsx",
        _miss_the_last_leaf,
    ),
    Bug(
        "fresh-for-ever",
        "what was allocated before a snapshot is overwritten in place after it",
        ("I5",),
        "fsx",
        replacing(LeafMap, "writable", _writable),
    ),
    Bug(
        "clone-sees-later-writes",
        "a clone sees what its origin wrote in the epoch after the snapshot",
        ("I5",),
        "fsx",
        _see_later,
        is_quick=False,
    ),
    Bug(
        "overwrites-merged-across-gaps",
        "chunks that do not lie side by side are overwritten in place as if they did",
        ("I4",),
        "fsx",
        replacing(volume, "is_run", lambda entries, first, end: all(entries[first:end])),
        is_quick=False,
    ),
)
"""Each is caught by one history."""
