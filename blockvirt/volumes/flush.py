"""FLUSH and FUA: when the reply leaves, everything that was replied to before survives power loss (I3).

One sync where the map did not change, two where it did: first the data, then a mark in the journal that speaks for
the map changes made before the flush began. Who asks while one runs joins the next.
"""

import asyncio
import time
from collections.abc import Callable

from blockvirt.volumes.volume import Volume


class Flusher:
    """The flushes of one open volume."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self.syncing = asyncio.Lock()
        """Held by a flush, and by a checkpoint from its freeze to its commit: a flush that comes while a checkpoint
        runs waits for its commit, so a mark never speaks across generations."""
        self._next: asyncio.Task[None] | None = None

    async def flush(self) -> None:
        """Return when every write replied to before the call is durable; raises VolumeStopped."""
        volume = self._volume
        volume.check()
        assert not volume.unsettled()
        if self._next is None:
            self._next = volume.tasks.start(self._round(), "flush", awaited=True)
        # Shielded: others wait for the same round.
        await asyncio.shield(self._next)

    async def _round(self) -> None:
        async with self.syncing:
            # What is replied to from here on may lie behind what this round notes: who comes now joins the next.
            self._next = None
            started_s = time.perf_counter()
            await self._flush_noted()
            self._volume.stats.flushes += 1
            self._volume.stats.flush_s += time.perf_counter() - started_s

    async def _flush_noted(self) -> None:
        volume = self._volume
        volume.check()
        journal = volume.journal
        upto = journal.map_sequence if journal is not None else 0
        needs_mark = journal is not None and journal.needs_mark()
        await sync_data(volume)
        if journal is None or not needs_mark:
            return
        volume.check()
        try:
            marked = journal.mark(upto)
        except OSError as error:
            raise volume.stop("its journal cannot be written", error) from error
        assert marked, "room for marks is kept free, and a half-full journal asks for a checkpoint"
        await sync_guarded(volume, "its journal cannot be synced", journal.sync)
        journal.durable_sequence = max(journal.durable_sequence, upto)


async def sync_data(volume: Volume) -> None:
    """Sync the files written since they were last noted. A failure stops the volume (I7)."""
    files = volume.files.unsynced()
    if not files:
        return
    for file in files:
        file.unsynced_bytes = 0

    def sync_all() -> None:
        for file in files:
            file.sync()

    await sync_guarded(volume, "its data cannot be synced", sync_all)


async def sync_guarded(volume: Volume, what: str, sync: Callable[[], None]) -> None:
    """Run a blocking sync in a thread; whatever keeps it from succeeding stops the volume (I7)."""
    started_s = time.perf_counter()
    try:
        await volume.context.threads.run(sync)
    except OSError as error:
        raise volume.stop(what, error) from error
    volume.stats.syncs += 1
    volume.stats.sync_s += time.perf_counter() - started_s
