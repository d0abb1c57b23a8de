"""A block device whose every write is logged, and the states that a crash may leave of it.

QEMU's storage daemon exports a file over FUSE and logs what is written (blklogwrites, in the format of dm-log-writes);
a loop device makes a block device of it. ``BlockLog`` reads that log: a crash keeps what was flushed, and of what came
after the last flush any part, in pieces of 4 KiB, which disks write whole.
"""

import os
import random
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from blockvirt.syscalls import punch_hole
from tests.attacks.power_cuts_disk import loop_device

_SUPER = struct.Struct("<QQQI")
_MAGIC = 0x6A736677736872
_ENTRY = struct.Struct("<QQQQ")
_FLUSH, _FUA, _DISCARD = 1, 2, 4
_LOG_SECTOR_BYTES = 512
ATOMIC_BYTES = 4096
_EXPORT_S = 10.0
_LOOK_S = 0.002


@dataclass(frozen=True, slots=True)
class Entry:
    """One request to the device: a write of ``length`` bytes, a discard, or a flush of everything before it."""

    at: int
    length: int
    flags: int
    payload_at: int
    """Where its bytes lie in the log."""

    @property
    def is_flush(self) -> bool:
        """Everything before it is durable from now on."""
        return bool(self.flags & _FLUSH)

    @property
    def is_durable(self) -> bool:
        """It is durable by itself as soon as it is answered."""
        return bool(self.flags & _FUA)


class Recorder:
    """A block device that is being logged."""

    def __init__(self, device: str, log: Path) -> None:
        self.device = device
        self._fd = os.open(log, os.O_RDONLY | os.O_CLOEXEC)

    def durable(self) -> int:
        """Return how many entries are durable by now: the log counts them anew with each flush."""
        return int(_SUPER.unpack(os.pread(self._fd, _SUPER.size, 0))[2])

    def close(self) -> None:
        """Let go of the log."""
        os.close(self._fd)


@contextmanager
def recorded(image: Path, log: Path, scratch: Path) -> Iterator[Recorder]:
    """Have a block device over ``image`` whose writes go to ``log`` too."""
    export, pid_file = scratch / "export", scratch / "qsd.pid"
    for path in (export, log):
        path.write_bytes(b"")
    with log.open("r+b") as file:
        file.truncate(3 << 30)
    pid_file.unlink(missing_ok=True)
    command = [
        *("setpriv", "--pdeathsig", "TERM", "qemu-storage-daemon"),  # it must not outlive a process that is killed
        *("--blockdev", f"file,node-name=d0,filename={image},discard=unmap,locking=off"),
        *("--blockdev", f"file,node-name=l0,filename={log},locking=off"),
        "--blockdev",
        '{"driver":"blklogwrites","node-name":"lw","file":"d0","log":"l0","log-sector-size":512}',
        *("--export", f"type=fuse,id=e0,node-name=lw,mountpoint={export},writable=on"),
        *("--pidfile", str(pid_file)),
    ]
    with ExitStack() as stack:
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        stack.callback(daemon.wait)
        stack.callback(daemon.terminate)
        deadline_s = time.monotonic() + _EXPORT_S
        while not pid_file.exists():  # it writes that once it exports
            if daemon.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"qemu-storage-daemon does not export {image}")
            time.sleep(_LOOK_S)
        recorder = Recorder(stack.enter_context(loop_device(export)), log)
        stack.callback(recorder.close)
        yield recorder


class BlockLog:
    """A log that was recorded."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.entries = list(self._read())

    def _read(self) -> Iterator[Entry]:
        magic, _, count, sector_bytes = _SUPER.unpack(os.pread(self._fd, _SUPER.size, 0))
        if magic != _MAGIC or sector_bytes != _LOG_SECTOR_BYTES:
            raise ValueError(f"no log of writes: magic {magic:#x}, sectors of {sector_bytes} bytes")
        at = sector_bytes
        for _ in range(count):
            sector, sectors, flags, _ = _ENTRY.unpack(os.pread(self._fd, _ENTRY.size, at))
            length = sectors * sector_bytes
            yield Entry(sector * sector_bytes, length, flags, at + sector_bytes)
            at += sector_bytes + (0 if flags & _DISCARD else length)

    def apply(self, entry: Entry, image: int, pieces: Sequence[tuple[int, int]] | None = None) -> None:
        """Do what an entry says to the file ``image``; of a write only ``pieces`` (offset, length) where given."""
        if entry.flags & _DISCARD:
            if entry.length:
                punch_hole(image, entry.at, entry.length)
            return
        for offset, length in pieces if pieces is not None else [(0, entry.length)]:
            done = 0
            while done < length:
                os.lseek(image, entry.at + offset + done, os.SEEK_SET)
                os.lseek(self._fd, entry.payload_at + offset + done, os.SEEK_SET)
                done += os.sendfile(image, self._fd, None, length - done)

    def unflushed(self, end: int) -> int:
        """Return the first of the entries before ``end`` that no flush among them covers."""
        for index in range(end, 0, -1):
            if self.entries[index - 1].is_flush:
                return index
        return 0

    def close(self) -> None:
        """Let go of the log."""
        os.close(self._fd)


def survivors(entries: Sequence[Entry], dice: random.Random) -> list[Sequence[tuple[int, int]]]:
    """Choose which pieces of unflushed writes a crash leaves: any of them, in pieces that disks write whole."""
    how = dice.choice(("half", "half", "lose one", "keep one", "tear"))
    picked = dice.randrange(len(entries)) if entries else 0
    kept: list[Sequence[tuple[int, int]]] = []
    for index, entry in enumerate(entries):
        pieces = list(_pieces(entry))
        if entry.is_durable:
            keep = 1.0
        elif how == "half":
            keep = float(dice.random() < 0.5)
        elif how == "lose one":
            keep = float(index != picked)
        elif how == "keep one":
            keep = float(index == picked)
        else:
            keep = 0.5
        kept.append([piece for piece in pieces if keep == 1.0 or dice.random() < keep])
    return kept


def _pieces(entry: Entry) -> Iterator[tuple[int, int]]:
    offset = 0
    while offset < entry.length:
        end = min(entry.length, ((entry.at + offset) // ATOMIC_BYTES + 1) * ATOMIC_BYTES - entry.at)
        yield offset, end - offset
        offset = end
