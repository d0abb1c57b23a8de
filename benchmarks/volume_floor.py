"""The volume floor of the speed report: the Python floor with what no server of volumes in an asyncio program can omit.

    python -m benchmarks.volume_floor SOCKET SIZE_BYTES FILE [SNAPSHOT]

It runs on uvloop; looks up each chunk in a map of leaves, and the file that the entry names; reads so that what is not
in the page cache would not hold up the loop; remembers of each write what a flush may take into a journal; counts and
takes the time. A chunk's first write takes the next place in FILE, and the map's changes go to a journal. With SNAPSHOT
all chunks lie in that file: what is written first in one is copied to FILE with it. Nearly all of it lies in one
function, without a call of Python in between. There is no budget and no room for other clients. What was never written
is never read, what is written first lies in one leaf, and a flush does not speak for the journal.
"""

import asyncio
import contextlib
import os
import socket
import struct
import sys
import zlib
from array import array
from collections import deque
from collections.abc import Sequence
from functools import partial
from time import perf_counter

import uvloop

from benchmarks.floor import (
    BATCH_BYTES,
    BATCH_PARTS,
    CMD_FLUSH,
    CMD_READ,
    CMD_WRITE,
    DATA_CHUNK,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Connection,
    Flushes,
    negotiate,
    send,
)

CHUNK_SHIFT, LEAF_SHIFT, FILE_SHIFT = 14, 9, 28
CHUNK_MASK, LEAF_MASK = (1 << FILE_SHIFT) - 1, (1 << LEAF_SHIFT) - 1
CHUNK_BYTES = 1 << CHUNK_SHIFT
SNAPSHOT_ENTRY, UNMAPPED = 1 << FILE_SHIFT, 2 << FILE_SHIFT
CHANGE = struct.Struct("<IIQ")
NOTED_BYTES, NOTED_WRITES = 32 << 10, 16
JOURNAL_BYTES = 16 << 20


class Leaf:
    """The entries of 512 chunks."""

    __slots__ = ("entries", "touched")

    def __init__(self, number: int, *, snapshotted: bool) -> None:
        first = SNAPSHOT_ENTRY | number << LEAF_SHIFT
        chunks = range(first, first + (1 << LEAF_SHIFT)) if snapshotted else [UNMAPPED] * (1 << LEAF_SHIFT)
        self.entries = array("Q", chunks)
        self.touched = False


class File:
    """A backing file, and what was written to it since the last flush."""

    __slots__ = ("changes", "fd", "noted_bytes", "unsynced_bytes")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.unsynced_bytes = self.noted_bytes = 0
        self.changes: deque[tuple[int, bytes | None]] = deque(maxlen=NOTED_WRITES + 1)


class Volume:
    """The map of all chunks, and where new ones and the map's changes go."""

    def __init__(self, fds: Sequence[int], journal: int, size_bytes: int) -> None:
        leaves = range((size_bytes >> CHUNK_SHIFT >> LEAF_SHIFT) + 1)
        self.leaves = {number: Leaf(number, snapshotted=len(fds) > 1) for number in leaves}
        self.files = {number: File(fd) for number, fd in enumerate(fds)}
        self.files[UNMAPPED >> FILE_SHIFT] = self.files[0]
        self.used_chunks = 0
        self._journal = journal
        self._journal_bytes = 0

    def append(self, changes: bytes) -> None:
        """Journal changes of the map."""
        frame = changes + zlib.crc32(changes).to_bytes(8, "little")
        self._journal_bytes += os.pwrite(self._journal, frame, self._journal_bytes)


class VolumeConnection(Connection):
    """Requests go through the map; one that touches several chunks finds them side by side, but for a snapshot's."""

    def __init__(self, sock: socket.socket, fd: int, volume: Volume, size_bytes: int, flushes: Flushes) -> None:
        super().__init__(sock, fd, size_bytes, flushes)
        self._volume = volume
        self._leaves, self._files = volume.leaves, volume.files
        self._failure: OSError | None = None
        self.reads = self.writes = self.bytes_read = self.bytes_written = 0
        self.busy_s = 0.0

    def _batch(self) -> bool:
        view, arena, low, high, used = self._view, self._arena, self._low, self._high, 0
        leaves, files = self._leaves, self._files
        out: list[bytes | memoryview] = []
        changed: list[bytes] = []
        known, began_s = True, perf_counter()
        while high - low >= REQUEST.size and used < BATCH_BYTES and len(out) < BATCH_PARTS:
            magic, _, command, cookie, offset, length = REQUEST.unpack_from(view, low)
            known = magic == REQUEST_MAGIC and offset + length <= self._size
            if not known:
                break
            chunk = offset >> CHUNK_SHIFT
            leaf = leaves[chunk >> LEAF_SHIFT]
            entry = leaf.entries[chunk & LEAF_MASK]
            leaf.touched = True
            file = files[entry >> FILE_SHIFT]
            position = ((entry & CHUNK_MASK) << CHUNK_SHIFT) + (offset & (CHUNK_BYTES - 1))
            if self._failure is not None:
                raise self._failure
            if command == CMD_READ:
                into = arena[used : used + length]
                try:
                    cached = os.preadv(file.fd, (into,), position, os.RWF_NOWAIT) == length
                except BlockingIOError:
                    cached = False
                if not cached:
                    os.preadv(file.fd, (into,), position)
                out.append(DATA_CHUNK.pack(STRUCTURED_REPLY_MAGIC, 1, 1, cookie, length + 8, offset))
                out.append(into)
                used += length
                self.reads += 1
                self.bytes_read += length
            elif command == CMD_WRITE:
                if high - low < REQUEST.size + length:
                    break
                data = view[low + REQUEST.size : low + REQUEST.size + length]
                if entry >= SNAPSHOT_ENTRY:
                    first, slot, within = self._volume.used_chunks, chunk & LEAF_MASK, offset & (CHUNK_BYTES - 1)
                    end = first + ((within + length - 1) >> CHUNK_SHIFT) + 1
                    if entry < UNMAPPED:
                        data, within = self._copied(file, position, data), 0
                    file, position, self._volume.used_chunks = files[0], (first << CHUNK_SHIFT) + within, end
                    leaf.entries[slot : slot + end - first] = array("Q", range(first, end))
                    changed.append(CHANGE.pack(chunk, end - first, first))
                os.pwrite(file.fd, data, position)
                written = None
                if file.noted_bytes + len(data) <= NOTED_BYTES:
                    file.noted_bytes += len(data)
                    written = bytes(data)
                file.changes.append((position, written))
                file.unsynced_bytes += len(data)
                out.append(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie))
                low += length
                self.writes += 1
                self.bytes_written += length
            elif command == CMD_FLUSH:
                file.unsynced_bytes = file.noted_bytes = 0
                file.changes.clear()
                self._flushes.asked.put((self, cookie))
            else:
                known = False
                break
            low += REQUEST.size
        self._low = low
        if changed:
            self._volume.append(b"".join(changed))
        if out:
            send(self._sock, out)
        self.busy_s += perf_counter() - began_s
        return known

    def _copied(self, file: File, position: int, data: memoryview) -> memoryview:
        content, within = bytearray(CHUNK_BYTES), position & (CHUNK_BYTES - 1)
        try:
            cached = os.preadv(file.fd, (content,), position - within, os.RWF_NOWAIT) == CHUNK_BYTES
        except BlockingIOError:
            cached = False
        if not cached:
            os.preadv(file.fd, (content,), position - within)
        content[within : within + len(data)] = data
        return memoryview(content)


async def serve(path: str, size_bytes: int, images: Sequence[str]) -> None:
    """Serve until killed."""
    fds = [os.open(image, os.O_RDWR) for image in images]
    journal = os.open(f"{images[0]}.journal", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.posix_fallocate(journal, 0, JOURNAL_BYTES)
    os.unlink(f"{images[0]}.journal")
    volume, flushes = Volume(fds, journal, size_bytes), Flushes(fds[0])
    loop = asyncio.get_running_loop()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)

    def ready(connection: VolumeConnection, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            try:
                if connection.serve():
                    return
            except BlockingIOError:  # nothing was there after all
                return
        loop.remove_reader(sock.fileno())
        connection.close()

    def accept() -> None:
        sock, _ = listener.accept()
        with contextlib.suppress(OSError):
            if negotiate(sock, size_bytes):
                connection = VolumeConnection(sock, fds[0], volume, size_bytes, flushes)
                loop.add_reader(sock.fileno(), partial(ready, connection, sock))

    loop.add_reader(listener.fileno(), accept)
    loop.add_reader(flushes.bell, flushes.answer)
    await loop.create_future()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
