"""Export: a snapshot as a stream of bytes, whole or as its differences from another one (``docs/stream-format.md``).

What differs is counted first, so that the stream can say how much is to come; then its leaves are looked at a few at a
time, and its chunks read, compared with their checksums and compressed a piece at a time, one piece ahead of whoever
takes the bytes. Nothing grows with the size of the volume but the list of its changed leaves, 8 bytes for each.
"""

import asyncio
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from blockvirt.device import read_one
from blockvirt.errors import DeviceFault, InvalidRequest, InvalidSize, NotFound
from blockvirt.ids import new_id
from blockvirt.limits import STREAM_BATCH_LEAVES, STREAM_MAX_DATA_BYTES
from blockvirt.lun.address import ADDRESS_MASK
from blockvirt.lun.leaf import SLOT_BITS
from blockvirt.meta.keys import Table
from blockvirt.meta.records import SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Reader
from blockvirt.snapshots.catalogue import Snapshots
from blockvirt.snapshots.changes import Chain, Point, chain_of, changed_leaves
from blockvirt.snapshots.diff import compare
from blockvirt.snapshots.reader import SnapshotHandle
from blockvirt.snapshots.readers import SnapshotReaders
from blockvirt.snapshots.stream_format import StreamBase, StreamEncoder, StreamHeader, StreamSnapshot
from blockvirt.tasks import TaskSet
from blockvirt.volumes.checksums import check_content, find_checksum
from blockvirt.volumes.engine import Engine
from blockvirt.volumes.versions import planes_through


@dataclass(frozen=True, slots=True)
class _Range:
    """Bytes that differ, within the snapshot's size and alike in whether they read as zeros."""

    offset_bytes: int
    length_bytes: int
    zero: bool


@dataclass(frozen=True, slots=True)
class _Content:
    """What was read of a range: whole chunks, of which ``length_bytes`` are to be sent."""

    offset_bytes: int
    length_bytes: int
    content: bytearray
    entries: tuple[int, ...]
    """Where its chunks lay when they were read."""


@dataclass(frozen=True, slots=True)
class _Survey:
    """Between which points the stream lies, and what it will cover."""

    old: Chain
    new: Chain
    leaves: "array[int]"
    changed_bytes: int


class SnapshotExports:
    """Begins exports. One per process; call it on the event loop."""

    def __init__(self, engine: Engine, snapshots: Snapshots, readers: SnapshotReaders) -> None:
        self._engine = engine
        self._snapshots = snapshots
        self._readers = readers
        self._tasks = TaskSet("exports")

    @asynccontextmanager
    async def export(self, name_or_id: str, since: str | None = None) -> "AsyncIterator[SnapshotExport]":
        """Have a snapshot ('VOLUME@NAME' or its id) exported inside the context: whole, or what differs from ``since``.

        Both count as read meanwhile, so that they are only deleted by force. Raises NotFound, InvalidRequest (the two
        have no history in common), InvalidSize (the snapshot is smaller than its base), DamagedRecord.
        """
        record = self._snapshots.find(name_or_id)
        base = None if since is None else self._snapshots.find(since)
        if base is not None and base.size_bytes > record.size_bytes:
            raise InvalidSize(
                f"snapshot {record.name!r} cannot be exported since {base.name!r}, which is larger",
                cause=f"it has {record.size_bytes} bytes, and its base {base.size_bytes}",
                correction="export it whole, without a base",
            )
        session_id = f"export-{new_id()}"
        handles = [self._readers.open(record, session_id)]
        try:
            if base is not None:
                handles.append(self._readers.open(base, f"{session_id}-base"))
            survey = await self._engine.context.threads.run(partial(self._survey, record, base))
            export = SnapshotExport(self._header(record, base, survey.changed_bytes), survey, handles)
            try:
                yield export
            finally:
                await export.close()
        finally:
            for handle in handles:
                await asyncio.shield(self._tasks.start(handle.close(), "close", awaited=True))

    def _survey(self, record: SnapshotRecord, base: SnapshotRecord | None) -> _Survey:
        context = self._engine.context
        with context.store.read() as reader:
            new = chain_of(reader, Point(record.branch, record.epoch))
            old = chain_of(reader, Point(base.branch, base.epoch)) if base is not None else ()
            if base is not None and not {branch for branch, _ in old} & {branch for branch, _ in new}:
                raise InvalidRequest(
                    f"snapshots {record.name!r} and {base.name!r} have no history in common",
                    correction="export it whole, without a base, or since one of its own volume",
                )
            leaves = array("Q", changed_leaves(reader, old, new))
            ranges = _ranges(reader, old, new, leaves, context.chunk_shift, record.size_bytes)
            return _Survey(old, new, leaves, sum(each.length_bytes for each in ranges))

    def _header(self, record: SnapshotRecord, base: SnapshotRecord | None, changed_bytes: int) -> StreamHeader:
        with self._engine.store.read() as reader:
            volume = reader.record(VolumeRecord, Table.VOLUMES, record.volume_id.encode())
        if volume is None:
            raise NotFound(f"the volume of snapshot {record.name!r} was deleted meanwhile")
        return StreamHeader(
            stream_id=new_id(),
            volume_name=volume.name,
            volume_size_bytes=volume.size_bytes,
            chunk_bytes=1 << self._engine.context.chunk_shift,
            changed_bytes=changed_bytes,
            snapshot=StreamSnapshot(
                content_id(record), record.name, record.created_s, dict(record.labels), record.size_bytes
            ),
            base=StreamBase(content_id(base), base.name) if base is not None else None,
        )


def content_id(record: SnapshotRecord) -> str:
    """Return the id that a snapshot shares with all of its copies: of the one that was taken, not imported."""
    return record.source_id or record.id


class SnapshotExport:
    """One snapshot on its way out. Made by ``SnapshotExports.export``."""

    def __init__(self, header: StreamHeader, survey: _Survey, handles: list[SnapshotHandle]) -> None:
        """``handles``: on the snapshot, and on its base where there is one."""
        self.header = header
        """What the stream will say about itself: there before its first byte."""
        self._survey = survey
        self._handles = handles
        self._opened = handles[0].opened
        self._context = self._opened.context
        self._encoder = StreamEncoder(header)
        self._tasks = TaskSet("export")

    async def blocks(self) -> AsyncGenerator[bytes]:
        """Yield the stream, in blocks of little more than STREAM_MAX_DATA_BYTES at most; one is made ahead.

        Raises NotFound where the snapshot or its base was deleted under it, DataDamaged for a chunk that is not what it
        was, DeviceFault, DamagedRecord. A stream that ends so has no trailer: nobody takes it for a whole one.
        """
        async with aclosing(self._frames()) as frames:
            ahead = self._tasks.start(_next(frames), "piece", awaited=True)
            try:
                while block := await asyncio.shield(ahead):
                    ahead = self._tasks.start(_next(frames), "piece", awaited=True)
                    yield block
            finally:
                await asyncio.wait({ahead})  # what is under way is a piece: a second at most, and its memory is in use

    async def close(self) -> None:
        """Return when nothing is under way any more."""
        await self._tasks.wait()

    async def _frames(self) -> AsyncGenerator[bytes]:
        threads = self._context.threads
        yield self._encoder.begin()
        for start in range(0, len(self._survey.leaves), STREAM_BATCH_LEAVES):
            ranges = await threads.run(partial(self._look, self._survey.leaves[start : start + STREAM_BATCH_LEAVES]))
            for batch in _pieces(ranges):
                contents = [part if part.zero else await self._read(part) for part in batch]
                self._still_there()
                yield await threads.run(partial(self._encode, contents))
        self._still_there()
        if self._encoder.coverage.covered_bytes != self.header.changed_bytes:
            raise self._changed()
        yield self._encoder.end()

    def _look(self, leaves: "array[int]") -> list[_Range]:
        with self._context.store.read() as reader:
            shift, size_bytes = self._context.chunk_shift, self.header.snapshot.size_bytes
            return list(_ranges(reader, self._survey.old, self._survey.new, leaves, shift, size_bytes))

    async def _read(self, part: _Range) -> _Content:
        """Read the whole chunks that a range lies in; addresses and reads are of one moment."""
        opened, shift = self._opened, self._context.chunk_shift
        first = part.offset_bytes >> shift
        count = ((part.offset_bytes + part.length_bytes - 1) >> shift) - first + 1
        content = bytearray(count << shift)
        entries = tuple(opened.map.readable(chunk) for chunk in range(first, first + count))
        try:
            await read_one(opened, first << shift, memoryview(content))
        except OSError as error:
            raise DeviceFault(
                f"snapshot {self.header.snapshot.name!r} cannot be read at {part.offset_bytes}: {error}",
                correction="check the disk and its mount",
            ) from error
        return _Content(part.offset_bytes, part.length_bytes, content, entries)

    def _encode(self, parts: "list[_Range | _Content]") -> bytes:
        frames = []
        for part in parts:
            covered = self._encoder.coverage.covered_bytes + part.length_bytes
            if covered > self.header.changed_bytes:
                raise self._changed()
            if isinstance(part, _Range):
                frames.append(self._encoder.zeros(part.offset_bytes, part.length_bytes))
                continue
            self._check(part)
            for start, end, zero in _runs(part.content, 1 << self._context.chunk_shift):
                end = min(end, part.length_bytes)
                if zero:
                    frames.append(self._encoder.zeros(part.offset_bytes + start, end - start))
                else:
                    frames.append(self._encoder.data(part.offset_bytes + start, bytes(part.content[start:end])))
        return b"".join(frames)

    def _check(self, part: _Content) -> None:
        """Compare what was read with the checksums that its chunks were sealed with; raises DataDamaged."""
        chunk_bytes, content = 1 << self._context.chunk_shift, memoryview(part.content)
        with self._context.store.read() as reader:
            for place, entry in enumerate(part.entries):
                if entry:
                    at = place * chunk_bytes
                    what = f"the chunk at {part.offset_bytes + at} of snapshot {self.header.snapshot.name!r}"
                    expected = find_checksum(reader, entry & ADDRESS_MASK)
                    check_content(content[at : at + chunk_bytes], expected, what)

    def _still_there(self) -> None:
        for handle in self._handles:
            if handle.lost.done():  # its chunks may have been given back while they were read
                raise NotFound(
                    f"snapshot {handle.opened.record.name!r} was deleted while it was exported",
                    correction="export another one",
                )

    def _changed(self) -> InvalidRequest:
        return InvalidRequest(
            f"what snapshot {self.header.snapshot.name!r} shares with its base changed while it was exported",
            cause="its volume was flattened meanwhile",
            correction="export it whole, without a base",
        )


async def _next(frames: AsyncGenerator[bytes]) -> bytes:
    """Return the next block; empty: that was all."""
    return await anext(frames, b"")


def _ranges(
    reader: Reader, old: Chain, new: Chain, leaves: "array[int]", chunk_shift: int, size_bytes: int
) -> Iterator[_Range]:
    """Yield what differs between two points in some leaves, in order; raises DamagedRecord."""
    for leaf in leaves:
        for change in compare(leaf << SLOT_BITS, planes_through(reader, old, leaf), planes_through(reader, new, leaf)):
            start, end = change.chunk << chunk_shift, min(size_bytes, (change.chunk + change.count) << chunk_shift)
            if start < end:
                yield _Range(start, end - start, change.zero)


def _pieces(ranges: list[_Range]) -> Iterator[list[_Range]]:
    """Yield ranges in order, so many at a time that their data is at most STREAM_MAX_DATA_BYTES."""
    piece: list[_Range] = []
    room_bytes = STREAM_MAX_DATA_BYTES
    for each in ranges:
        offset, left = each.offset_bytes, each.length_bytes
        while left:
            if not room_bytes:
                yield piece
                piece, room_bytes = [], STREAM_MAX_DATA_BYTES
            length = left if each.zero else min(left, room_bytes)
            piece.append(_Range(offset, length, each.zero))
            offset, left = offset + length, left - length
            room_bytes -= 0 if each.zero else length
    if piece:
        yield piece


def _runs(content: bytearray, chunk_bytes: int) -> Iterator[tuple[int, int, bool]]:
    """Yield the runs of chunks that are all zeros, and of those that are not: (start, end, zeros)."""
    zeros = bytes(chunk_bytes)
    start, was_zero = 0, False
    for at in range(0, len(content), chunk_bytes):
        zero = content[at : at + chunk_bytes] == zeros
        if at > start and zero != was_zero:
            yield start, at, was_zero
            start = at
        was_zero = zero
    yield start, len(content), was_zero
