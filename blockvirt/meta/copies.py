"""Compacted copies of the metadata on every device: the one file that maps everything must not be the only one.

A copy is called ``metadata-MILLISECONDS-CRC.mdb``: when it was made (since the epoch, 14 digits), and the CRC-32C of
its content (8 hex digits). So the newest intact one is found without reading anything else. All verbs block.
"""

import asyncio
import contextlib
import errno
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiofiles
import aiofiles.os

from blockvirt.checksum import crc32c
from blockvirt.errors import DeviceFault, MetadataFault
from blockvirt.limits import METADATA_COPIES_PER_DEVICE
from blockvirt.meta.datafile import DATA_FILE, structural_problems
from blockvirt.meta.store import Store
from blockvirt.units import MIB

FOLDERS_FILE = "metadata-copies.txt"
_NAME = re.compile(r"metadata-([0-9]{14})-([0-9a-f]{8})\.mdb", re.ASCII)
_DRAFT = "metadata.new"
_PIECE_BYTES = 1 * MIB


@dataclass(frozen=True, slots=True, order=True)
class MetadataCopy:
    """A copy by its name; nothing is said of its content. Later ones are greater."""

    created_ms: int
    crc: int
    path: Path

    @property
    def made(self) -> str:
        """When it was made, for people (UTC)."""
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.created_ms / 1000))


def write_copy(store: Store, folder: Path, now_s: float) -> MetadataCopy:
    """Put a copy of the store's last committed state into ``folder``; older ones than the newest few go.

    Durable when this returns; an interrupted one leaves the older copies as they are. Raises DeviceFault where the
    copy cannot be written, MetadataFault if the store is damaged.
    """
    draft = folder / _DRAFT
    try:
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            store.copy_compacted(fd)
            os.fsync(fd)
            crc = _crc_of(fd)
        finally:
            os.close(fd)
        older = find_copies([folder])
        # A clock that was set back must not make the new copy look older than the ones it follows.
        created_ms = max([int(now_s * 1000), *(copy.created_ms + 1 for copy in older)])
        path = folder / f"metadata-{created_ms:014d}-{crc:08x}.mdb"
        draft.rename(path)
        _sync_directory(folder)
        for copy in older[METADATA_COPIES_PER_DEVICE - 1 :]:
            copy.path.unlink()
    except BaseException as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        if not isinstance(error, OSError):
            raise
        raise DeviceFault(
            f"the metadata cannot be copied to {folder}: {error.strerror}",
            correction="check that disk's free space and health; the older copies are still there",
            reason="full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "failed",
            path=str(folder),
        ) from error
    return MetadataCopy(created_ms, crc, path)


def find_copies(folders: Iterable[Path]) -> list[MetadataCopy]:
    """Return all copies in these folders, newest first; a folder that cannot be read has none."""
    paths: list[Path] = []
    for folder in folders:
        with contextlib.suppress(OSError):
            paths += folder.iterdir()
    named = [(path, match) for path in paths if (match := _NAME.fullmatch(path.name))]
    copies = [MetadataCopy(int(match[1]), int(match[2], 16), path) for path, match in named]
    return sorted(copies, reverse=True)


def problems_of(copy: MetadataCopy) -> list[str]:
    """Read a copy whole and return what is wrong with it, in words; empty: it is intact."""
    try:
        fd = os.open(copy.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            crc = _crc_of(fd)
        finally:
            os.close(fd)
        if crc != copy.crc:
            return ["its content does not have the CRC-32C that its name says"]
        return structural_problems(copy.path)
    except OSError as error:
        return [f"it cannot be read: {error.strerror}"]


def newest_intact(folders: Iterable[Path]) -> MetadataCopy | None:
    """Return the newest copy that is intact; None if there is none."""
    return next((copy for copy in find_copies(folders) if not problems_of(copy)), None)


def restore(copy: MetadataCopy, metadata_dir: Path) -> Path | None:
    """Put ``copy`` in the place of the metadata in ``metadata_dir``; nobody may have it open.

    What was there is moved aside, never deleted; returns its new path, None if nothing was there. Raises
    MetadataFault if the copy is damaged or cannot be put there; everything is then as it was.
    """
    if problems := problems_of(copy):
        raise MetadataFault(
            f"the metadata copy {copy.path} is damaged: {problems[0]}", correction="choose another copy"
        )
    target, draft = metadata_dir / DATA_FILE, metadata_dir / f"{DATA_FILE}.new"
    aside: Path | None = None
    try:
        metadata_dir.mkdir(mode=0o700, exist_ok=True)
        _copy_file(copy.path, draft)
        if target.exists():
            aside = _free_name(metadata_dir)
            try:
                os.link(target, aside)  # so that there is metadata at every moment, the old or the copy
            except OSError:
                target.rename(aside)  # a filesystem without hard links
        draft.rename(target)
        _sync_directory(metadata_dir)
        _sync_directory(metadata_dir.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise MetadataFault(
            f"the metadata copy cannot be put into {metadata_dir}: {error.strerror}",
            correction="free space there and check the permissions, then try again",
            path=str(metadata_dir),
        ) from error
    return aside


async def remember_folders(state_dir: Path, folders: Sequence[Path]) -> None:
    """Note in the state directory where copies lie: when the metadata is lost, so are the devices' paths.

    One absolute path a line. Raises OSError.
    """
    path, draft = state_dir / FOLDERS_FILE, state_dir / f"{FOLDERS_FILE}.new"
    async with aiofiles.open(draft, "w", encoding="utf-8", errors="surrogateescape") as file:
        await file.write("".join(f"{folder}\n" for folder in folders if "\n" not in str(folder)))
        await file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())
    await aiofiles.os.replace(draft, path)
    await asyncio.to_thread(_sync_directory, state_dir)


def remembered_folders(state_dir: Path) -> list[Path]:
    """Return what ``remember_folders`` noted last; empty if it cannot be read."""
    try:
        text = (state_dir / FOLDERS_FILE).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return []
    return [Path(line) for line in text.splitlines() if line]


def naming_newest(fault: MetadataFault, folders: Iterable[Path]) -> MetadataFault:
    """Return ``fault`` with a correction that names the newest intact copy, or says that there is none."""
    copy = newest_intact(folders)
    if copy is None:
        correction = f"{fault.correction}; no intact copy was found on the devices that are mounted"
    else:
        correction = (
            f"the newest intact copy is {copy.path}, made {copy.made}: "
            "'blockvirt check --restore-metadata' puts it in place; what was mapped after it was made is not in it"
        )
    details = fault.details | {"copy": None if copy is None else str(copy.path)}
    return MetadataFault(fault.message, cause=fault.cause, correction=correction, **details)


def _crc_of(fd: int) -> int:
    crc = at = 0
    while piece := os.pread(fd, _PIECE_BYTES, at):
        crc = crc32c(piece, crc)
        at += len(piece)
    return crc


def _copy_file(source: Path, target: Path) -> None:
    with source.open("rb") as reading, target.open("wb") as writing:
        os.fchmod(writing.fileno(), 0o600)
        while piece := reading.read(_PIECE_BYTES):
            writing.write(piece)
        writing.flush()
        os.fsync(writing.fileno())


def _free_name(metadata_dir: Path) -> Path:
    number = 1
    while (path := metadata_dir / f"{DATA_FILE}.broken-{number}").exists():
        number += 1
    return path


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
