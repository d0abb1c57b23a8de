"""One history: volumes written to over several connections, snapshotted, cloned, reverted, grown, and read again.

All that was ever kept is compared again, byte by byte, and with it what the daemon says of differences.
"""

import asyncio
import json
import random
from typing import Any

from blockvirt.nbd.client import NbdClientError, RequestFailed
from tests.attacks.attack import Outcome
from tests.attacks.fsx_lanes import Lane, dirty_since, open_lanes, whole
from tests.attacks.fsx_model import Instant, Kind, Op, World, first_difference, grown, new_size, next_op, outside
from tests.real.daemon import Daemon

OPERATIONS = 1_000  # of one history
_IN_FLIGHT = 48
_MOST_VOLUMES, _MOST_SNAPSHOTS = 3, 7
_NOT_SUPPORTED = 95
_RESTARTS = 0.1  # of the histories


class Broken(Exception):
    """A promise was broken."""


class History:
    """One history over a running daemon, whose volumes nobody else uses."""

    def __init__(self, daemon: Daemon, seed: int, outcome: Outcome) -> None:
        self._daemon = daemon
        self._seed = seed
        self._outcome = outcome
        self._chance = random.Random(seed)
        self._world = World()
        self._lanes: dict[str, list[Lane]] = {}
        self._flying: dict[asyncio.Task[None], Op] = {}
        self._held: Op | None = None
        """What waits for its turn: the model has it already."""
        self._taking: asyncio.Task[None] | None = None
        """The snapshot that is being taken meanwhile."""
        self._issued: list[Op] = []
        """While it is: what was in flight when it was asked for, or came since."""
        self._names = 0
        self._jobs: list[str] = []

    async def run(self, *, is_kept: bool) -> None:
        """Do it all; raises Broken, and whatever else shows that the daemon does not do what it must.

        ``is_kept``: leave the volumes there, for the check of the pool.
        """
        try:
            await self._new_volume()
            bursts = self._chance.randrange(10, 16)
            left = OPERATIONS
            restart_at = self._chance.randrange(bursts) if self._chance.random() < _RESTARTS else -1
            for burst in range(bursts):
                count = left // (bursts - burst)
                left -= count
                await self._burst(count)
                await self._one_step(is_restart=burst == restart_at)
            await self._end(is_kept=is_kept)
        finally:
            running = [*self._flying, *([self._taking] if self._taking is not None else [])]
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)
            for volume in list(self._lanes):
                await self._drop(volume)

    # --- requests --------------------------------------------------------------------------------------------------

    async def _burst(self, count: int) -> None:
        """Send requests, many at once: in the order of their making where they overlap, else in any."""
        busy = self._chance.random() < 0.3 and len(self._world.snapshots) < _MOST_SNAPSHOTS
        instant_at = self._chance.randrange(count) if busy else -1
        for place in range(count):
            self._held = op = next_op(self._chance, self._world)
            while before := [task for task, other in self._flying.items() if other.overlaps(op)]:
                await asyncio.wait(before)
                self._raise_what_failed()
            while len(self._flying) >= _IN_FLIGHT:
                await asyncio.wait(self._flying, return_when=asyncio.FIRST_COMPLETED)
                self._raise_what_failed()
            lane = self._chance.choice(self._lanes[op.volume])
            self._issued.append(op)
            task = asyncio.create_task(self._do(lane, op))
            self._flying[task] = op
            self._held = None
            task.add_done_callback(self._landed)
            if place == instant_at:
                self._taking = asyncio.create_task(self._snapshot_in_flight(op.volume))
            elif not place % 8:
                await asyncio.sleep(0)  # requests leave, replies are taken
        if self._taking is not None:
            await self._taking
            self._taking = None
        await self._quiet()

    def _landed(self, task: "asyncio.Task[None]") -> None:
        if task.cancelled() or task.exception() is None:
            self._flying.pop(task, None)  # what failed stays, for ``_raise_what_failed``

    def _raise_what_failed(self) -> None:
        for task in [task for task in self._flying if task.done()]:
            del self._flying[task]
            task.result()

    async def _quiet(self) -> None:
        """Wait for every reply; raises what any of them broke."""
        while running := [task for task in self._flying if not task.done()]:
            await asyncio.wait(running)
        self._raise_what_failed()

    async def _do(self, lane: Lane, op: Op) -> None:
        try:
            found = await lane.do(op)
        except RequestFailed as error:
            if op.refused and error.error == _NOT_SUPPORTED:
                self._outcome.add("refused fast zeroes")
                return
            raise Broken(f"{op.kind} of {op.volume} at {op.offset}, {op.length} bytes: {error}") from error
        self._outcome.add(op.kind.value)
        if op.refused:
            raise Broken(f"zeroes of {op.volume} at {op.offset} that allocate were called fast")
        if op.kind is Kind.READ and found != op.data:
            raise Broken(f"a read of {op.volume}: {first_difference(op.data, found, op.offset)}")
        if op.kind is Kind.STATUS:
            for place, told in enumerate(found):
                if told and op.data[place]:
                    raise Broken(f"{op.volume} is told to read as zeros at {op.offset + place} and does not")

    # --- steps between -----------------------------------------------------------------------------------------------

    async def _one_step(self, *, is_restart: bool) -> None:
        steps = [self._snapshot, self._snapshot, self._clone, self._clone, self._revert, self._revert]
        steps += [self._flatten, self._delete_snapshot, self._grow, self._reopen, self._delete_volume]
        steps += [self._compare_two, self._compare_two, self._compare_head, self._compare_head, self._read_all]
        await (self._restart() if is_restart else self._chance.choice(steps)())

    async def _new_volume(self) -> None:
        name, size = self._name("v"), new_size(self._chance)
        await self._ask("POST", "/v1/volumes", {"name": name, "size": size}, status=201)
        self._world.volumes[name] = bytearray(size)
        await self._attach(name)

    async def _snapshot(self) -> None:
        if len(self._world.snapshots) >= _MOST_SNAPSHOTS:
            return await self._delete_snapshot()
        volume, name = self._a_volume(), self._name("s")
        await self._ask("POST", "/v1/snapshots", {"volume": volume, "name": name}, status=201)
        self._world.snapshots[f"{volume}@{name}"] = bytes(self._world.volumes[volume])
        self._outcome.add("snapshots")

    async def _snapshot_in_flight(self, volume: str) -> None:
        """Take a snapshot while requests are on their way: it holds all that was replied to, and never changes."""
        name = self._name("s")
        before = bytearray(self._world.volumes[volume])
        self._issued = list(self._flying.values())
        for op in [self._held, *self._issued]:
            if op is not None and op.volume == volume and not op.reads:
                before[op.offset : op.offset + op.length] = op.under
        await self._ask("POST", "/v1/snapshots", {"volume": volume, "name": name}, status=201)
        open_ops = [op for op in self._issued if op.volume == volume and not op.reads]
        found = await whole(self._daemon.socket, f"{volume}@{name}")
        if different := Instant(bytes(before), open_ops).difference(found):
            raise Broken(f"snapshot {volume}@{name}, taken under way: {different}")
        self._world.snapshots[f"{volume}@{name}"] = found
        self._outcome.add("snapshots under way")

    async def _clone(self) -> None:
        if not self._world.snapshots or len(self._world.volumes) >= _MOST_VOLUMES:
            return await self._snapshot()
        origin, name = self._a_snapshot(), self._name("c")
        await self._ask("POST", f"/v1/snapshots/{origin}/clone", {"name": name}, status=201)
        self._world.volumes[name] = bytearray(self._world.snapshots[origin])
        await self._attach(name)
        self._outcome.add("clones")

    async def _revert(self) -> None:
        targets = [name for name in self._world.snapshots if name.partition("@")[0] in self._world.volumes]
        if not targets:
            return await self._snapshot()
        target = self._chance.choice(targets)
        volume = target.partition("@")[0]
        keep, force = self._chance.random() < 0.5, self._chance.random() < 0.3
        safety = self._name("s")
        if not force:
            await self._detach(volume)
        wanted = {"force": force, "safety": keep} | ({"safety_name": safety} if keep else {})
        done = await self._ask("POST", f"/v1/snapshots/{target}/revert", wanted)
        if force:
            await self._drop(volume)
        if done["needs_reopen"]:
            await self._ask("POST", f"/v1/volumes/{volume}/reopen")
        if keep:
            self._world.snapshots[f"{volume}@{safety}"] = bytes(self._world.volumes[volume])
        self._world.volumes[volume] = bytearray(self._world.snapshots[target])
        await self._attach(volume)
        self._outcome.add("reverts")

    async def _flatten(self) -> None:
        volume = self._a_volume()
        job = await self._ask("POST", f"/v1/volumes/{volume}/flatten", status=None)
        if job.get("code") == "invalid-argument":  # it shares nothing
            return
        self._jobs.append(job["id"])
        self._outcome.add("flattens")

    async def _delete_snapshot(self) -> None:
        if not self._world.snapshots:
            return
        name = self._a_snapshot()
        await self._ask("DELETE", f"/v1/snapshots/{name}")
        del self._world.snapshots[name]
        self._outcome.add("snapshots deleted")

    async def _delete_volume(self) -> None:
        if len(self._world.volumes) < 2:
            return await self._clone()
        volume = self._a_volume()
        await self._detach(volume)
        await self._ask("DELETE", f"/v1/volumes/{volume}?purge=true")
        for name in self._world.snapshots_of(volume):
            del self._world.snapshots[name]
        del self._world.volumes[volume]
        self._outcome.add("volumes deleted")

    async def _grow(self) -> None:
        volume = self._a_volume()
        content = self._world.volumes[volume]
        size = grown(self._chance, len(content))
        await self._detach(volume)
        await self._ask("PATCH", f"/v1/volumes/{volume}", {"size": size})
        content.extend(bytes(size - len(content)))
        await self._attach(volume)
        self._outcome.add("growths")

    async def _reopen(self) -> None:
        volume = self._a_volume()
        await self._detach(volume)
        await self._attach(volume)
        self._outcome.add("reopenings")

    async def _restart(self) -> None:
        """A new daemon, after a clean end or none: everything was replied to, so nothing is lost."""
        is_kill = self._chance.random() < 0.5
        if not is_kill:
            for volume in list(self._lanes):
                await self._detach(volume)
        await asyncio.to_thread(self._daemon.kill9 if is_kill else self._daemon.stop)
        for volume in list(self._lanes):
            await self._drop(volume)
        await asyncio.to_thread(self._daemon.start)
        for volume in self._world.volumes:
            await self._attach(volume)
        self._outcome.add("kills" if is_kill else "restarts")

    # --- comparing ---------------------------------------------------------------------------------------------------

    async def _read_all(self) -> None:
        """Compare every volume, and every snapshot: the ancestors of all that was written since."""
        images: dict[str, bytes | bytearray] = {**self._world.volumes, **self._world.snapshots}
        for name, expected in images.items():
            if different := first_difference(expected, await whole(self._daemon.socket, name)):
                raise Broken(f"{name}: {different}")
        self._outcome.add("ancestors compared", len(self._world.snapshots))
        self._outcome.add("volumes compared", len(self._world.volumes))

    async def _compare_two(self) -> None:
        """Compare what is listed as changed between two snapshots, of one volume or not, with what differs."""
        if not self._world.snapshots:
            return await self._snapshot()
        new, base = self._a_snapshot(), self._a_snapshot()
        listed = await self._changes(f"/v1/snapshots/{new}/changes?since={base}&limit={self._chance.randrange(5, 500)}")
        if different := outside(listed, self._world.snapshots[base], self._world.snapshots[new]):
            raise Broken(f"{new} compared with {base}: {different}")
        self._outcome.add("differences compared")
        dirty = await dirty_since(self._daemon.socket, new, base)
        if dirty is None:
            return
        if different := outside(dirty, self._world.snapshots[base], self._world.snapshots[new]):
            raise Broken(f"the dirty bitmap of {new} since {base}: {different}")
        self._outcome.add("dirty bitmaps compared")

    async def _compare_head(self) -> None:
        """The same for a volume as it is now."""
        volume = self._a_volume()
        bases = self._world.snapshots_of(volume)
        if not bases:
            return await self._snapshot()
        base = self._chance.choice(bases)
        content, old = self._world.volumes[volume], self._world.snapshots[base]
        if different := outside(await self._changes(f"/v1/volumes/{volume}/changes?since={base}"), old, content):
            raise Broken(f"{volume} compared with {base}: {different}")
        self._outcome.add("differences compared")

    async def _changes(self, path: str) -> list[tuple[int, int, bool]]:
        found: list[tuple[int, int, bool]] = []
        more: int | None = 0
        while more is not None:
            page = await self._ask("GET", f"{path}&offset={more}")
            found += [(each["offset_bytes"], each["length_bytes"], each["zero"]) for each in page["changes"]]
            more = page.get("next_offset_bytes")
        return found

    async def _end(self, *, is_kept: bool) -> None:
        """Wait for what runs in the background, compare everything once more, and give it all back."""
        for job in self._jobs:
            shown = await self._ask("GET", f"/v1/jobs/{job}?wait_s=30", status=None)
            if shown.get("state") not in ("done", "cancelled", None):  # None: forgotten, with its volume
                raise Broken(f"job {job} is {shown.get('state')}: {shown.get('error')}")
        await self._read_all()
        for volume in list(self._world.volumes):
            await self._detach(volume)
            if not is_kept:
                await self._ask("DELETE", f"/v1/volumes/{volume}?purge=true")

    # --- small things ------------------------------------------------------------------------------------------------

    async def _ask(self, method: str, path: str, body: object = None, *, status: int | None = 200) -> Any:
        got, raw = await asyncio.to_thread(self._daemon.http, method, path, body)
        if status is not None and got != status:
            raise Broken(f"{method} {path} {body or ''}: {got} {raw.decode()[:500]}")
        return json.loads(raw)

    async def _attach(self, volume: str) -> None:
        self._lanes[volume] = await open_lanes(self._daemon.socket, volume)

    async def _detach(self, volume: str) -> None:
        for lane in self._lanes.pop(volume):
            await lane.close()

    async def _drop(self, volume: str) -> None:
        """Let go of connections that the daemon has ended, or may have."""
        for lane in self._lanes.pop(volume):
            try:
                await asyncio.wait_for(lane.close(), 10)
            except Exception:  # whatever a dead connection says
                pass

    def _name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}{self._seed}-{self._names}"

    def _a_volume(self) -> str:
        return self._chance.choice(list(self._world.volumes))

    def _a_snapshot(self) -> str:
        return self._chance.choice(list(self._world.snapshots))


FAILURES = (Broken, NbdClientError, OSError, AssertionError, TimeoutError)
"""How a history ends that was not served as it must be; AssertionError is the daemon's that could not be started."""
