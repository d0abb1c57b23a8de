"""Leaves: stored forms, sizes, and who may write to shared entries."""

from array import array
from sys import getsizeof

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockvirt.errors import DamagedRecord
from blockvirt.limits import LEAF_CHUNKS
from blockvirt.lun.address import ADDRESS_MASK, CHUNK_MASK, FILE_MASK, FRESH, address, chunk_of, file_of
from blockvirt.lun.leaf import NO_ENTRIES, Leaf, decode, encode, is_run, mapped

PAGE_VALUE_BYTES = 4_076  # what LMDB keeps in one overflow page beside its header and our checksum

entries = st.builds(
    lambda file, chunk, fresh: address(file, chunk) | (FRESH if fresh else 0),
    st.integers(1, FILE_MASK),
    st.integers(0, CHUNK_MASK),
    st.booleans(),
)
runs = st.lists(st.tuples(st.integers(0, LEAF_CHUNKS - 1), st.integers(1, LEAF_CHUNKS), entries), max_size=600)


def leaf_of(pieces: list[tuple[int, int, int]]) -> "array[int]":
    made = NO_ENTRIES[:]
    for slot, count, first in pieces:
        for index in range(min(count, LEAF_CHUNKS - slot, CHUNK_MASK - chunk_of(first) + 1)):
            made[slot + index] = first + index
    return made


@given(runs)
def test_stored_form_reads_back_and_fits_one_page(pieces: list[tuple[int, int, int]]) -> None:
    made = leaf_of(pieces)
    stored = encode(made)
    assert decode(stored) == made
    assert len(stored) + 4 < PAGE_VALUE_BYTES


@given(st.lists(st.one_of(st.just(0), entries), min_size=LEAF_CHUNKS, max_size=LEAF_CHUNKS))
def test_scattered_entries_read_back(values: list[int]) -> None:
    made = array("Q", values)
    assert decode(encode(made)) == made
    assert mapped(made) == sum(1 for value in values if value)
    assert len(encode(made)) + 4 < PAGE_VALUE_BYTES


@pytest.mark.parametrize("step", [1, 7])
def test_entries_read_back_take_no_spare_memory(step: int) -> None:
    """Arrays that were made from bytes do, and a map is thousands of them."""
    made = array("Q", [(1 << 30) + place * step for place in range(LEAF_CHUNKS)])
    assert encode(made)[0] == (1 if step == 1 else 2)
    assert getsizeof(decode(encode(made))) == getsizeof(made) == getsizeof(NO_ENTRIES[:])


@given(runs, st.integers(0, LEAF_CHUNKS - 1), st.integers(1, LEAF_CHUNKS))
def test_a_run_is_one_as_slot_by_slot(pieces: list[tuple[int, int, int]], first: int, count: int) -> None:
    made = leaf_of(pieces)
    end = min(first + count, LEAF_CHUNKS)
    assert is_run(made, first, end) == all(made[slot] == made[first] + slot - first for slot in range(first, end))


@given(entries, st.integers(0, LEAF_CHUNKS - 1), st.integers(2, LEAF_CHUNKS), st.integers(0, 55))
def test_one_bit_makes_a_run_none(first_entry: int, first: int, count: int, bit: int) -> None:
    made = leaf_of([(first, count, first_entry)])
    end = min(first + count, LEAF_CHUNKS, first + CHUNK_MASK - chunk_of(first_entry) + 1)
    assert is_run(made, first, end)
    made[end - 1] ^= 1 << bit
    assert is_run(made, first, end) == (end == first + 1)


def test_a_sequential_leaf_takes_one_run() -> None:
    assert len(encode(array("Q", range(address(1, 0), address(1, 0) + LEAF_CHUNKS)))) == 12


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x00",
        b"\x03abc",
        b"\x02" + bytes(100),
        b"\x01" + bytes(5),
        b"\x01" + b"\xff" * 11,
        b"\x01" + bytes(11),
        b"\x01" + bytes(2) + b"\x02\x00" + b"\xff" * 7,  # its second entry does not fit 56 bits
    ],
)
def test_what_is_no_leaf_is_refused(payload: bytes) -> None:
    with pytest.raises(DamagedRecord):
        decode(payload)


def test_owning_a_leaf_copies_shared_entries_and_drops_fresh_of_an_older_epoch() -> None:
    old = address(3, 7) | FRESH
    shared = array("Q", [old] * LEAF_CHUNKS)
    leaf = Leaf(shared, birth=4, shared=True)
    leaf.own(4)
    leaf.entries[0] = 0
    assert shared[0] == old
    assert leaf.entries[1] == old
    younger = Leaf(shared, birth=4)
    younger.own(5)
    assert set(younger.entries) == {old & ADDRESS_MASK}
    assert shared[0] == old
    assert younger.birth == 5


@given(st.integers(1, FILE_MASK), st.integers(0, CHUNK_MASK))
def test_addresses_take_apart(file: int, chunk: int) -> None:
    entry = address(file, chunk)
    assert (file_of(entry), chunk_of(entry)) == (file, chunk) == (file_of(entry | FRESH), chunk_of(entry | FRESH))
    assert 0 < entry <= ADDRESS_MASK < FRESH
