"""One run of a scrub: the file of the metadata, its records, then the sealed chunks; it goes on where the last ended.

What it has found, counted and come to lies in one record, so a crash repeats a few seconds of reading and counts
nothing twice.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TypeVar

from blockvirt.errors import BlockvirtError, DamagedRecord, MetadataFault
from blockvirt.limits import JOB_PROGRESS_S, SCRUB_BATCH_BYTES, SCRUB_BATCH_ROWS, SCRUB_FINDINGS, SCRUB_PAUSE_S
from blockvirt.lun.address import chunk_of
from blockvirt.lun.leaf import decode
from blockvirt.meta.datafile import DATA_FILE
from blockvirt.meta.keys import Table, number_key, pair_key, split_leaf, split_pair
from blockvirt.meta.preread import PIECE_BYTES, ThroughFile, Unreadable
from blockvirt.meta.record_walk import WALKED, DamagedRow, walk
from blockvirt.meta.records import FileRecord, ScrubFinding, ScrubRecord
from blockvirt.meta.store import Reader, Writer
from blockvirt.snapshots.scrub_chunks import ChunkProof, Group
from blockvirt.snapshots.scrub_pace import Pace
from blockvirt.volumes.checksums import GROUP_BITS
from blockvirt.volumes.concerned import first_names, snapshot_name, users, viewers, volume_name
from blockvirt.volumes.context import VolumeContext
from blockvirt.volumes.io_threads import IoThreads
from blockvirt.volumes.jobs import Running

log = logging.getLogger("blockvirt.scrub")
T = TypeVar("T")

_FILE, _CHUNKS = "file", "chunks"
_STILL_CACHED = "; the page cache has it still"
_TABLES = {f"table {table.value.decode()}": table for table in WALKED}
_STEPS = (_FILE, *_TABLES, _CHUNKS)

Rest = Callable[[float], Awaitable[None]]
"""Waits for so many seconds."""


@dataclass(slots=True)
class ScrubCounters:
    """What all scrubs of this process have done, for metrics."""

    read_bytes: int = 0
    chunks: int = 0
    damaged: int = 0


@dataclass(frozen=True, slots=True)
class Clocks:
    """The time as a scrub sees it."""

    time_s: Callable[[], float] = time.time
    monotonic_s: Callable[[], float] = time.monotonic
    rest: Rest = asyncio.sleep


@dataclass(slots=True)
class ScrubRun:
    """A scrub at work."""

    context: VolumeContext
    job: Running
    record: ScrubRecord
    proof: ChunkProof
    pace: Pace
    clocks: Clocks
    counters: ScrubCounters
    _threads: IoThreads = field(default_factory=lambda: IoThreads(1))  # its own: the others are for guests
    _missing: set[int] = field(default_factory=set)
    """Backing files that are not there."""
    _is_urgent: bool = False
    """There is damage that is not durable yet."""
    _total_bytes: int = 0
    _saved_s: float = 0.0

    async def go(self) -> None:
        """Read everything that is left; raises MetadataFault where the metadata cannot be read."""
        self._saved_s = self.clocks.monotonic_s()
        try:
            step, key = self._place()
            self._missing |= {each.address for each in self.record.findings if each.kind == "file"}
            if not self.record.begun_s:
                self.record = replace(self.record, begun_s=self.clocks.time_s())
            await self._weigh(step, key)
            for each in _STEPS[_STEPS.index(step) :]:
                if each == _FILE:
                    await self._file(key)
                elif each == _CHUNKS:
                    await self._chunks(key)
                else:
                    await self._rows(each, key)
                key = b""
            self.record = replace(self.record, ended_s=self.clocks.time_s())
        finally:
            await self._save()
            self._threads.close()

    async def _do(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the thread; who is cancelled waits for its end too: nothing of it is at work afterwards."""
        return await self._threads.run_to_end(work, lambda: None)

    # --- where it is -------------------------------------------------------------------------------------------------

    def _place(self) -> tuple[str, bytes]:
        """Return the step and the key to go on with."""
        step, _, key = self.record.cursor.partition(":")
        return (step, bytes.fromhex(key)) if step in _STEPS else (_FILE, b"")

    async def _weigh(self, step: str, key: bytes) -> None:
        """Find out how many bytes are to be read altogether."""
        left = 0
        if step == _FILE:
            left = max(0, self.context.store.stats().used_bytes - int.from_bytes(key, "big"))
        start: bytes | None = key if step == _CHUNKS else b""
        if start:
            number, chunk = split_pair(start)
            start = pair_key(number, chunk >> GROUP_BITS)
        while start is not None:
            self.job.checkpoint()
            chunks, start = await self._do(partial(self.proof.count, start))
            left += chunks << self.context.chunk_shift
        self._total_bytes = self._done_bytes() + left

    def _done_bytes(self) -> int:
        return self.record.read_bytes + (self.record.unread_chunks << self.context.chunk_shift)

    async def _advance(self, step: str, key: bytes) -> None:
        """Note that everything before (step, key) is done, with what was found there; damage at once durably."""
        self.record = replace(self.record, cursor=f"{step}:{key.hex()}")
        done = self._done_bytes()
        now_s = self.clocks.monotonic_s()
        if self._is_urgent or now_s - self._saved_s >= JOB_PROGRESS_S:
            self._is_urgent, self._saved_s = False, now_s
            await self._save()
        await self.job.advance(done, max(done, self._total_bytes), 0)

    async def _save(self) -> None:
        """Make what was found and come to durable; where that fails, it is tried again with the next piece."""
        record = self.record

        def note(writer: Writer) -> None:
            key = record.id.encode()
            stored = writer.record(ScrubRecord, Table.SCRUBS, key)
            if stored is not None:
                writer.put_record(Table.SCRUBS, key, replace(record, scheduled_for_s=stored.scheduled_for_s))

        try:
            await self.context.store.commit(note)
        except BlockvirtError as error:
            if record.ended_s:
                raise
            log.warning("what a scrub has found is not durable for now: %s", error)

    async def _rest(self, began_s: float, read_bytes: int) -> None:
        """Leave the disk to guests, and keep to the rate; raises what ends the job where it is to stop meanwhile."""
        left_s = self.pace.rest_s(began_s, self.clocks.monotonic_s(), read_bytes)
        while left_s > 0:
            self.job.checkpoint()
            await self.clocks.rest(min(left_s, SCRUB_PAUSE_S))
            left_s -= SCRUB_PAUSE_S

    def _count(self, *, read_bytes: int = 0, records: int = 0, chunks: int = 0, unread: int = 0) -> None:
        self.counters.read_bytes += read_bytes
        self.counters.chunks += chunks
        self.record = replace(
            self.record,
            read_bytes=self.record.read_bytes + read_bytes,
            records=self.record.records + records,
            chunks=self.record.chunks + chunks,
            unread_chunks=self.record.unread_chunks + unread,
        )

    def _found(self, findings: Iterable[ScrubFinding]) -> None:
        new = tuple(findings)
        for each in new:
            log.error("damaged: %s", in_words(each))
        self.counters.damaged += len(new)
        kept = (*self.record.findings, *new)[:SCRUB_FINDINGS]
        self.record = replace(self.record, findings=kept, damaged=self.record.damaged + len(new))
        self._is_urgent |= bool(new)

    # --- the metadata ------------------------------------------------------------------------------------------------

    async def _file(self, key: bytes) -> None:
        """Read the file that LMDB maps. With a sector of it lost, a look at the records might end the process."""
        self.job.detail = "reading the metadata"
        path = self.context.store.path / DATA_FILE
        at = int.from_bytes(key, "big")
        is_safe = all(_STILL_CACHED in each.problem for each in self.record.findings if each.kind == "metadata")
        with await self._do(partial(ThroughFile, path)) as file:
            while (left_bytes := self.context.store.stats().used_bytes - at) > 0:
                self.job.checkpoint()
                began_s = self.clocks.monotonic_s()
                lost = await self._do(partial(_piece, file, at))
                is_safe &= all(each.is_cached for each in lost)
                self._count(read_bytes=min(PIECE_BYTES, left_bytes))
                self._found(_unreadable(str(path), lost))
                at += PIECE_BYTES
                await self._advance(_FILE, at.to_bytes(8, "big"))
                await self._rest(began_s, min(PIECE_BYTES, left_bytes))
        if not is_safe:
            raise MetadataFault(
                f"the metadata file {path} cannot be read everywhere, and the rest was not looked at",
                cause="a look at its records could end the daemon",
                correction="stop the daemon, mend the disk, then 'blockvirt check --restore-metadata'",
            )

    async def _rows(self, step: str, key: bytes) -> None:
        self.job.detail = f"looking at the metadata, {step}"
        start: bytes | None = key
        while start is not None:
            self.job.checkpoint()
            began_s = self.clocks.monotonic_s()
            start, rows, findings = await self._do(partial(self._walk, _TABLES[step], start))
            self._count(records=rows)
            self._found(findings)
            await self._advance(*((step, start) if start is not None else (_STEPS[_STEPS.index(step) + 1], b"")))
            await self._rest(began_s, 0)

    def _walk(self, table: Table, start: bytes) -> tuple[bytes | None, int, list[ScrubFinding]]:
        """Look at some rows; returns where to go on, how many they were, and which are damaged. Blocks."""
        path = str(self.context.store.path / DATA_FILE)
        with self.context.store.read() as reader:
            step = walk(reader, table, start, SCRUB_BATCH_ROWS, decode)
            found = [
                ScrubFinding(
                    "record", f"table {row.table.value.decode()}: {row.problem}", _concerned(reader, row), path
                )
                for row in step.damaged
            ]
        return step.next_key, step.rows, found

    # --- the chunks --------------------------------------------------------------------------------------------------

    async def _chunks(self, key: bytes) -> None:
        start: bytes | None = key
        while start is not None:
            self.job.checkpoint()
            group = await self._do(partial(self.proof.group, start))
            self.job.detail = f"reading backing file {group.file}" if group.file else ""
            await self._group(group)
            start = group.next_key
            if start is not None:
                await self._advance(_CHUNKS, start)

    async def _group(self, group: Group) -> None:
        left, most = iter(group.checksums.items()), max(1, SCRUB_BATCH_BYTES >> self.context.chunk_shift)
        while batch := dict(islice(left, most)):
            self.job.checkpoint()
            began_s = self.clocks.monotonic_s()
            reading = await self._do(partial(self.proof.read, group.file, batch))
            if reading.differing:
                judge = partial(self.proof.damaged, group.file, batch, reading.differing)
                self._found(await self._do(judge))
            if reading.missing:
                await self._found_missing(group.file, reading.missing)
            is_read = not (reading.missing or reading.away)
            self._count(
                read_bytes=reading.read_bytes,
                chunks=len(batch) if is_read else 0,
                unread=0 if is_read else len(batch) - (reading.read_bytes >> self.context.chunk_shift),
            )

            await self._advance(_CHUNKS, pair_key(group.file, chunk_of(max(batch)) + 1))
            await self._rest(began_s, reading.read_bytes)

    async def _found_missing(self, number: int, problem: str) -> None:
        """Name a backing file that is not there, once for all its chunks."""
        if number not in self._missing:
            self._missing.add(number)
            self._found(await self._do(partial(self.proof.missing_file, number, problem)))


def _piece(file: ThroughFile, at: int) -> list[Unreadable]:
    return list(file.piece(at))


def _unreadable(path: str, lost: Iterable[Unreadable]) -> Iterable[ScrubFinding]:
    for each in lost:
        kept = _STILL_CACHED if each.is_cached else ""
        yield ScrubFinding("metadata", f"it cannot be read: {each.problem}{kept}", (), path, each.offset_bytes, 4096)


def _concerned(reader: Reader, row: DamagedRow) -> tuple[str, ...]:
    """Return whom a damaged row concerns, as far as its key tells."""
    key = row.key
    try:
        if row.table is Table.LEAVES:
            return first_names(viewers(reader, *split_leaf(key)))
        if row.table is Table.CHECKSUMS:
            file = reader.record(FileRecord, Table.FILES, key[:8])
            return first_names(users(reader, file.branch)) if file is not None else ()
        if row.table is Table.FILES:
            pairs = (split_pair(each) for each, _ in reader.scan(Table.BRANCH_FILES))
            branches = [branch for branch, number in pairs if number_key(number) == key]
            return first_names(name for branch in branches for name in users(reader, branch))
        if row.table is Table.BRANCHES:
            return first_names(users(reader, int.from_bytes(key, "big")))
    except DamagedRecord:
        return ()
    if row.table is Table.VOLUMES:
        return (volume_name(reader, key.decode(errors="replace")),)
    return (snapshot_name(reader, key.decode(errors="replace")),) if row.table is Table.SNAPSHOTS else ()


def in_words(finding: ScrubFinding) -> str:
    """Return a finding as one sentence for people."""
    concerns = f"; concerns {', '.join(finding.concerns)}" if finding.concerns else ""
    if finding.kind == "chunk":
        return (
            f"the {finding.length_bytes} bytes at {finding.volume_offset_bytes} of {', '.join(finding.concerns)}, "
            f"at {finding.offset_bytes} of {finding.path}: {finding.problem}"
        )
    if finding.kind == "metadata":
        return f"the metadata file {finding.path} at {finding.offset_bytes}: {finding.problem}"
    return f"{finding.path}: {finding.problem}{concerns}" if finding.kind == "file" else f"{finding.problem}{concerns}"
