"""Sealing: what a snapshot has sealed gets its checksums, in the background.

A row (branch, epoch) is queued with each snapshot and goes when all is done. Only leaves that changed since the point
before are looked at, and only chunks that have no checksum yet are read, a few at a time; a crash repeats little. A row
that fails stays, and waits until it is tried again: for its device where that is missing, else for a while.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial

from blockvirt.checksum import crc32c
from blockvirt.errors import BlockvirtError, DamagedRecord, DeviceFault
from blockvirt.limits import SEAL_BATCH_BYTES, SEAL_BATCH_LEAVES, SEAL_PAUSE_S, SEAL_REST_RATIO, SEAL_RETRY_S
from blockvirt.lun.address import ADDRESS_MASK, chunk_of, file_of
from blockvirt.meta.keys import Table, number_key, pair_key, split_pair
from blockvirt.meta.records import FileRecord
from blockvirt.meta.store import Reader, Writer
from blockvirt.pool.backing import BackingFile, backing_path
from blockvirt.volumes.checksums import put_checksums, without_checksum
from blockvirt.volumes.engine import Engine
from blockvirt.volumes.gaps import born_between
from blockvirt.volumes.versions import owner_of, previous_point, visible_version

log = logging.getLogger("blockvirt.sealing")


Row = tuple[int, int]
"""(branch, epoch) of a snapshot that waits for checksums."""


class Sealer:
    """The worker that computes the checksums. One per pool."""

    def __init__(self, engine: Engine) -> None:
        self._context = engine.context
        self._store = engine.store
        self._batch_chunks = max(1, SEAL_BATCH_BYTES >> engine.context.chunk_shift)
        self._due = engine.sealing
        self._due.set()
        self._put_off: dict[Row, str] = {}
        """Rows that failed, with the id of the device that they lack; '': it was something else."""
        self._retries = False
        """It is time to look at those again."""
        self._timer: asyncio.TimerHandle | None = None
        """Of the next such time."""
        self.sealed_chunks = 0
        """Since the start, for metrics."""

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self._due.wait()
            self._due.clear()
            for row in await self._context.threads.run(self._ready):
                try:
                    await self._seal(*row)
                    continue
                except (BlockvirtError, OSError) as error:
                    log.error("what a snapshot of branch %d sealed has no checksums yet: %s", row[0], error)
                except Exception:  # a mistake of ours with one snapshot must not end the worker of all
                    log.exception("sealing what a snapshot of branch %d sees failed", row[0])
                self._put_off[row] = ""
            if self._put_off and self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(SEAL_RETRY_S, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._retries = True
        self._due.set()

    def _ready(self) -> list[Row]:
        """Return the rows to work on: of those that failed none before its time, nor before its device is back. Blocks.

        A snapshot is no reason to try them: there may be thousands, and one snapshot a second.
        """
        with self._store.read() as reader:
            rows = [split_pair(key) for key, _ in reader.scan(Table.SEALS)]
        retries, self._retries = self._retries, False
        kept = set(self._put_off.values())
        if retries:
            kept = {device for device in kept if device and self._fault_of(device) is not None}
        self._put_off = {row: self._put_off[row] for row in rows if self._put_off.get(row) in kept}
        return [row for row in rows if row not in self._put_off]

    def _fault_of(self, device_id: str) -> DeviceFault | None:
        """Return why a device cannot be used now; None: it can."""
        try:
            self._context.storage.path_of(device_id)
        except DeviceFault as fault:
            return fault
        return None

    def _lacking(self, reader: Reader, addresses: Sequence[int]) -> str:
        """Return the id of a missing device that some of ``addresses`` are on; '': there is none."""
        numbers = {file_of(address) for address in addresses}
        for device_id in {_file(reader, number).device_id for number in numbers}:
            fault = self._fault_of(device_id)
            if fault is not None:
                if device_id not in self._put_off.values():
                    log.error("what snapshots sealed there gets its checksums when the device is back: %s", fault)
                return device_id
        return ""

    async def _seal(self, branch: int, epoch: int) -> None:
        mark, leaves = await self._context.threads.run(partial(self._leaves, branch, epoch))
        while leaves:
            look = partial(self._unsealed, branch, epoch, leaves)
            looked, addresses, lacking = await self._context.threads.run(look)
            if lacking:
                self._put_off[branch, epoch] = lacking
                return
            leaves = leaves[looked:]
            for start in range(0, len(addresses), self._batch_chunks):
                batch = addresses[start : start + self._batch_chunks]
                began_s = time.monotonic()
                checksums = await self._context.threads.run(partial(self._compute, batch))
                if not await self._store.commit(partial(_put, branch, epoch, checksums)):
                    return  # the snapshot went meanwhile
                self.sealed_chunks += len(checksums)
                # Longer where it took longer: what is slow now is what guests wait for.
                await asyncio.sleep(SEAL_REST_RATIO * (time.monotonic() - began_s))
            await asyncio.sleep(SEAL_PAUSE_S)
        await self._store.commit(partial(_forget, branch, epoch, mark))

    def _leaves(self, branch: int, epoch: int) -> tuple[bytes | None, list[int]]:
        """Return what the row says, and the leaves that changed between the point before and the snapshot. Blocks."""
        with self._store.read() as reader:
            mark = reader.get(Table.SEALS, pair_key(branch, epoch))
            before = previous_point(reader, branch, epoch)
            return mark, sorted({leaf for _, leaf, _ in born_between(reader, branch, before + 1, epoch)})

    def _unsealed(self, branch: int, epoch: int, leaves: Sequence[int]) -> tuple[int, list[int], str]:
        """Return what a snapshot sees in the first of ``leaves`` and has no checksum: how many leaves, the addresses.

        And a device that they are on and that is missing. A batch of chunks or so at a time. Only the branch's own:
        others are their branches' business. Blocks.
        """
        addresses: list[int] = []
        looked = 0
        with self._store.read() as reader:
            if reader.get(Table.SEALS, pair_key(branch, epoch)) is None:
                return len(leaves), [], ""
            is_own = owner_of(reader, branch)
            for leaf in leaves[:SEAL_BATCH_LEAVES]:
                if len(addresses) >= self._batch_chunks:
                    break
                looked += 1
                try:
                    found = visible_version(reader, branch, leaf, epoch)
                    entries = found[1] if found is not None else ()
                    addresses += without_checksum(reader, {entry & ADDRESS_MASK for entry in entries if entry}, is_own)
                except DamagedRecord as error:
                    log.error("%s", error)
            return looked, sorted(addresses), self._lacking(reader, addresses)

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
            record = _file(reader, number)
        path = backing_path(self._context.storage.path_of(record.device_id), record.branch, number)
        file = BackingFile(record, path, self._context.chunk_shift)
        file.open(read_only=True)
        return file


def _file(reader: Reader, number: int) -> FileRecord:
    record = reader.record(FileRecord, Table.FILES, number_key(number))
    if record is None:
        raise DamagedRecord(f"backing file {number} has no record", correction="run 'blockvirt check'")
    return record


def _put(branch: int, epoch: int, checksums: dict[int, int], writer: Writer) -> bool:
    """Store checksums, unless the snapshot went meanwhile: then what it saw may have been given back, and read so."""
    if writer.get(Table.SEALS, pair_key(branch, epoch)) is None:
        return False
    put_checksums(writer, checksums)
    return True


def _forget(branch: int, epoch: int, mark: bytes | None, writer: Writer) -> None:
    """Remove a row that is done, unless a flatten has put it anew since ``mark`` was read: there is more to do then."""
    key = pair_key(branch, epoch)
    if writer.get(Table.SEALS, key) == mark:
        writer.delete(Table.SEALS, key)
