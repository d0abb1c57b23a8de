"""Histories written as records: real snapshots and map versions by the thousand, whose chunks are holes in a file.

Ten thousand snapshots through the API would take minutes; these take a second, through the real store, while no daemon
runs. What the API would have made and the background finished is there: names, points, versions, checksums.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from blockvirt.checksum import crc32c
from blockvirt.ids import new_id
from blockvirt.limits import LEAF_CHUNKS
from blockvirt.lun.address import address
from blockvirt.lun.leaf import encode
from blockvirt.meta.keys import Table, born_key, leaf_key, number_key, pair_key, split_pair
from blockvirt.meta.records import BranchRecord, FileRecord, SnapshotRecord, VolumeRecord, seal
from blockvirt.meta.store import Reader, Writer
from blockvirt.pool.backing import backing_path
from blockvirt.snapshots.transactions import put_new
from blockvirt.volumes.checksums import put_checksums
from blockvirt.volumes.engine import Engine
from blockvirt.volumes.transactions import locate
from blockvirt.volumes.versions import branch_record, leaf_births, visible_version

if TYPE_CHECKING:
    from array import array

CHECKSUMS_PER_COMMIT = 1 << 18


@dataclass(frozen=True, slots=True)
class History:
    """So many snapshots of a volume, each of which saw one chunk changed in so many leaves since the one before."""

    volume: str
    snapshots: int
    leaves_each: int = 1
    prefix: str = "past"
    """Names are this and a number."""


async def write_histories(state_dir: Path, histories: Sequence[History]) -> None:
    """Add snapshots to volumes that are mapped from end to end. The changed chunks are holes: they read as zeros."""
    engine = await Engine.start(state_dir, [])
    try:
        shift = engine.context.chunk_shift
        for history in histories:
            file = await engine.store.commit(_Past(history, crc32c(bytes(1 << shift))))
            path = backing_path(engine.storage.path_of(file.device_id), file.branch, file.number)
            with path.open("r+b") as stream:
                stream.truncate(file.used_chunks << shift)
    finally:
        await engine.close()


async def write_checksums(state_dir: Path, volume: str, chunks: int) -> None:
    """End the sealing of a volume over a sparse file whose first ``chunks`` chunks were never written."""
    engine = await Engine.start(state_dir, [])
    try:
        zeros = crc32c(bytes(1 << engine.context.chunk_shift))
        with engine.store.read() as reader:
            branch = _volume(reader, volume).branch
            file = split_pair(next(iter(reader.scan(Table.BRANCH_FILES, prefix=number_key(branch))))[0])[1]
        for start in range(0, chunks, CHECKSUMS_PER_COMMIT):
            numbers = range(start, min(chunks, start + CHECKSUMS_PER_COMMIT))
            await engine.store.commit(_checksums(file, numbers, zeros))
        await engine.store.commit(_all_sealed)
    finally:
        await engine.close()


def _checksums(file: int, chunks: range, checksum: int) -> Callable[[Writer], None]:
    return lambda writer: put_checksums(writer, dict.fromkeys((address(file, chunk) for chunk in chunks), checksum))


def _all_sealed(writer: Writer) -> None:
    for key, _ in list(writer.scan(Table.SEALS)):
        writer.delete(Table.SEALS, key)


class _Past:
    """One volume's history. Runs in the store's thread, possibly twice: it has no effect but on the writer."""

    def __init__(self, history: History, checksum_of_zeros: int) -> None:
        self._history = history
        self._checksum = checksum_of_zeros

    def __call__(self, writer: Writer) -> FileRecord:
        history = self._history
        volume = _volume(writer, history.volume)
        branch = branch_record(writer, volume.branch)
        numbers = sorted({leaf for leaf, _ in leaf_births(writer, branch.number)})
        file = _newest_file(writer, branch.number)
        first_chunk = chunk = file.used_chunks
        leaves: dict[int, array[int]] = {}
        turn = 0
        for index in range(history.snapshots):
            epoch = branch.head_epoch + index
            for _ in range(history.leaves_each):
                leaf, slot = numbers[turn % len(numbers)], turn // len(numbers) % LEAF_CHUNKS
                if leaf not in leaves:
                    found = visible_version(writer, branch.number, leaf, epoch)
                    assert found is not None
                    assert found[0] < epoch, "the head owns what it wrote since the last snapshot: take one first"
                    leaves[leaf] = found[1][:]
                leaves[leaf][slot] = address(file.number, chunk)
                key = leaf_key(branch.number, leaf, epoch)
                writer.put(Table.LEAVES, key, seal(key, encode(leaves[leaf])))
                writer.put(Table.BORN, born_key(branch.number, epoch, leaf), b"")
                turn, chunk = turn + 1, chunk + 1
            self._take(writer, volume, branch, epoch, index)
        put_checksums(
            writer, dict.fromkeys((address(file.number, each) for each in range(first_chunk, chunk)), self._checksum)
        )
        changed = replace(file, used_chunks=chunk, live_chunks=file.live_chunks + chunk - first_chunk)
        writer.put_record(Table.FILES, number_key(file.number), changed)
        head = replace(branch, head_epoch=branch.head_epoch + history.snapshots)
        writer.put_record(Table.BRANCHES, number_key(branch.number), head)
        return changed

    def _take(self, writer: Writer, volume: VolumeRecord, branch: BranchRecord, epoch: int, index: int) -> None:
        record = SnapshotRecord(
            id=new_id(),
            volume_id=volume.id,
            name=f"{self._history.prefix}{index:05d}",
            branch=branch.number,
            epoch=epoch,
            size_bytes=volume.size_bytes,
            created_s=volume.created_s + index,
            mapped_chunks=branch.mapped_chunks,
        )
        put_new(writer, record)
        writer.delete(Table.SEALS, pair_key(branch.number, epoch))


def _volume(reader: Reader, name: str) -> VolumeRecord:
    volume = reader.record(VolumeRecord, Table.VOLUMES, locate(reader, name)[0].encode())
    assert volume is not None
    return volume


def _newest_file(writer: Writer, branch: int) -> FileRecord:
    numbers = [split_pair(key)[1] for key, _ in writer.scan(Table.BRANCH_FILES, prefix=number_key(branch))]
    file = writer.record(FileRecord, Table.FILES, number_key(max(numbers)))
    assert file is not None
    return file
