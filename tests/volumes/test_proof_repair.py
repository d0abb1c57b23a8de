"""What nobody needs is a leak, and ``--repair`` frees it; what is being removed is none."""

from dataclasses import replace
from pathlib import Path

from blockvirt.lun.leaf import NO_ENTRIES
from blockvirt.meta.keys import Table, born_key, leaf_key, number_key, pair_key
from blockvirt.meta.records import SnapshotRecord, VolumeRecord, seal
from blockvirt.meta.store import Writer
from blockvirt.volumes.checksums import put_checksums
from blockvirt.volumes.deletion import _remove_volume
from blockvirt.volumes.reclaim import _delete_rows
from tests.snapshots.test_histories import settled
from tests.volumes.proof_pool import COPY, WEB, alter, at_rest, check, put

CHUNK = 4096
SIZE = 600 * CHUNK


async def test_a_dead_version_is_a_leak_and_its_repair_frees_what_it_held(tmp_path: Path) -> None:
    pool = await at_rest(tmp_path)

    def change(writer: Writer) -> None:  # tuesday goes without a row for the reclaim
        for key, _ in writer.scan(Table.SNAPSHOTS):
            snapshot = writer.record(SnapshotRecord, Table.SNAPSHOTS, key)
            assert snapshot is not None
            if snapshot.name == "tuesday":
                writer.delete(Table.SNAPSHOTS, key)
                writer.delete(Table.SNAPSHOT_NAMES, f"{snapshot.volume_id}/tuesday".encode())
                for point, _ in writer.scan(Table.POINTS):
                    if point.endswith(key):
                        writer.delete(Table.POINTS, point)

    alter(pool, change)
    (found,) = check(pool)
    assert (found.severity.value, found.code, found.what) == ("leak", "version-dead", "leaf 0 of branch 1")
    assert check(pool, repair=True) == []
    assert check(pool) == [], "a reclaim is pending"
    await pool.start()
    await settled(pool)
    with pool.engine.store.read() as reader:
        assert len(list(reader.scan(Table.LEAVES, prefix=number_key(WEB)))) == 3
    await pool.close()
    assert check(pool) == []


async def test_a_branch_that_is_being_removed_may_be_half_gone_but_not_forgotten(tmp_path: Path) -> None:
    pool = await at_rest(tmp_path)

    def purge(writer: Writer) -> None:  # as far as the commit that takes the volume's record away
        volume_id = writer.get(Table.VOLUME_NAMES, b"copy")
        assert volume_id is not None
        writer.delete(Table.VOLUME_NAMES, b"copy")
        assert _remove_volume(volume_id.decode(), writer) == [COPY]

    def forget(writer: Writer) -> None:
        ((key, _),) = writer.scan(Table.RECLAIM)
        writer.delete(Table.RECLAIM, key)

    alter(pool, purge)
    assert check(pool) == []
    (file,) = (pool.device / "files").glob("00000002-*")
    file.unlink()
    assert check(pool) == []
    alter(pool, lambda writer: _delete_rows(Table.LEAVES, number_key(COPY), writer))
    assert check(pool) == []
    alter(pool, forget)
    assert [(found.severity.value, found.code, found.what) for found in check(pool)] == [
        ("leak", "orphan-branch", "branch 2")
    ]
    assert check(pool, repair=True) == []
    assert check(pool) == []
    await pool.start()
    await settled(pool)
    with pool.engine.store.read() as reader:
        assert reader.get(Table.BRANCHES, number_key(COPY)) is None
    await pool.close()
    assert check(pool) == []


async def test_rows_that_nobody_refers_to_are_removed_and_a_lost_purge_is_done(tmp_path: Path) -> None:
    pool = await at_rest(tmp_path)

    def change(writer: Writer) -> None:
        put(writer, leaf_key(99, 0, 1), NO_ENTRIES)
        writer.put(Table.BORN, born_key(99, 1, 0), b"")
        writer.put(Table.BORN, born_key(99, 1, 5), b"")
        writer.put(Table.RECLAIM, pair_key(99, 1), b"")
        writer.put(Table.SEALS, pair_key(99, 1), b"")
        punch = pair_key(98, 0)
        writer.put(Table.PUNCH, punch, seal(punch, (1).to_bytes(8, "little")))
        put_checksums(writer, {98 << 28: 1})
        volume_id = writer.get(Table.VOLUME_NAMES, b"bare")
        assert volume_id is not None
        volume = writer.record(VolumeRecord, Table.VOLUMES, volume_id)
        assert volume is not None
        writer.put_record(Table.VOLUMES, volume_id, replace(volume, deleting=True))
        writer.delete(Table.VOLUME_NAMES, b"bare")

    alter(pool, change)
    assert {finding.code for finding in check(pool)} == {
        *("orphan-leaf", "orphan-birth", "orphan-reclaim", "orphan-seal", "orphan-punch", "orphan-checksums"),
        "orphan-deletion",
    }
    assert check(pool, repair=True) == []
    assert check(pool) == []
    await pool.start()
    await settled(pool)
    with pool.engine.store.read() as reader:
        assert reader.count(Table.VOLUMES) == 2
    await pool.close()
    assert check(pool) == []
