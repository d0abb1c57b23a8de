"""What every open volume works with: the store, the pool's storage, threads, the leaf cache. Wired in the daemon."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from blockvirt.meta.keys import Table, number_key, split_pair
from blockvirt.meta.records import FileRecord, VolumeRecord
from blockvirt.meta.store import Store
from blockvirt.volumes.checksums import SealedChecksums
from blockvirt.volumes.copies import CopyBuffer
from blockvirt.volumes.io_threads import IoThreads
from blockvirt.volumes.leaf_map import LeafCache
from blockvirt.volumes.pressure import WritePressure
from blockvirt.volumes.ranges import Inflight


class Storage(Protocol):
    """The pool's devices and their space, as the data plane sees them. Figures are kept on the event loop."""

    counting: asyncio.Lock
    """Held from a commit that drops punch rows until its figures are changed: whoever counts anew takes it."""

    def path_of(self, device_id: str) -> Path:
        """Return the directory of a device; raises DeviceFault where it cannot be used now."""

    def identity_of(self, device_id: str) -> str:
        """Return the identity of the page cache that files on the device are written through."""

    def place(self, volume: VolumeRecord, needed_bytes: int) -> str:
        """Choose the device for a new backing file; raises PoolFull that says why none fits."""

    def admit(self, device_id: str, needed_bytes: int) -> None:
        """Refuse (PoolFull) where reserving so much more would eat the device's or the metadata's reserve."""

    def reserved(self, device_id: str, change_bytes: int) -> None:
        """Note that space reserved ahead of need grew or shrank."""

    def mapped(self, device_id: str, file: int, change_chunks: int) -> None:
        """Note that chunks of a backing file came into use, or were given back to the filesystem."""

    def recounted(self, device_id: str, file: int, chunks: int) -> None:
        """Note how many chunks of a backing file are in use, whatever was noted before."""

    def removed(self, device_id: str, file: int) -> None:
        """Note that a backing file is gone."""

    def paths(self) -> Mapping[str, Path]:
        """Return the directories of the devices that can be used now, by device id."""


@dataclass(frozen=True, slots=True)
class VolumeContext:
    """Everything an open volume shares with the others."""

    pool_id: str
    chunk_shift: int
    store: Store
    storage: Storage
    threads: IoThreads
    cache: LeafCache
    pressure: WritePressure
    punches: asyncio.Event
    """Set when the metadata store has new punch rows."""
    jobs: asyncio.Event
    """Set when it has new jobs, by those who know no job board."""
    file_chunks: int
    """Chunks after which a backing file is rotated."""
    checkpoint_age_s: float
    checksums: SealedChecksums
    copy_buffer: CopyBuffer
    inflights: set[Inflight] = field(default_factory=set)
    """The operations in threads of everything that is open: volumes, and snapshots that are read."""

    async def drained(self) -> None:
        """Return when no operation in a thread uses an address that its map has dropped by now.

        Of any volume: what one branch frees, another that comes from it may have been reading.
        """
        for inflight in list(self.inflights):
            await inflight.drained()


def files_of(store: Store, branch: int) -> list[FileRecord]:
    """Return the backing files of a branch, oldest first."""
    with store.read() as reader:
        found = [split_pair(key)[1] for key, _ in reader.scan(Table.BRANCH_FILES, prefix=number_key(branch))]
        records = [reader.record(FileRecord, Table.FILES, number_key(number)) for number in found]
    return [record for record in records if record is not None]
