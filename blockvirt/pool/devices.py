"""Devices: directories on disks, given to the pool. Recognised by their label, locked, and never written to when wrong.

A device's directory holds ``blockvirt-device.json`` (the label), ``files/`` (backing files), ``journal/`` and
``metadata/`` (copies of the metadata). All verbs block for a few syscalls; those that write also sync.
"""

import errno
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from blockvirt.errors import BlockvirtError, DeviceFault
from blockvirt.meta.records import DeviceRecord
from blockvirt.pool.identity import PageCacheIdentity, identity_of
from blockvirt.pool.labels import LABEL_FILE, DeviceLabel, read_label
from blockvirt.pool.lock import Lock, lock_device
from blockvirt.pool.mounts import mount_of

log = logging.getLogger("blockvirt.pool")
FILES, JOURNAL, COPIES = "files", "journal", "metadata"
FOLDERS = (FILES, JOURNAL, COPIES)
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_WARNINGS = {
    "btrfs": "copies on write: once it is full, overwriting allocated chunks may fail as well; prefer XFS or ext4",
    "bcachefs": "copies on write: once it is full, overwriting allocated chunks may fail as well; prefer XFS or ext4",
    "zfs": "copies on write: once it is full, overwriting allocated chunks may fail as well; prefer XFS or ext4",
    "tmpfs": "lives in memory: everything on it is gone after a reboot",
    "overlay": "a container's layer: put volumes on a mounted disk",
    "nfs": "is remote: its server decides what a sync means; put volumes on a local disk",
    "nfs4": "is remote: its server decides what a sync means; put volumes on a local disk",
}


@dataclass(frozen=True, slots=True)
class FilesystemSpace:
    """What statvfs says of the filesystem a device is on, in bytes."""

    filesystem: int
    """``st_dev``: devices with the same number share the space."""
    total_bytes: int
    free_bytes: int
    """What an unprivileged process may still allocate."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device that was verified and is locked for this process."""

    record: DeviceRecord
    path: Path
    identity: PageCacheIdentity
    inode: int
    """Of the directory; with ``identity.filesystem`` it says which directory this is."""
    warnings: tuple[str, ...]
    lock: Lock

    def check_reachable(self) -> None:
        """Raise DeviceFault if the path leads elsewhere by now: the disk was unmounted, or another mounted over it."""
        try:
            facts = self.path.stat()
        except OSError as error:
            raise missing(self.path, self.record.name, error) from error
        if (facts.st_dev, facts.st_ino) != (self.identity.filesystem, self.inode):
            raise DeviceFault(
                f"device {self.record.name}: {self.path} now leads to another filesystem than the one in use",
                correction="mount the device's disk there again, then restart the daemon",
                reason="moved",
                device=self.record.name,
                path=str(self.path),
            )

    def space(self) -> FilesystemSpace:
        """Return the filesystem's space now; raises DeviceFault, also where the path leads elsewhere by now."""
        self.check_reachable()
        return space_at(self.path, self.record.name)

    def release(self) -> None:
        """Let go of the device's lock. Idempotent."""
        self.lock.release()


@dataclass(frozen=True, slots=True)
class DeviceProblem:
    """A device of the pool that cannot be used now, and why."""

    record: DeviceRecord
    fault: BlockvirtError


def claim(record: DeviceRecord, pool_id: str) -> Device:
    """Verify and lock a device of the pool; raises DeviceFault or PoolLocked. Writes nothing to a wrong one.

    ``details["reason"]`` of a DeviceFault is one of: missing, unlabelled, damaged-label, newer-format, foreign,
    read-only, failed.
    """
    path = Path(record.path)
    try:
        inode = path.stat().st_ino
        is_directory = path.is_dir()
    except OSError as error:
        raise missing(path, record.name, error) from error
    if not is_directory:
        raise missing(path, record.name, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    _check_label(read_label(path), record, pool_id, path)
    warnings = check_mount(path, record.name)
    lock = lock_device(path)
    try:
        check_writable(path, record.name, full_is_wrong=False)
        for folder in FOLDERS:
            if not (path / folder).is_dir():
                raise DeviceFault(
                    f"device {record.name}: the folder {path / folder} is missing",
                    correction="restore the device from a backup, or remove it from the pool if it held no data",
                    reason="damaged",
                    device=record.name,
                    path=str(path),
                )
        return Device(record, path, identity_of(path), inode, warnings, lock)
    except BaseException:
        lock.release()
        raise


def claim_all(records: Iterable[DeviceRecord], pool_id: str) -> tuple[list[Device], list[DeviceProblem]]:
    """Claim each device by itself: one that is wrong keeps none of the others from being used."""
    devices: list[Device] = []
    problems: list[DeviceProblem] = []
    for record in records:
        try:
            device = claim(record, pool_id)
        except BlockvirtError as fault:
            log.error("device %s is not usable: %s (%s)", record.name, fault.message, fault.correction)
            problems.append(DeviceProblem(record, fault))
            continue
        for warning in device.warnings:
            log.warning("device %s: %s", record.name, warning)
        devices.append(device)
    return devices, problems


def space_at(path: Path, name: str) -> FilesystemSpace:
    """Return the space of the filesystem that ``path`` is on; raises DeviceFault for the device called ``name``."""
    try:
        facts, filesystem = os.statvfs(path), path.stat().st_dev
    except OSError as error:
        raise missing(path, name, error) from error
    return FilesystemSpace(filesystem, facts.f_blocks * facts.f_frsize, facts.f_bavail * facts.f_frsize)


def check_mount(path: Path, name: str) -> tuple[str, ...]:
    """Return what an administrator should know of the filesystem; raises DeviceFault where it cannot be reached."""
    try:
        mount = mount_of(path)
    except OSError as error:
        raise missing(path, name, error) from error
    if mount.fs_type not in _WARNINGS:
        return ()
    return (f"the filesystem of {path} ({mount.fs_type}) {_WARNINGS[mount.fs_type]}",)


def check_writable(path: Path, name: str, *, full_is_wrong: bool) -> None:
    """Really create a file, because root ignores modes and a bind mount may be read-only; raises DeviceFault."""
    try:
        try:
            os.close(os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
            probe = path / f".blockvirt-probe-{os.getpid()}"
            os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            probe.unlink()
    except OSError as error:
        if error.errno in _FULL and not full_is_wrong:
            return
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise _read_only(path, name) from error
        raise DeviceFault(
            f"device {name}: no file can be created in {path}: {error.strerror}",
            correction="free space on that disk" if error.errno in _FULL else "check the disk's health",
            reason="full" if error.errno in _FULL else "failed",
            device=name,
            path=str(path),
        ) from error


def missing(path: Path, name: str, error: OSError) -> DeviceFault:
    """Return the fault of a directory that is not there or cannot be reached."""
    return DeviceFault(
        f"device {name}: the directory {path} cannot be reached: {error.strerror}",
        correction="mount its disk, or check the disk's health",
        reason="missing" if isinstance(error, FileNotFoundError | NotADirectoryError) else "failed",
        device=name,
        path=str(path),
    )


def _read_only(path: Path, name: str) -> DeviceFault:
    """Return the fault of a directory in which nothing can be written."""
    return DeviceFault(
        f"device {name}: {path} is read-only",
        correction="mount its disk read-write (check the kernel log for errors first), and let the daemon's user write",
        reason="read-only",
        device=name,
        path=str(path),
    )


def foreign(path: Path, name: str, label: DeviceLabel) -> DeviceFault:
    """Return the fault of a directory that another pool owns."""
    return DeviceFault(
        f"device {name}: {path} belongs to another pool ({label.pool})",
        correction=f"mount the right disk there; to give it up for this pool, erase it first (remove {LABEL_FILE})",
        reason="foreign",
        device=name,
        path=str(path),
        pool=label.pool,
    )


def _check_label(label: DeviceLabel | None, record: DeviceRecord, pool_id: str, path: Path) -> None:
    """Return if ``label`` is the one of ``record``; raises DeviceFault that says what it is instead."""
    if label is None:
        raise DeviceFault(
            f"device {record.name}: {path} has no label ({LABEL_FILE}): is the disk mounted?",
            cause=f"it lies on the filesystem mounted at {mount_of(path).point}",
            correction="mount the device's disk there and restart the daemon",
            reason="unlabelled",
            device=record.name,
            path=str(path),
        )
    if label.pool != pool_id:
        raise foreign(path, record.name, label)
    if label.device != record.id:
        raise DeviceFault(
            f"device {record.name}: {path} holds another device of this pool ({label.device})",
            cause="two disks were mounted in each other's place, or one disk in two places",
            correction="mount each disk where it belongs ('blockvirt device list' shows the paths)",
            reason="foreign",
            device=record.name,
            path=str(path),
        )
