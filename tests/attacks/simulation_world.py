"""A pool on a simulated machine, life after life, and what is known of it: the looks after each start."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockvirt.errors import DeviceFault, InUse, NotFound, VolumeStopped
from blockvirt.meta.findings import Severity
from blockvirt.meta.keys import Table, number_key
from blockvirt.meta.records import BranchRecord, VolumeRecord
from blockvirt.snapshots.catalogue import Snapshots
from blockvirt.snapshots.readers import SnapshotReaders
from blockvirt.snapshots.revert import Reverts
from blockvirt.snapshots.sealing import Sealer
from blockvirt.tasks import TaskSet
from blockvirt.units import KIB, MIB
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.engine import Engine, EngineSettings
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.proof import MapProof
from tests.attacks.attack import Outcome
from tests.attacks.simulation_model import CELL, Broken, Snapshot, Volume, taken, unpacked
from tests.attacks.simulation_seam import Faults, Machine

CHUNK_CELLS = 8
CHUNK = CHUNK_CELLS * CELL
_LEAF = 512
_OPENINGS = 4  # of a volume under a disk that is mended after the first one


@dataclass(slots=True)
class Use:
    """Who works with a volume in this life."""

    sessions: list[Handle] = field(default_factory=list)
    users: int = 0
    is_alone: bool = False
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def enter(self) -> None:
        """Begin to work with it."""
        self.users += 1

    def leave(self) -> None:
        """Be done."""
        self.users -= 1
        self.left.set()


@dataclass(slots=True, eq=False)
class Undecided:
    """A request that was under way when the process died: it was done as a whole, or not at all."""

    kind: str
    volumes: list[Volume] = field(default_factory=list)
    snapshots: list[Snapshot | None] = field(default_factory=list)
    """One for each volume; of a revert: the safety snapshot, and behind it the target."""
    size_cells: int = 0


class World:
    """The pool and the model beside it."""

    def __init__(self, root: Path, seed: int, outcome: Outcome) -> None:
        self.machine = Machine(root, seed)
        self.dice: random.Random = self.machine.dice
        self.outcome = outcome
        self.volumes: dict[str, Volume] = {}
        self.undecided: list[Undecided] = []
        self.uses: dict[str, Use] = {}
        self.branches: dict[str, int] = {}
        """Of the volumes' heads, by name, as last seen."""
        self.settings = EngineSettings(
            chunk_bytes=4 * KIB,
            metadata_reserve_bytes=MIB,
            checkpoint_age_s=self.dice.choice((0.05, 0.5, 3600.0)),
            backing_file_bytes=self.dice.choice((64 * CHUNK, MIB, 16 * MIB)),
            leaf_cache_bytes=self.dice.choice((1, MIB)),
        )
        self.has_errors = self.dice.random() < 0.3
        """The disk fails now and then."""
        self.making = 0
        """Volumes that are being created."""
        self.is_started = False
        """In this life: it has been looked at everything."""
        self.engine: Engine
        self._tick = 0
        self._numbers = 0

    # --- numbers -------------------------------------------------------------------------------------------------

    def tick(self) -> int:
        """Return the next moment of the model."""
        self._tick += 1
        return self._tick

    def number(self) -> int:
        """Return a number that was never used: of a stamp, a name, a session."""
        self._numbers += 1
        return self._numbers

    # --- lives ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the daemon's parts and look at everything; raises Broken."""
        self.uses = {}
        self.making = 0
        if self.has_errors and self.dice.random() < 0.2:
            self.machine.faults.sync_fails = 0.4
        self.machine.is_served = self._is_served
        engine = self.engine = await Engine.start(
            self.machine.root / "state", [self.machine.root / "disk"], self.settings
        )
        self.prove()
        self.catalogue = Catalogue(engine.store, engine.registry, engine.storage)
        self.readers = SnapshotReaders(engine.context)
        self.snapshots = Snapshots(engine, self.readers)
        self.reverts = Reverts(engine, self.snapshots, self.catalogue.promises)
        self.workers = TaskSet("simulation")
        self.workers.start(Sealer(engine).run(), "seal")
        for undecided in self.undecided:
            await self._decide(undecided)
        self.undecided.clear()
        for volume in list(self.volumes.values()):
            await self.look(volume)
            for snapshot in volume.snapshots.values():
                await self.look_at_snapshot(volume, snapshot)
        self.mend()

    def _is_served(self, branch: int) -> bool:
        return hasattr(self, "engine") and any(
            opened.volume.map.branch == branch for opened in self.engine.registry.opened()
        )

    def mend(self) -> None:
        """Have the disk work again."""
        self.machine.faults = Faults(look_misses=self.machine.faults.look_misses, presses=self.machine.faults.presses)

    def prove(self) -> None:
        """Have the offline proof look at the map; raises Broken."""
        found = [each for each in MapProof(self.engine.context).run() if each.severity is Severity.CORRUPT]
        if found:
            raise Broken(f"the map is corrupt: {found[0].code}, {found[0].message}")
        self.outcome.add("maps proved")

    async def stop(self) -> None:
        """Stop the daemon in order: what was answered survives a power cut from then on."""
        self.mend()
        for use in self.uses.values():
            for session in use.sessions:
                await session.close()
        await self.workers.close()
        await self.readers.close()
        began = self.tick()
        await self.engine.close()
        for volume in self.volumes.values():
            if self.branches.get(volume.name) not in self.machine.hit_by_errors:
                volume.flush(began)

    def died(self, *, power: bool) -> None:
        """Note that the process is gone."""
        self.machine.faults = Faults()
        self.machine.failed_branches.clear()
        tick = self.tick()
        for volume in self.volumes.values():
            failed = self.branches.get(volume.name) in self.machine.shaken
            volume.died(tick, power=power or failed)
        for undecided in self.undecided:
            for volume in undecided.volumes:
                volume.died(tick, power=power)
        for volume in self.volumes.values():
            for snapshot in volume.snapshots.values():
                snapshot.is_going = False

    # --- looks ---------------------------------------------------------------------------------------------------

    async def session(self, volume: Volume) -> Handle:
        """Return a session of a volume, one that is there or a new one; raises what opening it raises."""
        sessions = self.uses.setdefault(volume.name, Use()).sessions
        if not sessions or (len(sessions) < 2 and self.dice.random() < 0.1):
            opened = await self.engine.registry.open(volume.id, f"session-{self.number()}")
            sessions.append(opened)
            self.branches[volume.name] = opened._opened.volume.map.branch
            return opened
        return self.dice.choice(sessions)

    @asynccontextmanager
    async def alone(self, volume: Volume) -> AsyncIterator[None]:
        """Have a volume without sessions for a while."""
        use = self.uses.setdefault(volume.name, Use())
        if use.is_alone:
            raise InUse("somebody else was quicker")
        use.is_alone = True
        try:
            while use.users:
                use.left.clear()
                await use.left.wait()
            await self.close_sessions(use)
            yield
        finally:
            use.is_alone = False

    async def close_sessions(self, use: Use) -> None:
        """End the sessions of a volume."""
        sessions, use.sessions = use.sessions, []
        for session in sessions:
            await session.close()

    async def look(self, volume: Volume) -> None:
        """Read what counts of a volume and compare; raises Broken."""
        for _ in range(_OPENINGS):
            try:
                handle = await self.session(volume)
                content = await self.read(handle, volume.name, volume.cells, volume.size_cells)
                break
            except (VolumeStopped, DeviceFault, OSError) as error:
                self.note_error(volume, error)
                volume.lost_power = True
                await self.close_sessions(self.uses[volume.name])
                self.mend()
                await self.reopen(volume, error)
        else:
            raise Broken(f"{volume.name} cannot be had back, although its disk is mended")
        if handle.size_bytes != volume.size_cells * CELL:
            raise Broken(f"{volume.name} has {handle.size_bytes} bytes, not {volume.size_cells * CELL}")
        volume.found(content, self.tick())
        self.machine.hit_by_errors.discard(self.branches[volume.name])
        self.machine.shaken.discard(self.branches[volume.name])
        self.outcome.add("volumes compared")

    async def reopen(self, volume: Volume, error: BaseException) -> None:
        """Ask for a volume back that has stopped; it stays so where another client breaks the disk again meanwhile."""
        branch = self.head_of(volume)
        self.machine.failed_branches.pop(branch, None)
        if isinstance(error, VolumeStopped):
            try:
                await self.catalogue.reopen(volume.id)
                self.outcome.add("reopened")
            except DeviceFault as failure:
                self.note_error(volume, failure)

    def head_of(self, volume: Volume) -> int:
        """Return the number of a volume's branch."""
        with self.engine.store.read() as reader:
            record = reader.record(VolumeRecord, Table.VOLUMES, volume.id.encode())
        assert record is not None
        self.branches[volume.name] = record.branch
        return record.branch

    def note_error(self, volume: Volume, error: BaseException) -> None:
        """Raise Broken unless something was done to a volume that explains an error."""
        with self.engine.store.read() as reader:
            record = reader.record(VolumeRecord, Table.VOLUMES, volume.id.encode())
            branch = reader.record(BranchRecord, Table.BRANCHES, number_key(record.branch)) if record else None
        if branch is None:
            return  # it was deleted meanwhile
        if branch.number not in self.machine.hit_by_errors:
            raise Broken(f"{volume.name} fails without a reason: {error!r}") from error
        self.branches[volume.name] = branch.number
        self.outcome.add("errors explained")

    async def look_at_snapshot(self, volume: Volume, snapshot: Snapshot) -> None:
        """Read what counts of a snapshot and compare; raises Broken."""
        where = f"{volume.name}@{snapshot.name}"
        try:
            record = self.snapshots.find(where)
        except NotFound as error:
            if snapshot.is_going or volume.snapshots.get(snapshot.name) is not snapshot:
                return
            raise Broken(f"a snapshot is gone: {where}") from error
        handle = self.readers.open(record, f"reader-{self.number()}")
        cells = snapshot.fixed if snapshot.is_looked_at else {**dict.fromkeys(volume.cells), **snapshot.may}
        try:
            content = await self.read(handle, where, cells, snapshot.size_cells)
        finally:
            await handle.close()
        if snapshot.is_going:
            return  # what it alone held may be punched by now
        snapshot.found(volume.name, content)
        self.outcome.add("snapshots compared")

    async def read(self, handle: Any, where: str, cells: Iterable[int], size_cells: int) -> dict[int, int]:
        """Read cells, and those around the ends; returns their stamps. Raises Broken, OSError, BlockvirtError."""
        wanted = sorted({cell for run in runs(size_cells) for cell in run} | {c for c in cells if c < size_cells})
        content: dict[int, int] = {}
        for start, count in _ranges(wanted):
            buffer = bytearray(count * CELL)
            if not handle.read_now(start * CELL, memoryview(buffer)):
                for error in await handle.read([(start * CELL, memoryview(buffer))]):
                    if error is not None:
                        raise error
            for place in range(count):
                content[start + place] = unpacked(
                    f"{where} cell {start + place}", bytes(buffer[place * CELL : (place + 1) * CELL])
                )
        return content

    # --- what was under way --------------------------------------------------------------------------------------

    async def _decide(self, undecided: Undecided) -> None:
        """Find out what became of a request; raises Broken where it was done in part."""
        volume = undecided.volumes[0]
        if undecided.kind in ("create", "clone"):
            record = self._named(volume.name)
            if record is not None:
                volume.id = record.id
                self.volumes[volume.name] = volume
        elif undecided.kind == "delete":
            if self._named(volume.name) is None:
                self.volumes.pop(volume.name, None)
        elif undecided.kind == "resize":
            record = self._named(volume.name)
            if record is not None and record.size_bytes == undecided.size_cells * CELL:
                volume.size_cells = undecided.size_cells
        elif undecided.kind == "snapshot":
            self._decide_group(undecided)
        elif undecided.kind == "delete-snapshot":
            (snapshot,) = undecided.snapshots
            assert snapshot is not None
            if not self.has_snapshot(volume, snapshot):
                volume.snapshots.pop(snapshot.name, None)
        else:
            await self._decide_revert(undecided)

    def _named(self, name: str) -> Any:
        try:
            return self.catalogue.get(name)
        except NotFound:
            return None

    def has_snapshot(self, volume: Volume, snapshot: Snapshot) -> bool:
        """Tell whether a snapshot is there."""
        try:
            self.snapshots.find(f"{volume.name}@{snapshot.name}")
        except NotFound:
            return False
        return True

    def _decide_group(self, undecided: Undecided) -> None:
        pairs = [(v, s) for v, s in zip(undecided.volumes, undecided.snapshots, strict=True) if s is not None]
        there = [self.has_snapshot(volume, snapshot) for volume, snapshot in pairs]
        if any(there) and not all(there):
            raise Broken(f"a group is there in part: {[snapshot.name for _, snapshot in pairs]}, {there}")
        if all(there):
            for volume, snapshot in pairs:
                volume.snapshots[snapshot.name] = taken(volume, snapshot.name, snapshot.group)

    async def _decide_revert(self, undecided: Undecided) -> None:
        volume = undecided.volumes[0]
        safety, target = undecided.snapshots
        assert target is not None
        if safety is not None:
            is_done = self.has_snapshot(volume, safety)
        else:
            with self.engine.store.read() as reader:
                record = reader.record(VolumeRecord, Table.VOLUMES, volume.id.encode())
            assert record is not None
            is_done = record.branch != self.branches[volume.name]
        if is_done:
            if safety is not None:
                volume.snapshots[safety.name] = taken(volume, safety.name, safety.group)
            volume.content(target, self.tick())


def runs(size_cells: int) -> list[range]:
    """Return where a volume is worked on: its beginning, around the end of the first leaf, and its own end."""
    around = _LEAF * CHUNK_CELLS
    places = [(0, 6 * CHUNK_CELLS), (around - 4 * CHUNK_CELLS, around + 3 * CHUNK_CELLS)]
    places.append((max(0, size_cells - 3 * CHUNK_CELLS), size_cells))
    return [range(start, min(end, size_cells)) for start, end in places if start < size_cells]


def _ranges(cells: list[int]) -> list[tuple[int, int]]:
    """Return runs of neighbours: the first, and how many."""
    found: list[tuple[int, int]] = []
    for cell in cells:
        if found and found[-1][0] + found[-1][1] == cell:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((cell, 1))
    return found
