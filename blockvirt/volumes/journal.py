"""The write-ahead journal of one open volume: a pair of preallocated files, used in turn, generation after generation.

Each file: block 0 the header (whose journal it is, and the page cache it was written through), block 1 the stop note,
frames from 8 KiB on (``journal_frames``). Generation g lies in file g mod 2. Written by ``pwrite``, never mapped: a
store into a mapped file of a failed filesystem is a SIGBUS or silence, ``pwrite`` says EIO.
"""

import errno
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from blockvirt.errors import DamagedRecord, DeviceFault
from blockvirt.limits import JOURNAL_FILE_BYTES
from blockvirt.meta.records import BranchRecord, seal, unseal
from blockvirt.pool.backing import sync_directory, unlink_files
from blockvirt.units import KIB
from blockvirt.volumes.journal_frames import (
    CHANGE,
    MARK_FRAME_BYTES,
    Kind,
    data_frame_bytes,
    first_generation,
    frame_bytes,
    pack,
    pack_data,
    pack_mark,
)

BLOCK_BYTES = 4096
FRAMES_AT_BYTES = 2 * BLOCK_BYTES
FORMAT = 1
FILE_SIZES_BYTES = (64 * KIB, 256 * KIB, JOURNAL_FILE_BYTES)
"""The usual size is the last; the others are for full disks."""
_MARK_ROOM_BYTES = 64 * MARK_FRAME_BYTES  # kept free for marks: a flush must not wait for room that maps used up
_NO_CHANGE_BYTES = _MARK_ROOM_BYTES + frame_bytes(0)  # of what is free, not for changes


def smallest_file_bytes(changes: int) -> int:
    """Return the smallest size of journal that takes so many map changes in one frame."""
    needed = FRAMES_AT_BYTES + frame_bytes(changes) + _MARK_ROOM_BYTES
    return next(size for size in FILE_SIZES_BYTES if size >= needed)


@dataclass(frozen=True, slots=True)
class JournalHeader:
    """Whose journal a file is."""

    pool_id: str
    branch: int
    identities: dict[str, str] = field(default_factory=dict)
    """Device id -> identity of its page cache when the journal was made."""
    format_version: int = FORMAT


def journal_paths(device_path: Path, branch: int) -> tuple[Path, Path]:
    """Return where the two files of a branch's journal lie on a device."""
    folder = device_path / "journal"
    return folder / f"{branch:08x}.0", folder / f"{branch:08x}.1"


def pack_header(header: JournalHeader) -> bytes:
    """Return the header block."""
    body = json.dumps(asdict(header), separators=(",", ":"), sort_keys=True).encode()
    sealed = seal(b"journal", body)
    assert len(sealed) <= BLOCK_BYTES - 4
    return (len(sealed).to_bytes(4, "little") + sealed).ljust(BLOCK_BYTES, b"\0")


def unpack_header(block: bytes) -> JournalHeader:
    """Read a header block; raises DamagedRecord where it is none."""
    length = int.from_bytes(block[:4], "little")
    if not 4 < length <= BLOCK_BYTES - 4:
        raise DamagedRecord("a journal file has no header", correction="run 'blockvirt check'")
    body = unseal(b"journal", block[4 : 4 + length], what="a journal header")
    try:
        header = JournalHeader(**json.loads(body))
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedRecord(
            "the header of a journal file cannot be understood", cause=str(error), correction="run 'blockvirt check'"
        ) from error
    if header.format_version != FORMAT:
        raise DamagedRecord(
            f"a journal file has format {header.format_version}; this blockvirt reads {FORMAT}",
            cause="another version of blockvirt wrote it, and ended without closing the volume",
            correction="open the volume once with that version",
        )
    return header


class Journal:
    """The running journal of an open volume. Used on the event loop alone, but for ``sync`` and the constructors."""

    def __init__(
        self,
        paths: tuple[Path, Path],
        fds: tuple[int, int],
        header: JournalHeader,
        branch: BranchRecord,
        file_bytes: int = JOURNAL_FILE_BYTES,
    ) -> None:
        self.paths = paths
        self.header = header
        self.generation = branch.covered_generation + 1
        self.sequence = branch.covered_sequence
        """Number of the last frame."""
        self.chain = branch.journal_chain
        self.map_sequence = branch.covered_sequence
        """Number of the last frame with map changes."""
        self.durable_sequence = branch.covered_sequence
        """Map changes up to this frame survive power loss: by a durable mark, or by a checkpoint."""
        self.holds_data = False
        """There are DATA frames that no mark and no checkpoint has made void: a sync of the files is not enough."""
        self.appended_bytes = 0
        self._fds = fds
        self._file_bytes = file_bytes
        self._at = FRAMES_AT_BYTES
        self._may_switch = True

    @classmethod
    def create(
        cls, device_path: Path, header: JournalHeader, branch: BranchRecord, file_bytes: int = JOURNAL_FILE_BYTES
    ) -> "Journal":
        """Make the pair: written, not just reserved, so that an append allocates nothing. Blocks (two syncs).

        A header is written when the other file durably has its whole size: so one that is shorter was cut.
        ``file_bytes`` is one of FILE_SIZES_BYTES.
        """
        assert file_bytes in FILE_SIZES_BYTES
        paths = journal_paths(device_path, branch.number)
        block = pack_header(header)
        fds: list[int] = []
        try:
            for path in paths:
                if path.exists():  # it could not be removed; emptied instead, it would look cut beside the other
                    path.unlink()
            for path in paths:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                fds.append(fd)
            for fd, content in ((fds[1], bytes(file_bytes)), (fds[0], block.ljust(file_bytes, b"\0"))):
                _write_whole(fd, content)
                os.fdatasync(fd)
            _write_whole(fds[1], block)  # durable with its first frame; until then the other one's is enough
            sync_directory(paths[0].parent)
        except OSError:
            # All of it, whatever becomes of one; the error that is told is the first.
            with suppress(OSError), ExitStack() as undoing:
                undoing.callback(unlink_files, paths)
                for fd in fds:
                    undoing.callback(os.close, fd)
            raise
        return cls(paths, (fds[0], fds[1]), header, branch, file_bytes)

    def room(self) -> int:
        """Return how many map changes one more frame may hold."""
        free = self._file_bytes - _NO_CHANGE_BYTES - self._at
        return free // CHANGE.size if free > 0 else 0

    def half_full(self) -> bool:
        """Tell whether it is time for a checkpoint."""
        return self._at > self._file_bytes // 2

    def fill_ratio(self) -> float:
        """Return how full the running generation's file is, 0 to 1."""
        return (self._at - FRAMES_AT_BYTES) / (self._file_bytes - FRAMES_AT_BYTES)

    def needs_mark(self) -> bool:
        """Tell whether there are map changes that no durable mark or checkpoint covers."""
        return self.map_sequence > self.durable_sequence

    def append(self, changes: bytes) -> None:
        """Append one frame of packed map changes; they survive SIGKILL from now on. Raises OSError."""
        frame, crc = pack(Kind.MAP, self.generation, self.sequence + 1, changes, self.chain)
        self._write(frame, crc)
        self.map_sequence = self.sequence

    def mark(self, upto: int) -> bool:
        """Append a mark for the frames up to ``upto``; False where there is no room (a checkpoint must come first)."""
        if self._at + MARK_FRAME_BYTES > self._file_bytes:
            return False
        self._write(*pack_mark(self.generation, self.sequence + 1, upto, self.chain))
        return True

    def embed(self, upto: int, parts: Sequence[tuple[int, int, bytes]]) -> bool:
        """Append a mark for the frames up to ``upto`` that brings its data along; False where there is no room.

        There is none in the small journals of full disks: map changes need it, the largest of them nearly all.

        ``parts`` are (file, position, bytes). Raises OSError.
        """
        needed = data_frame_bytes(len(parts), sum(len(data) for _, _, data in parts))
        if self._file_bytes < JOURNAL_FILE_BYTES or self._at + needed > self._file_bytes - _MARK_ROOM_BYTES:
            return False
        self._write(*pack_data(self.generation, self.sequence + 1, upto, parts, self.chain))
        self.holds_data = True
        return True

    def _write(self, frame: bytes, crc: int) -> None:
        assert self._at + len(frame) <= self._file_bytes
        written = os.pwrite(self._fds[self.generation & 1], frame, self._at)
        if written != len(frame):
            raise OSError(errno.EIO, f"short write to {self.paths[self.generation & 1]}")
        self._at += len(frame)
        self.sequence += 1
        self.chain = crc
        self.appended_bytes += len(frame)

    def sync(self) -> None:
        """Make the running generation's frames durable. Blocks. Never retried after a failure (I7)."""
        os.fdatasync(self._fds[self.generation & 1])

    def switch(self) -> None:
        """Open the next generation: frames go to the other file from now on. Its old content must be covered."""
        assert self._may_switch, "the generation before the last is not covered yet"
        self._may_switch = False
        self.generation += 1
        self._at = FRAMES_AT_BYTES

    def covered(self, sequence: int) -> None:
        """Note that a committed checkpoint holds every frame up to ``sequence`` and the generation before this one."""
        self.durable_sequence = max(self.durable_sequence, sequence)
        self.holds_data = False  # no flush comes between a freeze and its commit: all of them lie in what is covered
        self._may_switch = True

    def admit_device(self, device_id: str, identity: str) -> None:
        """Write a further device's page-cache identity into the headers, before a file on it is used. Blocks."""
        header = JournalHeader(self.header.pool_id, self.header.branch, self.header.identities | {device_id: identity})
        block = pack_header(header)
        for fd in self._fds:
            if os.pwrite(fd, block, 0) != len(block):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            os.fdatasync(fd)
        self.header = header

    def note_stop(self, reason: str) -> None:
        """Leave word that the volume stopped for I7: recovery must trust nothing but durable marks."""
        for fd in self._fds:
            os.pwrite(fd, _stop_note(reason), BLOCK_BYTES)

    def close(self, *, remove: bool) -> None:
        """Close the files; ``remove`` them where a checkpoint covers everything. Blocks. Raises OSError."""
        with ExitStack() as closing:  # both, whatever becomes of one
            for fd in self._fds:
                closing.callback(os.close, fd)
        if remove:
            unlink_files(self.paths)


def _write_whole(fd: int, content: bytes) -> None:
    if os.pwrite(fd, content, 0) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass(frozen=True, slots=True)
class FoundJournal:
    """A journal pair that was left behind, as recovery finds it."""

    paths: tuple[Path, Path]
    device_id: str
    header: JournalHeader
    stop_reason: str
    """Empty where the volume had not stopped."""
    logs: tuple[bytes, bytes]
    """What lies behind the headers, by generation mod 2."""


def read_journal(device_path: Path, device_id: str, branch: int) -> FoundJournal | None:
    """Read a pair that was left behind; None where there is no whole pair (it was being made or removed)."""
    paths = journal_paths(device_path, branch)
    contents = []
    for path in paths:
        try:
            contents.append(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DeviceFault(
                f"cannot read the journal {path}: {error.strerror}", correction="check the disk"
            ) from error
    sizes = {len(content) for content in contents}
    if len(sizes) > 1 or sizes.pop() not in FILE_SIZES_BYTES or not any(any(each[:BLOCK_BYTES]) for each in contents):
        return None
    logs = (contents[0][FRAMES_AT_BYTES:], contents[1][FRAMES_AT_BYTES:])
    stops = [_stop_reason(content[BLOCK_BYTES:FRAMES_AT_BYTES]) for content in contents]
    return FoundJournal(paths, device_id, _either_header(contents), stops[0] or stops[1], logs)


def refuse_to_drop(device_path: Path, branch: BranchRecord) -> None:
    """Raise DamagedRecord if what is left of a pair holds changes that no checkpoint covers; return if it may go.

    Half a pair is left where it was being made or removed: then it holds no frame, or covered ones alone. And one file
    of it is missing, or the longer one has no header yet.
    """
    found: list[tuple[int, bool, Path]] = []  # size, whether it has a header
    with_changes: list[Path] = []
    for path in journal_paths(device_path, branch.number):
        try:
            with path.open("rb") as file:
                found.append((os.fstat(file.fileno()).st_size, any(file.read(BLOCK_BYTES)), path))
                file.seek(FRAMES_AT_BYTES)
                if first_generation(file.read(frame_bytes(0))) > branch.covered_generation:
                    with_changes.append(path)
        except FileNotFoundError:
            continue
    shorter, longer = min(found, default=None), max(found, default=None)
    if shorter and longer and shorter[0] < longer[0] and longer[1]:
        with_changes.append(longer[2])
    if with_changes:
        raise DamagedRecord(
            f"the journal {with_changes[0]} holds changes, and its other half or a part of it is missing",
            cause="it was removed or cut short from outside",
            correction="bring both files back; or move what is left away: what was written last is lost then",
        )


def _either_header(contents: list[bytes]) -> JournalHeader:
    # The two are rewritten one after the other with a sync between: at least one is whole, or the disk damaged both.
    try:
        return unpack_header(contents[0][:BLOCK_BYTES])
    except DamagedRecord:
        return unpack_header(contents[1][:BLOCK_BYTES])


def leave_stop_note(paths: tuple[Path, Path], reason: str) -> None:
    """As ``Journal.note_stop``, in a pair that was left behind. Blocks; raises OSError."""
    for path in paths:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.pwrite(fd, _stop_note(reason), BLOCK_BYTES)
        finally:
            os.close(fd)


def _stop_note(reason: str) -> bytes:
    return b"STOPPED " + reason.encode()[:512] + b"\0"


def _stop_reason(block: bytes) -> str:
    note, _, reason = block.partition(b"\0")[0].partition(b" ")
    return reason.decode(errors="replace") if note == b"STOPPED" else ""  # anything else is no word of ours
