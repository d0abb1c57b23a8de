"""The offline check: clean pools are clean, damage is corrupt, what a crash leaves is a leak that repair frees."""

import os
import subprocess
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from blockvirt.check import run
from blockvirt.errors import DamagedRecord, InUse, PoolLocked
from blockvirt.lun.leaf import decode, encode
from blockvirt.meta.copies import remember_folders, write_copy
from blockvirt.meta.keys import Table, number_key, pair_key
from blockvirt.meta.records import FileRecord, seal, unseal
from blockvirt.meta.store import Store, Writer
from blockvirt.pool.labels import LABEL_FILE
from blockvirt.units import MIB
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.journal import BLOCK_BYTES, FRAMES_AT_BYTES
from blockvirt.volumes.journal_frames import frame_bytes
from blockvirt.volumes.requests import NewVolume
from tests.volumes.conftest import Pool, abandon, read, write


async def at_rest(tmp_path: Path) -> Pool:
    """A pool with one volume of 20 chunks, 6 of them mapped."""
    pool = await Pool(tmp_path).start()
    handle = await pool.open(await pool.volume(20 * 4096, "v"))
    for chunk in (0, 1, 2, 9, 10, 15):
        await write(handle, chunk * 4096, bytes([chunk + 1]) * 4096)
    await handle.close()
    await pool.close()
    return pool


def codes(pool: Pool, *, repair: bool = False) -> list[str]:
    report = run(pool.state_dir, repair=repair, restore_metadata=False)
    return sorted(finding.code for finding in report.findings)


def alter(pool: Pool, change: Callable[[Writer], None]) -> None:
    store = Store.open(pool.state_dir / "metadata", reserve_bytes=0)
    store.commit_now(change)
    store.close()


async def test_a_pool_at_rest_is_clean(tmp_path: Path) -> None:
    pool = await at_rest(tmp_path)
    report = run(pool.state_dir, repair=False, restore_metadata=False)
    assert (report.exit_code, report.findings, report.summary) == (0, (), "clean")


async def test_a_pool_that_a_dead_daemon_left_is_proved_with_its_journal(pool: Pool) -> None:
    handle = await pool.open(await pool.volume(4096 * 600))
    await write(handle, 0, b"x" * 4096 * 600)
    await handle._opened.checkpointer.run()
    await handle.zero(4096, 4096 * 500, punch=True)
    await write(handle, 4096 * 3, b"y" * 9000)
    await abandon(pool, power_cut=False)
    assert codes(pool) == []
    await pool.start()


async def test_a_running_pool_is_not_checked(pool: Pool) -> None:
    with pytest.raises(PoolLocked, match=str(os.getpid())):
        run(pool.state_dir, repair=False, restore_metadata=False)


@pytest.mark.parametrize(
    ("slot", "entry_of", "code"),
    [
        (4, lambda entries: entries[0], "address-twice"),
        (4, lambda entries: entries[0] + 19, "address-beyond"),
        (4, lambda entries: entries[0] + (7 << 28), "address-unknown"),
        (0, lambda entries: 0, "live-count"),
    ],
)
async def test_a_wrong_entry_is_corrupt(
    tmp_path: Path, slot: int, entry_of: Callable[["array[int]"], int], code: str
) -> None:
    pool = await at_rest(tmp_path)

    def change(writer: Writer) -> None:
        ((key, stored),) = writer.scan(Table.LEAVES)
        entries = decode(unseal(key, stored, what="leaf"))
        entries[slot] = entry_of(entries)
        writer.put(Table.LEAVES, key, seal(key, encode(entries)))

    alter(pool, change)
    assert code in codes(pool)
    assert run(pool.state_dir, repair=False, restore_metadata=False).exit_code == 2


async def test_a_damaged_leaf_a_short_file_and_a_missing_file_are_corrupt(tmp_path: Path) -> None:
    pool = await at_rest(tmp_path)
    (file,) = (pool.device / "files").iterdir()
    os.truncate(file, 4096)
    assert codes(pool) == ["file-short"]
    file.rename(tmp_path / "kept")
    assert codes(pool) == ["file-missing"]

    def change(writer: Writer) -> None:
        ((key, stored),) = writer.scan(Table.LEAVES)
        writer.put(Table.LEAVES, key, stored[:-1] + bytes([stored[-1] ^ 1]))

    alter(pool, change)
    assert "leaf-damaged" in codes(pool) or "damaged-record" in codes(pool)


async def test_leaks_are_found_and_repaired(tmp_path: Path) -> None:
    pool = await at_rest(tmp_path)
    stray = pool.device / "files" / "000000ff-00000ff"
    stray.write_bytes(b"z" * 10_000)
    (file,) = (path for path in (pool.device / "files").iterdir() if path != stray)
    with file.open("r+b") as opened:  # chunks that were handed out and never journalled
        opened.seek(6 * 4096)
        opened.write(b"q" * 8192)

    def change(writer: Writer) -> None:
        ((key, _),) = writer.scan(Table.FILES)
        record = writer.record(FileRecord, Table.FILES, key)
        assert record is not None
        writer.put_record(Table.FILES, key, FileRecord(record.number, record.branch, record.device_id, 8, 6))

    alter(pool, change)
    report = run(pool.state_dir, repair=False, restore_metadata=False)
    assert report.exit_code == 3
    assert sorted(finding.code for finding in report.findings) == ["chunks-leaked", "file-stray"]
    assert "8192 bytes" in next(finding.message for finding in report.findings if finding.code == "chunks-leaked")
    assert codes(pool, repair=True) == []
    assert codes(pool) == []
    assert not stray.exists()


async def test_metadata_comes_back_from_a_copy_and_no_address_is_used_twice(tmp_path: Path) -> None:
    pool = await Pool(tmp_path).start()
    volume_id = await pool.volume(20 * 4096, "v")
    handle = await pool.open(volume_id)
    await write(handle, 0, b"a" * 4096)
    await handle._opened.checkpointer.run()
    write_copy(pool.engine.store, pool.device / "metadata", 1000.0)
    await remember_folders(pool.state_dir, [pool.device / "metadata"])
    await write(handle, 4096, b"SECRET" * 500)
    await handle.close()
    await pool.close()
    with pytest.raises(InUse, match="intact"):
        run(pool.state_dir, repair=False, restore_metadata=True)
    (pool.state_dir / "metadata" / "data.mdb").write_bytes(b"garbage" * 1000)
    report = run(pool.state_dir, repair=False, restore_metadata=True)
    assert "restored" in report.summary
    assert {finding.code for finding in report.findings} <= {"chunks-leaked"}
    await pool.start()
    handle = await pool.open(volume_id)
    assert await read(handle, 0, 8192) == b"a" * 4096 + bytes(4096)
    await write(handle, 5000, b"b")
    assert await read(handle, 4096, 4096) == bytes(5000 - 4096) + b"b" + bytes(8192 - 5001)
    await handle.close()
    await pool.close()


async def two_devices(tmp_path: Path) -> tuple[Pool, Path]:
    """A pool at rest with a volume on each of two devices; returns the second, which is called 'two'."""
    pool = await at_rest(tmp_path)
    await pool.start()
    await pool.engine.storage.add(str(tmp_path / "two"), "two", None, 0, {}, create=True)
    catalogue = Catalogue(pool.engine.store, pool.engine.registry, pool.engine.storage)
    made = await catalogue.create(NewVolume(size_bytes=MIB, name="other", placement_devices=("two",)))
    handle = await pool.open(made.volume.id)
    await write(handle, 0, b"x" * 4096)
    await handle.close()
    await pool.close()
    return pool, tmp_path / "two"


async def test_what_cannot_be_looked_at_is_not_corrupt(tmp_path: Path) -> None:
    pool, device = await two_devices(tmp_path)
    device.rename(tmp_path / "away")
    stray = pool.device / "files" / "000000ff-00000ff"
    stray.write_bytes(b"z" * 10_000)
    report = run(pool.state_dir, repair=True, restore_metadata=False)
    assert [(found.severity.value, found.code) for found in report.findings] == [
        ("unchecked", "device-unusable"),
        ("unchecked", "device-missing"),
        ("leak", "file-stray"),
    ]
    assert (report.exit_code, report.summary) == (
        1,
        "0 corruptions, 1 leaks, 2 parts could not be looked at; nothing was repaired, as there is more than leaks",
    )
    assert stray.exists(), "what seems to be nobody's may belong to what was not seen"
    (file,) = (path for path in (pool.device / "files").iterdir() if path != stray)
    os.truncate(file, 4096)
    report = run(pool.state_dir, repair=False, restore_metadata=False)
    assert report.exit_code == 2, "corruption where it could look is corruption"
    (tmp_path / "away").rename(device)
    stray.unlink()
    assert codes(pool) == ["file-short"]


async def test_a_journal_that_names_a_missing_device_is_not_corrupt(pool: Pool, tmp_path: Path) -> None:
    storage = pool.engine.storage
    await storage.add(str(tmp_path / "two"), "two", None, 0, {}, create=True)
    handle = await pool.open(await pool.volume(MIB))
    await write(handle, 0, b"x" * 4096)
    (first,) = handle._opened.volume.files.own()
    other = next(status for status in storage.list() if status.id != first.device_id)
    await handle._opened.volume.files.create(other.id, handle._opened.slow._admit_device)
    await abandon(pool, power_cut=False)
    Path(other.path).rename(tmp_path / "away")
    report = run(pool.state_dir, repair=True, restore_metadata=False)
    assert [(found.severity.value, found.code) for found in report.findings] == [
        ("unchecked", "device-unusable"),
        ("unchecked", "branch-unreadable"),
    ], "and its file on the other device is nobody's leak"
    assert report.exit_code == 1
    assert first.path.exists()
    (tmp_path / "away").rename(other.path)
    assert codes(pool) == []
    await pool.start()


async def test_a_device_whose_label_is_damaged_is_corrupt(tmp_path: Path) -> None:
    pool, device = await two_devices(tmp_path)
    (device / LABEL_FILE).write_text("{}")
    report = run(pool.state_dir, repair=False, restore_metadata=False)
    assert ("corrupt", "device-unusable") in [(found.severity.value, found.code) for found in report.findings]
    assert report.exit_code == 2


@pytest.mark.requires("root")
async def test_a_read_only_device_is_not_corrupt(tmp_path: Path) -> None:
    pool = await at_rest(tmp_path)
    for options in (["--bind", str(pool.device)], ["-o", "remount,ro,bind"]):
        subprocess.run(["mount", *options, str(pool.device)], check=True)
    try:
        report = run(pool.state_dir, repair=False, restore_metadata=False)
    finally:
        subprocess.run(["umount", str(pool.device)], check=True)
    assert report.exit_code == 1
    assert "is read-only" in report.findings[0].message
    assert codes(pool) == []


@pytest.mark.parametrize(
    ("table", "key", "damaged"),
    [(Table.FILES, number_key(1), number_key(1 << 40)), (Table.BRANCH_FILES, pair_key(1, 1), b"short")],
)
async def test_a_damaged_index_does_not_end_the_check(tmp_path: Path, table: Table, key: bytes, damaged: bytes) -> None:
    """The proof of the map stands on the records: where they are damaged it may come to nothing, and says so."""
    pool = await at_rest(tmp_path)

    def displace(writer: Writer) -> None:
        stored = writer.get(table, key)
        assert stored is not None
        writer.delete(table, key)
        writer.put(table, damaged, stored)

    alter(pool, displace)
    report = run(pool.state_dir, repair=True, restore_metadata=False, data=True)
    assert report.exit_code == 2
    assert {"file-index", "proof-ended"} <= {finding.code for finding in report.findings}


async def journalled(tmp_path: Path) -> tuple[Pool, str, Path]:
    """A pool whose daemon was killed after five frames; its volume's id and its journal's file."""
    pool = await Pool(tmp_path).start()
    volume_id = await pool.volume(20 * 4096, "v")
    handle = await pool.open(volume_id)
    for chunk in range(5):
        await write(handle, chunk * 4096, bytes([chunk + 1]) * 4096)
    await abandon(pool, power_cut=False)
    return pool, volume_id, next(path for path in (pool.device / "journal").iterdir() if any(path.read_bytes()[8192:]))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


async def test_damage_amid_a_journal_is_found_and_loses_nothing_silently(tmp_path: Path) -> None:
    pool, volume_id, journal = await journalled(tmp_path)
    flip(journal, FRAMES_AT_BYTES + 2 * frame_bytes(1) + 40)
    assert codes(pool) == ["branch-unreadable"]
    await pool.start()
    with pytest.raises(DamagedRecord, match="intact frames lie behind"):
        await pool.open(volume_id)
    await pool.close()
    assert journal.exists()


@pytest.mark.parametrize("left_bytes", [0, 4096, FRAMES_AT_BYTES + 10, FRAMES_AT_BYTES + 100, 65_536])
@pytest.mark.parametrize("half", [0, 1])
async def test_a_journal_that_was_cut_short_is_found_and_kept(tmp_path: Path, half: int, left_bytes: int) -> None:
    pool, volume_id, _ = await journalled(tmp_path)
    paths = sorted((pool.device / "journal").iterdir())
    os.truncate(paths[half], left_bytes)
    assert codes(pool) == ["branch-unreadable"]
    await pool.start()
    with pytest.raises(DamagedRecord, match="a part of it is missing"):
        await pool.open(volume_id)
    await pool.close()
    assert sorted((pool.device / "journal").iterdir()) == paths


async def test_a_flipped_bit_is_no_note_that_a_volume_stopped(tmp_path: Path) -> None:
    pool, volume_id, journal = await journalled(tmp_path)
    flip(journal, BLOCK_BYTES)
    await pool.start()
    handle = await pool.open(volume_id)
    assert await read(handle, 4 * 4096, 1) == b"\5"
    await handle.close()
    await pool.close()


@pytest.mark.parametrize("table", [Table.POOL, Table.DEVICES])
async def test_a_pool_whose_own_record_is_lost_is_not_made_anew(tmp_path: Path, table: Table) -> None:
    pool = await at_rest(tmp_path)

    def misplace(writer: Writer) -> None:
        (row,) = writer.scan(table)
        writer.delete(table, row[0])
        writer.put(table, b"qool", row[1])

    alter(pool, misplace)
    before = (pool.state_dir / "metadata" / "data.mdb").read_bytes()
    assert "damaged-record" in codes(pool)
    assert (pool.state_dir / "metadata" / "data.mdb").read_bytes() == before
    with pytest.raises(DamagedRecord):
        await pool.start()
