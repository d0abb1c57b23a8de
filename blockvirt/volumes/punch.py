"""Giving freed chunks back to the filesystem: after the commit that dropped them, in the background, repeatable.

Rows of the punch table are (file, first chunk) -> count, written in the transaction that dropped the last entry. A
crash repeats some punches, without harm: their addresses are never used again.

The worker passes over the table whenever there is something new. A row that it cannot do stays for the next pass. Who
waits for the rows of some files hears of the end of a pass that began after the question, and why some of them stayed.
"""

import asyncio
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

from blockvirt.errors import BlockvirtError, DamagedRecord, DeviceFault
from blockvirt.limits import PUNCH_BATCH_ROWS, PUNCH_PAUSE_S, PUNCHES_PER_BATCH
from blockvirt.meta.keys import Table, number_key, pair_key, split_pair
from blockvirt.meta.records import FileRecord, punch_count
from blockvirt.meta.store import Writer
from blockvirt.pool.backing import backing_path
from blockvirt.syscalls import punch_hole
from blockvirt.volumes.checksums import forget_checksums
from blockvirt.volumes.context import VolumeContext

log = logging.getLogger("blockvirt.punch")


@dataclass(slots=True)
class _Punch:
    """One hole, for neighbouring rows: chunks that were written together are freed one by one, and lie side by side."""

    file: FileRecord | None
    number: int
    chunk: int
    counts: list[int]
    """How many chunks each row has, in order."""

    @property
    def count(self) -> int:
        """How many chunks all of them have."""
        return sum(self.counts)

    def rows(self) -> Iterator[tuple[bytes, int]]:
        """Give each row's key and number of chunks."""
        chunk = self.chunk
        for count in self.counts:
            yield pair_key(self.number, chunk), count
            chunk += count


@dataclass(slots=True, eq=False)
class Turn:
    """What somebody hears who waits for the rows of some files."""

    files: frozenset[int]
    """Numbers of backing files."""
    done_chunks: int = 0
    """How many of their chunks were given back since the question."""
    is_over: bool = False
    """Every row that was there at the time of the question was tried."""
    problem: DeviceFault | None = None
    """Why some of them stayed."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when something of the above is new; for the one who waits to clear."""

    def failed(self, file: int, fault: DeviceFault) -> None:
        """Note that a row of a file stays."""
        if file in self.files and not self.is_over:
            self.problem = fault

    def end(self) -> None:
        """Note that there is nothing more to wait for."""
        self.is_over = True
        self.changed.set()


class Puncher:
    """The worker of the punch table. One per pool."""

    def __init__(self, context: VolumeContext) -> None:
        self._store = context.store
        self._storage = context.storage
        self._threads = context.threads
        self._chunk_shift = context.chunk_shift
        self._drained = context.drained
        self._work = context.punches
        self._work.set()
        self._turns: set[Turn] = set()

    @contextmanager
    def turn(self, files: Collection[int]) -> Iterator[Turn]:
        """Ask to be told when what the table has for some files, given by their numbers, has had its turn."""
        turn = Turn(frozenset(files))
        self._turns.add(turn)
        self._work.set()
        try:
            yield turn
        finally:
            self._turns.discard(turn)

    async def run(self) -> None:
        """Work until cancelled; a few punches at a time, because a filesystem may stall a file's writes for each."""
        while True:
            await self._work.wait()
            self._work.clear()
            turns = [turn for turn in self._turns if not turn.is_over]
            for turn in turns:
                turn.problem = None  # of a pass that was under way at the question
            try:
                await self._pass(turns)
            except BlockvirtError as error:
                log.error("freed space is not given back for now: %s", error)
                problem = error.message
            except Exception as error:  # a mistake of ours must not end the worker: no space would ever come back
                log.exception("freed space is not given back for now")
                problem = f"a mistake of blockvirt, see its log: {error!r}"
            else:
                problem = ""
            for turn in turns:
                if problem and not turn.is_over:
                    turn.problem = DeviceFault(f"freed space is not given back for now: {problem}")
                turn.end()

    async def _pass(self, turns: Sequence[Turn]) -> None:
        """Try every row that is there, in order of files; each of ``turns`` is over as soon as its files are behind."""
        after = b""
        while True:
            batch, after = self._batch(after)
            if not batch:
                return
            for turn in turns:
                if all(file < batch[0].number for file in turn.files):
                    turn.end()
            await self._punch(batch)
            await asyncio.sleep(PUNCH_PAUSE_S)

    def _stays(self, file: int, problem: str, correction: str) -> None:
        """Tell who waits for a file that something of it is not given back for now."""
        fault = DeviceFault(f"freed space is not given back for now: {problem}", correction=correction)
        for turn in self._turns:
            turn.failed(file, fault)

    def _batch(self, after: bytes) -> tuple[list[_Punch], bytes]:
        batch: list[_Punch] = []
        rows = 0
        with self._store.read() as reader:
            for key, stored in reader.scan(Table.PUNCH, start=after):
                number, chunk = split_pair(key)
                try:
                    count = punch_count(key, stored)
                    last = batch[-1] if batch else None
                    if last is not None and (number, chunk) == (last.number, last.chunk + last.count):
                        last.counts.append(count)
                    elif len(batch) == PUNCHES_PER_BATCH:
                        break
                    else:
                        file = reader.record(FileRecord, Table.FILES, number_key(number))
                        batch.append(_Punch(file, number, chunk, [count]))
                except DamagedRecord as error:
                    log.error("%s", error)
                    self._stays(number, error.message, error.correction)
                after = key + b"\0"
                rows += 1
                if rows == PUNCH_BATCH_ROWS:
                    break
        return batch, after

    async def _punch(self, batch: Sequence[_Punch]) -> None:
        await self._drained()
        done: list[_Punch] = []
        for _, neighbours in groupby(batch, lambda punch: punch.number):
            punches = list(neighbours)
            done += punches if punches[0].file is None else await self._punch_file(punches[0].file, punches)

        def forget(writer: Writer) -> list[int]:
            # A row that went meanwhile, with its whole volume, is not ours to count.
            for punch in done:
                forget_checksums(writer, punch.number, punch.chunk, punch.count)
            return [sum(count for key, count in punch.rows() if writer.delete(Table.PUNCH, key)) for punch in done]

        async with self._storage.counting:
            for punch, chunks in zip(done, await self._store.commit(forget), strict=True):
                if punch.file is not None:
                    self._storage.mapped(punch.file.device_id, punch.number, -chunks)
        for turn in self._turns:
            if chunks := sum(punch.count for punch in done if punch.number in turn.files):
                turn.done_chunks += chunks
                turn.changed.set()

    async def _punch_file(self, file: FileRecord, punches: Sequence[_Punch]) -> Sequence[_Punch]:
        """Punch holes into one file; returns those that are done."""
        folder = self._storage.paths().get(file.device_id)
        if folder is None:
            self._away(file)
            return ()
        path = backing_path(folder, file.branch, file.number)
        done, problem = await self._threads.run(partial(self._punch_all, path, punches))
        if problem:
            self._stays(file.number, problem, "check the disk and its mount; it is tried again by itself")
        return done

    def _away(self, file: FileRecord) -> None:
        problem, correction = "its device was away", "it is tried again by itself"
        try:
            self._storage.path_of(file.device_id)
        except DeviceFault as fault:
            problem, correction = fault.message, fault.correction
        self._stays(file.number, problem, correction)

    def _punch_all(self, path: Path, punches: Sequence[_Punch]) -> tuple[Sequence[_Punch], str]:
        """Punch one after the other; returns those that are done, and why others are not. Blocks."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return punches, ""
        except OSError as error:
            log.error("cannot open %s to give freed chunks back: %s", path, error)
            return (), f"{path} cannot be opened: {error.strerror}"
        done: list[_Punch] = []
        problem = ""
        try:
            for punch in punches:
                try:
                    punch_hole(fd, punch.chunk << self._chunk_shift, punch.count << self._chunk_shift)
                    done.append(punch)
                except OSError as error:
                    log.error("cannot punch %d chunks out of %s: %s", punch.count, path, error)
                    problem = f"{path} cannot be punched: {error.strerror}"
        finally:
            os.close(fd)
        return done, problem
