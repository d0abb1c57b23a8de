"""FLUSH and FUA: when the reply leaves, everything that was replied to before survives power loss (I3).

One sync where the map did not change: of the data. Where it did, the journal must have a mark that speaks for the map
changes made before the flush began, and what they name must be durable before the mark is. If little was written since
the last flush the mark brings it along, and the journal alone is synced; else the data is synced first, then the mark.
Who asks while one runs joins the next.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from functools import partial

from blockvirt.limits import FLUSH_EMBED_BYTES
from blockvirt.pool.backing import BackingFile
from blockvirt.volumes.journal import Journal
from blockvirt.volumes.volume import Volume

Changes = tuple[BackingFile, list[tuple[int, bytes]] | None]
"""A file, and what was written in it since the last flush (``BackingFile.take_last_changes``)."""


class Flusher:
    """The flushes of one open volume."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self.syncing = asyncio.Lock()
        """Held by a flush, and by a checkpoint from its freeze to its commit: a flush that comes while a checkpoint
        runs waits for its commit, so a mark never speaks across generations."""
        self._next: list[asyncio.Future[None]] | None = None
        """Who waits for the round that has not begun."""

    def flush(self) -> "asyncio.Future[None]":
        """Return what is done when every write replied to before the call is durable. It, or the call: VolumeStopped.

        It is the caller's own: to cancel it takes nothing from others who wait for the same round.
        """
        self._volume.check()
        if self._next is None:
            self._next = []
            task = self._volume.tasks.start(self._round(self._next), "flush")
            task.add_done_callback(partial(self._ended, self._next))
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._next.append(future)
        return future

    async def _round(self, waiting: "list[asyncio.Future[None]]") -> None:
        try:
            async with self.syncing:
                # What is replied to from here on may lie behind what this round notes: who comes now joins the next.
                self._next = None
                started_s = time.perf_counter()
                await self._flush_noted()
                self._volume.stats.flushes += 1
                self._volume.stats.flush_s += time.perf_counter() - started_s
        except Exception as error:
            for future in waiting:
                if not future.done():
                    future.set_exception(error)
        else:
            for future in waiting:
                if not future.done():
                    future.set_result(None)

    def _ended(self, waiting: "list[asyncio.Future[None]]", _: "asyncio.Task[None]") -> None:
        """Have nobody wait for a round that was cancelled, perhaps before its first step."""
        if self._next is waiting:
            self._next = None
        for future in waiting:
            future.cancel()

    async def _flush_noted(self) -> None:
        volume = self._volume
        volume.check()
        assert not volume.unsettled()
        journal = volume.journal
        changes = [(file, file.take_last_changes()) for file in volume.files.open_files.values()]
        # Also where data lies in the journal: it would overwrite what is only synced at home after a power cut.
        if journal is None or not (journal.needs_mark() or journal.holds_data):
            await sync_data(volume)
            return
        if not journal.needs_mark() and all(ranges == [] for _, ranges in changes):
            return  # the flush before this one spoke for everything
        upto = journal.map_sequence
        try:
            if not _embed(volume, journal, upto, changes):
                await _sync_and_mark(volume, journal, upto)
        except OSError as error:
            raise volume.stop("its journal cannot be written", error) from error
        await sync_guarded(volume, "its journal cannot be synced", journal.sync)
        journal.durable_sequence = max(journal.durable_sequence, upto)


def _embed(volume: Volume, journal: Journal, upto: int, changes: Iterable[Changes]) -> bool:
    """Append a mark with all that was written since the last flush; False where that is too much.

    The files stay unsynced: a later mark without data may only speak for them when they are synced.
    """
    parts: list[tuple[int, int, bytes]] = []
    for file, ranges in changes:
        if ranges is None or file.grown:
            return False
        parts += [(file.number, position, written) for position, written in ranges]
    if sum(len(content) for _, _, content in parts) > FLUSH_EMBED_BYTES or not journal.embed(upto, parts):
        return False
    if journal.half_full():
        volume.checkpoint_due.set()
    volume.stats.embedded_flushes += 1
    return True


async def _sync_and_mark(volume: Volume, journal: Journal, upto: int) -> None:
    """Bring everything home, then append a mark that says so: data in the journal is void from there on."""
    await sync_data(volume, also_grown=True)
    volume.check()
    marked = journal.mark(upto)
    assert marked, "room for marks is kept free, and a half-full journal asks for a checkpoint"
    journal.holds_data = False


async def sync_data(volume: Volume, *, also_grown: bool = False) -> None:
    """Sync the files written since they were last noted. A failure stops the volume (I7)."""
    files = volume.files.unsynced(also_grown=also_grown)
    if not files:
        return
    for file in files:
        file.unsynced_bytes, file.grown = 0, False

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
