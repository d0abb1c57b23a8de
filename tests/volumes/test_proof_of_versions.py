"""The offline proof over snapshots, clones and what crashes leave: damage is found, and said in users' words."""

import random
from array import array
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from blockvirt.lun.address import FRESH
from blockvirt.meta.findings import Severity
from blockvirt.meta.keys import Table, born_key, child_point_key, leaf_key, number_key, pair_key, split_leaf
from blockvirt.meta.records import BranchRecord, FileRecord, SnapshotRecord, seal
from blockvirt.meta.store import Writer
from blockvirt.volumes.deletion import _remove_snapshots, _remove_volume
from blockvirt.volumes.requests import NewVolume
from tests.snapshots.conftest import SnapshotPool
from tests.snapshots.test_histories import History
from tests.volumes.conftest import abandon, write
from tests.volumes.proof_pool import COPY, WEB, alter, at_rest, check, fill, messages, put, versions

CHUNK = 4096
SIZE = 600 * CHUNK


def edits(
    version: int, slot: int, entry_of: Callable[[list["array[int]"]], int], branch: int = WEB
) -> Callable[[Writer], None]:
    """A change of one entry of leaf 0; ``entry_of`` is given the entries of all its versions."""

    def change(writer: Writer) -> None:
        found = versions(writer, branch, 0)
        key, entries = found[version]
        entries[slot] = entry_of([each for _, each in found])
        put(writer, key, entries)

    return change


async def test_a_pool_at_rest_is_clean(tmp_path: Path) -> None:
    assert check(await at_rest(tmp_path)) == []


async def test_a_journal_whose_head_is_gone_says_nothing_of_the_map(tmp_path: Path) -> None:
    """A volume that had stopped is deleted with its journal, which goes with the rest of it, after the record."""
    pool = await SnapshotPool(tmp_path).start()
    web = await pool.volume(SIZE, "web")
    await fill(pool, web, [0, 1, 2, 3], 1)
    await pool.snapshots.create({web: "monday"})
    await pool.catalogue.create(NewVolume(size_bytes=SIZE, name="copy"), origin=pool.snapshots.find("web@monday"))
    handle = await pool.open(web)
    await write(handle, 5 * CHUNK, bytes(CHUNK))
    await handle.zero(0, 2 * CHUNK, punch=True)
    await abandon(pool, power_cut=False)
    assert [finding for finding in check(pool) if finding.severity is not Severity.LEAK] == []
    alter(pool, partial(_remove_snapshots, web))
    alter(pool, partial(_remove_volume, web))
    alter(pool, lambda writer: writer.delete(Table.VOLUME_NAMES, b"web"))
    assert [finding for finding in check(pool) if finding.severity is not Severity.LEAK] == []


@pytest.mark.parametrize(
    ("change", "code", "what", "words"),
    [
        # monday's version, and those that copied the entry
        (
            edits(0, 9, lambda found: found[0][3]),
            "address-twice",
            "branch 1 chunk 9",
            "byte 36864: chunk 3 of backing file 1 is named twice, from byte 12288 on (chunk 3) too; "
            "concerns web@monday, bare",
        ),
        (
            edits(2, 9, lambda found: found[0][3]),
            "address-twice",
            "branch 1 chunk 9",
            "byte 36864: chunk 3 of backing file 1 is named twice, from byte 12288 on (chunk 3) too; concerns web",
        ),
        (
            edits(2, 0, lambda found: found[0][0]),
            "address-twice",
            "branch 1 chunk 0",
            "byte 0: names chunk 0 of backing file 1 again, which a version in between had dropped; concerns web",
        ),
        (
            edits(1, 9, lambda found: found[0][0] + 500),
            "address-beyond",
            "branch 1 chunk 9",
            "byte 36864: names chunk 500 of backing file 1, which has handed out 8; concerns web@tuesday",
        ),
        (
            edits(1, 9, lambda found: found[0][0] + (9 << 28)),
            "address-unknown",
            "branch 1 chunk 9",
            "byte 36864: names backing file 10, which does not exist; concerns web@tuesday",
        ),
        (
            edits(2, 3, lambda found: found[2][3] | FRESH),
            "address-shared",
            "branch 1 chunk 3",
            "byte 12288: chunk 3 of backing file 1 is shared and marked as overwritable; concerns web",
        ),
        (
            edits(0, 3, lambda found: found[0][3] | FRESH, COPY),
            "address-shared",
            "branch 2 chunk 3",
            "byte 12288: chunk 3 of backing file 1 is shared and marked as overwritable; concerns copy",
        ),
        # what only tuesday and web hold is kept for nobody: a reclaim may free it
        (
            edits(0, 0, lambda found: found[0][1] + 4 - 1, COPY),
            "address-foreign",
            "branch 2 chunk 0",
            "byte 0: names chunk 4 of backing file 1, which branch 1 does not keep for it; concerns copy",
        ),
    ],
)
async def test_a_wrong_address_is_found_and_says_whom_it_concerns(
    tmp_path: Path, change: Callable[[Writer], None], code: str, what: str, words: str
) -> None:
    pool = await at_rest(tmp_path)
    alter(pool, change)
    assert messages(pool).get((code, what)) == words


def missing(branch: int, leaf: int, version: int) -> Callable[[Writer], None]:
    def change(writer: Writer) -> None:
        key, _ = versions(writer, branch, leaf)[version]
        _, _, birth = split_leaf(key)
        writer.delete(Table.LEAVES, key)
        writer.delete(Table.BORN, born_key(branch, birth, leaf))

    return change


@pytest.mark.parametrize(
    ("change", "concerned"),
    [
        (missing(WEB, 0, 0), {"snapshot web@monday", "volume bare"}),
        (missing(WEB, 1, 0), {"snapshot web@tuesday", "volume web"}),
    ],
)
async def test_a_missing_version_is_found(
    tmp_path: Path, change: Callable[[Writer], None], concerned: set[str]
) -> None:
    pool = await at_rest(tmp_path)
    alter(pool, change)
    found = check(pool)
    assert concerned <= {finding.what for finding in found if finding.code == "mapped-count"}
    assert "live-count" in {finding.code for finding in found}


async def test_a_missing_version_that_leaves_the_figures_of_points_is_found(tmp_path: Path) -> None:
    pool = await at_rest(tmp_path)
    alter(pool, missing(WEB, 0, 1))  # tuesday then sees monday's chunk 0: as many chunks, other bytes
    found = messages(pool)
    words = found["live-count", "backing file 1"]
    assert words.endswith("; concerns web, web@monday, web@tuesday, copy, bare"), words


async def test_a_damaged_version_names_who_sees_it_and_nothing_else_is_blamed(tmp_path: Path) -> None:
    pool = await at_rest(tmp_path)

    def change(writer: Writer) -> None:
        key, _ = versions(writer, WEB, 0)[0]
        stored = writer.get(Table.LEAVES, key)
        assert stored is not None
        writer.put(Table.LEAVES, key, stored[:-1] + bytes([stored[-1] ^ 1]))

    alter(pool, change)
    found = messages(pool)
    assert {code for code, _ in found} == {"damaged-leaf", "leaf-damaged"}
    assert found["leaf-damaged", "leaf 0 of branch 1"].endswith("; concerns web@monday, bare")


async def test_live_counts_and_mapped_counts_that_are_off_are_found(tmp_path: Path) -> None:
    pool = await at_rest(tmp_path)

    def change(writer: Writer) -> None:
        for key, _ in writer.scan(Table.FILES):
            file = writer.record(FileRecord, Table.FILES, key)
            assert file is not None
            writer.put_record(Table.FILES, key, replace(file, live_chunks=file.live_chunks - 1))
        for key, _ in writer.scan(Table.SNAPSHOTS):
            snapshot = writer.record(SnapshotRecord, Table.SNAPSHOTS, key)
            assert snapshot is not None
            changed = replace(snapshot, mapped_chunks=snapshot.mapped_chunks + 1)
            writer.put_record(Table.SNAPSHOTS, key, changed)
        copy = writer.record(BranchRecord, Table.BRANCHES, number_key(COPY))
        assert copy is not None
        writer.put_record(Table.BRANCHES, number_key(COPY), replace(copy, inherited_chunks=1))

    alter(pool, change)
    assert set(messages(pool)) == {
        ("live-count", "backing file 1"),
        ("live-count", "backing file 2"),
        ("mapped-count", "snapshot web@monday"),
        ("mapped-count", "snapshot web@tuesday"),
        ("mapped-count", "volume copy"),
    }


async def test_a_clone_whose_origin_is_not_kept_for_it_is_corrupt(tmp_path: Path) -> None:
    pool = await at_rest(tmp_path)

    def change(writer: Writer) -> None:
        copy = writer.record(BranchRecord, Table.BRANCHES, number_key(COPY))
        assert copy is not None
        writer.delete(Table.POINTS, child_point_key(WEB, copy.origin_epoch, COPY))
        flattened = replace(copy, origin_branch=0, origin_epoch=0, mapped_chunks=4, inherited_chunks=0)
        writer.put_record(Table.BRANCHES, number_key(COPY), flattened)

    alter(pool, change)
    assert {what for code, what in messages(pool) if code == "address-foreign"} == {
        f"branch 2 chunk {chunk}" for chunk in (0, 1, 3)
    }


async def test_branches_that_come_from_one_another_do_not_hang_the_proof(tmp_path: Path) -> None:
    pool = await at_rest(tmp_path)

    def change(writer: Writer) -> None:
        web = writer.record(BranchRecord, Table.BRANCHES, number_key(WEB))
        assert web is not None
        writer.put_record(Table.BRANCHES, number_key(WEB), replace(web, origin_branch=COPY, origin_epoch=2))

    alter(pool, change)
    assert ("branch-unreadable", "branch 1") in messages(pool)


async def test_what_is_to_be_freed_is_dead_and_was_handed_out(tmp_path: Path) -> None:
    pool = await at_rest(tmp_path)

    def change(writer: Writer) -> None:
        for chunk, count in ((4, 1), (7, 2)):
            key = pair_key(1, chunk)
            writer.put(Table.PUNCH, key, seal(key, count.to_bytes(8, "little")))

    alter(pool, change)
    found = [(finding.code, finding.what, finding.message) for finding in check(pool)]
    users = "; concerns web, web@monday, web@tuesday, copy, bare"
    assert found == [
        ("punch-live", "backing file 1", f"chunk 4 is to be freed and is live{users}"),
        ("punch-beyond", "backing file 1", "chunks 7 to 8 are to be freed, 8 were handed out"),
        ("punch-live", "backing file 1", f"chunk 7 is to be freed and is live{users}"),
    ]


async def test_a_pending_reclaim_excuses_its_own_gap_alone(tmp_path: Path) -> None:
    pool = await at_rest(tmp_path)

    def change(writer: Writer) -> None:
        (monday, _), (_, entries), *_ = versions(writer, WEB, 0)
        dead = leaf_key(WEB, 0, 0)
        put(writer, dead, entries)  # before monday's: nobody can see it
        writer.put(Table.BORN, born_key(WEB, 0, 0), b"")
        writer.put(Table.RECLAIM, number_key(WEB) + number_key(split_leaf(monday)[2] + 1), b"")

    alter(pool, change)
    assert ("version-dead", "leaf 0 of branch 1") in messages(pool)


@pytest.mark.parametrize("seed", range(4))
async def test_every_moment_of_a_history_is_clean(tmp_path: Path, seed: int) -> None:
    """Killed at random, in the middle of whatever the background does: what is left is no damage."""
    pool = await SnapshotPool(tmp_path).start()
    history = History(pool, seed)
    await history.new_volume()
    for step in range(40):
        if len(history.volumes) < 2:
            await history.new_volume()
        await history.step()
        if step % 5 == 4:
            await abandon(pool, power_cut=random.Random(seed).random() < 0.2)
            for volume in history.volumes:
                volume.handle = None
            assert check(pool) == [], f"seed {seed}, step {step}"
            await pool.start()
    for volume in history.volumes:
        await history.shut(volume)
    await pool.close()
