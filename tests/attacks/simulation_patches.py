"""Where the simulation takes hold of the product: system calls, clock, chance and threads. Nothing else is replaced."""

import logging
import os
import secrets
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import lmdb
import pytest

from blockvirt import syscalls
from blockvirt.meta import store as store_module
from blockvirt.pool import backing, devices
from blockvirt.snapshots.reader import SnapshotHandle
from blockvirt.units import GIB, KIB, MIB
from blockvirt.volumes import engine as engine_module
from blockvirt.volumes import flush, journal, journal_opening, tail
from blockvirt.volumes.context import VolumeContext
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.jobs import JobBoard
from tests.attacks.simulation_loop import SimThreads, SimWriter
from tests.attacks.simulation_seam import Machine

_EPOCH_S = 1_700_000_000.0
_PAGE = 4096


class _Pressure:
    """Stands for ``volumes.pressure.WritePressure``."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    @property
    def high(self) -> bool:
        return self._machine.chance(self._machine.faults.presses)

    def wrote(self, length: int) -> None:
        pass

    def look(self) -> None:
        pass


class _InOrder(dict[Any, None]):
    """A set that is walked in the order in which things came."""

    def add(self, item: Any) -> None:
        self[item] = None

    def discard(self, item: Any) -> None:
        self.pop(item, None)


def _in_order(context: VolumeContext) -> VolumeContext:
    inflights: Any = _InOrder()
    return replace(context, inflights=inflights)


@contextmanager
def interposed(machine: Machine, journal_bytes: int) -> Iterator[None]:
    """Have the product run on ``machine``, with journal files of so many bytes."""
    dice = machine.dice
    context_of = engine_module.volume_context
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("open", "close", "pwrite", "preadv", "ftruncate", "unlink", "posix_fadvise"):
            patch.setattr(os, name, getattr(machine, name))
        patch.setattr(os, "fdatasync", machine.sync)
        patch.setattr(os, "fsync", machine.sync)
        # Requests are small here; flushes that go into the journal and those that sync at home are to take turns.
        patch.setattr(flush, "FLUSH_EMBED_BYTES", dice.choice((KIB, 4 * KIB)))
        # A disk that is full is to be noticed.
        patch.setattr(tail, "RESERVE_STEP_MIN_BYTES", dice.choice((32 * KIB, 128 * KIB, MIB)))
        space = SimpleNamespace(f_frsize=_PAGE, f_blocks=64 * GIB // _PAGE, f_bavail=32 * GIB // _PAGE)
        patch.setattr(os, "statvfs", lambda _: space)
        patch.setattr(syscalls, "_call", machine.fallocate)
        patch.setattr(backing, "filesystem_type", lambda _: 0)  # a seed is the same history on every filesystem
        patch.setattr(time, "time", lambda: _EPOCH_S + machine.now_s())
        patch.setattr(time, "monotonic", machine.now_s)
        patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=dice.getrandbits(128), version=4))
        patch.setattr(secrets, "randbits", dice.getrandbits)
        patch.setattr(secrets, "token_bytes", lambda length=32: dice.randbytes(length))
        patch.setattr(secrets, "token_hex", lambda length=32: dice.randbytes(length).hex())
        patch.setattr(lmdb, "open", machine.open_lmdb)
        patch.setattr(store_module, "WriterThread", SimWriter)
        patch.setattr(store_module, "run_group", machine.run_group)
        patch.setattr(devices, "identity_of", machine.identity_of)
        patch.setattr(engine_module, "IoThreads", SimThreads)
        patch.setattr(engine_module, "WritePressure", lambda _: _Pressure(machine))
        patch.setattr(engine_module, "volume_context", lambda *given: _in_order(context_of(*given)))
        patch.setattr(JobBoard.__init__, "__defaults__", (lambda: time.time(), None))
        patch.setattr(Handle, "__hash__", lambda handle: zlib.crc32(handle.session_id.encode()))
        patch.setattr(SnapshotHandle, "__hash__", lambda handle: zlib.crc32(handle.session_id.encode()))
        patch.setattr(journal_opening, "JOURNAL_FILE_BYTES", journal_bytes)
        patch.setattr(journal, "JOURNAL_FILE_BYTES", journal_bytes)
        patch.setattr(journal, "FILE_SIZES_BYTES", (journal_bytes, *journal.FILE_SIZES_BYTES))
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, logging.NOTSET)
        yield
