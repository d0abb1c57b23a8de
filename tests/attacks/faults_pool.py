"""The pool that the attacks by faults and by full disks work on: an engine with snapshots, without its background."""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import pytest

from blockvirt.errors import BlockvirtError, DamagedRecord
from blockvirt.meta.keys import Table
from blockvirt.snapshots.sealing import Sealer
from blockvirt.units import KIB, MIB
from blockvirt.volumes.engine import EngineSettings
from blockvirt.volumes.job_states import FINISHED
from blockvirt.volumes.journal import BLOCK_BYTES, pack_header, unpack_header
from tests.snapshots.conftest import SnapshotPool
from tests.volumes.conftest import abandon, until

CHUNK_BYTES = 4 * KIB
SETTINGS = EngineSettings(
    chunk_bytes=CHUNK_BYTES,
    metadata_reserve_bytes=MIB,
    checkpoint_age_s=3600.0,
    backing_file_bytes=48 * CHUNK_BYTES,  # so that files are made and changed to
)


class AttackedPool(SnapshotPool):
    """A pool in which nothing happens that was not asked for, but for punches and jobs."""

    is_up = False

    async def start(self) -> "AttackedPool":
        """Start, or fail as the engine does."""
        await super().start()
        self.sealer.cancel()
        self.is_up = True
        return self

    async def seal(self) -> None:
        """Give what snapshots sealed its checksums."""
        sealer = Sealer(self.engine)
        for row in sealer._ready():
            await sealer._seal(*row)

    async def job_over(self, job_id: str) -> None:
        """Wait for a job's end, or until it is put off because not even its failure can be recorded."""
        entry = self.engine.jobs._entry(job_id)

        def is_over() -> bool:
            is_put_off = entry.run is None and entry.due_s > 0
            return entry.record.state in FINISHED or is_put_off or bool(self.engine.not_ready())

        await until(is_over)

    async def punch(self) -> str:
        """Wait for one pass over what is to be given back; return what was wrong."""
        with self.engine.puncher.turn(self._punched()) as turn:
            while not turn.is_over:
                await turn.changed.wait()
                turn.changed.clear()
        return turn.problem.message if turn.problem is not None else ""

    def _punched(self) -> set[int]:
        with self.engine.store.read() as reader:
            return {int.from_bytes(key[:4], "big") for key, _ in reader.scan(Table.FILES)}

    async def close(self) -> None:
        """Close everything in order."""
        self.is_up = False
        await super().close()

    async def kill(self) -> None:
        """End as SIGKILL would."""
        self.is_up = False
        await self.readers.close()
        await abandon(self, power_cut=False)

    def devices(self) -> list[Path]:
        """The directories given to the pool, whether they were taken or not."""
        return [path for path in sorted(self.state_dir.parent.glob("disk*")) if path.is_dir()]

    def change_page_cache(self) -> None:
        """Have the journals say that they were written through another page cache, as after a reboot."""
        for folder in self.devices():
            for path in (folder / "journal").glob("*"):
                content = bytearray(path.read_bytes())
                try:
                    header = unpack_header(bytes(content[:BLOCK_BYTES]))
                except DamagedRecord:
                    continue
                others = dict.fromkeys(header.identities, "another")
                content[:BLOCK_BYTES] = pack_header(replace(header, identities=others))
                path.write_bytes(content)


class Complaints(logging.Handler):
    """What the engine logged of mistakes of its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what names an exception that is neither ours nor the system's."""
        error = record.exc_info[1] if record.exc_info else None
        text = record.getMessage()
        is_mistake = error is not None and not isinstance(error, BlockvirtError | OSError | lmdb.Error)
        if is_mistake or "fault in blockvirt itself" in text:
            self.found.append(f"{text} ({error!r})")


@contextmanager
def quiet() -> Iterator[Complaints]:
    """Take what the engine logs away from the screen, and look it through."""
    log = logging.getLogger("blockvirt")
    before, handler = (log.propagate, log.level, list(log.handlers)), Complaints()
    log.propagate, log.handlers = False, [handler]
    log.setLevel(logging.ERROR)
    try:
        yield handler
    finally:
        log.propagate, log.handlers = before[0], before[2]
        log.setLevel(before[1])


def without_pauses(patch: pytest.MonkeyPatch) -> None:
    """Have the background not wait for guests that are not there."""
    patch.setattr("blockvirt.volumes.punch.PUNCH_PAUSE_S", 0)
    patch.setattr("blockvirt.snapshots.sealing.SEAL_REST_RATIO", 0)
    patch.setattr("blockvirt.snapshots.sealing.SEAL_PAUSE_S", 0)


def without_metadata_syncs(patch: pytest.MonkeyPatch) -> None:
    """Have LMDB not sync: nothing of it is lost where no power is cut under it."""
    real = lmdb.open

    def opened(*arguments: Any, **options: Any) -> Any:
        return real(*arguments, **{**options, "sync": False})

    patch.setattr(lmdb, "open", opened)


def open_descriptors(root: Path) -> list[str]:
    """Return the files below ``root`` that this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if path.startswith(str(root)):
            found.append(path)
    return found


def unfinished(loop: asyncio.AbstractEventLoop) -> list[str]:
    """Have exceptions that nobody asked for collected; returns the list they come to."""
    found: list[str] = []
    loop.set_exception_handler(
        lambda _, context: found.append(f"{context.get('message')} ({context.get('exception')!r})")
    )
    return found


class Hung(BaseException):
    """A trial does not end."""


@contextmanager
def watched(seconds: int) -> Iterator[None]:
    """Raise Hung in a trial that does not end, though the event loop be stuck."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def raised(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, raised)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
