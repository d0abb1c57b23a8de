"""One open volume with everything that works on it: opened on the first session, closed after the last."""

import logging

from blockvirt.errors import BlockvirtError, VolumeStopped
from blockvirt.meta.keys import Table, number_key
from blockvirt.meta.records import BranchRecord, VolumeRecord
from blockvirt.volumes.checkpoint import Checkpointer
from blockvirt.volumes.context import VolumeContext
from blockvirt.volumes.flush import Flusher, sync_data
from blockvirt.volumes.slow_path import SlowPath
from blockvirt.volumes.volume import Volume

log = logging.getLogger("blockvirt.volumes")


class OpenVolume:
    """A volume's parts, wired."""

    def __init__(self, context: VolumeContext, record: VolumeRecord, branch: BranchRecord) -> None:
        self.volume = Volume(context, record, branch)
        self.flusher = Flusher(self.volume)
        self.checkpointer = Checkpointer(self.volume, self.flusher)
        self.slow = SlowPath(self.volume, self.flusher, self.checkpointer)
        context.inflights.add(self.volume.inflight)
        self._watch = self.volume.tasks.start(self.checkpointer.watch(), "watch")

    async def close(self) -> None:
        """Checkpoint, give reserved space back, remove the journal and close every descriptor.

        A volume that has stopped keeps its journal and its files as they are, for recovery. Never raises for what
        the disk does: that stops the volume.
        """
        volume = self.volume
        await self._quiet()
        if volume.failure is None:
            try:
                await self.checkpointer.run_all()
                async with self.flusher.syncing:
                    await sync_data(volume)
            except BlockvirtError as error:
                log.error("volume %s: closing: %s", volume.record.name, error)
        await self.abandon(keep_journal=volume.failure is not None)

    async def close_foreign(self) -> None:
        """Close the files of other branches: while they are open, unlinking them frees nothing."""
        files = self.volume.files.take_foreign()
        await self.volume.inflight.drained()
        for file in files:
            file.close()

    async def abandon(self, *, keep_journal: bool) -> None:
        """Close every descriptor and let memory go, without a checkpoint."""
        volume = self.volume
        self._watch.cancel()
        if volume.age_timer is not None:
            volume.age_timer.cancel()
        await self._quiet()
        await self._background_ended()
        if isinstance(volume.failure, VolumeStopped):
            await volume.note_stop()
        await volume.files.close(give_back=volume.failure is None)
        journal = volume.journal
        if journal is not None:
            try:
                await volume.context.threads.run(lambda: journal.close(remove=not keep_journal))
            except OSError as error:  # what is left of it is covered: the next open removes it
                log.error("volume %s: its journal is not removed: %s", volume.record.name, error)
        volume.map.close()
        volume.context.inflights.discard(volume.inflight)

    async def _background_ended(self) -> None:
        """Return when no task is left and no flush is under way, which is none."""
        while self.volume.tasks or self.flusher.syncing.locked():
            await self.volume.tasks.wait()
            async with self.flusher.syncing:
                pass

    async def _quiet(self) -> None:
        """Return when no operation is under way: sessions that were dropped may have left some."""
        await self.volume.busy.released()
        await self.volume.inflight.drained()


def opening(context: VolumeContext, record: VolumeRecord, *, reverted: bool = False) -> OpenVolume:
    """Open a volume; raises VolumeStopped where it waits for ``volume reopen``, DamagedRecord.

    With ``reverted`` also where it waits only because it was reverted under its guests.
    """
    with context.store.read() as reader:
        branch = reader.record(BranchRecord, Table.BRANCHES, number_key(record.branch))
    assert branch is not None, "a volume and its branch are made in one transaction"
    check_stopped(record, branch, reverted=reverted)
    return OpenVolume(context, record, branch)


def check_stopped(record: VolumeRecord, branch: BranchRecord, *, reverted: bool = False) -> None:
    """Return unless a volume waits for ``volume reopen``, with ``reverted`` for a failure's sake; raises VolumeStopped.

    After a revert under its guests nobody has written to it: there is nothing to recover.
    """
    if branch.stopped and not (reverted and branch.awaits_guests):
        raise VolumeStopped.because(record.name, branch.stopped)
