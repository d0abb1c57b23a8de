"""Import: snapshot streams become snapshots of a volume, a new one or one that holds what the stream goes on from.

What a stream says is written as a guest would write it, into a volume that nobody else may use meanwhile. Only when the
stream proves to be whole does the snapshot come into being, in the transaction that also takes the volume's mark off.
Anything else takes the volume back to what it was, at once, or when the daemon starts again.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

from blockvirt.errors import BlockvirtError, DamagedRecord, DeviceFault, Exists, InUse, InvalidSize, NotFound
from blockvirt.limits import STREAM_BATCH_EVENTS, STREAM_MAX_DATA_BYTES, STREAM_ZERO_BYTES
from blockvirt.meta.keys import Table
from blockvirt.meta.records import SnapshotRecord, VolumeRecord
from blockvirt.meta.store import Writer
from blockvirt.snapshots import import_transactions
from blockvirt.snapshots.stream_format import StreamBase, StreamHeader
from blockvirt.snapshots.stream_reader import StreamData, StreamDecoder, StreamEnd, StreamEvent
from blockvirt.snapshots.transactions import check_new
from blockvirt.tasks import TaskSet
from blockvirt.volumes.allowance import check_background
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.checkpoint import checkpoint_and_step
from blockvirt.volumes.engine import Engine
from blockvirt.volumes.imports import NEW
from blockvirt.volumes.opened import OpenVolume
from blockvirt.volumes.requests import NewVolume, check_labels, round_size
from blockvirt.volumes.transactions import locate

log = logging.getLogger("blockvirt.snapshots")
T = TypeVar("T")


class SnapshotImports:
    """All imports of the pool. One per process; call it on the event loop."""

    def __init__(self, engine: Engine, catalogue: Catalogue, *, clock: Callable[[], float] = time.time) -> None:
        self.engine = engine
        self.catalogue = catalogue
        self.running: set[str] = set()
        """The volumes whose mark is that of an import at work, not of one that a dead daemon left."""
        self._clock = clock
        self._tasks = TaskSet("imports")

    async def run(self, volume: str, pieces: AsyncIterable[bytes]) -> list[SnapshotRecord]:
        """Import the streams that ``pieces`` are, one behind the other; returns their snapshots when all are there.

        A full stream makes the volume called ``volume``, others continue it (name or id). Streams that were whole stay
        when a later one is not; the error then has their names as ``imported``. Pieces should be small: what one
        holds is applied to its end even where the caller is cancelled.

        Raises StreamDamaged, StreamVersion, WrongBase, Exists, NotFound, InUse, InvalidSize, InvalidName, PoolFull,
        OvercommitLimit, LimitReached, VolumeStopped, DeviceFault.
        """
        work = _Import(self, volume)
        try:
            async for piece in pieces:
                await self._whole(work.feed(piece), "feed")
            await self._whole(work.finish(), "finish")
        except BaseException as error:
            if isinstance(error, BlockvirtError) and work.imported:
                error.details["imported"] = [each.name for each in work.imported]
            await self._whole(work.give_up(), "give up")
            raise
        return work.imported

    async def _whole(self, work: Coroutine[Any, Any, T], name: str) -> T:
        """Run something to its end even if who asked for it is cancelled: it must not be left half done."""
        result: T = await asyncio.shield(self._tasks.start(work, name, awaited=True))
        return result

    async def take_back(self, volume_id: str, *, own: bool = False) -> None:
        """Take a volume that an import has left half done back to what it was; nothing where none has.

        What an import at work has done by now is left alone, unless it is the ``own`` one that gives up. Raises
        VolumeStopped, DeviceFault, DamagedRecord: the volume keeps its mark then.
        """
        engine = self.engine
        with engine.store.read() as reader:
            record = reader.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
        if record is None or record.deleting or not record.importing or not (own or self._is_left(volume_id)):
            return
        undo = partial(import_transactions.take_back, volume_id=volume_id, now_s=self._clock())
        if record.importing == NEW:
            purged, job_id = await engine.store.commit(undo)
            if purged is not None:
                self.catalogue.promises.release(purged.size_bytes)
                await engine.registry.discard(volume_id)
        else:
            async with engine.registry.set_aside(volume_id, importing=True):
                if not (own or self._is_left(volume_id)):
                    return
                _, job_id = await engine.store.commit(undo)
        if job_id is not None:
            engine.jobs.wake(job_id)
        log.warning("volume %s: what came of an unfinished import is taken back", record.name)

    @contextmanager
    def at_work(self, volume_id: str) -> Iterator[None]:
        """Count a volume's mark as that of an import at work, from before it is there; not if it cannot be set."""
        self.running.add(volume_id)
        try:
            yield
        except BaseException:
            self.running.discard(volume_id)
            raise

    def _is_left(self, volume_id: str) -> bool:
        return volume_id not in self.running

    async def take_back_all(self) -> None:
        """Take back what a dead daemon has left half imported; before anybody is served."""
        with self.engine.store.read() as reader:
            found = []
            for key, _ in reader.scan(Table.VOLUMES):
                try:
                    record = reader.record(VolumeRecord, Table.VOLUMES, key)
                except DamagedRecord:  # said where the volume is shown
                    continue
                if record is not None and record.importing and not record.deleting:
                    found.append(record)
        for record in found:
            try:
                await self.take_back(record.id)
            except BlockvirtError as error:
                log.error("the import into volume %s cannot be taken back: %s", record.name, error)

    async def close(self) -> None:
        """Return when no import is at work any more."""
        await self._tasks.wait()


class _Import:
    """The streams of one request, on their way into one volume. Its verbs run one at a time, each to its end."""

    def __init__(self, imports: SnapshotImports, volume: str) -> None:
        self.imported: list[SnapshotRecord] = []
        self._imports = imports
        self._engine = imports.engine
        self._promises = imports.catalogue.promises
        self._volume = volume
        self._decoder = StreamDecoder()
        self._lock = asyncio.Lock()
        self._given_up = False
        self._header: StreamHeader | None = None
        self._volume_id = ""
        """Of the volume that bears this import's mark; empty between two streams."""
        self._granted_bytes = 0
        self._opened: OpenVolume | None = None
        self._pin = AsyncExitStack()

    async def feed(self, piece: bytes) -> None:
        """Apply what the next piece of the input says."""
        async with self._lock:
            events = self._decoder.feed(piece)
            while batch := await self._engine.context.threads.run(partial(_batch, events)):
                for event in batch:
                    if self._given_up:
                        return
                    await self._apply(event)

    async def finish(self) -> None:
        """Say that the input has ended; raises StreamDamaged unless it ended where a stream did."""
        async with self._lock:
            self._decoder.finish()

    async def give_up(self) -> None:
        """Take back what is there of a stream that is not whole, and will not be."""
        self._given_up = True
        async with self._lock:
            await self._pin.aclose()
            self._opened = None
            if self._granted_bytes:
                self._promises.release(self._granted_bytes)
            if not self._volume_id:
                return
            try:
                await self._imports.take_back(self._volume_id, own=True)
            except BlockvirtError as error:  # the mark stays: it is tried again by the next import, or start
                log.error("the import into volume %s cannot be taken back: %s", self._volume, error)
            finally:
                self._imports.running.discard(self._volume_id)

    async def _apply(self, event: StreamEvent) -> None:
        if isinstance(event, StreamHeader):
            await self._begin(event)
            return
        if isinstance(event, StreamEnd):
            await self._end()
            return
        assert self._opened is not None, "the decoder yields a header first"
        slow = self._opened.slow
        try:
            if isinstance(event, StreamData):
                check_background(self._engine.storage.status(), len(event.content), "the import")
                await slow.write(event.offset_bytes, memoryview(event.content))
                return
            offset, end = event.offset_bytes, event.offset_bytes + event.length_bytes
            while offset < end and not self._given_up:
                stop = min(end, offset + STREAM_ZERO_BYTES)
                await slow.zero(offset, stop - offset, punch=True)
                offset = stop
        except OSError as error:
            raise DeviceFault(
                f"volume {self._volume!r} cannot be written: {error}", correction="check the disk and its mount"
            ) from error

    # --- from a header on -------------------------------------------------------------------------------------------

    async def _begin(self, header: StreamHeader) -> None:
        check_labels(header.snapshot.labels)
        round_size(header.snapshot.size_bytes, 1 << self._engine.context.chunk_shift)  # fits this pool's chunks
        check_background(self._engine.storage.status(), 0, "the import")
        self._header = header
        if header.base is None:
            await self._make(header)
        else:
            await self._go_on(header, header.base)
        self._opened = await self._pin.enter_async_context(
            self._engine.registry.pinned(self._volume_id, importing=True)
        )
        size_bytes = max(self._opened.volume.size_bytes, header.snapshot.size_bytes)
        await self._engine.registry.resize(self._volume_id, size_bytes)

    async def _make(self, header: StreamHeader) -> None:
        made = None
        if not self._is_there():
            wanted = NewVolume(size_bytes=header.snapshot.size_bytes, name=self._volume)
            made = await self._imports.catalogue.create(wanted, also=self._mark_new)
        if made is None or not made.created:
            raise Exists(
                f"there is a volume {self._volume!r} already, and the stream holds a whole one",
                correction="import it under another name; a stream that was exported since a snapshot continues one",
            )
        self._volume_id = made.volume.id

    def _mark_new(self, writer: Writer, record: VolumeRecord) -> None:
        self._imports.running.add(record.id)  # before anybody can see the mark
        import_transactions.mark_new(writer, record)

    def _is_there(self) -> bool:
        with self._engine.store.read() as reader:
            try:
                locate(reader, self._volume)
            except NotFound:
                return False
            return True

    async def _go_on(self, header: StreamHeader, base: StreamBase) -> None:
        registry, snapshot = self._engine.registry, header.snapshot
        volume = self._record(base)
        if volume.importing:
            await self._imports.take_back(volume.id)
            volume = self._record(base)
        if sessions := registry.sessions_of(volume.id):
            raise InUse(
                f"volume {volume.name!r} is in use by {sessions} sessions",
                cause="what they write and what the stream brings would mix",
                correction="end them ('blockvirt session list'), or import while nobody has it open",
                sessions=sessions,
            )
        async with registry.set_aside(volume.id, refuse_sessions=True):
            volume = self._record(base)
            found = await self._engine.context.threads.run(partial(self._base, volume, base, snapshot.name))
            if snapshot.size_bytes < found.size_bytes:
                raise InvalidSize(
                    f"snapshot {snapshot.name!r} is smaller than its base {found.name!r}",
                    cause=f"it has {snapshot.size_bytes} bytes, and its base {found.size_bytes}",
                    correction="export it whole, and import it as a new volume",
                )
            extra_bytes = max(0, snapshot.size_bytes - volume.size_bytes)
            with self._promises.grant(extra_bytes), self._imports.at_work(volume.id):
                await self._engine.store.commit(lambda writer: import_transactions.mark(writer, volume, found))
            self._granted_bytes = extra_bytes
            self._volume_id = volume.id

    def _record(self, base: StreamBase) -> VolumeRecord:
        with self._engine.store.read() as reader:
            try:
                volume_id, _ = locate(reader, self._volume)
            except NotFound as error:
                error.correction = f"the stream goes on from snapshot {base.name!r}: import that one first"
                raise
            record = reader.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
        assert record is not None, "it was found by its record or its name"
        return record

    def _base(self, volume: VolumeRecord, base: StreamBase, name: str) -> SnapshotRecord:
        with self._engine.store.read() as reader:
            if refusal := check_new(reader, volume, name):
                raise refusal
            return import_transactions.find_base(reader, volume, base)

    async def _end(self) -> None:
        opened, header, volume_id = self._opened, self._header, self._volume_id
        assert opened is not None, "the decoder yields a header first"
        assert header is not None, "the decoder yields a header first"
        outcome = await checkpoint_and_step(
            [opened.checkpointer],
            lambda writer, changes: import_transactions.finish(writer, header, changes[0], volume_id),
        )
        if isinstance(outcome, BlockvirtError):
            raise outcome
        self.imported.append(outcome)
        self._engine.sealing.set()
        self._imports.running.discard(volume_id)
        self._header, self._opened, self._volume_id, self._granted_bytes = None, None, "", 0
        await self._pin.aclose()
        log.info("snapshot %s of volume %s imported", outcome.name, volume_id)


def _batch(events: Iterator[StreamEvent]) -> list[StreamEvent]:
    """Return the next events, up to the end of a stream at most; none: that was all. Blocks, for a thread."""
    found: list[StreamEvent] = []
    held_bytes = 0
    for event in events:
        found.append(event)
        if isinstance(event, StreamEnd) or len(found) == STREAM_BATCH_EVENTS:
            break
        if isinstance(event, StreamData):
            held_bytes += len(event.content)
            if held_bytes >= STREAM_MAX_DATA_BYTES:
                break
    return found
