"""A state machine over the storage stack: volumes and snapshots against plain bytes, changed blocks against a model.

Hypothesis looks for a history that breaks it and prints the shortest one it finds, as code that replays it.
"""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blockvirt.device import read_one
from blockvirt.errors import InvalidRequest
from blockvirt.snapshots.changes import Point, chain_of, changes
from blockvirt.snapshots.flatten import FLATTEN
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.requests import NewVolume, VolumeChange
from tests.snapshots.conftest import SnapshotPool
from tests.snapshots.test_histories import settled
from tests.volumes.conftest import abandon, findings, read, write

CHUNK = 4096
SIZE = 516 * CHUNK  # a leaf and a bit
LARGEST = 1100 * CHUNK
HOT = [0, 1, 2, 510, 511, 512, 513, 514, 515]  # chunks around the edges of leaves and of the volume
T = TypeVar("T")

INDEX = st.integers(0, 5)
LENGTHS = st.sampled_from([1, 700, CHUNK, 2 * CHUNK, 5 * CHUNK])


@dataclass
class State:
    """What a volume or a snapshot holds, and in which order its chunks were last touched."""

    content: bytearray
    touched: dict[int, int] = field(default_factory=dict)

    def copy(self) -> "State":
        return State(bytearray(self.content), dict(self.touched))


@dataclass
class Model:
    """One volume and its snapshots."""

    id: str
    name: str
    state: State
    snapshots: dict[str, State] = field(default_factory=dict)
    handle: Handle | None = None


class Volumes(RuleBasedStateMachine):
    """Volumes of one pool, each of which can be opened, changed, snapshotted, cloned, reverted and deleted."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="blockvirt-test-"))
        self.runner = asyncio.Runner()
        self.pool: SnapshotPool = self.run(SnapshotPool(self.folder).start())
        self.volumes: list[Model] = []
        self.made = 0
        self.clock = 0
        self.may_leak = False
        """A flatten was killed: copies that it had not brought into the map may be left over."""
        self.new_volume()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        try:
            self.run(self.close())
        finally:
            self.runner.close()
            shutil.rmtree(self.folder)

    async def close(self) -> None:
        for volume in self.volumes:
            await self.shut(volume)
        await settled(self.pool)
        found = findings(self.pool, leaks=not self.may_leak)
        await self.pool.close()
        assert not found

    def name(self, kind: str) -> str:
        self.made += 1
        return f"{kind}{self.made}"

    def pick(self, index: int) -> Model:
        return self.volumes[index % len(self.volumes)]

    def pick_snapshot(self, index: int) -> tuple[Model, str]:
        every = [(volume, name) for volume in self.volumes for name in volume.snapshots]
        return every[index % len(every)]

    async def opened(self, volume: Model) -> Handle:
        if volume.handle is None:
            volume.handle = await self.pool.open(volume.id)
        return volume.handle

    async def shut(self, volume: Model) -> None:
        if volume.handle is not None:
            await volume.handle.close()
            volume.handle = None

    def has_snapshots(self) -> bool:
        return any(volume.snapshots for volume in self.volumes)

    # --- volumes ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.volumes) < 4)
    @rule()
    def new_volume(self) -> None:
        name = self.name("v")
        self.volumes.append(Model(self.run(self.pool.volume(SIZE, name)), name, State(bytearray(SIZE))))

    @rule(
        index=INDEX,
        chunk=st.sampled_from(HOT),
        within=st.integers(0, CHUNK - 1),
        length=LENGTHS,
        byte=st.integers(1, 255),
    )
    def write(self, index: int, chunk: int, within: int, length: int, byte: int) -> None:
        volume = self.pick(index)
        self.change(volume, chunk * CHUNK + within, bytes([byte]) * length, None)

    @rule(index=INDEX, chunk=st.sampled_from(HOT), length=LENGTHS)
    def trim(self, index: int, chunk: int, length: int) -> None:
        self.change(self.pick(index), chunk * CHUNK, bytes(length), True)

    @rule(index=INDEX, chunk=st.sampled_from(HOT), within=st.integers(0, CHUNK - 1), length=LENGTHS)
    def zero(self, index: int, chunk: int, within: int, length: int) -> None:
        self.change(self.pick(index), chunk * CHUNK + within, bytes(length), False)

    def change(self, volume: Model, offset: int, data: bytes, punch: bool | None) -> None:
        data = data[: len(volume.state.content) - offset]

        async def work() -> None:
            handle = await self.opened(volume)
            if punch is None:
                await write(handle, offset, data)
            else:
                await handle.zero(offset, len(data), punch=punch)

        self.run(work())
        volume.state.content[offset : offset + len(data)] = data
        self.clock += 1
        for chunk in range(offset // CHUNK, (offset + len(data) - 1) // CHUNK + 1):
            volume.state.touched[chunk] = self.clock

    @rule(index=INDEX)
    def flush(self, index: int) -> None:
        async def work() -> None:
            await (await self.opened(self.pick(index))).flush()

        self.run(work())

    @rule(index=INDEX, more=st.sampled_from([1, 512, CHUNK, 40 * CHUNK]))
    def resize(self, index: int, more: int) -> None:
        volume = self.pick(index)
        size = -(-(len(volume.state.content) + more) // 512) * 512
        if size <= LARGEST:
            self.run(self.pool.catalogue.change(volume.id, VolumeChange(size_bytes=size)))
            volume.state.content.extend(bytes(size - len(volume.state.content)))
            self.run(self.shut(volume))

    @precondition(lambda self: len(self.volumes) > 1)
    @rule(index=INDEX, purge=st.booleans())
    def delete(self, index: int, purge: bool) -> None:
        volume = self.pick(index)
        self.run(self.shut(volume))
        self.run(self.pool.catalogue.delete(volume.id, purge=purge))
        self.volumes.remove(volume)

    # --- snapshots -------------------------------------------------------------------------------------------------

    @rule(index=INDEX)
    def snapshot(self, index: int) -> None:
        self.take([self.pick(index)])

    @rule()
    def group_snapshot(self) -> None:
        self.take(self.volumes)

    def take(self, volumes: list[Model]) -> None:
        name = self.name("s")
        self.run(self.pool.snapshots.create({volume.id: name for volume in volumes}))
        for volume in volumes:
            volume.snapshots[name] = volume.state.copy()

    @precondition(lambda self: self.has_snapshots())
    @rule(index=INDEX)
    def delete_snapshot(self, index: int) -> None:
        volume, name = self.pick_snapshot(index)
        self.run(self.pool.snapshots.delete([f"{volume.name}@{name}"]))
        del volume.snapshots[name]

    @precondition(lambda self: self.has_snapshots() and len(self.volumes) < 4)
    @rule(index=INDEX)
    def clone(self, index: int) -> None:
        volume, snapshot = self.pick_snapshot(index)
        origin = self.pool.snapshots.find(f"{volume.name}@{snapshot}")
        state, name = volume.snapshots[snapshot], self.name("c")
        made = self.run(self.pool.catalogue.create(NewVolume(size_bytes=len(state.content), name=name), origin=origin))
        self.volumes.append(Model(made.volume.id, name, state.copy()))

    @precondition(lambda self: self.has_snapshots())
    @rule(index=INDEX, safety=st.booleans())
    def revert(self, index: int, safety: bool) -> None:
        volume, snapshot = self.pick_snapshot(index)
        self.run(self.shut(volume))
        done = self.run(self.pool.reverts.revert(f"{volume.name}@{snapshot}", safety=safety))
        if done.safety is not None:
            volume.snapshots[done.safety.name] = volume.state.copy()
        volume.state = volume.snapshots[snapshot].copy()

    @rule(index=INDEX, wait=st.booleans())
    def flatten(self, index: int, wait: bool) -> None:
        async def work() -> None:
            try:
                job_id = await self.pool.flattening.start(self.pick(index).id)
            except InvalidRequest:
                return
            if wait:
                assert (await self.pool.engine.jobs.finished(job_id)).state == "done"

        self.run(work())

    # --- trouble ---------------------------------------------------------------------------------------------------

    @rule(index=INDEX)
    def close_volume(self, index: int) -> None:
        self.run(self.shut(self.pick(index)))

    @rule()
    def kill_and_start_again(self) -> None:
        self.may_leak |= any(job.state in ("queued", "running") for job in self.pool.engine.jobs.list(kind=FLATTEN))

        async def work() -> None:
            self.pool.sealer.cancel()
            await abandon(self.pool, power_cut=False)
            for volume in self.volumes:
                volume.handle = None
            await self.pool.start()

        self.run(work())

    @rule()
    def stop_and_start_again(self) -> None:
        async def work() -> None:
            for volume in self.volumes:
                await self.shut(volume)
            await self.pool.close()
            await self.pool.start()

        self.run(work())

    # --- what must hold --------------------------------------------------------------------------------------------

    @invariant()
    def volumes_hold_what_was_written(self) -> None:
        async def work() -> None:
            for volume in self.volumes:
                handle = await self.opened(volume)
                assert await read(handle, 0, len(volume.state.content)) == volume.state.content, volume.name

        self.run(work())

    @rule()
    def snapshots_hold_what_their_volume_held(self) -> None:
        async def work() -> None:
            for volume in self.volumes:
                for name, state in volume.snapshots.items():
                    handle = self.pool.readers.open(self.pool.snapshots.find(f"{volume.name}@{name}"), name)
                    assert handle.size_bytes == len(state.content)
                    into = bytearray(len(state.content))
                    await read_one(handle, 0, memoryview(into))
                    await handle.close()
                    assert into == state.content, f"{volume.name}@{name}"

        self.run(work())

    @precondition(lambda self: self.has_snapshots())
    @rule(first=INDEX, second=INDEX)
    def changed_blocks_are_those_that_changed(self, first: int, second: int) -> None:
        (one, old_name), (other, new_name) = self.pick_snapshot(first), self.pick_snapshot(second)
        old, new = one.snapshots[old_name], other.snapshots[new_name]
        points = [
            self.pool.snapshots.find(f"{one.name}@{old_name}"),
            self.pool.snapshots.find(f"{other.name}@{new_name}"),
        ]
        with self.pool.engine.store.read() as reader:
            chains = [chain_of(reader, Point(each.branch, each.epoch)) for each in points]
            listed = {
                change.chunk + index: change.zero
                for change in changes(reader, chains[0], chains[1])
                for index in range(change.count)
            }
        for chunk in range(-(-len(new.content) // CHUNK)):
            before, after = (state.content[chunk * CHUNK : (chunk + 1) * CHUNK] for state in (old, new))
            if before.ljust(CHUNK, b"\0") != after.ljust(CHUNK, b"\0"):
                assert chunk in listed, f"chunk {chunk} differs and is not listed"
            if listed.get(chunk):
                assert not any(after), f"chunk {chunk} is listed as zeros"
        if one is other:
            touched = {
                chunk for chunk in {*old.touched, *new.touched} if old.touched.get(chunk) != new.touched.get(chunk)
            }
            assert listed.keys() <= touched, "nothing is listed that nobody touched"


Volumes.TestCase.settings = settings(
    max_examples=int(os.environ.get("BLOCKVIRT_EXAMPLES", "40")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
TestVolumes = Volumes.TestCase
