"""The worker that keeps compacted copies of the metadata on every device: the one LMDB file maps everything."""

import asyncio
import logging
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from blockvirt.errors import BlockvirtError
from blockvirt.limits import METADATA_COPY_INTERVAL_S, METADATA_COPY_RETRY_S
from blockvirt.meta.copies import remember_folders, write_copy
from blockvirt.meta.store import Store
from blockvirt.pool.devices import COPIES
from blockvirt.volumes.io_threads import IoThreads
from blockvirt.volumes.storage import PoolStorage

log = logging.getLogger("blockvirt.pool")


class MetadataCopies:
    """Writes a copy to each usable device, again after an interval, and sooner where it failed. One per pool."""

    def __init__(self, store: Store, storage: PoolStorage, threads: IoThreads, state_dir: Path) -> None:
        """``state_dir`` is where the folders of the copies are noted."""
        self._store = store
        self._storage = storage
        self._threads = threads
        self._state_dir = state_dir

    async def run(self) -> None:
        """Work until cancelled. A copy that fails is a problem of its device until one succeeds."""
        while True:
            due = await self._copy_to(set(self._storage.paths()))
            try:
                await remember_folders(self._state_dir, [path / COPIES for path in self._storage.paths().values()])
            except OSError as error:
                log.error("cannot note where the copies of the metadata lie: %s", error)
            left_s = METADATA_COPY_INTERVAL_S
            while left_s > 0:
                pause_s = METADATA_COPY_RETRY_S if due else left_s
                await asyncio.sleep(pause_s)
                left_s -= pause_s
                due = await self._copy_to(due)

    async def _copy_to(self, due: Iterable[str]) -> set[str]:
        """Write a copy to these devices; returns those where that failed."""
        failed = set()
        for device_id in due:
            path = self._storage.paths().get(device_id)
            if path is None:  # removed or out of reach by now: that is a problem of its own
                continue
            problem = ""
            try:
                await self._threads.run(partial(write_copy, self._store, path / COPIES, time.time()))
            except BlockvirtError as error:
                log.error("no copy of the metadata in %s: %s", path / COPIES, error)
                problem = f"{error.message}; {error.correction}"
                failed.add(device_id)
            self._storage.copied(device_id, problem)
        return failed
