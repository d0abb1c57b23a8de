"""Sealing: what a snapshot has sealed gets its checksums, in the background.

A row (branch, epoch) is queued with each snapshot and goes when all is done. Only leaves that changed since the point
before are looked at, and only chunks that have no checksum yet are read, a few at a time; a crash repeats little.
"""

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from blockvirt.checksum import crc32c
from blockvirt.errors import BlockvirtError, DamagedRecord
from blockvirt.limits import SEAL_BATCH_CHUNKS, SEAL_BATCH_LEAVES, SEAL_PAUSE_S, SEAL_RETRY_S
from blockvirt.lun.address import ADDRESS_MASK, chunk_of, file_of
from blockvirt.meta.keys import Table, number_key, pair_key, split_pair
from blockvirt.meta.records import FileRecord
from blockvirt.meta.store import Writer
from blockvirt.pool.backing import BackingFile, backing_path
from blockvirt.volumes.checksums import put_checksums, without_checksum
from blockvirt.volumes.engine import Engine
from blockvirt.volumes.gaps import born_between
from blockvirt.volumes.versions import owner_of, previous_point, visible_version

log = logging.getLogger("blockvirt.sealing")


class Sealer:
    """The worker that computes the checksums. One per pool."""

    def __init__(self, engine: Engine) -> None:
        self._context = engine.context
        self._store = engine.store
        self._due = engine.sealing
        self._due.set()
        self.sealed_chunks = 0
        """Since the start, for metrics."""

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self._due.wait()
            self._due.clear()
            for branch, epoch in self._rows():
                try:
                    await self._seal(branch, epoch)
                    continue
                except (BlockvirtError, OSError) as error:
                    log.error("what a snapshot of branch %d sealed has no checksums yet: %s", branch, error)
                except Exception:  # a mistake of ours with one snapshot must not end the worker of all
                    log.exception("sealing what a snapshot of branch %d sees failed", branch)
                asyncio.get_running_loop().call_later(SEAL_RETRY_S, self._due.set)

    def _rows(self) -> list[tuple[int, int]]:
        with self._store.read() as reader:
            return [split_pair(key) for key, _ in reader.scan(Table.SEALS)]

    async def _seal(self, branch: int, epoch: int) -> None:
        leaves = await self._context.threads.run(partial(self._leaves, branch, epoch))
        while leaves:
            looked, addresses = await self._context.threads.run(partial(self._unsealed, branch, epoch, leaves))
            leaves = leaves[looked:]
            for start in range(0, len(addresses), SEAL_BATCH_CHUNKS):
                batch = addresses[start : start + SEAL_BATCH_CHUNKS]
                checksums = await self._context.threads.run(partial(self._compute, batch))
                if not await self._store.commit(partial(_put, branch, epoch, checksums)):
                    return  # the snapshot went meanwhile
                self.sealed_chunks += len(checksums)
                await asyncio.sleep(SEAL_PAUSE_S)
            await asyncio.sleep(SEAL_PAUSE_S)
        await self._store.commit(lambda writer: writer.delete(Table.SEALS, pair_key(branch, epoch)))

    def _leaves(self, branch: int, epoch: int) -> list[int]:
        """Return the leaves that changed between the point before and the snapshot. Blocks."""
        with self._store.read() as reader:
            before = previous_point(reader, branch, epoch)
            return sorted({leaf for _, leaf, _ in born_between(reader, branch, before + 1, epoch)})

    def _unsealed(self, branch: int, epoch: int, leaves: Sequence[int]) -> tuple[int, list[int]]:
        """Return what a snapshot sees in the first of ``leaves`` and has no checksum: how many leaves, the addresses.

        A batch of chunks or so at a time. Only the branch's own: others are their branches' business. Blocks.
        """
        addresses: list[int] = []
        looked = 0
        with self._store.read() as reader:
            if reader.get(Table.SEALS, pair_key(branch, epoch)) is None:
                return len(leaves), []
            is_own = owner_of(reader, branch)
            for leaf in leaves[:SEAL_BATCH_LEAVES]:
                if len(addresses) >= SEAL_BATCH_CHUNKS:
                    break
                looked += 1
                try:
                    found = visible_version(reader, branch, leaf, epoch)
                    entries = found[1] if found is not None else ()
                    addresses += without_checksum(reader, {entry & ADDRESS_MASK for entry in entries if entry}, is_own)
                except DamagedRecord as error:
                    log.error("%s", error)
        return looked, sorted(addresses)

    def _compute(self, addresses: list[int]) -> dict[int, int]:
        """Read chunks and return their checksums. Blocks."""
        shift = self._context.chunk_shift
        content = memoryview(bytearray(1 << shift))
        checksums: dict[int, int] = {}
        files: dict[int, BackingFile] = {}
        try:
            for address in addresses:
                number = file_of(address)
                if number not in files:
                    files[number] = self._open(number)
                files[number].read(content, chunk_of(address) << shift)
                checksums[address] = crc32c(bytes(content))
        finally:
            for file in files.values():
                file.close()
        return checksums

    def _open(self, number: int) -> BackingFile:
        with self._store.read() as reader:
            record = reader.record(FileRecord, Table.FILES, number_key(number))
        if record is None:
            raise DamagedRecord(f"backing file {number} has no record", correction="run 'blockvirt check'")
        path = backing_path(self._context.storage.path_of(record.device_id), record.branch, number)
        file = BackingFile(record, path, self._context.chunk_shift)
        file.open(read_only=True)
        return file


def _put(branch: int, epoch: int, checksums: dict[int, int], writer: Writer) -> bool:
    """Store checksums, unless the snapshot went meanwhile: then what it saw may have been given back, and read so."""
    if writer.get(Table.SEALS, pair_key(branch, epoch)) is None:
        return False
    put_checksums(writer, checksums)
    return True
