"""FLUSH and FUA: when the reply leaves, everything that was replied to before survives power loss (I3).

One sync where the map did not change: of the data. Where it did, the journal must have a mark that speaks for the map
changes made before the flush began, and what they name must be durable before the mark is. If little was written since
the last flush the mark brings it along, and the journal alone is synced; else the data is synced first, then the mark.
Who asks while one runs joins the next.

The first sync of a round begins in the call where one client alone asks: its turns in the loop would be a tenth of the
time that a write and a flush take. Where several ask, a round waits for one turn, and they share it.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from time import perf_counter

from blockvirt.errors import BlockvirtError
from blockvirt.limits import FLUSH_EMBED_BYTES
from blockvirt.pool.backing import BackingFile
from blockvirt.volumes.journal import Journal
from blockvirt.volumes.volume import Volume

Changes = tuple[BackingFile, list[tuple[int, bytes]] | None]
"""A file, and what was written in it since the last flush (``BackingFile.take_last_changes``)."""

Sync = tuple[str, Callable[[], None]]
"""What it means if it fails, and what blocks until it is done."""

Then = Callable[[BaseException | None], None]
"""Is told that a flush has ended, and what failed."""


class Flusher:
    """The flushes of one open volume."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self.syncing = SyncLock()
        """Held by a flush, and by a checkpoint from its freeze to its commit: a flush that comes while a checkpoint
        runs waits for its commit, so a mark never speaks across generations."""
        self._next: list[Then] | None = None
        """Who waits for the round that has not begun."""
        self._alone = True
        """The last round had one asker, and nobody came while it ran: to wait for others to join would be in vain."""
        self._in_call = False

    def flush(self) -> "asyncio.Future[None]":
        """Return what is done when every write replied to before the call is durable. It, or the call: VolumeStopped.

        It is the caller's own: to cancel it takes nothing from others who wait for the same round.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.start(partial(_settle, future))
        return future

    def start(self, then: Then) -> None:
        """See VolumeHandle.start_flush. ``then`` hears of CancelledError where the round was given up."""
        self._volume.check()
        if self._next is not None:
            self._next.append(then)
        elif self._alone and not self._volume.unsettled() and self.syncing.take():
            self._in_call = True
            self._begin([then])
            self._in_call = False
        else:
            self._next = [then]
            task = self._volume.tasks.start(self._begin_later(self._next), "flush")
            task.add_done_callback(partial(self._given_up, self._next))

    async def _begin_later(self, waiting: list[Then]) -> None:
        await self.syncing.acquire()
        # What is replied to from here on may lie behind what this round notes: who comes now joins the next.
        self._next = None
        assert not self._volume.unsettled()
        self._begin(waiting)

    def _given_up(self, waiting: list[Then], _: "asyncio.Task[None]") -> None:
        """Have nobody wait for a round that was cancelled before it began."""
        if self._next is waiting:
            self._next = None
            _tell(waiting, asyncio.CancelledError())

    def _begin(self, waiting: list[Then]) -> None:
        """Do a round; ``syncing`` is held, and given back in the end."""
        now_s = perf_counter()
        self._go_on(waiting, self._syncs(), now_s, now_s)

    def _go_on(self, waiting: list[Then], syncs: Iterator[Sync], began_s: float, now_s: float) -> None:
        try:
            what, sync = next(syncs)
        except StopIteration:
            self._volume.stats.flushes += 1
            self._volume.stats.flush_s += now_s - began_s
            self._end(waiting, self._volume.failure)
            return
        except BlockvirtError as error:
            self._end(waiting, error)
            return
        except Exception as error:  # what was noted is not synced, and no later round would look for it
            self._end(waiting, self._volume.stop("of a fault in blockvirt itself", error))
            return
        sync_began_s = perf_counter()

        def ended(_: object, error: BaseException | None) -> None:
            now_s = perf_counter()
            failure = sync_ended(self._volume, what, now_s - sync_began_s, error)
            if failure is None:
                self._go_on(waiting, syncs, began_s, now_s)
            else:
                self._end(waiting, failure)

        try:
            self._volume.context.threads.call(sync, ended)
        except Exception as error:
            ended(None, error)

    def _end(self, waiting: list[Then], failure: BaseException | None) -> None:
        self._alone = len(waiting) == 1 and self._next is None
        self.syncing.release()
        if self._in_call or self._next is not None:  # the next round's sync begins before these are told
            asyncio.get_running_loop().call_soon(_tell, waiting, failure)
        else:
            _tell(waiting, failure)

    def _syncs(self) -> Iterator[Sync]:
        """Note what a round speaks for, and give the syncs that it takes, one when the other is done."""
        volume = self._volume
        volume.check()
        journal = volume.journal
        files = volume.files.open_files.values()
        # Also where data lies in the journal: it would overwrite what is only synced at home after a power cut.
        if journal is None or not (journal.needs_mark() or journal.holds_data):
            for file in files:
                file.forget_last_changes()
            yield from data_syncs(volume)
            return
        changes = [(file, file.take_last_changes()) for file in files]
        if not journal.needs_mark() and all(ranges == [] for _, ranges in changes):
            return  # the flush before this one spoke for everything
        upto = journal.map_sequence
        try:
            if not _embed(volume, journal, upto, changes):
                yield from data_syncs(volume, also_grown=True)
                volume.check()
                _mark(journal, upto)
        except OSError as error:
            raise volume.stop("its journal cannot be written", error) from error
        yield "its journal cannot be synced", journal.sync
        journal.durable_sequence = max(journal.durable_sequence, upto)


def _tell(waiting: Iterable[Then], failure: BaseException | None) -> None:
    for then in waiting:
        try:
            then(failure)
        except Exception as error:  # our own mistake: it may cost nobody else his answer
            context = {"message": f"after a flush: {then}", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)


def _settle(future: "asyncio.Future[None]", failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(None)
    elif isinstance(failure, asyncio.CancelledError):
        future.cancel()
    else:
        future.set_exception(failure)


class SyncLock(asyncio.Lock):
    """A lock that can also be taken without a task."""

    def take(self) -> bool:
        """Take it if nobody has it or waits for it; whoever gets True calls ``release``."""
        if self.locked():
            return False
        acquiring = self.acquire()
        try:
            acquiring.send(None)
        except StopIteration:
            return True
        acquiring.close()
        return False


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


def _mark(journal: Journal, upto: int) -> None:
    """Append a mark that says that everything is at home: data in the journal is void from there on."""
    marked = journal.mark(upto)
    assert marked, "room for marks is kept free, and a half-full journal asks for a checkpoint"
    journal.holds_data = False


def data_syncs(volume: Volume, *, also_grown: bool = False) -> Iterator[Sync]:
    """Note that what was written is synced, and give the sync: what is written from here on takes another."""
    files = volume.files.unsynced(also_grown=also_grown)
    if not files:
        return
    for file in files:
        file.unsynced_bytes, file.grown = 0, False

    def sync_all() -> None:
        for file in files:
            file.sync()

    yield "its data cannot be synced", sync_all


async def sync_data(volume: Volume, *, also_grown: bool = False) -> None:
    """Sync the files written since they were last noted. A failure stops the volume (I7)."""
    for what, sync in data_syncs(volume, also_grown=also_grown):
        await sync_guarded(volume, what, sync)


async def sync_guarded(volume: Volume, what: str, sync: Callable[[], None]) -> None:
    """Run a blocking sync in a thread; whatever keeps it from succeeding stops the volume (I7).

    Who is cancelled waits for its end: until then the descriptors are in use.
    """
    began_s = perf_counter()
    error: BaseException | None = None
    failure: BlockvirtError | None = None

    def work() -> None:
        nonlocal error
        try:
            sync()
        except Exception as raised:
            error = raised

    def at_end() -> None:
        nonlocal failure
        failure = sync_ended(volume, what, perf_counter() - began_s, error)

    try:
        await volume.context.threads.run_to_end(work, at_end)
    except Exception as raised:  # no thread could be had
        error = raised
        at_end()
    if failure is not None:
        raise failure


def sync_ended(volume: Volume, what: str, took_s: float, error: BaseException | None) -> BlockvirtError | None:
    """Count a sync, or stop the volume for its failure; returns what to tell those who wait for it."""
    if error is not None:
        stopped = volume.stop(what, error)
        stopped.__cause__ = error
        return stopped
    volume.stats.syncs += 1
    volume.stats.sync_s += took_s
    return None
