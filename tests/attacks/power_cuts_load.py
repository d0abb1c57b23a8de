"""The load that a power cut interrupts: writes, zeroes, trims, flushes, snapshots, clones and deletes, from a seed.

Each volume has one or two connections, on each of which bursts of requests are sent; no two requests that are in flight
overlap. One more lane takes and deletes snapshots and clones. What is sent is a function of the seed; what has been
answered when the power fails is noted in the model.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from typing import Any, Protocol

from blockvirt.errors import BlockvirtError
from blockvirt.nbd.client import NbdClientError
from tests.attacks.power_cuts_model import Allowed, PoolModel, SnapshotModel, Span, VolumeModel, content, judge, writers

MAX_VOLUMES, MAX_SNAPSHOTS = 5, 8
_STORM_SHARE, _STORM_WRITES = 8, 12  # the part of a volume that is written to while a snapshot is taken, and how often
_LINGERING_REQUESTS = 100  # that are sent after the power was cut
REFUSALS = (BlockvirtError, NbdClientError)
"""What a pool that does not do what it is asked for raises."""


class Kind(StrEnum):
    """What a request asks for."""

    WRITE = "write"
    ZERO = "zero"  # may become unmapped
    ALLOCATE = "allocate"  # zeros that keep their space
    TRIM = "trim"
    FLUSH = "flush"
    REOPEN = "reopen"  # the connection ends, and the volume with it: a checkpoint, and no journal any more
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True, slots=True)
class Request:
    """One request to a volume, in sectors."""

    kind: Kind
    first: int = 0
    count: int = 0
    fua: bool = False


class Volume(Protocol):
    """An open volume. Verbs raise whatever they like once the power is gone."""

    async def send(self, request: Request, data: bytes) -> None:
        """Do a write, a zero, a trim, a flush or a checkpoint; return when it is answered."""

    async def close(self) -> None:
        """End the connection."""


class Pool(Protocol):
    """What the load works on."""

    async def create(self, volume: str, size_bytes: int) -> None:
        """Make a volume."""

    async def clone(self, snapshot: str, volume: str) -> None:
        """Make a volume of VOLUME@SNAPSHOT."""

    async def delete(self, volume: str) -> None:
        """Delete a volume for good."""

    async def snapshot(self, volume: str, name: str) -> None:
        """Take a snapshot."""

    async def delete_snapshot(self, snapshot: str) -> None:
        """Delete VOLUME@SNAPSHOT."""

    async def open(self, volume: str) -> Volume:
        """Open a volume."""

    async def read(self, export: str) -> bytes:
        """Return all that a volume or VOLUME@SNAPSHOT holds."""

    async def names(self) -> tuple[list[str], list[str]]:
        """Return the volumes, and the snapshots as VOLUME@SNAPSHOT."""


def bursts(dice: random.Random, first: int, sectors: int) -> Iterator[list[Request]]:
    """Yield requests to ``sectors`` from ``first`` on that are sent together: no two of them overlap."""
    weights = (56, 6, 6, 8, dice.choice((2, 10, 30)), 2, 2)
    while True:
        if dice.random() < 0.1:  # each kind of change must be enough of a reason for a sync
            kind = dice.choice((Kind.WRITE, Kind.ZERO, Kind.ALLOCATE, Kind.TRIM))
            change = _range(dice, kind, first, sectors)
            yield [Request(Kind.FLUSH)]
            yield [change]
            yield [Request(Kind.FLUSH)]
        burst: list[Request] = []
        taken: list[tuple[int, int]] = []
        for _ in range(dice.choice((1, 1, 2, 3, 4))):
            request = _range(dice, dice.choices(list(Kind), weights)[0], first, sectors)
            end = request.first + request.count
            if request.count and any(request.first < stop and start < end for start, stop in taken):
                continue
            taken.append((request.first, end))
            burst.append(request)
        if any(request.kind is Kind.REOPEN for request in burst):
            burst = [Request(Kind.REOPEN)]
        yield burst


def _range(dice: random.Random, kind: Kind, begin: int, sectors: int) -> Request:
    if kind in (Kind.FLUSH, Kind.REOPEN, Kind.CHECKPOINT):
        return Request(kind)
    count = min(sectors, dice.choice((1, 1, 3, 8, 8, 8, 16, 40, 128)))
    area = sectors if dice.random() < 0.4 else max(count, sectors // 8)  # most of it hits the same chunks again
    first = dice.randrange(area - count + 1)
    if dice.random() < 0.5:
        first, count = first // 8 * 8, max(8, count // 8 * 8)
    return Request(kind, begin + first, min(count, sectors - first), dice.random() < 0.08)


class End(Enum):
    """What becomes of who serves at the end of a load."""

    LIVES = auto()  # there was no cut: what is on its way will be answered, and counts
    DIES = auto()  # in the middle of whatever it does: what it answers after the cut was seen by nobody
    LINGERS = auto()  # on a dead disk: what it still acknowledges must be kept (I7)


class PowerIsGone(Exception):
    """An answer came after the cut, from who was dead by then."""


class Load:
    """One run of it, up to a power cut."""

    def __init__(
        self,
        pool: Pool,
        model: PoolModel,
        dice: random.Random,
        requests: int,
        cut: Callable[[], End],
        meanwhile: Callable[[random.Random], None],
    ) -> None:
        """After ``requests`` of them ``cut`` is called; ``meanwhile`` now and then, for what the kernel may do."""
        self._pool = pool
        self._model = model
        self._dice = dice
        self._left = requests
        self._more = 0
        self._end = End.LIVES
        self._cut = cut
        self._meanwhile = meanwhile
        self._lanes: dict[str, list[asyncio.Task[None]]] = {}
        self._ending: set[str] = set()
        self._acts_at = requests
        self._acts = asyncio.Event()
        self.is_cut = False
        self.flushes = 0
        """Acknowledged flushes and FUA writes."""
        self.problem = ""
        """What broke a promise before the power was cut."""

    async def run(self) -> None:
        """Work until the power was cut, and what was sent is answered or has failed. Raises what fails before."""
        async with asyncio.TaskGroup() as group:
            for volume in list(self._model.volumes.values()):
                self._start_lanes(group, volume)
            group.create_task(self._until_cut(self._control(group)))

    def _start_lanes(self, group: asyncio.TaskGroup, volume: VolumeModel) -> None:
        count = self._dice.choice((1, 2, 2))
        share = (volume.sectors - volume.sectors // _STORM_SHARE) // count
        self._lanes[volume.name] = [
            group.create_task(self._until_cut(self._lane(volume, number * share, share))) for number in range(count)
        ]

    async def _until_cut(self, work: Coroutine[Any, Any, None]) -> None:
        """Nothing that fails once the power is gone is a mistake."""
        try:
            await work
        except Exception:
            if not self.is_cut:
                raise

    # --- data ------------------------------------------------------------------------------------------------------

    async def _lane(self, volume: VolumeModel, first: int, sectors: int) -> None:
        dice = random.Random(self._dice.getrandbits(64))
        opened = await self._pool.open(volume.name)
        try:
            for burst in bursts(dice, first, sectors):
                if self._is_over() or volume.name in self._ending:
                    return
                if burst[0].kind is Kind.REOPEN:
                    await opened.close()
                    opened = await self._pool.open(volume.name)
                    continue
                sent = [asyncio.create_task(self._send(opened, volume, request)) for request in burst]
                await asyncio.wait(sent)  # all: what was answered by the time of the cut counts
                for error in [task.exception() for task in sent]:
                    if error is not None:
                        raise error
        finally:
            with suppress(Exception):
                await opened.close()

    async def _send(self, opened: Volume, volume: VolumeModel, request: Request) -> None:
        self._count()
        if self._is_over():
            return
        model, number = self._model, self._model.number()
        if request.kind in (Kind.FLUSH, Kind.CHECKPOINT):
            mark = volume.mark(number)
            await opened.send(request, b"")
            self._sees_the_answer()
            if request.kind is Kind.FLUSH:
                volume.flushed(mark, model.clock())
                self.flushes += 1
            return
        mark = volume.mark(number + 1)
        is_write = request.kind is Kind.WRITE
        volume.begin(number, request.first, [number if is_write else 0] * request.count)
        await opened.send(request, content(number, request.first, request.count) if is_write else b"")
        self._sees_the_answer()
        volume.answered(number)
        if request.fua:
            volume.flushed(mark, model.clock())
            self.flushes += 1

    def _is_over(self) -> bool:
        return self.is_cut and not self._more

    def _sees_the_answer(self) -> None:
        if self._end is End.DIES:
            raise PowerIsGone

    def _count(self) -> None:
        if self.is_cut:
            self._more = max(0, self._more - 1)
            return
        self._left -= 1
        if self._left <= 0:
            self.is_cut = True
            self._end = self._cut()
            self._more = _LINGERING_REQUESTS if self._end is End.LINGERS else 0
        elif self._dice.random() < 0.08:
            self._meanwhile(self._dice)
        if self._left <= self._acts_at or self.is_cut:
            self._acts.set()

    # --- snapshots, clones, deletes --------------------------------------------------------------------------------

    async def _control(self, group: asyncio.TaskGroup) -> None:
        while not self.is_cut:
            self._acts_at = self._left - self._dice.randrange(2, 14)
            self._acts.clear()
            await self._acts.wait()
            if not self.is_cut:
                await self._act(group)

    async def _act(self, group: asyncio.TaskGroup) -> None:
        dice, model = self._dice, self._model
        snapshots = [each for each in model.snapshots.values() if each.life.removed is None]
        clones = [each for each in model.volumes.values() if each.life.removed is None and each.name.startswith("c")]
        volumes = [each for each in model.volumes.values() if each.life.removed is None]
        verb = dice.choices(("snapshot", "delete snapshot", "clone", "delete clone", "read"), (10, 3, 4, 2, 2))[0]
        if verb == "snapshot" and len(snapshots) < MAX_SNAPSHOTS:
            await self._snapshot(dice.choice(volumes))
        elif verb == "delete snapshot" and snapshots:
            await self._delete_snapshot(dice.choice(snapshots))
        elif verb == "clone" and snapshots and len(volumes) < MAX_VOLUMES:
            await self._clone(group, dice.choice(snapshots))
        elif verb == "delete clone" and clones:
            await self._delete_clone(dice.choice(clones))
        elif verb == "read" and snapshots:
            await self._read(dice.choice(snapshots))

    async def _snapshot(self, volume: VolumeModel) -> None:
        opened = await self._pool.open(volume.name)
        answered = asyncio.Event()
        try:
            await self._send(opened, volume, self._storm_write(volume))  # something is to be synced
            made = self._model.add_snapshot(volume, f"s{self._model.number()}")
            storm = asyncio.create_task(self._until_cut(self._storm(opened, volume, answered)))
            try:
                await self._pool.snapshot(volume.name, made.name)
                self._sees_the_answer()
                made.answered(self._model.number())
                made.life.made.answered = self._model.clock()
            finally:
                answered.set()
                await storm
        finally:
            with suppress(Exception):
                await opened.close()

    async def _storm(self, opened: Volume, volume: VolumeModel, answered: asyncio.Event) -> None:
        """Write while a snapshot is taken: between its syncs, its freeze and its commit."""
        for _ in range(_STORM_WRITES):
            if answered.is_set():
                return
            await self._send(opened, volume, self._storm_write(volume))
            await asyncio.sleep(0)

    def _storm_write(self, volume: VolumeModel) -> Request:
        share = volume.sectors // _STORM_SHARE
        return Request(Kind.WRITE, volume.sectors - share + self._dice.randrange(share // 8) * 8, 8)

    async def _delete_snapshot(self, snapshot: SnapshotModel) -> None:
        snapshot.life.removed = Span(self._model.clock())
        await self._pool.delete_snapshot(snapshot.export)
        self._sees_the_answer()
        snapshot.life.removed.answered = self._model.clock()

    async def _clone(self, group: asyncio.TaskGroup, snapshot: SnapshotModel) -> None:
        made = self._model.add_volume(f"c{self._model.number()}", snapshot.allowed())
        await self._pool.clone(snapshot.export, made.name)
        self._sees_the_answer()
        made.life.made.answered = self._model.clock()
        self._start_lanes(group, made)

    async def _delete_clone(self, volume: VolumeModel) -> None:
        self._ending.add(volume.name)
        await asyncio.wait(self._lanes[volume.name])
        if self.is_cut:
            return
        removed = volume.life.removed = Span(self._model.clock())
        for snapshot in self._model.snapshots.values():  # they go with it
            if snapshot.volume is volume and snapshot.life.removed is None:
                snapshot.life.removed = removed
        await self._pool.delete(volume.name)
        self._sees_the_answer()
        removed.answered = self._model.clock()

    async def _read(self, snapshot: SnapshotModel) -> None:
        data = await self._pool.read(snapshot.export)
        problem = judge(snapshot.export, data, snapshot.allowed())
        self.problem = self.problem or problem
        if not problem:
            snapshot.found(writers(data))


# --- after a restart -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Found:
    """What a pool holds."""

    volumes: dict[str, list[int]] = field(default_factory=dict)
    """For each sector the number of the write that its content is of."""
    snapshots: dict[str, list[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Promises that this breaks."""


async def examine(pool: Pool, model: PoolModel, at: int) -> Found:
    """Read everything, and compare it with what was promised by ``at``."""
    volumes, snapshots = await pool.names()
    found = Found(problems=list(model.misses(volumes, snapshots, at)))
    for names, known, into in (
        (volumes, {name: each.allowed(at) for name, each in model.volumes.items()}, found.volumes),
        (snapshots, {name: each.allowed() for name, each in model.snapshots.items()}, found.snapshots),
    ):
        for name in names:
            if name not in known:
                continue  # told among the problems
            try:
                data = await pool.read(name)
            except REFUSALS as error:
                found.problems.append(f"{name} cannot be read: {error!r}")
                continue
            if problem := judge(name, data, known[name]):
                found.problems.append(problem)
            into[name] = writers(data)
    return found


async def scribble(pool: Pool, model: PoolModel, found: Found, dice: random.Random) -> str:
    """Write one sector each into blocks that read as zeros; return what else changed there (I8: nothing)."""
    for name, values in found.volumes.items():
        empty = [first for first in range(0, len(values) - 7, 8) if not any(values[first : first + 8])]
        picked = [first + dice.randrange(8) for first in dice.sample(empty, min(len(empty), 12))]
        expected: Allowed = [(value,) for value in values]
        opened = await pool.open(name)
        for sector in picked:
            number = model.number()
            await opened.send(Request(Kind.WRITE, sector, 1), content(number, sector, 1))
            expected[sector] = (number,)
        await opened.close()
        if problem := judge(f"{name}, written to after recovery,", await pool.read(name), expected):
            return problem
    return ""
