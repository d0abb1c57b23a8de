"""Journals that a dead daemon left behind: found at start, recovered before the volume is served again."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from blockvirt.errors import BlockvirtError, DamagedRecord, DeviceFault, VolumeStopped
from blockvirt.meta.keys import Table, number_key
from blockvirt.meta.records import BranchRecord, FileRecord, VolumeRecord, punch_count
from blockvirt.meta.store import Store
from blockvirt.pool.backing import unlink_files
from blockvirt.volumes.context import VolumeContext, files_of
from blockvirt.volumes.journal import FoundJournal, journal_paths, read_journal, refuse_to_drop
from blockvirt.volumes.recovery import go_back_to_disk, recover, sync_overwrites
from blockvirt.volumes.versions import note_stopped

log = logging.getLogger("blockvirt.recovery")


class Leftovers:
    """Looks for journals on the pool's devices, and recovers."""

    def __init__(self, context: VolumeContext) -> None:
        self._context = context
        self._synced: set[int] = set()
        """Branches whose files hold nothing that a dead daemon wrote and nobody synced."""

    async def settle(self, record: VolumeRecord, *, reopen: bool = False) -> None:
        """Bring a volume's map up to date before it opens; where no journal was left, its files are synced once.

        Raises DeviceFault where a device with its data is missing, VolumeStopped where it had stopped for I7 and an
        administrator did not ask to ``reopen`` it, DamagedRecord, MetadataFault.
        """
        context = self._context
        with context.store.read() as reader:
            branch = reader.record(BranchRecord, Table.BRANCHES, number_key(record.branch))
        assert branch is not None, "a volume and its branch are made in one transaction"
        for file in files_of(context.store, branch.number):
            context.storage.path_of(file.device_id)
        found = await self._find(branch)
        reason = branch.stopped or (found.stop_reason if found is not None else "")
        if reason and not reopen:
            raise VolumeStopped.because(record.name, reason)
        if found is not None:
            await self._recover(record, branch, found)
        elif reason:
            with _in_our_words(record):
                await context.threads.run(lambda: go_back_to_disk(context, branch))
            await context.store.commit(lambda writer: note_stopped(writer, branch.number, ""))
        elif branch.number not in self._synced:
            with _in_our_words(record):
                await context.threads.run(lambda: sync_overwrites(context, branch))
        self._synced.add(branch.number)

    async def _recover(self, record: VolumeRecord, branch: BranchRecord, found: FoundJournal) -> None:
        with _in_our_words(record):
            done = await self._context.threads.run(lambda: recover(self._context, branch, found))
        await self._recount(branch.number)
        self._context.punches.set()
        self._context.jobs.set()
        log.info(
            "volume %s recovered %s: %d frames, %d changes",
            record.name,
            "completely" if done.complete else "as after a power cut",
            done.frames,
            done.changes,
        )

    async def _recount(self, branch: int) -> None:
        """Correct the pool's figures: what was replayed was not counted yet, what was dropped no longer is."""
        context = self._context
        async with context.storage.counting:
            for file, chunks in await context.threads.run(lambda: _in_use(context.store, branch)):
                context.storage.recounted(file.device_id, file.number, chunks)

    async def _find(self, branch: BranchRecord) -> FoundJournal | None:
        paths = dict(self._context.storage.paths())

        def look() -> FoundJournal | None:
            for device_id, folder in paths.items():
                found = read_journal(folder, device_id, branch.number)
                if found is not None:
                    return found
                if paths_left := [path for path in journal_paths(folder, branch.number) if path.exists()]:
                    refuse_to_drop(folder, branch)
                    unlink_files(paths_left)
            return None

        try:
            return await self._context.threads.run(look)
        except OSError as error:
            raise DeviceFault(
                f"cannot remove what is left of a journal of branch {branch.number}: {error}",
                correction="check the disk and its mount",
            ) from error

    def branches(self) -> list[int]:
        """Return the branches that have a journal on some device. Blocks briefly; for start-up."""
        found = set()
        for folder in self._context.storage.paths().values():
            for path in (folder / "journal").glob("*.0"):
                try:
                    found.add(int(path.stem, 16))
                except ValueError:
                    log.warning("%s is no journal of ours: left alone", path)
        return sorted(found)

    async def settle_all(self) -> None:
        """Recover every volume that has a journal; one that cannot be recovered is refused when it is opened."""
        for number in self.branches():
            try:
                record = self._volume_of(number)
                if record is not None and not record.deleting:
                    await self.settle(record)
            except BlockvirtError as error:
                log.error("branch %d: %s (%s) %s", number, error.message, error.cause, error.correction)

    def _volume_of(self, branch: int) -> VolumeRecord | None:
        with self._context.store.read() as reader:
            found = reader.record(BranchRecord, Table.BRANCHES, number_key(branch))
            if found is None:
                return None
            return reader.record(VolumeRecord, Table.VOLUMES, found.volume_id.encode())


@contextmanager
def _in_our_words(record: VolumeRecord) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DeviceFault(
            f"volume {record.name} cannot be recovered: {error}",
            correction="mend the disk and open it again; nothing of it was removed",
        ) from error


def _in_use(store: Store, branch: int) -> list[tuple[FileRecord, int]]:
    """Return how many chunks of each of a branch's files some entry names, or wait for their punch. Blocks."""
    found = []
    files = files_of(store, branch)
    with store.read() as reader:
        for file in files:
            chunks = file.live_chunks
            for key, stored in reader.scan(Table.PUNCH, prefix=number_key(file.number)):
                try:
                    chunks += punch_count(key, stored)
                except DamagedRecord as error:
                    log.error("%s", error)
            found.append((file, chunks))
    return found
