"""Devices: given, recognised, refused when wrong (and then left as they were), taken away."""

import contextlib
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from blockvirt.errors import DeviceFault, Exists, InUse, LimitReached, PoolLocked
from blockvirt.ids import new_id
from blockvirt.meta.records import DeviceRecord
from blockvirt.pool.devices import Device, claim, claim_all
from blockvirt.pool.labels import LABEL_FILE, DeviceLabel, read_label, write_label
from blockvirt.pool.membership import add_device, check_removable, erase_device
from blockvirt.pool.mounts import Mount, mount_of, parse_mount

POOL, OTHER_POOL = new_id(), new_id()
Mounter = Callable[..., Path]


def wanted(path: Path, name: str = "disk1") -> DeviceRecord:
    """A device as an administrator asks for it."""
    return DeviceRecord(new_id(), name, str(path), 1.0)


def added(path: Path, name: str = "disk1", members: tuple[DeviceRecord, ...] = ()) -> DeviceRecord:
    """Make a device of the pool and let go of it."""
    path.mkdir(exist_ok=True)
    device = add_device(wanted(path, name), POOL, members)
    device.release()
    return device.record


def listing(path: Path) -> list[tuple[str, int, int]]:
    """Everything under a directory, to show that nothing was written."""
    return sorted((str(entry), entry.lstat().st_mtime_ns, entry.lstat().st_size) for entry in path.rglob("*"))


def refused(path: Path, record: DeviceRecord, reason: str) -> DeviceFault:
    """Claim it and expect to be refused, with the device, its path and a correction named and nothing written."""
    before = listing(path) if path.is_dir() else []
    with pytest.raises(DeviceFault) as caught:
        claim(record, POOL)
    assert caught.value.details["reason"] == reason
    assert record.name in caught.value.message or reason in ("damaged-label", "newer-format")
    assert str(path) in caught.value.message
    assert caught.value.correction
    assert (listing(path) if path.is_dir() else []) == before
    return caught.value


def fill(disk: Path) -> None:
    """Take all inodes and all space of a filesystem."""
    with contextlib.suppress(OSError):
        for number in range(1 << 20):
            (disk / f"f{number}").touch()
    with (disk / "f0").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(1 << 16)):
            pass
    assert os.statvfs(disk).f_bavail == os.statvfs(disk).f_ffree == 0


def test_a_device_is_labelled_and_recognised_again(tmp_path: Path) -> None:
    record = added(tmp_path / "disk")
    assert {entry.name for entry in (tmp_path / "disk").iterdir()} == {LABEL_FILE, "files", "journal", "metadata"}
    again = claim(record, POOL)
    assert again.path == tmp_path / "disk"
    space = again.space()
    assert 0 < space.free_bytes < space.total_bytes
    assert space.filesystem == os.stat(tmp_path).st_dev
    again.check_reachable()
    again.release()


def test_an_interrupted_add_is_taken_up(tmp_path: Path) -> None:
    """The label is there, the record in the metadata store is not."""
    first = added(tmp_path / "disk")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "files").mkdir()
    (tmp_path / "cut" / f"{LABEL_FILE}.new").write_text("{")
    assert added(tmp_path / "disk").id == first.id
    assert added(tmp_path / "cut", "disk2", (first,)).id != first.id


def test_an_add_whose_last_sync_failed_is_synced_when_it_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut would take the label, and what is on the disk by then could not be used."""
    (path := tmp_path / "disk").mkdir()
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)
        if synced[-1] == str(path) and len(synced) == 2:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DeviceFault, match="cannot be labelled"):
        added(path)
    added(path)
    assert synced == [str(path / f"{LABEL_FILE}.new"), str(path), str(path)]


def test_a_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "gone", wanted(tmp_path / "gone"), "missing")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", wanted(tmp_path / "file"), "missing")
    with pytest.raises(DeviceFault, match="cannot be reached"):
        add_device(wanted(tmp_path / "gone"), POOL, ())
    device = add_device(wanted(tmp_path / "gone"), POOL, (), create=True)
    assert (tmp_path / "gone" / LABEL_FILE).exists()
    device.release()


def test_a_disk_that_is_not_mounted_shows_no_label(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    fault = refused(tmp_path / "disk", wanted(tmp_path / "disk"), "unlabelled")
    assert "is the disk mounted?" in fault.message
    assert "mounted at /" in fault.cause


def test_a_mount_that_the_table_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As below a chroot whose root is a plain directory, where the table has no line for it."""
    seen = mount_of(tmp_path)
    real = Path.read_text
    lines = real(Path("/proc/self/mountinfo")).splitlines()
    other = f"9999999 1 {os.major(seen.filesystem)}:{os.minor(seen.filesystem)} /x /elsewhere rw - ext4 /dev/x rw"
    tables = {
        "hidden": [line for line in lines if parse_mount(line).filesystem != seen.filesystem],
        "elsewhere": [other],
        "none": [],
    }
    found = {}
    for name, table in tables.items():
        text = "\n".join(table)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "read_text", lambda path, text=text: text if path.name == "mountinfo" else real(path))
            found[name] = mount_of(tmp_path)
    assert {name: (mount.fs_type, mount.source) for name, mount in found.items()} == {
        "hidden": ("", ""),
        "elsewhere": ("ext4", "/dev/x"),
        "none": ("", ""),
    }
    for mount in found.values():
        top = Path(mount.point)
        assert top in (tmp_path, *tmp_path.parents)
        assert top.stat().st_dev == mount.filesystem == tmp_path.stat().st_dev
        assert top == top.parent or top.parent.stat().st_dev != mount.filesystem


def test_a_foreign_label_is_never_touched(tmp_path: Path) -> None:
    record = added(tmp_path / "disk")
    write_label(tmp_path / "disk", DeviceLabel(record.id, OTHER_POOL, 1.0))
    assert OTHER_POOL in refused(tmp_path / "disk", record, "foreign").message
    before = listing(tmp_path)
    with pytest.raises(DeviceFault, match="belongs to another pool"):
        add_device(wanted(tmp_path / "disk"), POOL, ())
    assert listing(tmp_path) == before


def test_two_disks_in_each_others_place(tmp_path: Path) -> None:
    first = added(tmp_path / "a")
    second = added(tmp_path / "b", "disk2", (first,))
    (tmp_path / "a").rename(tmp_path / "c")
    (tmp_path / "b").rename(tmp_path / "a")
    assert second.id in refused(tmp_path / "a", first, "foreign").message
    devices, problems = claim_all([first, replace(second, path=str(tmp_path / "a"))], POOL)
    assert [device.record.id for device in devices] == [second.id]
    assert [problem.record.id for problem in problems] == [first.id]
    devices[0].release()


@pytest.mark.parametrize("damage", ["damaged-label", "newer-format"])
def test_a_label_that_cannot_be_used(tmp_path: Path, damage: str) -> None:
    record = added(tmp_path / "disk")
    if damage == "damaged-label":
        (tmp_path / "disk" / LABEL_FILE).write_text("{}")
    else:
        write_label(tmp_path / "disk", DeviceLabel(record.id, POOL, 1.0, format=2))
    refused(tmp_path / "disk", record, damage)


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    record = added(tmp_path / "disk")
    (tmp_path / "disk" / "files").rmdir()
    assert "files is missing" in refused(tmp_path / "disk", record, "damaged").message


def test_what_may_not_be_given(tmp_path: Path) -> None:
    first = added(tmp_path / "disk")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    (tmp_path / "new").mkdir()
    with pytest.raises(DeviceFault, match=r"not empty \(it holds 'precious\.txt'\)"):
        add_device(wanted(tmp_path / "full", "disk2"), POOL, (first,))
    with pytest.raises(Exists, match="called disk1"):
        add_device(wanted(tmp_path / "new", "disk1"), POOL, (first,))
    with pytest.raises(Exists, match="is device disk1 already"):
        add_device(wanted(tmp_path / "disk", "disk2"), POOL, (first,))
    for inside in (tmp_path / "disk" / "files", tmp_path):
        with pytest.raises(DeviceFault, match="inside one another"):
            add_device(wanted(inside, "disk2"), POOL, (first,))
    with pytest.raises(LimitReached, match="at most 64"):
        add_device(wanted(tmp_path / "new", "disk2"), POOL, [wanted(tmp_path, f"d{n}") for n in range(64)])
    assert list((tmp_path / "new").iterdir()) == []


def test_one_directory_by_two_ways(tmp_path: Path) -> None:
    first = added(tmp_path / "disk")
    (tmp_path / "link").symlink_to("disk")
    with pytest.raises(Exists, match="is device disk1 already"):
        add_device(wanted(tmp_path / "link", "disk2"), POOL, (first,))
    (tmp_path / "other").mkdir()
    (tmp_path / "way").symlink_to("other")
    assert added(tmp_path / "way", "disk2", (first,)).path == str(tmp_path / "other")


@pytest.mark.requires("root")
def test_a_bind_mount_of_a_device_is_the_same_device(tmp_path: Path, mount: Mounter) -> None:
    first = added(tmp_path / "disk")
    twice = mount("--bind", tmp_path / "disk")
    with pytest.raises(DeviceFault, match="carries the label of device disk1, which is at") as caught:
        add_device(wanted(twice, "disk2"), POOL, (first,))
    assert caught.value.details["reason"] == "doubly-given"
    held = claim(first, POOL)
    with pytest.raises(PoolLocked, match=f"in use by process {os.getpid()}"):
        claim(replace(first, path=str(twice)), POOL)
    held.release()


@pytest.mark.requires("root")
def test_a_read_only_bind_mount(tmp_path: Path, mount: Mounter) -> None:
    record = added(tmp_path / "disk")
    (tmp_path / "empty").mkdir()
    frozen, empty = mount("--bind", tmp_path / "disk"), mount("--bind", tmp_path / "empty")
    for point in (frozen, empty):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(point)], check=True)
    refused(frozen, replace(record, path=str(frozen)), "read-only")
    with pytest.raises(DeviceFault, match="is read-only"):
        add_device(wanted(empty, "disk2"), POOL, (record,))


def test_a_directory_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the mount table does not tell, trying tells."""
    record = added(tmp_path / "disk")
    real_open = os.open

    def no_writing(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(13, "Permission denied")
        return real_open(path, flags, mode)

    monkeypatch.setattr("blockvirt.pool.devices.os.open", no_writing)
    with pytest.raises(DeviceFault, match="is read-only"):
        claim(record, POOL)


@pytest.mark.requires("root", "loop", "mkfs.ext4")
def test_a_full_disk_is_claimed_but_not_given(tmp_path: Path, mount: Mounter, make_image: Callable[..., Path]) -> None:
    disk = mount("-o", "loop", make_image("ext4", 16, "-N", "64"))
    (disk / "device").mkdir()
    (disk / "other").mkdir()
    record = added(disk / "device")
    fill(disk)
    claim(record, POOL).release()
    with pytest.raises(DeviceFault) as caught:
        add_device(wanted(disk / "other", "disk2"), POOL, (record,))
    assert caught.value.details["reason"] == "full"
    assert read_label(disk / "other") is None


@pytest.mark.requires("root", "loop", "mkfs.ext4")
def test_another_disk_mounted_over_one_in_use(tmp_path: Path, mount: Mounter, make_image: Callable[..., Path]) -> None:
    record = added(tmp_path / "disk")
    device: Device = claim(record, POOL)
    mount("-o", "loop", make_image("ext4", 16), at=tmp_path / "disk")
    for use in (device.check_reachable, device.space, lambda: check_removable(device), lambda: erase_device(device)):
        with pytest.raises(DeviceFault, match="now leads to another filesystem"):
            use()
    refused(tmp_path / "disk", record, "unlabelled")
    device.release()


@pytest.mark.requires("root")
def test_a_filesystem_that_suits_badly_is_warned_about(
    mount: Mounter, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mount("-t", "tmpfs", "-o", "size=1m", "none")
    device = add_device(wanted(disk), POOL, ())
    assert device.warnings == (
        f"the filesystem of {disk} (tmpfs) lives in memory: everything on it is gone after a reboot",
    )
    device.release()
    line = f"36 35 0:31 / {disk} rw,relatime shared:1 - btrfs /dev/sda rw,ssd"
    monkeypatch.setattr("blockvirt.pool.devices.mount_of", lambda path: parse_mount(line))
    devices, _ = claim_all([device.record], POOL)
    assert "overwriting allocated chunks may fail" in caplog.text
    devices[0].release()


def test_a_line_of_the_mount_table() -> None:
    mount = parse_mount(
        r"36 35 8:1 /a /my\040disk rw,noatime shared:1 master:2 - ext4 /dev/sda\1341 ro,errors=remount-ro"
    )
    assert mount == Mount("/my disk", "ext4", r"/dev/sda\1", os.makedev(8, 1))
    assert parse_mount("36 35 0:9 / /x rw - tmpfs  rw,size=1k").source == ""
    for line in ("", "36 35 8:1 / / rw", "36 35 - ext4 x rw"):
        with pytest.raises(ValueError, match="not a line"):
            parse_mount(line)


def test_only_an_empty_device_is_erased(tmp_path: Path) -> None:
    device = claim(added(tmp_path / "disk"), POOL)
    (tmp_path / "disk" / "files" / "00000001-0000001").write_bytes(b"x")
    (tmp_path / "disk" / "metadata" / "copy").write_bytes(b"x")
    with pytest.raises(InUse, match="holds 1 files"):
        check_removable(device)
    with pytest.raises(InUse):
        erase_device(device)
    (tmp_path / "disk" / "files" / "00000001-0000001").unlink()
    check_removable(device)
    erase_device(device)
    assert list((tmp_path / "disk").iterdir()) == []
    added(tmp_path / "disk")


def test_a_fault_of_one_device_keeps_no_other_from_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = added(tmp_path / "disk")
    devices, problems = claim_all([wanted(tmp_path / "gone", "gone"), record], POOL)
    assert [device.record for device in devices] == [record]
    assert problems[0].fault.details["reason"] == "missing"
    assert "gone is not usable" in caplog.text
    devices[0].release()
