"""The proof of the metadata: silent over a sound pool, and it names each thing that is planted."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from blockvirt.errors import DamagedRecord
from blockvirt.meta.findings import Severity
from blockvirt.meta.keys import (
    POOL_KEY,
    Table,
    born_key,
    leaf_key,
    number_key,
    pair_key,
    unit_key,
    volume_unit_key,
)
from blockvirt.meta.records import (
    BranchRecord,
    DeviceRecord,
    FileRecord,
    HostRecord,
    IdempotencyRecord,
    PoolRecord,
    UnitRecord,
    VolumeRecord,
    encode,
    seal,
)
from blockvirt.meta.store import Store, Writer
from blockvirt.meta.verify import verify_pages, verify_records

VOLUME = VolumeRecord("v1", "web", 1 << 30, 1, 1.0)
GOING = VolumeRecord("v2", "web", 1 << 30, 2, 1.0, deleting=True)  # its name was given to another volume already
BRANCH = BranchRecord(1, "v1", 5)
FILE = FileRecord(1, 1, "d1", used_chunks=10, live_chunks=4)
HOST = HostRecord("h1", "web1", 1.0)
UNIT = UnitRecord("u1", "h1", 0, "v1", 1.0)
POOL = PoolRecord("p", 1, 65536, 1.0, epoch=6, next_branch=3, next_file=3)
LEAF = leaf_key(1, 7, 4)
PUNCH = pair_key(1, 3)
CHECKED = (Table.POOL, Table.DEVICES, Table.VOLUMES, Table.BRANCHES, Table.FILES, Table.HOSTS, Table.UNITS)


def decode_leaf(payload: bytes) -> None:
    """Stands for the map's decoder."""
    if payload != b"leaf":
        raise DamagedRecord("no leaf")


def fill(writer: Writer) -> None:
    """A small sound pool, one volume of which is being deleted."""
    writer.put_record(Table.POOL, POOL_KEY, POOL)
    writer.put_record(Table.DEVICES, b"d1", DeviceRecord("d1", "disk1", "/d", 1.0))
    for volume, branch in ((VOLUME, BRANCH), (GOING, BranchRecord(2, "v2", 6))):
        writer.put_record(Table.VOLUMES, volume.id.encode(), volume)
        writer.put_record(Table.BRANCHES, number_key(branch.number), branch)
        file = replace(FILE, number=branch.number, branch=branch.number)
        writer.put_record(Table.FILES, number_key(file.number), file)
        writer.put(Table.BRANCH_FILES, pair_key(file.branch, file.number), b"")
    writer.put(Table.VOLUME_NAMES, b"web", b"v1")
    writer.put(Table.LEAVES, LEAF, seal(LEAF, b"leaf"))
    writer.put(Table.BORN, born_key(1, 4, 7), b"")
    writer.put(Table.BORN, born_key(2, 4, 7), b"")  # the leaf of the deleted volume is gone already
    writer.put(Table.PUNCH, PUNCH, seal(PUNCH, (2).to_bytes(8, "little")))
    writer.put_record(Table.HOSTS, b"h1", HOST)
    writer.put(Table.HOST_NAMES, b"web1", b"h1")
    writer.put_record(Table.UNITS, unit_key("h1", 0), UNIT)
    writer.put(Table.VOLUME_UNITS, volume_unit_key("v1", "h1", 0), b"")
    writer.put_record(Table.IDEMPOTENCY, b"k", IdempotencyRecord("k", "00", 201, "{}", "/", 1.0))


def found(store: Store) -> list[tuple[str, str, Severity]]:
    """What the proof finds: (code, what, severity)."""
    with store.read() as reader:
        return [(finding.code, finding.what, finding.severity) for finding in verify_records(reader, decode_leaf)]


@pytest.fixture
def pool(store: Store) -> Store:
    """A store with the small pool in it."""
    store.commit_now(fill)
    return store


def test_a_sound_pool_is_silent(pool: Store) -> None:
    assert found(pool) == []
    assert list(verify_pages(pool.path)) == []


def test_an_empty_store_lacks_its_pool(store: Store) -> None:
    assert found(store) == [("missing-record", "pool", Severity.CORRUPT)]


def puts(table: Table, key: bytes, value: bytes) -> Callable[[Writer], None]:
    """A change that stores one row."""
    return lambda writer: writer.put(table, key, value)


def drops(table: Table, key: bytes) -> Callable[[Writer], None]:
    """A change that removes one row."""

    def change(writer: Writer) -> None:
        assert writer.delete(table, key)

    return change


def branch(**changes: int | str) -> Callable[[Writer], None]:
    """A change of the volume's branch."""
    return puts(Table.BRANCHES, number_key(1), encode(number_key(1), replace(BRANCH, **changes)))  # type: ignore[arg-type]


def file(**changes: int | str) -> Callable[[Writer], None]:
    """A change of its file."""
    return puts(Table.FILES, number_key(1), encode(number_key(1), replace(FILE, **changes)))  # type: ignore[arg-type]


def counters(**changes: int) -> Callable[[Writer], None]:
    """A change of the pool record."""
    return puts(Table.POOL, POOL_KEY, encode(POOL_KEY, replace(POOL, **changes)))  # type: ignore[arg-type]


def volume(**changes: int | str) -> Callable[[Writer], None]:
    """A change of the volume's record."""
    return puts(Table.VOLUMES, b"v1", encode(b"v1", replace(VOLUME, **changes)))  # type: ignore[arg-type]


OTHER_LEAF, BAD_LEAF = leaf_key(9, 7, 4), leaf_key(1, 8, 6)
OTHER_PUNCH = pair_key(9, 3)
PLANTED = [
    (counters(chunk_bytes=65537), {("bad-value", "pool")}),
    (counters(epoch=4), {("counter", "branch 1"), ("counter", "branch 2")}),
    (counters(next_branch=2), {("counter", "branch 2")}),
    (counters(next_file=2), {("counter", "file 2")}),
    (puts(Table.POOL, b"other", encode(b"other", POOL)), {("unknown-row", "pool other")}),
    (
        puts(Table.DEVICES, b"d2", encode(b"d2", DeviceRecord("d1", "disk1", "/d", 1.0))),
        {("wrong-key", "device disk1"), ("double-name", "device disk1")},
    ),
    (drops(Table.DEVICES, b"d1"), {("wrong-link", "file 1"), ("wrong-link", "file 2")}),
    (branch(volume_id="v9"), {("orphan-branch", "branch 1"), ("wrong-link", "volume web")}),
    (branch(origin_branch=8, origin_epoch=2), {("missing-origin", "branch 1")}),
    (branch(number=7), {("wrong-key", "branch 7")}),
    (branch(head_epoch=3), {("counter", "leaf 7 of branch 1, born in epoch 4")}),
    (
        drops(Table.BRANCHES, number_key(1)),
        {
            ("missing-record", "volume web"),
            ("orphan-file", "file 1"),
            ("orphan-leaf", "leaf 7 of branch 1, born in epoch 4"),
        },
    ),
    (volume(size_bytes=0), {("bad-value", "volume web")}),
    (volume(name="other"), {("name-index", "volume other"), ("name-index", "volume name web")}),
    (drops(Table.VOLUME_NAMES, b"web"), {("name-index", "volume web")}),
    (puts(Table.VOLUME_NAMES, b"ghost", b"v9"), {("name-index", "volume name ghost")}),
    (puts(Table.VOLUME_NAMES, b"alias", b"v1"), {("name-index", "volume name alias")}),
    (
        drops(Table.VOLUMES, b"v1"),
        {
            ("orphan-branch", "branch 1"),
            ("name-index", "volume name web"),
            ("wrong-link", "logical unit h1/00000000"),
        },
    ),
    (file(live_chunks=11), {("bad-value", "file 1")}),
    (file(branch=2), {("file-index", "file 1"), ("file-index", "branch 1")}),
    (drops(Table.BRANCH_FILES, pair_key(1, 1)), {("file-index", "file 1")}),
    (puts(Table.BRANCH_FILES, pair_key(1, 9), b""), {("file-index", "branch 1")}),
    (
        puts(Table.LEAVES, OTHER_LEAF, seal(OTHER_LEAF, b"leaf")),
        {("orphan-leaf", "leaf 7 of branch 9, born in epoch 4")},
    ),
    (
        puts(Table.LEAVES, BAD_LEAF, seal(BAD_LEAF, b"x")),
        {
            ("damaged-leaf", "leaf 8 of branch 1, born in epoch 6"),
            ("counter", "leaf 8 of branch 1, born in epoch 6"),
            ("born-index", "leaf 8 of branch 1, born in epoch 6"),
        },
    ),
    (puts(Table.LEAVES, LEAF, seal(b"other", b"leaf")), {("damaged-leaf", "leaf 7 of branch 1, born in epoch 4")}),
    (drops(Table.BORN, born_key(1, 4, 7)), {("born-index", "leaf 7 of branch 1, born in epoch 4")}),
    (drops(Table.LEAVES, LEAF), {("born-index", "leaf 7 of branch 1, born in epoch 4")}),
    (puts(Table.BORN, born_key(9, 4, 7), b""), {("orphan-birth", "leaf 7 of branch 9, born in epoch 4")}),
    (puts(Table.PUNCH, PUNCH, seal(PUNCH, bytes(8))), {("bad-value", "punch of file 1 from chunk 3 on")}),
    (
        puts(Table.PUNCH, OTHER_PUNCH, seal(OTHER_PUNCH, b"\1" + bytes(7))),
        {("orphan-punch", "punch of file 9 from chunk 3 on")},
    ),
    (drops(Table.HOST_NAMES, b"web1"), {("name-index", "host web1")}),
    (
        drops(Table.HOSTS, b"h1"),
        {("name-index", "host name web1"), ("wrong-link", "logical unit h1/00000000")},
    ),
    (drops(Table.VOLUME_UNITS, volume_unit_key("v1", "h1", 0)), {("unit-index", "logical unit h1/00000000")}),
    (drops(Table.UNITS, unit_key("h1", 0)), {("unit-index", "index of units, v1/h1/00000000")}),
    (
        puts(Table.UNITS, unit_key("h1", 1), encode(unit_key("h1", 1), UNIT)),
        {("wrong-key", "logical unit h1/00000001")},
    ),
    (puts(Table.LEAVES, b"short", b"x"), {("unknown-row", "leaf short")}),
    (puts(Table.BORN, b"short", b"x"), {("unknown-row", "index of births, short")}),
    (puts(Table.PUNCH, b"short", b"x"), {("unknown-row", "punch short")}),
    (puts(Table.BRANCH_FILES, b"short", b"x"), {("unknown-row", "index of files, short")}),
    (puts(Table.IDEMPOTENCY, b"k", b"xxxxxx"), {("damaged-record", "idempotency k")}),
    (puts(Table.HOSTS, b"h9", seal(b"h9", b"\1{}")), {("damaged-record", "host h9")}),
    (puts(Table.HOSTS, b"h9", seal(b"h9", b"\1[")), {("damaged-record", "host h9")}),
    (puts(Table.HOSTS, b"h9", seal(b"h9", b"\2{}")), {("newer-record", "host h9")}),
]


@pytest.mark.parametrize(("change", "expected"), PLANTED)
def test_what_is_planted_is_found(
    pool: Store, change: Callable[[Writer], None], expected: set[tuple[str, str]]
) -> None:
    pool.commit_now(change)
    results = found(pool)
    assert {(code, what) for code, what, _ in results} == expected
    for code, _, severity in results:
        assert (severity is Severity.LEAK) == code.startswith("orphan-")


def test_every_flipped_bit_of_a_sealed_row_is_found(pool: Store) -> None:
    """LMDB itself has no checksums: of 400 bits flipped, 293 would go unnoticed."""
    chance = random.Random(2)
    with pool.read() as reader:
        rows = [(table, *row) for table in (*CHECKED, Table.LEAVES, Table.PUNCH) for row in reader.scan(table)]
    for table, key, value in rows:
        for bit in chance.sample(range(8 * len(value)), 12):
            damaged = bytearray(value)
            damaged[bit // 8] ^= 1 << bit % 8
            pool.commit_now(puts(table, key, bytes(damaged)))
            assert any(severity is Severity.CORRUPT for _, _, severity in found(pool)), (table, key, bit)
        pool.commit_now(puts(table, key, value))
    assert found(pool) == []


def test_damaged_pages_are_found_without_mapping_them(pool: Store, tmp_path: Path) -> None:
    pool.close()
    data_file = pool.path / "data.mdb"
    content = bytearray(data_file.read_bytes())
    content[8192:12288] = bytes(4096)
    data_file.write_bytes(content[:-4096])
    findings = list(verify_pages(pool.path))
    assert findings
    assert {(finding.code, finding.severity) for finding in findings} == {("damaged-pages", Severity.CORRUPT)}
    assert [finding.message for finding in verify_pages(tmp_path / "gone")] == [
        "it cannot be read: No such file or directory"
    ]
