"""What clients and administrators do to the simulated pool, several at a time, and what they count on afterwards."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from blockvirt.errors import BlockvirtError, DeviceFault, InUse, NotFound, PoolFull, VolumeStopped
from blockvirt.volumes.requests import NewVolume, VolumeChange
from tests.attacks.simulation_full import MAY_NEED_SPACE, only_what_needs_space
from tests.attacks.simulation_model import CELL, Broken, Group, Snapshot, Volume, Write, packed, taken, unpacked
from tests.attacks.simulation_world import CHUNK_CELLS, Undecided, Use, World, runs

_MAX_VOLUMES = 4
_MAX_SNAPSHOTS = 5
_HEARD_S = 1.0  # after a sync failed the loop knows of it, however slow the thread was
_WEIGHTS = {
    "write": 34,
    "zero": 14,
    "read": 12,
    "flush": 12,
    "log": 8,
    "snapshot": 6,
    "group": 2,
    "delete_snapshot": 4,
    "clone": 3,
    "revert": 2,
    "close": 3,
    "grow": 2,
    "create": 2,
    "delete": 1,
    "fault": 3,
}


class Clients:
    """Some clients, who do so many things between them."""

    def __init__(self, world: World, things: int) -> None:
        self.world = world
        self.dice = world.dice
        self.left = things
        # Each life has its own habits: what is rare among everything is common where little else is done.
        self._weights = [weight * self.dice.choice((0, 0.3, 1, 3)) for weight in _WEIGHTS.values()]
        self._weights[0] += 1
        self._pauses_s = self.dice.choice(((0.0,), (0.0, 1e-4, 1e-2), (0.0, 1e-2, 0.2)))
        world.machine.faults.presses = self.dice.choice((0.0, 0.1, 0.8))
        world.machine.faults.look_misses = self.dice.choice((0.0, 0.15, 0.7))
        self._does: dict[str, Callable[[Volume], Awaitable[None]]] = {
            name: getattr(self, name) for name in _WEIGHTS if name not in ("create", "fault")
        }

    async def run(self, clients: int) -> None:
        """Do everything; raises Broken."""
        tasks = [asyncio.create_task(self._client()) for _ in range(clients)]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task in done:
                task.result()

    async def _client(self) -> None:
        while self.left > 0:
            self.left -= 1
            name = self.dice.choices(list(_WEIGHTS), self._weights)[0]
            free = [v for v in self.world.volumes.values() if not self.world.uses.setdefault(v.name, Use()).is_alone]
            if name == "fault":
                self.fault()
            elif name == "create" or not free:
                await self.create()
            else:
                await self._try(name, self.dice.choice(free))
            await asyncio.sleep(self.dice.choice(self._pauses_s))

    async def _try(self, name: str, volume: Volume) -> None:
        try:
            await self._does[name](volume)
        except (InUse, NotFound):
            pass  # somebody else was quicker
        except PoolFull as error:
            if not self.world.machine.was_full:
                raise Broken(f"{volume.name} finds the pool full, which it is not") from error
            if name not in MAY_NEED_SPACE:
                raise Broken(f"a full pool keeps {volume.name} from {name}, which needs no space") from error
            self.world.outcome.add("refused for lack of space")
        except (VolumeStopped, DeviceFault, OSError) as error:
            if name == "group":
                return  # which of the two it was does not count
            self.world.note_error(volume, error)
            if isinstance(error, VolumeStopped) and self.dice.random() < 0.3:  # else it stays stopped for a while
                await self._revive(volume)

    async def _revive(self, volume: Volume) -> None:
        use = self.world.uses[volume.name]
        if use.is_alone or volume.name not in self.world.volumes:
            return
        async with self.world.alone(volume):
            self.world.mend()
            volume.lost_power = True
            try:
                await self.world.reopen(volume, VolumeStopped(""))
            except InUse:
                volume.lost_power = False
            await self.world.look(volume)

    # --- data ------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _using(self, volume: Volume) -> AsyncIterator[Any]:
        use = self.world.uses[volume.name]
        use.enter()
        try:
            yield await self.world.session(volume)
        finally:
            use.leave()

    def _range(self, volume: Volume, size_bytes: int) -> range:
        run = self.dice.choice(runs(size_bytes // CELL))
        start = self.dice.choice((run.start, self.dice.choice(run), self.dice.choice(run)))
        if self.dice.random() < 0.4:
            start -= start % CHUNK_CELLS
        length = self.dice.choice((1, 1, 2, 7, CHUNK_CELLS, CHUNK_CELLS, 9, 17, 3 * CHUNK_CELLS))
        return range(start, min(start + length, run.stop))

    async def write(self, volume: Volume) -> None:
        """A batch of writes, as a session does them: at once where possible, the others after the batch."""
        async with self._using(volume) as handle:
            slow: list[tuple[Write, range]] = []
            fast: list[tuple[Write, range]] = []
            failed: BlockvirtError | OSError | None = None
            began_s = self.world.machine.now_s()
            for _ in range(self.dice.choice((1, 1, 2, 4))):
                cells = self._range(volume, handle.size_bytes)
                write = volume.begin(self.world.number(), cells, self.world.tick())
                try:
                    with only_what_needs_space(handle, cells):
                        done = handle.write_now(cells.start * CELL, memoryview(packed(write.stamp) * len(cells)))
                    (fast if done else slow).append((write, cells))
                except (BlockvirtError, OSError) as error:
                    volume.end(write, self.world.tick(), answered=False)
                    failed = error
                    break
            try:
                handle.settle()  # whatever became of the last one
            except (BlockvirtError, OSError):
                for each, _ in [*fast, *slow]:
                    volume.end(each, self.world.tick(), answered=False)
                raise
            for write, _ in fast:
                self._answered(volume, write, began_s)
            tasks = [asyncio.create_task(self._slow_write(volume, handle, *each)) for each in slow]
            if tasks:
                await asyncio.wait(tasks)
            for problem in [failed, *(task.exception() for task in tasks)]:
                if problem is not None:
                    raise problem

    async def _slow_write(self, volume: Volume, handle: Any, write: Write, cells: range) -> None:
        fua = self.dice.random() < 0.1
        data = memoryview(packed(write.stamp) * len(cells))
        with only_what_needs_space(handle, cells, is_awaited=True):
            await self._one(volume, write, handle.write(cells.start * CELL, data, fua=fua), fua=fua)

    async def zero(self, volume: Volume) -> None:
        """A trim, or zeros."""
        async with self._using(volume) as handle:
            cells = self._range(volume, handle.size_bytes)
            if self.dice.random() < 0.5:  # whole chunks
                end = min(-(-cells.stop // CHUNK_CELLS) * CHUNK_CELLS, handle.size_bytes // CELL)
                cells = range(cells.start // CHUNK_CELLS * CHUNK_CELLS, end)
            touched = {*cells}
            if self.dice.random() < 0.1:
                cells = range(handle.size_bytes // CELL)
                touched = {*volume.cells}.union(*runs(len(cells)))
            write = volume.begin(0, sorted(touched), self.world.tick())
            fua, punch = self.dice.random() < 0.1, len(cells) > 100 or self.dice.random() < 0.7
            zeroed = handle.zero(cells.start * CELL, len(cells) * CELL, punch=punch, fua=fua)
            with only_what_needs_space(handle, cells, punch=punch):
                await self._one(volume, write, zeroed, fua=fua)

    async def _one(self, volume: Volume, write: Write, request: Awaitable[None], *, fua: bool) -> None:
        began_s = self.world.machine.now_s()
        try:
            await request
        except (BlockvirtError, OSError):
            volume.end(write, self.world.tick(), answered=False)
            raise
        self._answered(volume, write, began_s)
        if fua:
            assert write.ended is not None
            volume.flush(write.began)
            self.world.outcome.add("flushes answered")

    def _answered(self, volume: Volume, write: Write, began_s: float) -> None:
        self._is_not_stopped(volume, began_s, "a write")
        volume.end(write, self.world.tick(), answered=True)
        self.world.machine.note("answered", volume.name, write.stamp, write.began)
        self.world.outcome.add("writes answered")

    def _is_not_stopped(self, volume: Volume, began_s: float, what: str) -> None:
        failed_s = self.world.machine.failed_branches.get(self.world.branches.get(volume.name, 0))
        if failed_s is not None and began_s > failed_s + _HEARD_S:
            raise Broken(f"{what} of {volume.name} is answered after a sync of it has failed")

    async def read(self, volume: Volume) -> None:
        """A read, compared with what may be there."""
        async with self._using(volume) as handle:
            cells = self._range(volume, handle.size_bytes)
            began = self.world.tick()
            volume.looks.append(began)
            buffer = bytearray(len(cells) * CELL)
            if not handle.read_now(cells.start * CELL, memoryview(buffer)):
                for error in await handle.read([(cells.start * CELL, memoryview(buffer))]):
                    if error is not None:
                        raise error
            volume.looks.remove(began)
            for place, cell in enumerate(cells):
                stamps = {write.stamp for write in volume.now(cell, began)}
                piece = bytes(buffer[place * CELL : (place + 1) * CELL])
                if len(volume.now(cell, began)) > 1 and piece not in map(packed, stamps):
                    continue  # a write is under way in it
                stamp = unpacked(f"{volume.name} cell {cell}", piece)
                if stamp not in stamps:
                    raise Broken(f"a read of {volume.name} cell {cell} shows {stamp}, may show {sorted(stamps)}")
            self.world.outcome.add("reads compared")

    async def flush(self, volume: Volume) -> None:
        """A flush."""
        async with self._using(volume) as handle:
            began, began_s = self.world.tick(), self.world.machine.now_s()
            await handle.flush()
            self._is_not_stopped(volume, began_s, "a flush")
            volume.flush(began)
            self.world.machine.note("flushed", volume.name, began)
            self.world.outcome.add("flushes answered")

    async def log(self, volume: Volume) -> None:
        """Small writes to a few places over and over, each followed by a flush, as the log of a database does them."""
        for _ in range(self.dice.randrange(1, 6)):
            async with self._using(volume) as handle:
                cell = self.dice.randrange(min(4 * CHUNK_CELLS, handle.size_bytes // CELL))
                write = volume.begin(self.world.number(), range(cell, cell + 1), self.world.tick())
                await self._slow_write(volume, handle, write, range(cell, cell + 1))
            await self.flush(volume)

    # --- snapshots -------------------------------------------------------------------------------------------------

    async def snapshot(self, volume: Volume) -> None:
        """A snapshot of one volume."""
        await self._snapshot([volume])

    async def group(self, volume: Volume) -> None:
        """A snapshot of two volumes at one instant."""
        uses = self.world.uses
        others = [each for each in self.world.volumes.values() if each is not volume and not uses[each.name].is_alone]
        if others:
            await self._snapshot([volume, self.dice.choice(others)])

    async def _snapshot(self, volumes: list[Volume]) -> None:
        if any(len(volume.snapshots) >= _MAX_SNAPSHOTS for volume in volumes):
            await self.delete_snapshot(volumes[0])
            return
        group, name = Group(self.world.tick()), f"s{self.world.number()}"
        for volume in volumes:
            self.world.uses[volume.name].enter()
            volume.looks.append(group.began)
        held = [Snapshot(name, volume.size_cells, {}, group) for volume in volumes]
        undecided = Undecided("snapshot", volumes, [*held])
        self.world.undecided.append(undecided)
        try:
            await self.world.snapshots.create({volume.id: name for volume in volumes})
        except (BlockvirtError, OSError):
            if all(self.world.has_snapshot(volume, snapshot) for volume, snapshot in zip(volumes, held, strict=True)):
                raise Broken(f"a snapshot was refused, and is there: {name}") from None
            raise
        else:
            for volume in volumes:
                volume.snapshots[name] = taken(volume, name, group)
            self.world.machine.note("snapshot", name)
            self.world.outcome.add("snapshots taken")
        finally:
            if not self.world.machine.is_dead():
                self.world.undecided.remove(undecided)
                for volume in volumes:
                    volume.looks.remove(group.began)
                    self.world.uses[volume.name].leave()
        if self.dice.random() < 0.5:
            for volume in volumes:
                if name in volume.snapshots:
                    await self.world.look_at_snapshot(volume, volume.snapshots[name])

    def _of(self, volume: Volume) -> Snapshot | None:
        there = [snapshot for snapshot in volume.snapshots.values() if not snapshot.is_going]
        return self.dice.choice(there) if there else None

    @asynccontextmanager
    async def _undecided(self, kind: str, *about: Any, size_cells: int = 0) -> AsyncIterator[None]:
        volumes = [each for each in about if isinstance(each, Volume)]
        snapshots = [each for each in about if not isinstance(each, Volume)]
        undecided = Undecided(kind, volumes, snapshots, size_cells)
        self.world.undecided.append(undecided)
        try:
            yield
        finally:
            if not self.world.machine.is_dead():
                self.world.undecided.remove(undecided)

    def _are_enough(self) -> bool:
        return len(self.world.volumes) + self.world.making >= _MAX_VOLUMES

    async def delete_snapshot(self, volume: Volume) -> None:
        """A snapshot goes."""
        snapshot = self._of(volume)
        if snapshot is None:
            return
        async with self._undecided("delete-snapshot", volume, snapshot):
            snapshot.is_going = True
            await self.world.snapshots.delete([f"{volume.name}@{snapshot.name}"], force=True)
            del volume.snapshots[snapshot.name]
        self.world.outcome.add("snapshots deleted")

    async def clone(self, volume: Volume) -> None:
        """A volume that comes from a snapshot."""
        snapshot = self._of(volume)
        if snapshot is None or self._are_enough() or not await self._is_seen(volume, snapshot):
            return
        made = Volume(f"v{self.world.number()}")
        made.content(snapshot, self.world.tick())
        origin = self.world.snapshots.find(f"{volume.name}@{snapshot.name}")
        self.world.making += 1
        async with self._undecided("clone", made):
            wanted = NewVolume(size_bytes=snapshot.size_cells * CELL, name=made.name)
            made.id = (await self.world.catalogue.create(wanted, origin=origin)).volume.id
            self.world.volumes[made.name] = made
            self.world.making -= 1
        self.world.outcome.add("clones")

    async def _is_seen(self, volume: Volume, snapshot: Snapshot) -> bool:
        await self.world.look_at_snapshot(volume, snapshot)
        return snapshot.is_looked_at and not snapshot.is_going

    async def revert(self, volume: Volume) -> None:
        """A volume goes back to a snapshot."""
        snapshot = self._of(volume)
        if snapshot is None or not await self._is_seen(volume, snapshot):
            return
        async with self.world.alone(volume):
            name = f"s{self.world.number()}" if self.dice.random() < 0.5 else ""
            safety = taken(volume, name, Group(self.world.tick())) if name else None
            self.world.head_of(volume)
            async with self._undecided("revert", volume, safety, snapshot):
                where = f"{volume.name}@{snapshot.name}"
                await self.world.reverts.revert(where, safety=safety is not None, safety_name=name)
                if safety is not None:
                    volume.snapshots[name] = safety
                volume.content(snapshot, self.world.tick())
            self.world.head_of(volume)
        self.world.outcome.add("reverts")

    # --- volumes ---------------------------------------------------------------------------------------------------

    async def create(self) -> None:
        """A new volume."""
        if self._are_enough():
            return
        size = self.dice.choice((6 * CHUNK_CELLS, 514 * CHUNK_CELLS + 3, 520 * CHUNK_CELLS))
        made = Volume(f"v{self.world.number()}", size_cells=size)
        self.world.making += 1
        async with self._undecided("create", made):
            made.id = (await self.world.catalogue.create(NewVolume(size_bytes=size * CELL, name=made.name))).volume.id
            self.world.volumes[made.name] = made
            self.world.making -= 1

    async def close(self, volume: Volume) -> None:
        """All sessions end; the next one opens the volume anew."""
        async with self.world.alone(volume):
            pass

    async def grow(self, volume: Volume) -> None:
        """A volume gets larger."""
        size = volume.size_cells + self.dice.choice((1, 5, CHUNK_CELLS, 20))
        async with self.world.alone(volume), self._undecided("resize", volume, size_cells=size):
            await self.world.catalogue.change(volume.id, VolumeChange(size_bytes=size * CELL))
            volume.size_cells = size

    async def delete(self, volume: Volume) -> None:
        """A volume goes, with its snapshots."""
        async with self.world.alone(volume), self._undecided("delete", volume):
            for snapshot in volume.snapshots.values():
                snapshot.is_going = True
            await self.world.catalogue.delete(volume.id)
            del self.world.volumes[volume.name]
            self.world.outcome.add("volumes deleted")

    # --- the disk --------------------------------------------------------------------------------------------------

    def fault(self) -> None:
        """Something goes wrong for a while."""
        errors = [("sync_fails", 0.3), ("write_fails", 0.1)] if self.world.has_errors else []
        setattr(self.world.machine.faults, *self.dice.choice([("write_is_short", 0.5), ("is_full", True), *errors]))
        asyncio.get_running_loop().call_later(self.dice.choice((1e-3, 0.05, 0.5, 5.0)), self.world.mend)
