"""Comparing stored leaves gives what comparing their entries slot by slot gives."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockvirt.errors import DamagedRecord
from blockvirt.limits import LEAF_CHUNKS
from blockvirt.lun.address import ADDRESS_MASK, CHUNK_MASK, FILE_MASK, FRESH, address
from blockvirt.lun.leaf import encode
from blockvirt.lun.leaf_diff import NOTHING, differing, planes

ENTRIES = st.one_of(
    st.sampled_from([0, FRESH]),
    st.builds(
        lambda file, chunk, fresh: address(file, chunk) | (FRESH if fresh else 0),
        st.sampled_from([1, 2, FILE_MASK]),
        st.sampled_from([0, 1, 2, 255, 256, CHUNK_MASK]),
        st.booleans(),
    ),
)


RUNS = st.lists(st.tuples(ENTRIES, st.sampled_from([1, 3, 100, 512]), st.booleans()), max_size=6)


def leaf(runs: list[tuple[int, int, bool]]) -> "array[int]":
    """Return a leaf of runs: of one entry repeated, or counted up; unmapped behind them."""
    entries: list[int] = []
    for first, count, step in runs:
        entries += [first + (index if step and 0 < first & CHUNK_MASK < 1000 else 0) for index in range(count)]
    return array("Q", (entries + [0] * LEAF_CHUNKS)[:LEAF_CHUNKS])


LEAVES = RUNS.map(leaf)


def expected(old: "array[int]", new: "array[int]") -> list[tuple[int, int, bool]]:
    runs: list[tuple[int, int, bool]] = []
    for slot, (before, after) in enumerate(zip(old, new, strict=True)):
        if before & ADDRESS_MASK == after & ADDRESS_MASK:
            continue
        zero = not after & ADDRESS_MASK
        if runs and runs[-1][0] + runs[-1][1] == slot and runs[-1][2] == zero:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, zero)
        else:
            runs.append((slot, 1, zero))
    return runs


@given(LEAVES, LEAVES)
def test_the_same_as_slot_by_slot(old: "array[int]", new: "array[int]") -> None:
    assert list(differing(planes(encode(old)), planes(encode(new)))) == expected(old, new)


@given(LEAVES, st.dictionaries(st.integers(0, LEAF_CHUNKS - 1), ENTRIES, max_size=5))
def test_a_few_changes(old: "array[int]", changes: dict[int, int]) -> None:
    new = old[:]
    for slot, entry in changes.items():
        new[slot] = entry
    assert list(differing(planes(encode(old)), planes(encode(new)))) == expected(old, new)
    assert list(differing(NOTHING, planes(encode(new)))) == expected(array("Q", bytes(8 * LEAF_CHUNKS)), new)


@pytest.mark.parametrize("payload", [b"", b"\x03abc", b"\x02short", b"\x01short"])
def test_what_is_no_leaf_is_refused(payload: bytes) -> None:
    with pytest.raises(DamagedRecord):
        planes(payload)
