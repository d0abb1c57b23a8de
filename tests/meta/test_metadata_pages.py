"""What the walk over LMDB's pages finds beyond LMDB's own verifier: lookups led astray, what only writers look at."""

import random
import struct
from functools import partial
from pathlib import Path

import pytest

from blockvirt.errors import MetadataFault
from blockvirt.meta.keys import Table
from blockvirt.meta.store import Store, Writer
from blockvirt.meta.verify import verify_pages

PAGE_BYTES = 4096
BRANCH = 1


def fill(first: int, writer: Writer) -> None:
    """Put 500 rows of a quarter of a page, and small ones beside some."""
    for number in range(first, first + 500):
        writer.put(Table.LEAVES, b"%08d" % number, bytes(1_000))
        if number < 400:
            writer.put(Table.BORN, b"%08d" % number, b"")


def thin_out(writer: Writer) -> None:
    """Remove many neighbours."""
    for number in range(400, 900):
        writer.delete(Table.LEAVES, b"%08d" % number)


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """A data file with tables of one, two and three levels, some rows deleted again."""
    store = Store.open(tmp_path, create=True, reserve_bytes=0)
    for first in range(0, 1_500, 500):
        store.commit_now(partial(fill, first))
    store.commit_now(thin_out)
    store.close()
    return tmp_path / "data.mdb"


def separators(content: bytes) -> list[tuple[int, int]]:
    """Where the keys of branch pages lie (offset, length), but for each page's first, which LMDB never looks at."""
    found = []
    for base in range(2 * PAGE_BYTES, len(content), PAGE_BYTES):
        flags, lower = struct.unpack_from("<HH", content, base + 10)
        if flags == BRANCH and content[base : base + 8] == (base // PAGE_BYTES).to_bytes(8, "little"):
            offsets = struct.unpack_from(f"<{(lower - 16) // 2}H", content, base + 16)[1:]
            found += [(base + at + 8, struct.unpack_from("<H", content, base + at + 6)[0]) for at in offsets]
    return found


def lost(data_file: Path) -> bool:
    """Whether a row that a scan shows is not found by its key."""
    store = Store.open(data_file.parent, reserve_bytes=0)
    try:
        with store.read() as reader:
            rows = [(table, key) for table in Table for key, _ in reader.scan(table)]
            return any(reader.get(table, key) is None for table, key in rows)
    finally:
        store.close()


def test_a_sound_file_is_silent(data_file: Path) -> None:
    assert list(verify_pages(data_file.parent)) == []


def test_a_branch_page_that_leads_astray_is_found(data_file: Path) -> None:
    content, chance = data_file.read_bytes(), random.Random(1)
    places = separators(content)
    assert len(places) > 50
    astray = 0
    for start, length in chance.sample(places, 25):
        at, bit = start + chance.randrange(length), 1 << chance.randrange(8)
        data_file.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
        if not list(verify_pages(data_file.parent)):
            assert not lost(data_file)
            continue
        astray += 1
    assert astray


def test_a_meta_page_out_of_turn_is_found(data_file: Path) -> None:
    """The older state would be taken for the newer one, or the newer one for the older.

    One bit at most cannot be told from what a commit writes: it takes a page to the other side of its neighbour.
    """
    content = data_file.read_bytes()
    for page in (0, 1):
        at, other = (each * PAGE_BYTES + 16 + 128 for each in (page, 1 - page))
        neighbour = int.from_bytes(content[other : other + 8], "little")
        for bit in range(0, 64, 3):
            number = int.from_bytes(content[at : at + 8], "little") ^ 1 << bit
            if abs(number - neighbour) == 1:
                continue
            damaged = bytearray(content)
            damaged[at + bit // 8] ^= 1 << bit % 8
            data_file.write_bytes(damaged)
            assert list(verify_pages(data_file.parent)), (page, bit)


def test_a_new_file_and_one_commit_are_sound(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True, reserve_bytes=0)
    assert list(verify_pages(tmp_path)) == []
    store.commit_now(lambda writer: writer.put(Table.POOL, b"pool", b"x"))
    store.close()
    assert list(verify_pages(tmp_path)) == []


def test_half_an_offset_of_a_node_is_found(data_file: Path) -> None:
    content = bytearray(data_file.read_bytes())
    (root,) = struct.unpack_from("<Q", content, max(0, PAGE_BYTES, key=lambda at: content[at + 144]) + 16 + 72 + 40)
    content[root * PAGE_BYTES + 12] ^= 1
    data_file.write_bytes(content)
    assert "half an offset" in next(iter(verify_pages(data_file.parent))).message


def in_use(content: bytes) -> list[int]:
    """Where the pages of the newest state lie that have nodes; those of older states are skipped by a walk."""
    (root,) = struct.unpack_from("<Q", content, max(0, PAGE_BYTES, key=lambda at: content[at + 144]) + 16 + 72 + 40)
    found, below = [], [root]
    while below:
        base = below.pop() * PAGE_BYTES
        found.append(base)
        flags, lower = struct.unpack_from("<HH", content, base + 10)
        for at in struct.unpack_from(f"<{(lower - 16) // 2}H", content, base + 16):
            low, high, top, key_bytes = struct.unpack_from("<HHHH", content, base + at)
            if flags & BRANCH:
                below.append(low | high << 16 | top << 32)
            elif top & 2:
                (child,) = struct.unpack_from("<Q", content, base + at + 8 + key_bytes + 40)
                below += [child] if child != (1 << 64) - 1 else []
    return found


def flipped(data_file: Path, content: bytes, at: int, bit: int) -> list[str]:
    """What is found with one bit of the file changed."""
    data_file.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
    return [each.message for each in verify_pages(data_file.parent)]


def test_a_page_whose_nodes_begin_elsewhere_is_found(data_file: Path) -> None:
    """No reader looks at it. The next write copies what lies behind it, and no row that lies before."""
    content = data_file.read_bytes()
    pages = in_use(content)
    assert len(pages) > 100
    for number, base in enumerate(pages[::10]):
        assert flipped(data_file, content, base + 14 + number % 2, number % 8), base


def test_an_empty_value_that_became_longer_is_found(data_file: Path) -> None:
    """Nobody reads it; but who deletes its row moves the others of its page by so much."""
    content = data_file.read_bytes()
    born = next(
        base
        for base in reversed(in_use(content))
        if content[base + 10] == 2 and int.from_bytes(content[base + 12 : base + 14], "little") > 100
    )
    offsets = struct.unpack_from("<8H", content, born + 16)
    for bit, node in enumerate(offsets[:5], start=1):
        assert struct.unpack_from("<HHHH", content, born + node) == (0, 0, 0, 8)
        assert flipped(data_file, content, born + node, bit), bit


def test_nodes_and_tables_of_no_kind_are_found(data_file: Path) -> None:
    content = data_file.read_bytes()
    leaf = next(base for base in reversed(in_use(content)) if content[base + 10] == 2)
    (node,) = struct.unpack_from("<H", content, leaf + 16)
    for bit in range(16):
        assert flipped(data_file, content, leaf + node + 4 + bit // 8, bit % 8), bit
    record = content.index(b"leaves", in_use(content)[0]) + len(b"leaves")
    for bit in (0, 2, 7, 9, 15):
        assert flipped(data_file, content, record + 4 + bit // 8, bit % 8), bit
    newest = max(0, PAGE_BYTES, key=lambda at: content[at + 144])
    for record in (newest + 16 + 24, newest + 16 + 72):
        assert flipped(data_file, content, record + 4, 7), record


def test_a_row_with_pages_of_its_own_is_no_table(tmp_path: Path) -> None:
    """A table's record would reach beyond the page: by seed 9347 of bit_rot a check ended in a traceback."""
    store = Store.open(tmp_path, create=True, reserve_bytes=0)
    store.commit_now(lambda writer: writer.put(Table.BORN, b"large row", bytes(3_000)))
    store.close()
    data_file = tmp_path / "data.mdb"
    content = data_file.read_bytes()
    pages = {base: content[base : base + PAGE_BYTES] for base in in_use(content)}
    (key_at,) = (base + page.index(b"large row") for base, page in pages.items() if b"large row" in page)
    assert flipped(data_file, content, key_at - 4, 1)


def test_whatever_was_put_and_deleted_the_pages_are_sound(tmp_path: Path) -> None:
    """LMDB itself keeps what is asked for here: in rows that grow, shrink, go, and need pages of their own."""
    chance = random.Random(1)
    store = Store.open(tmp_path, create=True, reserve_bytes=0)

    def change(writer: Writer) -> None:
        for _ in range(400):
            table, key = chance.choice((Table.LEAVES, Table.BORN, Table.JOBS)), b"%05d" % chance.randrange(900)
            if chance.random() < 0.35:
                writer.delete(table, key)
            else:
                writer.put(table, key * chance.choice((1, 1, 9)), bytes(chance.choice((0, 9, 300, 1_999, 3_000))))

    for _ in range(12):
        store.commit_now(change)
        assert list(verify_pages(tmp_path)) == []
    store.commit_now(lambda writer: [writer.delete(Table.BORN, key) for key, _ in list(writer.scan(Table.BORN))])
    assert list(verify_pages(tmp_path)) == []
    store.close()


def test_a_table_whose_name_is_damaged_is_not_made_anew(data_file: Path) -> None:
    content = data_file.read_bytes()
    assert b"idempotency" in content
    data_file.write_bytes(content.replace(b"idempotency", b"idempotgncy"))
    damaged = data_file.read_bytes()
    with pytest.raises(MetadataFault) as caught:
        Store.open(data_file.parent, reserve_bytes=0)
    assert "idempotgncy" in caught.value.cause
    assert data_file.read_bytes() == damaged
