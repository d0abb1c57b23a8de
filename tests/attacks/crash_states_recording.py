"""A load on a filesystem whose block device is logged, and what had been promised at each point of the log."""

import copy
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from blockvirt.errors import BlockvirtError
from blockvirt.units import MIB
from tests.attacks.crash_states_log import Recorder, recorded
from tests.attacks.crash_states_pool import EnginePool
from tests.attacks.power_cuts_disk import Disk, copy_sparse, make_filesystem, random_file
from tests.attacks.power_cuts_load import End, Load, examine
from tests.attacks.power_cuts_model import NEVER, SECTOR_BYTES, PoolModel

IMAGE_BYTES = 96 * MIB
REQUESTS = (80, 220)  # before the power cut in the middle, and as many after it


@dataclass(slots=True)
class Recording:
    """What was logged, and what was promised."""

    kind: str
    """Of filesystem."""
    ready_at: int = 0
    """From this entry on the pool and its first volumes are there."""
    eras: list[tuple[int, PoolModel]] = field(default_factory=list)
    """From which entry on what was promised is told by which model: recovery settles what was open before."""
    recovery: range = range(0)
    """The entries that were written from the mount after the power cut to the end of recovery."""
    flushes: int = 0
    problems: list[str] = field(default_factory=list)
    """What was broken while it was recorded."""

    def flush_places(self) -> list[int]:
        """Return after which entries flushes were acknowledged."""
        return sorted({at for _, model in self.eras for each in model.volumes.values() for at in each.promises()})

    def change_places(self) -> list[int]:
        """Return after which entries snapshots, volumes and deletions were acknowledged."""
        places: set[int] = set()
        for _, model in self.eras:
            lives = [each.life for each in model.volumes.values()]
            lives += [each.life for each in model.snapshots.values()]
            places.update(life.made.answered for life in lives)
            places.update(life.removed.answered for life in lives if life.removed is not None)
        return sorted(places - {NEVER})

    def model(self, at: int) -> PoolModel:
        """Return what tells what a crash after ``at`` entries may leave."""
        return next(model for since, model in reversed(self.eras) if since <= at)


@contextmanager
def quiet() -> Iterator[None]:
    """Have nothing said of the errors that a dead disk gives."""
    loggers = [logging.getLogger(name) for name in ("blockvirt", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


async def record(number: int, kind: str, folder: Path, mountpoint: Path) -> Recording:
    """Record the load of seed ``number``: ``folder`` then has the image as it was before, and the log.

    In the middle the power is cut, and the pool recovers: the crash states have those of recovery among them.
    """
    make_filesystem(kind, folder / "data", IMAGE_BYTES)
    with (folder / "data").open("rb") as data, (folder / "base").open("wb") as base:
        base.truncate(IMAGE_BYTES)
        copy_sparse(data.fileno(), base.fileno())
    with recorded(folder / "data", folder / "log", folder) as recorder:
        disk = Disk(recorder.device, kind, mountpoint)
        session = _Session(number, disk, recorder, folder)
        try:
            await session.run()
        except* BlockvirtError as errors:
            session.done.problems.append(f"an error that nothing was done for: {errors.exceptions!r}")
        finally:
            await session.pool.close()
            disk.close()
        return session.done


class _Session:
    def __init__(self, number: int, disk: Disk, recorder: Recorder, folder: Path) -> None:
        self.dice = random.Random(f"crash states {number}")
        self.disk = disk
        self.recorder = recorder
        self.pool = EnginePool(disk.mountpoint, folder / "lock")
        self.model = PoolModel(recorder.durable)
        self.done = Recording(disk.kind)

    async def run(self) -> None:
        done, model = self.done, self.model
        self.disk.mount()
        await self.pool.start(sealing=True)
        for each in range(self.dice.randrange(1, 3)):
            sectors = self.dice.choice((256, 512, 1024))
            volume = model.add_volume(f"v{each}", [(0,)] * sectors)
            await self.pool.create(volume.name, sectors * SECTOR_BYTES)
            volume.life.made.answered = model.clock()
        done.ready_at = model.clock()
        await self._work(cut=True)
        if done.problems:
            return
        await self.pool.close()
        self.disk.unmount()
        done.eras.append((0, copy.deepcopy(model)))
        cut_at = model.clock()
        self.disk.mount()
        await self.pool.start(sealing=True)
        done.recovery = range(cut_at, model.clock() + 1)
        found = await examine(self.pool, model, NEVER - 1)
        done.problems += found.problems
        if not done.problems:
            model.settle(found.volumes, found.snapshots, model.clock())
            done.eras.append((model.clock(), model))
            await self._work(cut=False)
        await self.pool.close()
        self.disk.unmount()

    async def _work(self, *, cut: bool) -> None:
        requests = self.dice.randrange(*REQUESTS)
        load = Load(self.pool, self.model, self.dice, requests, self._cut if cut else _nothing, self._writes_back)
        await load.run()
        self.done.flushes += load.flushes
        if load.problem:
            self.done.problems.append(load.problem)

    def _cut(self) -> End:
        # A sync that runs in a thread meanwhile may say that it succeeded: see DaemonPool.between_system_calls.
        self.pool.hold_metadata()
        self.disk.shut_down()
        return End.DIES

    def _writes_back(self, dice: random.Random) -> None:
        file = random_file(self.pool.device, dice)
        if dice.random() < 0.15:
            self.disk.sync_all()
        elif file is not None:
            self.disk.write_back(file)


def _nothing() -> End:
    return End.LIVES
