"""The embedded engine: a pool with its metadata, devices, open volumes and background workers, in order up and down.

Everything that touches a pool goes through one of these: the daemon holds one for its life, tests and tools open their
own. ``close`` is the unwinding of ``start``.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from blockvirt.errors import BlockvirtError, DamagedRecord, InvalidRequest, MetadataFault
from blockvirt.ids import new_id
from blockvirt.limits import (
    CHECKPOINT_AGE_S,
    DEFAULT_CHUNK_BYTES,
    IO_THREADS,
    LEAF_CACHE_BYTES,
    MAX_BACKING_FILE_BYTES,
    MAX_CHUNK_BYTES,
    METADATA_RESERVE_BYTES,
    METADATA_RESERVE_RETRY_S,
    MIN_CHUNK_BYTES,
    PRESSURE_STEP_BYTES,
)
from blockvirt.lun.address import CHUNK_MASK
from blockvirt.meta.copies import naming_newest, remembered_folders
from blockvirt.meta.datafile import DATA_FILE
from blockvirt.meta.keys import POOL_KEY, Table
from blockvirt.meta.records import DeviceRecord, PoolRecord
from blockvirt.meta.store import Reader, Store
from blockvirt.pool.devices import claim_all
from blockvirt.pool.lock import lock_pool
from blockvirt.tasks import TaskSet
from blockvirt.volumes.checksums import SealedChecksums
from blockvirt.volumes.context import VolumeContext
from blockvirt.volumes.copies import CopyBuffer
from blockvirt.volumes.deletion import Purger
from blockvirt.volumes.io_threads import IoThreads
from blockvirt.volumes.jobs import JobBoard
from blockvirt.volumes.leaf_map import LeafCache
from blockvirt.volumes.leftovers import Leftovers
from blockvirt.volumes.pressure import WritePressure
from blockvirt.volumes.punch import Puncher
from blockvirt.volumes.reclaim import PURGE, RECLAIM, Reclaimer, adopt_rows
from blockvirt.volumes.registry import VolumeRegistry
from blockvirt.volumes.storage import PoolStorage

log = logging.getLogger("blockvirt.pool")

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an administrator may choose about the engine; the defaults are those of ``limits``."""

    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    """Only when the pool is created: a power of two."""
    leaf_cache_bytes: int = LEAF_CACHE_BYTES
    metadata_reserve_bytes: int = METADATA_RESERVE_BYTES
    checkpoint_age_s: float = CHECKPOINT_AGE_S
    backing_file_bytes: int = MAX_BACKING_FILE_BYTES


class Engine:
    """A running pool. Made by ``start``."""

    def __init__(self, context: VolumeContext, storage: PoolStorage) -> None:
        self.context = context
        self.store = context.store
        self.storage = storage
        self.leftovers = Leftovers(context)
        self.jobs = JobBoard(context.store, work=context.jobs)
        self.sealing = asyncio.Event()
        """Set when a snapshot was taken: what it seals is to get checksums."""
        self.registry = VolumeRegistry(context, self.leftovers, self.jobs.wake)
        self.puncher = Puncher(context)
        self.reclaimer = Reclaimer(context, self.puncher, self.jobs.wake)
        purger = Purger(context.store, self.reclaimer, self.registry.discard, self.registry.forget)
        self.jobs.register(RECLAIM, self.reclaimer.work, cancellable=False, retries=True)
        self.jobs.register(PURGE, purger.work, cancellable=False, retries=True)
        self._stack = AsyncExitStack()

    @classmethod
    async def start(cls, state_dir: Path, devices: Sequence[Path], settings: EngineSettings | None = None) -> "Engine":
        """Open the pool in ``state_dir``, creating it at the first start, and recover what a dead daemon left.

        ``devices`` are directories that belong to the pool from now on; those that do already are left alone. A pool
        without any gets 'pool' in the state directory. Raises PoolLocked, MetadataFault, DeviceFault, InvalidRequest.
        """
        settings = settings or EngineSettings()
        async with AsyncExitStack() as stack:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.callback(lock_pool(state_dir).release)
            store = _open_store(state_dir, settings)
            stack.callback(store.close)
            pool = pool_record(store, settings)
            threads = IoThreads(IO_THREADS)
            stack.callback(threads.close)
            with store.read() as reader:
                members = members_of(reader)
            storage = PoolStorage(store, threads, *claim_all(members, pool.id))
            stack.push_async_callback(storage.close)
            await _add_devices(storage, members, devices or ([] if members else [state_dir / "pool"]))
            engine = cls(volume_context(settings, pool, storage, store, threads), storage)
            stack.push_async_callback(engine.registry.close)
            store.on_failure(engine.registry.stop_all)
            await engine.leftovers.settle_all()
            workers = TaskSet("pool")
            stack.push_async_callback(workers.close)
            workers.start(engine.puncher.run(), "punch")
            await store.commit(adopt_rows)
            workers.start(engine.jobs.run(), "jobs")
            workers.start(_mend_reserve(store), "metadata reserve")
            engine._stack = stack.pop_all()
            return engine

    def not_ready(self) -> str:
        """Return why the pool cannot be worked with as a whole; empty when it can."""
        try:
            self.store.stats()
        except BlockvirtError as error:
            return f"metadata: {error.message}"
        return ""

    async def close(self) -> None:
        """Close every volume with a checkpoint, end the workers, let go of devices and store. Idempotent."""
        await self._stack.aclose()


def _open_store(state_dir: Path, settings: EngineSettings) -> Store:
    """Open the metadata, new where there never was any; a fault names the newest intact copy of it."""
    folders = remembered_folders(state_dir)
    data_file = state_dir / "metadata" / DATA_FILE
    is_empty = not data_file.exists() or not data_file.stat().st_size
    try:
        if is_empty and folders:  # a new, empty pool would hide the one that is still on the devices
            raise MetadataFault(f"the metadata of the pool in {state_dir} is missing", correction="bring it back")
        return Store.open(state_dir / "metadata", create=True, reserve_bytes=settings.metadata_reserve_bytes)
    except MetadataFault as fault:
        raise naming_newest(fault, folders) from fault


async def _mend_reserve(store: Store) -> None:
    """Have new chunks given again soon after somebody made room for the metadata reserve; until cancelled.

    Commits look at the reserve by themselves, but a pool in which every write waits for space makes none.
    """
    while True:
        await asyncio.sleep(METADATA_RESERVE_RETRY_S)
        if store.reserve_ok:
            continue
        try:
            if await store.check_reserve():
                log.info("the metadata reserve of %s is whole again", store.path)
        except BlockvirtError as error:
            log.error("the metadata reserve of %s cannot be looked at: %s", store.path, error)


def volume_context(
    settings: EngineSettings, pool: PoolRecord, storage: PoolStorage, store: Store, threads: IoThreads
) -> VolumeContext:
    """Return what the volumes of a pool share."""
    return VolumeContext(
        pool_id=pool.id,
        chunk_shift=pool.chunk_bytes.bit_length() - 1,
        store=store,
        storage=storage,
        threads=threads,
        cache=LeafCache(settings.leaf_cache_bytes),
        pressure=WritePressure(PRESSURE_STEP_BYTES),
        punches=asyncio.Event(),
        jobs=asyncio.Event(),
        # One address less than fits: entries of neighbouring chunks in two files must not look like one run.
        file_chunks=min(settings.backing_file_bytes // pool.chunk_bytes, CHUNK_MASK),
        checkpoint_age_s=settings.checkpoint_age_s,
        checksums=SealedChecksums(store),
        copy_buffer=CopyBuffer(pool.chunk_bytes),
    )


def pool_record(store: Store, settings: EngineSettings) -> PoolRecord:
    """Return the pool's record, made at the first start; raises MetadataFault for a newer format, DamagedRecord."""
    with store.read() as reader:
        found = reader.record(PoolRecord, Table.POOL, POOL_KEY)
        is_new = not any(reader.count(table) for table in (Table.POOL, Table.DEVICES, Table.VOLUMES, Table.BRANCHES))
    if found is None and not is_new:
        raise DamagedRecord(
            "the pool's own record is missing from the metadata, and others are there",
            correction="run 'blockvirt check'; 'blockvirt check --restore-metadata' brings back the newest intact copy",
        )
    if found is not None:
        if found.format_version > FORMAT_VERSION:
            raise MetadataFault(
                f"the pool has format {found.format_version}, this blockvirt reads up to {FORMAT_VERSION}",
                correction="start the version of blockvirt that wrote it, or a newer one",
            )
        return found
    size = settings.chunk_bytes
    if size & (size - 1) or not MIN_CHUNK_BYTES <= size <= MAX_CHUNK_BYTES:
        raise InvalidRequest(
            f"a chunk of {size} bytes is not possible",
            correction=f"choose a power of two from {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES}",
        )
    made = PoolRecord(new_id(), FORMAT_VERSION, size, time.time(), epoch=0, next_branch=1, next_file=1)
    store.commit_now(lambda writer: writer.put_record(Table.POOL, POOL_KEY, made))
    return made


def members_of(reader: Reader) -> list[DeviceRecord]:
    """Return the devices of a pool, usable or not; raises DamagedRecord."""
    members = []
    for key, _ in reader.scan(Table.DEVICES):
        record = reader.record(DeviceRecord, Table.DEVICES, key)
        assert record is not None
        members.append(record)
    return members


async def _add_devices(storage: PoolStorage, members: Sequence[DeviceRecord], paths: Sequence[Path]) -> None:
    known = {Path(member.path) for member in members}
    for path in paths:
        if path.resolve() in known:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        status = await storage.add(str(path), None, None, None, {}, create=True)
        log.info("device %s is now part of the pool: %s", status.name, status.path)
