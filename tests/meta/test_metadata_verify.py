"""The proof of the metadata: silent over a sound pool, and it names each thing that is planted."""

import random
from pathlib import Path

import pytest

from blockvirt.meta.findings import Severity
from blockvirt.meta.keys import (
    MARK_BYTES,
    Table,
    born_key,
    child_point_key,
    deadline,
    leaf_key,
    number_key,
    pair_key,
    snapshot_name_key,
    unit_key,
    volume_branch_key,
    volume_unit_key,
)
from blockvirt.meta.records import DeviceRecord, encode, seal
from blockvirt.meta.store import Store
from blockvirt.meta.verify import verify_pages, verify_records
from blockvirt.meta.verify_catalogue import JOB_STATES
from blockvirt.volumes.job_states import State
from tests.meta.verify_pool import (
    CHILD,
    CLONED,
    DYING,
    LEAF,
    LEFT,
    POINT,
    POOL,
    PUNCH,
    SCRUB,
    TRASHED,
    UNIT,
    Change,
    branch,
    counters,
    decode_leaf,
    drops,
    file,
    fill,
    job,
    puts,
    puts_record,
    schedule,
    snapshot,
    volume,
)

CHECKED = (
    *(Table.POOL, Table.DEVICES, Table.VOLUMES, Table.BRANCHES, Table.FILES, Table.HOSTS, Table.UNITS),
    *(Table.SNAPSHOTS, Table.SCHEDULES, Table.JOBS, Table.SCRUBS),
)


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


OTHER_LEAF, BAD_LEAF = leaf_key(9, 7, 4), leaf_key(1, 8, 6)
OTHER_PUNCH = pair_key(9, 3)
BORN_LOST = ("born-index", "leaf 7 of branch 6, born in epoch 4")
LEAF_EARLY = ("counter", "leaf 7 of branch 1, born in epoch 4")
ILLEGIBLE = pair_key(1, 4) + b"s\xb6"
NINTH = "point at epoch 4 of branch 9"
PLANTED = [
    (counters(chunk_bytes=65537), {("bad-value", "pool")}),
    (counters(epoch=5), {("counter", "branch 2"), ("counter", "branch 3"), ("counter", "branch 4")}),
    (counters(next_branch=6), {("counter", "branch 6")}),
    (counters(next_file=6), {("counter", "file 6")}),
    (puts(Table.POOL, b"other", encode(b"other", POOL)), {("unknown-row", "pool other")}),
    (
        puts(Table.DEVICES, b"d2", encode(b"d2", DeviceRecord("d1", "disk1", "/d", 1.0))),
        {("wrong-key", "device disk1"), ("double-name", "device disk1")},
    ),
    (drops(Table.DEVICES, b"d1"), {("wrong-link", f"file {number}") for number in range(1, 7)}),
    (
        branch(volume_id="v9"),
        {
            ("branch-index", "branch 1"),
            ("branch-index", "index of branches, v1/0000000000000001"),
            ("wrong-link", "branch 1"),
            ("wrong-link", "volume web"),
            ("wrong-link", "snapshot web@monday"),
        },
    ),
    (branch(origin_branch=8), {("missing-origin", "branch 1")}),
    (branch(number=7), {("wrong-key", "branch 7")}),
    (
        branch(head_epoch=3),
        {("counter", "leaf 7 of branch 1, born in epoch 4"), ("counter", "snapshot web@monday")},
    ),
    (
        drops(Table.BRANCHES, number_key(1)),
        {
            ("missing-record", "volume web"),
            ("branch-index", "index of branches, v1/0000000000000001"),
            ("missing-origin", "branch 4"),
            ("wrong-link", "snapshot web@monday"),
            ("wrong-link", "point at epoch 4 of branch 1"),
            ("orphan-seal", "seals of branch 1, epoch 4"),
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
            ("name-index", "volume name web"),
            ("wrong-link", "branch 1"),
            ("wrong-link", "snapshot v1@monday"),
            ("wrong-link", "snapshot v1@sunday"),
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
    # Branches: who lists them, who keeps them, where they come from.
    (drops(Table.VOLUME_BRANCHES, volume_branch_key("v1", 1)), {("branch-index", "branch 1")}),
    (
        puts(Table.VOLUME_BRANCHES, volume_branch_key("v1", 9), b""),
        {("branch-index", "index of branches, v1/0000000000000009")},
    ),
    (puts(Table.VOLUME_BRANCHES, b"v1/x", b""), {("unknown-row", "index of branches, v1/x")}),
    (branch(head_epoch=0), {("missing-head", "volume web")}),
    (branch(LEFT, head_epoch=6), {("two-heads", "branch 5")}),
    (drops(Table.RECLAIM, pair_key(6, 4)), {("orphan-branch", "branch 6")}),
    (branch(DYING, head_epoch=6), {("wrong-link", "branch 6"), BORN_LOST}),
    (branch(first_epoch=6), {("counter", "branch 1"), LEAF_EARLY, ("counter", "snapshot web@monday")}),
    (branch(mapped_chunks=1, inherited_chunks=2), {("bad-value", "branch 1")}),
    (branch(CLONED, first_epoch=4), {("counter", "branch 4")}),
    (branch(CLONED, origin_branch=4), {("wrong-link", "branch 4"), ("point-index", "point at epoch 4 of branch 1")}),
    (branch(CLONED, pins=()), {("point-index", "point at epoch 3 of branch 2")}),
    (branch(CLONED, pins=((2, 3), (9, 3))), {("missing-origin", "branch 4")}),
    (drops(Table.POINTS, CHILD), {("point-index", "branch 4")}),
    (drops(Table.POINTS, child_point_key(2, 3, 4)), {("point-index", "branch 4")}),
    (puts(Table.POINTS, child_point_key(1, 4, 9), b""), {("point-index", "point at epoch 4 of branch 1")}),
    (puts(Table.POINTS, child_point_key(9, 4, 4), b""), {(code, NINTH) for code in ("wrong-link", "point-index")}),
    # Snapshots: who finds them, who keeps them.
    (
        drops(Table.SNAPSHOTS, b"s1"),
        {("name-index", "snapshot name web@monday"), ("point-index", "point at epoch 4 of branch 1")},
    ),
    (drops(Table.SNAPSHOT_NAMES, snapshot_name_key("v1", "monday")), {("name-index", "snapshot web@monday")}),
    (
        puts(Table.SNAPSHOT_NAMES, snapshot_name_key("v1", "friday"), b"s1"),
        {("name-index", "snapshot name web@friday")},
    ),
    (drops(Table.POINTS, POINT), {("point-index", "snapshot web@monday")}),
    (
        snapshot(epoch=3),
        {("point-index", "snapshot web@monday"), ("point-index", "point at epoch 4 of branch 1")},
    ),
    (
        snapshot(branch=4, epoch=5),
        {
            ("wrong-link", "snapshot web@monday"),
            ("point-index", "snapshot web@monday"),
            ("point-index", "point at epoch 4 of branch 1"),
        },
    ),
    (snapshot(id="s9"), {("wrong-key", "snapshot web@monday")}),
    (snapshot(size_bytes=0), {("bad-value", "snapshot web@monday")}),
    (snapshot(mapped_chunks=-1), {("bad-value", "snapshot web@monday")}),
    (snapshot(holds=("a", "a")), {("bad-value", "snapshot web@monday")}),
    (snapshot(labels={"a": "x" * 300}), {("bad-value", "snapshot web@monday")}),
    (
        snapshot(name="a/b"),
        {
            ("name-index", "snapshot web@a/b"),
            ("bad-value", "snapshot web@a/b"),
            ("name-index", "snapshot name web@monday"),
        },
    ),
    (puts(Table.RECLAIM, pair_key(9, 4), b""), {("orphan-reclaim", "reclaim of branch 9, epoch 4")}),
    (puts(Table.SEALS, pair_key(9, 4), b""), {("orphan-seal", "seals of branch 9, epoch 4")}),
    # The trash, schedules and jobs.
    (drops(Table.TRASH, b"v3"), {("trash-index", "volume web")}),
    (puts(Table.TRASH, b"v1", b""), {("trash-index", "volume web")}),
    (puts(Table.TRASH, b"v2", b""), {("trash-index", "volume web")}),
    (puts(Table.TRASH, b"v9", b""), {("trash-index", "trash v9")}),
    (puts(Table.TRASH, b"v3", deadline(3.5)), {("trash-index", "volume web")}),
    (volume(importing="s9"), {("wrong-link", "volume web")}),
    (volume(TRASHED, purge_at_s=0.0), {("bad-value", "volume web")}),
    (puts(Table.VOLUME_NAMES, b"thrown", b"v3"), {("name-index", "volume name thrown")}),
    (
        volume(trashed_s=2.0, purge_at_s=3.0),
        {
            ("trash-index", "volume web"),
            ("name-index", "volume name web"),
            ("wrong-link", "logical unit h1/00000000"),
        },
    ),
    (drops(Table.JOBS, b"j1"), {("orphan-deletion", "volume web")}),
    (job(state="done"), {("orphan-deletion", "volume web")}),
    (job(state="lost"), {("bad-value", "job j1 (purge of web)")}),
    (job(id="j2"), {("wrong-key", "job j2 (purge of web)")}),
    (drops(Table.SCHEDULES, b"c1"), {("name-index", "schedule name daily")}),
    (drops(Table.SCHEDULE_NAMES, b"daily"), {("name-index", "schedule daily")}),
    (schedule(labels={"tier": "gold"}), {("bad-value", "schedule daily")}),
    (puts_record(Table.SCRUBS, b"j8", SCRUB), {("wrong-key", "scrub j9")}),
    (schedule(id="c2"), {("wrong-key", "schedule daily")}),
    (puts(Table.LEAVES, b"short", b"x"), {("unknown-row", "leaf short")}),
    (puts(Table.BORN, b"short", b""), {("unknown-row", "index of births, short")}),
    (puts(Table.POINTS, b"short", b""), {("unknown-row", "point short")}),
    (puts(Table.POINTS, ILLEGIBLE, b""), {("unknown-row", f"point {ILLEGIBLE.hex()}")}),
    (puts(Table.CHECKSUMS, b"short", b""), {("unknown-row", "checksums short")}),
    (puts(Table.CHECKSUMS, PUNCH, b"xxxxxx"), {("damaged-record", "checksums of file 1, group 3")}),
    (puts(Table.CHECKSUMS, PUNCH, seal(PUNCH, b"x")), {("bad-value", "checksums of file 1, group 3")}),
    (
        puts(Table.CHECKSUMS, OTHER_PUNCH, seal(OTHER_PUNCH, bytes(2112))),
        {("orphan-checksums", "checksums of file 9, group 3")},
    ),
    (puts(Table.SEALS, b"short", b""), {("unknown-row", "seals short")}),
    (puts(Table.RECLAIM, b"short", b""), {("unknown-row", "reclaim short")}),
    (puts(Table.POINTS, POINT, b"\0"), {("bad-value", f"row {POINT.hex()} of points")}),
    (puts(Table.BORN, born_key(1, 4, 7), b"\0"), {("bad-value", f"row {born_key(1, 4, 7).hex()} of born")}),
    (puts(Table.SEALS, pair_key(1, 4), b"x"), {("bad-value", f"row {pair_key(1, 4).hex()} of seals")}),
    (puts(Table.SEALS, pair_key(1, 4), bytes(MARK_BYTES)), set()),
    (puts(Table.PUNCH, b"short", b"x"), {("unknown-row", "punch short")}),
    (puts(Table.BRANCH_FILES, b"short", b""), {("unknown-row", "index of files, short")}),
    (puts(Table.IDEMPOTENCY, b"k", b"xxxxxx"), {("damaged-record", "idempotency k")}),
    (puts(Table.HOSTS, b"h9", seal(b"h9", b"\1{}")), {("damaged-record", "host h9")}),
    (puts(Table.HOSTS, b"h9", seal(b"h9", b"\1[")), {("damaged-record", "host h9")}),
    (puts(Table.HOSTS, b"h9", seal(b"h9", b"\2{}")), {("newer-record", "host h9")}),
]


@pytest.mark.parametrize(("change", "expected"), PLANTED)
def test_what_is_planted_is_found(pool: Store, change: Change, expected: set[tuple[str, str]]) -> None:
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


def test_the_states_of_a_job_are_those_of_the_board() -> None:
    assert frozenset(State) == JOB_STATES
