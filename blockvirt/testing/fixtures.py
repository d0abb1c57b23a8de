"""Pools for tests and benchmarks, written through the real store: real map records over sparse files."""

import random
from array import array
from dataclasses import replace
from pathlib import Path

from blockvirt.ids import new_id
from blockvirt.limits import LEAF_CHUNKS
from blockvirt.lun.address import FRESH, address
from blockvirt.lun.leaf import NO_ENTRIES, encode
from blockvirt.meta.keys import POOL_KEY, Table, born_key, leaf_key, number_key, pair_key, volume_branch_key
from blockvirt.meta.records import BranchRecord, FileRecord, PoolRecord, VolumeRecord, seal
from blockvirt.meta.store import Writer
from blockvirt.pool.backing import backing_path
from blockvirt.volumes.engine import Engine

_VOLUMES_PER_COMMIT = 500


async def write_mapped_pool(state_dir: Path, device_dir: Path, volumes: int, mapped_chunks: int) -> None:
    """Make a pool with ``volumes`` volumes that together map ``mapped_chunks`` chunks, in scattered order.

    The volumes are called v00000, v00001 and so on; their backing files are sparse, so every chunk reads as zeros.
    """
    engine = await Engine.start(state_dir, [device_dir])
    try:
        device_id, path = next(iter(engine.storage.paths().items()))
        for first in range(0, volumes, _VOLUMES_PER_COMMIT):
            numbers = range(first, min(volumes, first + _VOLUMES_PER_COMMIT))
            shares = [mapped_chunks // volumes + (number < mapped_chunks % volumes) for number in numbers]
            files = await engine.store.commit(_Batch(device_id, numbers, shares, engine.context.chunk_shift))
            for record in files:
                with backing_path(path, record.branch, record.number).open("wb") as file:
                    file.truncate(record.used_chunks << engine.context.chunk_shift)
    finally:
        await engine.close()


class _Batch:
    """One commit's volumes. Runs in the store's thread, possibly twice: it has no effect but on the writer."""

    def __init__(self, device_id: str, numbers: range, shares: list[int], chunk_shift: int) -> None:
        self._device_id = device_id
        self._numbers = numbers
        self._shares = shares
        self._chunk_shift = chunk_shift

    def __call__(self, writer: Writer) -> list[FileRecord]:
        pool = writer.record(PoolRecord, Table.POOL, POOL_KEY)
        assert pool is not None
        count = len(self._numbers)
        files = []
        for index, (number, chunks) in enumerate(zip(self._numbers, self._shares, strict=True)):
            branch, file, epoch = pool.next_branch + index, pool.next_file + index, pool.epoch + 1 + index
            volume_id = new_id()
            record = FileRecord(file, branch, self._device_id, used_chunks=chunks, live_chunks=chunks)
            size_bytes = max(1, chunks) << self._chunk_shift
            volume = VolumeRecord(volume_id, f"v{number:05d}", size_bytes, branch, pool.created_s)
            writer.put_record(Table.VOLUMES, volume_id.encode(), volume)
            writer.put(Table.VOLUME_NAMES, volume.name.encode(), volume_id.encode())
            head = BranchRecord(branch, volume_id, epoch, first_epoch=epoch, mapped_chunks=chunks)
            writer.put_record(Table.BRANCHES, number_key(branch), head)
            writer.put(Table.VOLUME_BRANCHES, volume_branch_key(volume_id, branch), b"")
            writer.put_record(Table.FILES, number_key(file), record)
            writer.put(Table.BRANCH_FILES, pair_key(branch, file), b"")
            _write_leaves(writer, head, file, chunks)
            files.append(record)
        counters = replace(
            pool,
            epoch=pool.epoch + count,
            next_branch=pool.next_branch + count,
            next_file=pool.next_file + count,
        )
        writer.put_record(Table.POOL, POOL_KEY, counters)
        return files


def _write_leaves(writer: Writer, head: BranchRecord, file: int, chunks: int) -> None:
    order = list(range(chunks))
    random.Random(file).shuffle(order)  # scattered, as after random writes: the stored form is the large one
    for leaf, start in enumerate(range(0, chunks, LEAF_CHUNKS)):
        part = order[start : start + LEAF_CHUNKS]
        entries = NO_ENTRIES[:]
        entries[: len(part)] = array("Q", [address(file, chunk) | FRESH for chunk in part])
        key = leaf_key(head.number, leaf, head.head_epoch)
        writer.put(Table.LEAVES, key, seal(key, encode(entries)))
        writer.put(Table.BORN, born_key(head.number, head.head_epoch, leaf), b"")
