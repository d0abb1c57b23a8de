"""Versions of a leaf: which addresses become free when versions that nobody sees any more go. Pure.

The live points of a branch are its snapshots, the origins of its children, and its head. A version born in epoch b is
seen by the points from b on, up to the birth of the next version; one that no point sees is dead. An address belongs to
one slot of one leaf of one branch for its whole life, because addresses are never reused. So an address of a dead
version is free exactly if the nearest live versions before and after it do not hold it in the same slot: no reference
counts, and neighbours that are dead together are judged together.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from blockvirt.lun.address import ADDRESS_MASK
from blockvirt.lun.leaf import NO_ENTRIES

if TYPE_CHECKING:
    from array import array


def freed_addresses(
    before: "array[int] | None",
    dead: "Sequence[array[int]]",
    after: "array[int] | None",
    owned: Callable[[int], bool],
) -> list[int]:
    """Return the addresses that only ``dead`` versions of a leaf hold, which lie next to each other in time.

    ``before`` and ``after`` are the nearest live versions of the same branch, None where there is none. ``owned`` tells
    whether an address lies in a file of the branch: others are their own branch's business.
    """
    kept_before = before if before is not None else NO_ENTRIES
    kept_after = after if after is not None else NO_ENTRIES
    freed: set[int] = set()
    for version in dead:
        for entry, earlier, later in zip(version, kept_before, kept_after, strict=True):
            if entry != earlier and entry != later:
                address = entry & ADDRESS_MASK
                if address and address != earlier & ADDRESS_MASK and address != later & ADDRESS_MASK:
                    freed.add(address)
    return [address for address in freed if owned(address)]
