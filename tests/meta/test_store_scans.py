"""Scans and floor against a sorted list, for readers, and for writers that change what they walk over."""

from collections.abc import Generator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockvirt.meta.keys import Table
from blockvirt.meta.store import Store, Writer

KEYS = st.lists(st.sampled_from([b"\x00", b"\x01", b"a", b"b", b"\xff"]), min_size=1, max_size=4).map(b"".join)
BOUNDS = st.one_of(st.just(b""), KEYS)


@pytest.fixture(scope="module")
def shared() -> Generator[Store]:
    """One store for all examples."""
    with TemporaryDirectory() as name:
        store = Store.open(Path(name) / "metadata", create=True, reserve_bytes=0)
        yield store
        store.close()


def fill(store: Store, keys: set[bytes]) -> list[tuple[bytes, bytes]]:
    """Make the table hold exactly ``keys``; returns its rows in order."""

    def change(writer: Writer) -> None:
        for key, _ in writer.scan(Table.BORN):
            assert writer.delete(Table.BORN, key)
        for key in keys:
            writer.put(Table.BORN, key, b"v" + key)

    store.commit_now(change)
    return [(key, b"v" + key) for key in sorted(keys)]


@given(keys=st.sets(KEYS), start=BOUNDS, prefix=BOUNDS, reverse=st.booleans())
def test_scan(shared: Store, keys: set[bytes], start: bytes, prefix: bytes, reverse: bool) -> None:
    rows = [row for row in fill(shared, keys) if row[0].startswith(prefix)]
    expected = (
        [row for row in reversed(rows) if not start or row[0] <= start]
        if reverse
        else [row for row in rows if row[0] >= start]
    )
    with shared.read() as reader:
        assert list(reader.scan(Table.BORN, start=start, prefix=prefix, reverse=reverse)) == expected
        assert reader.count(Table.BORN) == len(keys)
    in_writer = shared.commit_now(lambda w: list(w.scan(Table.BORN, start=start, prefix=prefix, reverse=reverse)))
    assert in_writer == expected


@given(keys=st.sets(KEYS), key=KEYS, prefix=BOUNDS)
def test_floor(shared: Store, keys: set[bytes], key: bytes, prefix: bytes) -> None:
    below = [row for row in fill(shared, keys) if row[0] <= key]
    expected = below[-1] if below and below[-1][0].startswith(prefix) else None
    with shared.read() as reader:
        assert reader.floor(Table.BORN, key, prefix) == expected


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("count", [255, 256, 257, 1000])
def test_a_writer_scans_in_batches_and_may_delete_what_it_scans(store: Store, count: int, reverse: bool) -> None:
    def put(writer: Writer) -> None:
        for number in range(count):
            writer.put(Table.PUNCH, b"%06d" % number, b"")

    store.commit_now(put)

    def change(writer: Writer) -> list[bytes]:
        seen = []
        for key, _ in writer.scan(Table.PUNCH, reverse=reverse):
            seen.append(key)
            assert len(seen) <= count
            writer.delete(Table.PUNCH, key)
        return seen

    expected = [b"%06d" % number for number in range(count)]
    all_rows = store.commit_now(lambda writer: list(writer.scan(Table.PUNCH, reverse=reverse)))
    assert [key for key, _ in all_rows] == (expected[::-1] if reverse else expected)
    assert store.commit_now(change) == (expected[::-1] if reverse else expected)
    assert store.stats().entries["punch"] == 0
