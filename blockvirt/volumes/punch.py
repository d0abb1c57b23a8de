"""Giving freed chunks back to the filesystem: after the commit that dropped them, in the background, repeatable.

Rows of the punch table are (file, first chunk) -> count, written in the transaction that dropped the last entry. A
crash repeats some punches, without harm: their addresses are never used again.
"""

import asyncio
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blockvirt.errors import BlockvirtError, DamagedRecord
from blockvirt.limits import PUNCH_PAUSE_S, PUNCHES_PER_BATCH
from blockvirt.meta.keys import Table, number_key, pair_key, split_pair
from blockvirt.meta.records import FileRecord, punch_count
from blockvirt.meta.store import Reader, Writer
from blockvirt.pool.backing import backing_path
from blockvirt.syscalls import punch_hole
from blockvirt.volumes.checksums import forget_checksums
from blockvirt.volumes.context import VolumeContext

log = logging.getLogger("blockvirt.punch")


@dataclass(frozen=True, slots=True)
class _Punch:
    file: FileRecord | None
    number: int
    chunk: int
    count: int


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

    async def run(self) -> None:
        """Work until cancelled; a few punches at a time, because a filesystem may stall a file's writes for each."""
        while True:
            await self._work.wait()
            self._work.clear()
            after = b""
            while True:
                try:
                    batch, after = self._batch(after)
                    if not batch:
                        break
                    await self._punch(batch)
                except BlockvirtError as error:
                    log.error("freed space is not given back for now: %s", error)
                    break
                except Exception:  # a mistake of ours must not end the worker: freed space would never come back
                    log.exception("freed space is not given back for now")
                    break
                await asyncio.sleep(PUNCH_PAUSE_S)

    def _batch(self, after: bytes) -> tuple[list[_Punch], bytes]:
        batch: list[_Punch] = []
        with self._store.read() as reader:
            for key, stored in reader.scan(Table.PUNCH, start=after):
                number, chunk = split_pair(key)
                try:
                    count = punch_count(key, stored)
                    batch.append(_Punch(self._file(reader, number), number, chunk, count))
                except DamagedRecord as error:
                    log.error("%s", error)
                after = key + b"\0"
                if len(batch) == PUNCHES_PER_BATCH:
                    break
        return batch, after

    def _file(self, reader: Reader, number: int) -> FileRecord | None:
        return reader.record(FileRecord, Table.FILES, number_key(number))

    async def _punch(self, batch: Sequence[_Punch]) -> None:
        await self._drained()
        paths = self._storage.paths()
        done: list[_Punch] = []
        for punch in batch:
            if punch.file is None:
                done.append(punch)
            elif folder := paths.get(punch.file.device_id):
                path = backing_path(folder, punch.file.branch, punch.number)
                if await self._threads.run(partial(self._punch_one, path, punch)):
                    done.append(punch)

        def forget(writer: Writer) -> list[_Punch]:
            # A row that went meanwhile, with its whole volume, is not ours to count.
            for punch in done:
                forget_checksums(writer, punch.number, punch.chunk, punch.count)
            return [punch for punch in done if writer.delete(Table.PUNCH, pair_key(punch.number, punch.chunk))]

        async with self._storage.counting:
            for punch in await self._store.commit(forget):
                if punch.file is not None:
                    self._storage.mapped(punch.file.device_id, punch.number, -punch.count)

    def _punch_one(self, path: Path, punch: _Punch) -> bool:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return True
        except OSError as error:
            log.error("cannot open %s to give freed chunks back: %s", path, error)
            return False
        try:
            punch_hole(fd, punch.chunk << self._chunk_shift, punch.count << self._chunk_shift)
            return True
        except OSError as error:
            log.error("cannot punch %d chunks out of %s: %s", punch.count, path, error)
            return False
        finally:
            os.close(fd)
