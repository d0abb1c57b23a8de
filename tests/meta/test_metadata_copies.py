"""Copies of the metadata: made while commits go on, found newest first, believed only when intact, put in place."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from blockvirt.errors import DeviceFault, MetadataFault
from blockvirt.meta.copies import (
    MetadataCopy,
    find_copies,
    naming_newest,
    newest_intact,
    problems_of,
    remember_folders,
    remembered_folders,
    restore,
    write_copy,
)
from blockvirt.meta.keys import Table
from blockvirt.meta.store import Store, Writer

NOW_S = 1_795_312_800.5


def put(store: Store, first: int, count: int) -> None:
    """Commit rows."""

    def change(writer: Writer) -> None:
        for number in range(first, first + count):
            writer.put(Table.FILES, b"%08d" % number, bytes(500))

    store.commit_now(change)


def rows_in(path: Path) -> int:
    """Open an environment and count its rows."""
    store = Store.open(path, reserve_bytes=0)
    try:
        return store.stats().entries["files"]
    finally:
        store.close()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two devices' folders for copies."""
    found = [tmp_path / "a", tmp_path / "b"]
    for folder in found:
        folder.mkdir()
    return found


def test_the_newest_few_are_kept_and_found(store: Store, folders: list[Path]) -> None:
    made = []
    for number in range(5):
        put(store, number * 10, 10)
        made.append(write_copy(store, folders[number % 2], NOW_S + number))
    assert find_copies(folders) == made[:0:-1], "two on each, the newest first"
    assert newest_intact([*folders, Path("/nowhere")]) == made[4]
    assert made[4].path.name.startswith("metadata-01795312804500-")
    assert made[4].made == "2026-11-22 02:00:04 UTC"
    assert sorted(entry.name for folder in folders for entry in folder.iterdir()) == sorted(
        c.path.name for c in made[1:]
    )
    assert find_copies([]) == []
    assert newest_intact([]) is None


def test_a_clock_set_back_does_not_make_the_new_copy_the_older_one(store: Store, folders: list[Path]) -> None:
    for number in range(4):
        put(store, number, 1)
        latest = write_copy(store, folders[0], NOW_S - 1000 * number)
    assert find_copies(folders)[0] == latest
    assert len(find_copies(folders)) == 2


def test_a_copy_is_one_moment_of_a_busy_store(store: Store, folders: list[Path], tmp_path: Path) -> None:
    put(store, 0, 2000)
    stop = threading.Event()

    def pairs() -> None:
        number = 0
        while not stop.is_set():
            number += 1

            def change(writer: Writer, value: bytes = b"%d" % number) -> None:
                writer.put(Table.HOSTS, b"one", value)
                writer.put(Table.UNITS, b"two", value)

            store.commit_now(change)

    thread = threading.Thread(target=pairs)
    thread.start()
    try:
        copies = [write_copy(store, folders[0], NOW_S + number) for number in range(10)]
    finally:
        stop.set()
        thread.join()
    assert problems_of(copies[-1]) == []
    restore(copies[-1], tmp_path / "restored")
    opened = Store.open(tmp_path / "restored", reserve_bytes=0)
    with opened.read() as reader:
        assert reader.get(Table.HOSTS, b"one") == reader.get(Table.UNITS, b"two") is not None
        assert reader.count(Table.FILES) == 2000
    opened.close()


def test_a_damaged_copy_is_passed_over(store: Store, folders: list[Path], tmp_path: Path) -> None:
    put(store, 0, 100)
    older = write_copy(store, folders[0], NOW_S)
    newer = write_copy(store, folders[1], NOW_S + 1)
    content = bytearray(newer.path.read_bytes())
    content[len(content) // 2] ^= 1
    newer.path.write_bytes(content)
    assert problems_of(newer) == ["its content does not have the CRC-32C that its name says"]
    assert newest_intact(folders) == older
    with pytest.raises(MetadataFault, match="is damaged: its content"):
        restore(newer, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
    older.path.unlink()
    assert newest_intact(folders) is None
    assert problems_of(older) == ["it cannot be read: No such file or directory"]
    torn = folders[0] / "metadata-01795312900000-00000000.mdb"
    torn.touch()
    assert problems_of(MetadataCopy(1795312900000, 0, torn)), "an empty file has the CRC 0, and is no metadata"


def test_restore_moves_what_is_there_aside(store: Store, folders: list[Path], tmp_path: Path) -> None:
    put(store, 0, 100)
    copy = write_copy(store, folders[0], NOW_S)
    put(store, 100, 100)
    store.close()
    data_file = store.path / "data.mdb"
    with data_file.open("r+b") as file:
        file.truncate(9000)
    with pytest.raises(MetadataFault) as caught:
        Store.open(store.path)
    named = naming_newest(caught.value, folders)
    assert str(copy.path) in named.correction
    assert "made 2026-11-22 02:00:00 UTC" in named.correction
    assert named.message == caught.value.message
    assert naming_newest(caught.value, []).correction.endswith(
        "no intact copy was found on the devices that are mounted"
    )
    assert restore(copy, store.path) == store.path / "data.mdb.broken-1"
    assert rows_in(store.path) == 100
    assert (store.path / "data.mdb.broken-1").stat().st_size == 9000
    assert restore(copy, store.path) == store.path / "data.mdb.broken-2"
    assert (store.path / "data.mdb.broken-1").stat().st_size == 9000
    assert restore(copy, tmp_path / "fresh") is None
    assert rows_in(tmp_path / "fresh") == 100
    assert copy.path.exists()


def test_a_folder_that_takes_no_copy_keeps_what_it_has(
    store: Store, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = write_copy(store, folders[0], NOW_S)
    with pytest.raises(DeviceFault, match="cannot be copied") as caught:
        write_copy(store, folders[0] / "gone", NOW_S)
    assert caught.value.details["reason"] == "failed"

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blockvirt.meta.copies.os.fsync", full)
    with pytest.raises(DeviceFault, match="No space left") as caught:
        write_copy(store, folders[0], NOW_S + 1)
    assert caught.value.details["reason"] == "full"
    assert list(folders[0].iterdir()) == [copy.path]


@pytest.mark.requires("root", "loop", "mkfs.ext4")
def test_a_copy_to_a_disk_that_is_too_small(store: Store, make_filesystem: Callable[[str, int], Path]) -> None:
    disk = make_filesystem("ext4", 16)
    put(store, 0, 40_000)
    with pytest.raises(DeviceFault) as caught:
        write_copy(store, disk, NOW_S)
    assert caught.value.details["reason"] == "full"
    assert [entry.name for entry in disk.iterdir()] == ["lost+found"]
    put(store, 0, 1)


async def test_where_copies_lie_is_noted_outside_the_metadata(tmp_path: Path) -> None:
    assert remembered_folders(tmp_path) == []
    odd = Path("/disks/caf\udce9 1/metadata")
    await remember_folders(tmp_path, [Path("/disks/a/metadata"), odd])
    assert remembered_folders(tmp_path) == [Path("/disks/a/metadata"), odd]
    await remember_folders(tmp_path, [])
    assert remembered_folders(tmp_path) == []
