"""Taking deleted volumes apart in the background: files first (their space is what matters), then rows in steps.

Every step is idempotent: a volume flagged ``deleting`` cannot be opened, and a crash only repeats a step.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from blockvirt.errors import BlockvirtError, DamagedRecord, DeviceFault
from blockvirt.limits import DELETE_BATCH_ROWS, DELETE_RETRY_S
from blockvirt.meta.keys import Table, number_key, pair_key
from blockvirt.meta.records import FileRecord, VolumeRecord
from blockvirt.meta.store import Writer
from blockvirt.pool.backing import backing_path, unlink_files
from blockvirt.volumes.context import VolumeContext, files_of
from blockvirt.volumes.journal import journal_paths

log = logging.getLogger("blockvirt.deletion")


class Deleter:
    """The worker that removes volumes flagged ``deleting``. One per pool."""

    def __init__(
        self, context: VolumeContext, discard: Callable[[str], Awaitable[None]], gone: Callable[[str], None]
    ) -> None:
        """``discard(volume id)`` drops its sessions and closes it; ``gone(volume id)`` hears of the end."""
        self._store = context.store
        self._storage = context.storage
        self._threads = context.threads
        self._discard = discard
        self._gone = gone
        self._work = asyncio.Event()
        self._work.set()

    def wake(self) -> None:
        """Say that a volume was flagged."""
        self._work.set()

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self._work.wait()
            self._work.clear()
            for record in self._flagged():
                try:
                    await self._delete(record)
                    continue
                except (BlockvirtError, OSError) as error:
                    log.error("volume %s is not wholly deleted yet: %s", record.name, error)
                except Exception:  # a mistake of ours with one volume must not end the worker of all
                    log.exception("deleting volume %s failed", record.name)
                asyncio.get_running_loop().call_later(DELETE_RETRY_S, self._work.set)

    def _flagged(self) -> list[VolumeRecord]:
        flagged = []
        with self._store.read() as reader:
            for key, _ in reader.scan(Table.VOLUMES):
                try:
                    record = reader.record(VolumeRecord, Table.VOLUMES, key)
                except DamagedRecord:
                    continue  # quarantined: whoever lists it sees that
                if record is not None and record.deleting:
                    flagged.append(record)
        return flagged

    async def _delete(self, record: VolumeRecord) -> None:
        await self._discard(record.id)
        files = files_of(self._store, record.branch)
        await self._unlink(record.branch, files)
        prefixes = [(Table.LEAVES, number_key(record.branch)), (Table.BORN, number_key(record.branch))]
        prefixes += [(Table.PUNCH, number_key(file.number)) for file in files]
        for table, prefix in prefixes:
            while await self._store.commit(partial(_delete_rows, table, prefix)):
                pass

        def finish(writer: Writer) -> None:
            for file in files:
                writer.delete(Table.FILES, number_key(file.number))
                writer.delete(Table.BRANCH_FILES, pair_key(record.branch, file.number))
            writer.delete(Table.BRANCHES, number_key(record.branch))
            writer.delete(Table.VOLUMES, record.id.encode())

        await self._store.commit(finish)
        for file in files:
            self._storage.removed(file.device_id, file.number)
        self._gone(record.id)
        log.info("volume %s (%s) is deleted", record.name, record.id)

    async def _unlink(self, branch: int, files: list[FileRecord]) -> None:
        paths = self._storage.paths()
        missing = {file.device_id for file in files} - paths.keys()
        if missing:
            raise DeviceFault(
                f"device {missing.pop()} is missing", correction="bring it back: the deletion then goes on by itself"
            )
        doomed = [backing_path(paths[file.device_id], branch, file.number) for file in files]
        doomed += [path for folder in paths.values() for path in journal_paths(folder, branch) if path.exists()]
        await self._threads.run(lambda: unlink_files(doomed))


def _delete_rows(table: Table, prefix: bytes, writer: Writer) -> int:
    """Remove some of the rows under ``prefix``; returns how many."""
    keys = [key for (key, _), _ in zip(writer.scan(table, prefix=prefix), range(DELETE_BATCH_ROWS), strict=False)]
    for key in keys:
        writer.delete(table, key)
    return len(keys)
