"""Giving a directory to the pool and taking it away again. What is not empty or not ours is never touched."""

import contextlib
import errno
import os
from collections.abc import Sequence
from pathlib import Path

from blockvirt.errors import DeviceFault, Exists, InUse, LimitReached
from blockvirt.limits import MAX_DEVICES
from blockvirt.meta.records import DeviceRecord
from blockvirt.pool.backing import sync_directory
from blockvirt.pool.devices import (
    COPIES,
    FILES,
    FOLDERS,
    JOURNAL,
    Device,
    check_mount,
    check_writable,
    claim,
    foreign,
    missing,
)
from blockvirt.pool.labels import LABEL_FILE, DeviceLabel, read_label, write_label

_NOT_OURS_BUT_HARMLESS = {"lost+found"}


def add_device(wanted: DeviceRecord, pool_id: str, members: Sequence[DeviceRecord], *, create: bool = False) -> Device:
    """Label the directory of ``wanted`` and claim it; the caller then stores the record of the result.

    An interrupted add may be repeated: the device then keeps the id it was labelled with. ``create`` makes the
    directory. Raises Exists for a taken name or a directory that is a member already, LimitReached, PoolLocked, and
    DeviceFault for one that is missing, not empty, foreign, nested in another device, read-only, full, or mounted
    twice. Blocks (a few syncs).
    """
    path = _directory(wanted, create=create)
    if len(members) >= MAX_DEVICES:
        raise LimitReached(
            f"the pool has {len(members)} devices already, at most {MAX_DEVICES} are possible",
            correction="remove an empty device first",
        )
    if any(member.name == wanted.name for member in members):
        raise Exists(f"there is a device called {wanted.name} already", correction="choose another name")
    device_id = _known_id(wanted, path, pool_id, members)
    _check_nesting(wanted, path, members)
    if device_id is None:
        _check_empty(wanted, path)
    check_mount(path, wanted.name)
    check_writable(path, wanted.name, full_is_wrong=True)
    record = DeviceRecord(
        device_id or wanted.id,
        wanted.name,
        str(path),
        wanted.added_s,
        wanted.limit_bytes,
        wanted.reserve_bytes,
        wanted.labels,
    )
    try:
        for folder in FOLDERS:
            (path / folder).mkdir(mode=0o700, exist_ok=True)
        if device_id is None:
            write_label(path, DeviceLabel(record.id, pool_id, record.added_s))
        else:
            sync_directory(path)  # the add that was interrupted may not have come to it
    except OSError as error:
        raise DeviceFault(
            f"device {wanted.name}: {path} cannot be labelled: {error.strerror}",
            correction="check the disk's free space and health, then try again",
            reason="full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "failed",
            device=wanted.name,
            path=str(path),
        ) from error
    return claim(record, pool_id)


def check_removable(device: Device) -> None:
    """Return if no data is left on a device; raises InUse with the number of files, DeviceFault for another disk."""
    device.check_reachable()
    left = [entry.name for folder in (FILES, JOURNAL) for entry in (device.path / folder).iterdir()]
    if left:
        raise InUse(
            f"device {device.record.name} still holds {len(left)} files of volumes",
            cause=f"for example {sorted(left)[0]} under {device.path}",
            correction="delete the volumes on it first ('blockvirt volume show' says where a volume's data lies)",
            device=device.record.name,
            files=len(left),
        )


def erase_device(device: Device) -> None:
    """Remove the label and the empty folders of a device whose record is gone, and let go of it. Raises OSError.

    An erase that was interrupted leaves a label of this pool without a record: the directory can be added again.
    """
    check_removable(device)
    for entry in (device.path / COPIES).iterdir():
        entry.unlink()
    for folder in FOLDERS:
        (device.path / folder).rmdir()
    (device.path / LABEL_FILE).unlink()
    fd = os.open(device.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    device.release()


def _directory(wanted: DeviceRecord, *, create: bool) -> Path:
    """Return the real path of the directory, symbolic links resolved: a link could lead elsewhere tomorrow."""
    given = Path(wanted.path)
    try:
        if create:
            with contextlib.suppress(FileExistsError):
                given.mkdir(mode=0o700)
        path = given.resolve(strict=True)
        next(path.iterdir(), None)
    except OSError as error:
        raise missing(given, wanted.name, error) from error
    return path


def _known_id(wanted: DeviceRecord, path: Path, pool_id: str, members: Sequence[DeviceRecord]) -> str | None:
    """Return the id that the directory is labelled with, None if it has no label; raises if it may not be added."""
    label = read_label(path)
    if label is None:
        return None
    if label.pool != pool_id:
        raise foreign(path, wanted.name, label)
    for member in members:
        if member.id != label.device:
            continue
        if Path(member.path) == path:
            raise Exists(f"{path} is device {member.name} already", correction="nothing is left to do")
        raise DeviceFault(
            f"device {wanted.name}: {path} carries the label of device {member.name}, which is at {member.path}",
            cause="the same disk is mounted in two places, or one disk is a copy of the other",
            correction="give another directory; unmount the copy",
            reason="doubly-given",
            device=wanted.name,
            path=str(path),
        )
    return label.device


def _check_nesting(wanted: DeviceRecord, path: Path, members: Sequence[DeviceRecord]) -> None:
    for member in members:
        other = Path(member.path)
        if path in other.parents or other in path.parents:
            raise DeviceFault(
                f"device {wanted.name}: {path} and device {member.name} ({other}) lie inside one another",
                correction="give a directory of its own",
                reason="nested",
                device=wanted.name,
                path=str(path),
            )


def _check_empty(wanted: DeviceRecord, path: Path) -> None:
    ours = {*FOLDERS, f"{LABEL_FILE}.new"}
    strangers = sorted(entry.name for entry in path.iterdir() if entry.name not in _NOT_OURS_BUT_HARMLESS | ours)
    strangers += [f"{folder}/{entry.name}" for folder in FOLDERS for entry in _entries(path / folder)]
    if strangers:
        raise DeviceFault(
            f"device {wanted.name}: {path} is not empty (it holds {strangers[0]!r}"
            + (f" and {len(strangers) - 1} more)" if len(strangers) > 1 else ")"),
            correction="give an empty directory, for example a new one on that disk",
            reason="not-empty",
            device=wanted.name,
            path=str(path),
        )


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
