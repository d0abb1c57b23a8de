"""The metadata store: one LMDB environment, short reads on the event loop, group commits in one writer thread.

I7 for metadata: after a commit that failed for another reason than space nothing is read or written any more
(``MetadataFault``); the store has to be opened again, which shows what is on disk.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import lmdb

from blockvirt.errors import BlockvirtError, MetadataFault, PoolFull, ShuttingDown
from blockvirt.limits import (
    LMDB_MAP_MAX_BYTES,
    LMDB_MAP_START_BYTES,
    METADATA_RESERVE_BYTES,
)
from blockvirt.meta.datafile import DATA_FILE, check_openable
from blockvirt.meta.faults import CUT_SHORT, NO_SPACE, cannot_open, errno_of, no_room, stopped, unreadable
from blockvirt.meta.group_commit import Change, Outcome, WriterThread, run_group
from blockvirt.meta.keys import Table
from blockvirt.meta.reserve import Reserve
from blockvirt.meta.transactions import Reader, Writer

__all__ = ["Reader", "Store", "StoreStats", "Writer"]

log = logging.getLogger("blockvirt.meta")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Plain numbers for metrics and status."""

    map_bytes: int
    used_bytes: int
    """End of the last page ever used, free pages included."""
    used_ratio: float
    """Of the map, which grows before it is half full."""
    commits: int
    """Synced transactions so far; one may hold several changes."""
    last_commit_s: float
    reserve_ok: bool
    failed: bool
    entries: dict[str, int]
    """Rows of each table."""


class _ReadScope:
    """``with store.read() as reader``: begins a read transaction and ends it."""

    __slots__ = ("_reader", "_store")

    def __init__(self, store: "Store") -> None:
        self._store = store
        self._reader: Reader | None = None

    def __enter__(self) -> Reader:
        store = self._store
        store._enter_read()
        try:
            self._reader = Reader(store._env.begin(), store._tables)
        except BaseException as error:
            store._leave_read()
            raise store._translate(error) from error
        return self._reader

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._reader is not None, "only what was entered is left"
        self._reader.end()
        self._store._leave_read()
        if isinstance(error, lmdb.Error):
            raise self._store._translate(error) from error


class Store:
    """The pool's metadata. At most one Store of an environment may be open in a process."""

    def __init__(self, path: Path, env: Any, tables: dict[Table, Any], reserve: Reserve) -> None:
        """Use ``open``."""
        self.path = path
        self._env = env
        self._tables = tables
        self._page_bytes = int(env.stat()["psize"])
        self._reserve = reserve
        self._fault: MetadataFault | None = None
        self._closed = False
        self._on_failure: list[Callable[[MetadataFault], None]] = []
        self._writer = WriterThread(self._transact)
        self._write_lock = threading.Lock()
        self._readers = 0
        self._no_readers = threading.Condition(threading.Lock())
        self.commits = 0
        """Transactions so far that changed something: what was looked up holds as long as this is the same."""
        self._last_commit_s = 0.0

    # --- open and close --------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        create: bool = False,
        map_bytes: int = LMDB_MAP_START_BYTES,
        reserve_bytes: int = METADATA_RESERVE_BYTES,
    ) -> "Store":
        """Open the environment in directory ``path``; with ``create`` make it if it is not there.

        Raises MetadataFault if it is missing, damaged, truncated, of another format or cannot be read, and PoolFull
        if there is no space to create it.
        """
        data_file = path / DATA_FILE
        try:
            if create:
                path.mkdir(mode=0o700, exist_ok=True)
            is_new = create and (not data_file.exists() or data_file.stat().st_size == 0)
            used_bytes = 0 if is_new else check_openable(data_file).used_bytes
            while map_bytes < 2 * used_bytes:
                map_bytes *= 2
            env = lmdb.open(
                str(path),
                lib_version=0,
                writemap=False,
                map_size=map_bytes,
                max_dbs=len(Table),
                mode=0o600,
                max_spare_txns=4,
            )
        except (lmdb.Error, OSError) as error:
            raise cannot_open(path, error) from error
        try:
            with env.begin(write=True) as transaction:
                _refuse_strange_tables(path, [bytes(name) for name, _ in transaction.cursor()])
                tables = {table: env.open_db(table.value, transaction, create=True) for table in Table}
            if create:  # not only where it is new: whoever made it may not have come to this
                for directory in (path, path.parent):
                    _sync_directory(directory)
            store = cls(path, env, tables, Reserve(data_file, reserve_bytes))
        except (lmdb.Error, OSError) as error:
            env.close()
            raise cannot_open(path, error) from error
        except MetadataFault:
            env.close()
            raise
        with store._write_lock:
            store._tend()
        return store

    def close(self) -> None:
        """Finish the changes that wait, then close the environment. Idempotent. Not inside ``read``."""
        if self._closed:
            return
        self._closed = True
        self._writer.close()
        with self._write_lock:
            self._reserve.close()
            self._env.close()

    # --- reading ---------------------------------------------------------------------------------------------------

    def read(self) -> _ReadScope:
        """Begin a snapshot: ``with store.read() as reader``. Short (2 to 5 us a row), never across an await.

        Entering raises MetadataFault once the store has failed.
        """
        return _ReadScope(self)

    def copy_compacted(self, fd: int) -> None:
        """Write a compacted copy of the last committed state to the file descriptor ``fd``. Blocks: use a thread.

        Raises OSError, or MetadataFault if the store is damaged. Commits go on meanwhile.
        """
        self._enter_read()
        try:
            self._env.copyfd(fd, compact=True)
        except lmdb.Error as error:
            code = errno_of(error)
            if code is not None:
                raise OSError(code, os.strerror(code)) from error
            raise self._translate(error) from error
        finally:
            self._leave_read()

    def _enter_read(self) -> None:
        if self._fault is not None or self._closed:
            raise self._unusable()
        with self._no_readers:
            self._readers += 1

    def _leave_read(self) -> None:
        with self._no_readers:
            self._readers -= 1
            if not self._readers:
                self._no_readers.notify_all()

    # --- writing ---------------------------------------------------------------------------------------------------

    async def commit(self, change: Callable[[Writer], T]) -> T:
        """Run ``change`` in the writer thread and return its result once its effect is durable.

        Changes that wait together share one transaction; one that raises is undone alone, and only its caller sees
        the exception. ``change`` may run more than once (after the map has grown), so it may touch nothing but its
        writer. Cancelling the await does not withdraw it. Raises PoolFull for lack of space, MetadataFault if the
        store has failed, ShuttingDown after ``close``.
        """
        if self._fault is not None or self._closed:
            raise self._unusable()
        result: T = await self._writer.run(change)
        return result

    def commit_now(self, change: Callable[[Writer], T]) -> T:
        """As ``commit``, in the calling thread: for start-up and offline use. Not inside ``read``."""
        if self._closed:
            raise self._unusable()
        (outcome,) = self._transact([change])
        if outcome.error is not None:
            raise outcome.error
        result: T = outcome.value
        return result

    def on_failure(self, callback: Callable[[MetadataFault], None]) -> None:
        """Have ``callback`` called once, on the event loop if there is one, when the store fails (I7)."""
        self._on_failure.append(callback)
        if self._fault is not None:
            callback(self._fault)

    @property
    def reserve_ok(self) -> bool:
        """Whether the metadata reserve is whole. While it is not, no new chunk may be given (I10)."""
        return self._reserve.whole

    async def check_reserve(self) -> bool:
        """Try to make the reserve whole again (space may have become free elsewhere); return ``reserve_ok``."""
        await self.commit(lambda writer: None)  # a commit without a change syncs nothing, and tops the reserve up
        return self._reserve.whole

    def stats(self) -> StoreStats:
        """Return the store's figures; raises MetadataFault once it has failed."""
        with self.read() as reader:
            entries = {table.value.decode(): reader.count(table) for table in Table}
            map_bytes, used_bytes = self._map_and_used()
        return StoreStats(
            map_bytes=map_bytes,
            used_bytes=used_bytes,
            used_ratio=used_bytes / map_bytes,
            commits=self.commits,
            last_commit_s=self._last_commit_s,
            reserve_ok=self._reserve.whole,
            failed=self._fault is not None,
            entries=entries,
        )

    # --- transactions ----------------------------------------------------------------------------------------------

    def _transact(self, changes: Sequence[Change]) -> list[Outcome]:
        """Run ``changes`` in one transaction and commit it; returns what became of each."""
        with self._write_lock:
            while True:
                if self._fault is not None:
                    return [Outcome(error=self._unusable()) for _ in changes]
                try:
                    started_s = time.perf_counter()
                    outcomes, committed = run_group(self._env, self._tables, changes)
                    if committed:
                        self.commits += 1
                        self._last_commit_s = time.perf_counter() - started_s
                    self._tend()
                    return [self._in_our_words(outcome) for outcome in outcomes]
                except lmdb.MapFullError as error:
                    if not self._grow(wait=True):
                        failure: lmdb.Error = error
                        break
                except lmdb.Error as error:
                    failure = error
                    break
            verdict = self._judge(failure)
            self._tend()
        if isinstance(verdict, PoolFull) and len(changes) > 1:  # a smaller one may find the space it needs
            return [self._transact([change])[0] for change in changes]
        return [Outcome(error=verdict) for _ in changes]

    def _in_our_words(self, outcome: Outcome) -> Outcome:
        if isinstance(outcome.error, lmdb.Error):
            return Outcome(error=unreadable(self.path, outcome.error))
        return outcome

    def _judge(self, error: lmdb.Error) -> BlockvirtError:
        """Return what the callers of a failed transaction get; latches unless only space was lacking."""
        if isinstance(error, lmdb.MapFullError):
            return no_room(self.path, f"the map has reached its limit of {LMDB_MAP_MAX_BYTES} bytes")
        if errno_of(error) in CUT_SHORT:
            try:
                self._env.begin(write=True).abort()  # fails where the meta page could not be written
                is_full = errno_of(error) in NO_SPACE or self._reserve.tells_full(self._map_and_used()[1])
            except lmdb.Error as poisoned:
                error, is_full = poisoned, False
            if is_full:
                return no_room(self.path, "its filesystem is full and the metadata reserve is used up")
        self._fail(error)
        return self._unusable()

    def _tend(self) -> None:
        """Between transactions: grow the map before it is half full, keep the reserve whole. Holds the write lock."""
        if self._fault is not None:
            return
        map_bytes, used_bytes = self._map_and_used()
        if used_bytes > map_bytes // 2:
            self._grow(wait=False)
        self._reserve.top_up(used_bytes)

    def _grow(self, *, wait: bool) -> bool:
        """Double the map while nobody reads; without ``wait`` only if nobody does now. False at the limit."""
        map_bytes = int(self._env.info()["map_size"])
        if 2 * map_bytes > LMDB_MAP_MAX_BYTES:
            return False
        with self._no_readers:
            while self._readers:
                if not wait:
                    return False
                self._no_readers.wait()
            try:
                self._env.set_mapsize(2 * map_bytes)
            except lmdb.Error as error:
                self._fail(error)
                return wait
        log.info("metadata map grown to %d bytes", 2 * map_bytes)
        return True

    def _map_and_used(self) -> tuple[int, int]:
        info = self._env.info()
        return int(info["map_size"]), (int(info["last_pgno"]) + 1) * self._page_bytes

    # --- failure ---------------------------------------------------------------------------------------------------

    def _translate(self, error: BaseException) -> BaseException:
        """Return the error of our tree for one that a reader met; latches if the environment is poisoned."""
        if isinstance(error, lmdb.PanicError):
            self._fail(error)
        return unreadable(self.path, error) if isinstance(error, lmdb.Error) else error

    def _fail(self, error: BaseException) -> None:
        if self._fault is not None:
            return
        self._fault = stopped(self.path, str(error))
        log.critical("%s: %s", self._fault, error)
        for callback in self._on_failure:
            self._writer.on_loop(callback, self._fault)

    def _unusable(self) -> BlockvirtError:
        """Return a fresh exception that says why nothing can be done."""
        if self._fault is not None:
            return stopped(self.path, self._fault.cause)
        return ShuttingDown(
            f"the metadata store {self.path} is closed", correction="wait for the daemon to start again"
        )


def _refuse_strange_tables(path: Path, names: Sequence[bytes]) -> None:
    """Raise MetadataFault for a table that is none of ours: with its name damaged its rows would seem to be gone."""
    if strange := sorted(set(names) - {table.value for table in Table}):
        raise cannot_open(path, ValueError(f"it has a table {strange[0]!r}: damaged, or of a newer blockvirt"))


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
