"""What is done to a pool while its disk fails: each verb once or more, in one order, on ranges that the seed chooses.

Whatever comes of a step is noted in the model: answered, refused, or stopped. A stopped volume must refuse everything,
and is reopened as an administrator would do it; a pool that has failed is started again.
"""

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path

from blockvirt.errors import BlockvirtError, Exists
from blockvirt.meta.copies import find_copies, remember_folders
from blockvirt.pool.devices import COPIES
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.metadata_copies import MetadataCopies
from blockvirt.volumes.requests import NewVolume
from tests.attacks.faults_attempts import BLOCKS, SIZE_BYTES, Attempts, read_all
from tests.attacks.faults_model import BLOCK_BYTES, ZEROS, Blocks, content, differences
from tests.attacks.faults_pool import CHUNK_BYTES
from tests.volumes.conftest import write

Step = Callable[[], Awaitable[object]]


A_CHUNK = CHUNK_BYTES // BLOCK_BYTES


class Scenario(Attempts):
    """One run over one pool."""

    async def run(self) -> None:
        """Do everything; what must not be is in ``problems``."""
        for step in self._steps():
            if not self.pool.is_up and not await self.start():
                return
            await step()
            if self._pool_failed or (self.pool.is_up and self.pool.engine.not_ready()):
                await self._start_again()

    def _steps(self) -> list[Step]:
        def on(name: str, *steps: Callable[[str], Awaitable[object]]) -> list[Step]:
            return [lambda step=step: step(name) for step in steps]  # type: ignore[misc]

        write, overwrite, zero, trim, flush = self.write, self.overwrite, self.zero, self.trim, self.flush
        return [
            *on("v", self.create, write, write, self.write_fua, flush, overwrite, write, flush, self.zero_written),
            *on("v", zero, flush, self.read),
            lambda: self.snapshot("v@s1"),
            *on("v", overwrite, write, overwrite, flush, trim, zero),
            self.seal,
            *on("v", self.checkpoint, write, self.read, overwrite, flush),
            self.copy_metadata,
            lambda: self.add_device("disk2"),
            self.copy_metadata,
            lambda: self.snapshot("v@s2"),
            lambda: self.clone("v@s2", "c"),
            *on("c", write, overwrite, flush, self.read),
            *on("v", write, self.zero_written, overwrite),
            self.copy_metadata,
            self.kill,
            *on("v", self.read, overwrite, flush),
            *on("c", self.read),
            lambda: self.delete_snapshot("v@s1"),
            *on("v", trim, self.checkpoint),
            self.punch,
            *on("v", write, flush, self.reconnect, overwrite, flush, write, self.read),
            self.reconnect_and_overwrite,
            self.kill,
            *on("v", self.read),
            lambda: self.delete_volume("c"),
            self.copy_metadata,
            *on("v", trim, overwrite, flush, write, trim, overwrite),
        ]

    # --- verbs of volumes ----------------------------------------------------------------------------------------

    async def create(self, name: str) -> None:
        """Make the volume, if it is not there."""
        if name in self.expected.volumes:
            return
        wanted = NewVolume(size_bytes=SIZE_BYTES, name=name)
        for _ in range(2):
            done, _ = await self._try(f"creating {name}", lambda: self.pool.catalogue.create(wanted))
            if done:
                self.expected.volumes[name] = Blocks.zeros(BLOCKS)
                return

    def _range(self, most_blocks: int, first: int = 0, end: int = BLOCKS) -> tuple[int, int]:
        count = self.dice.randrange(1, most_blocks + 1)
        return self.dice.randrange(first, end - count + 1), count

    async def _write(self, name: str, first: int, count: int, *, fua: bool = False) -> None:
        value = self.expected.next_value()
        data = content(value, first, count)

        async def call(handle: Handle) -> None:
            if fua:
                await handle.write(first * BLOCK_BYTES, memoryview(data), fua=True)
            else:
                await write(handle, first * BLOCK_BYTES, data)

        if name in self.expected.volumes:
            await self._noted(name, "a write", first, count, value, call)
            if fua and name in self.expected.volumes:
                self.expected.flushes += 1

    async def _noted(
        self, name: str, what: str, first: int, count: int, value: int, call: Callable[[Handle], Awaitable[None]]
    ) -> bool:
        """Do what changes a range, and note it: before the answer, since what a stopped volume kept is looked at."""
        if await self._handle(name) is None:
            return False
        blocks = self.expected.volumes[name]
        blocks.wrote(first, count, value, answered=False)
        done, _ = await self._on(name, what, call)
        if done:
            blocks.wrote(first, count, value, answered=True)
        return done

    async def write(self, name: str) -> None:
        """Write whole new chunks and parts of some."""
        await self._write(name, *self._range(12 * A_CHUNK))

    async def write_fua(self, name: str) -> None:
        """Write what is durable when it is answered."""
        first, count = self._range(2 * A_CHUNK)
        value = self.expected.next_value()
        data = content(value, first, count)
        if await self._noted(
            name, "a durable write", first, count, value, lambda handle: _write_fua(handle, first, data)
        ):
            self._flushed(name)

    async def overwrite(self, name: str) -> None:
        """Write a few blocks in the first half: mostly a part of a chunk that is there."""
        await self._write(name, *self._range(A_CHUNK, 0, BLOCKS // 2))

    async def zero_written(self, name: str) -> None:
        """Write some chunks, and zero the middle of them in place."""
        await self._write(name, 0, 4 * A_CHUNK)
        await self._noted(
            *(name, "a zeroing in place", A_CHUNK, 2 * A_CHUNK, ZEROS),
            lambda handle: handle.zero(CHUNK_BYTES, 2 * CHUNK_BYTES, punch=False),
        )

    async def zero(self, name: str) -> None:
        """Zero a range and keep its space."""
        await self._zero(name, punch=False)

    async def trim(self, name: str) -> None:
        """Zero a range and give its space back."""
        await self._zero(name, punch=True)

    async def _zero(self, name: str, *, punch: bool) -> None:
        first, count = self._range(8 * A_CHUNK)
        await self._noted(
            name,
            "a trim" if punch else "a zeroing",
            *(first, count, ZEROS),
            lambda handle: handle.zero(first * BLOCK_BYTES, count * BLOCK_BYTES, punch=punch),
        )

    async def flush(self, name: str) -> None:
        """Flush: what was answered before is durable."""
        done, _ = await self._on(name, "a flush", lambda handle: handle.flush())
        if done:
            self._flushed(name)

    def _flushed(self, name: str) -> None:
        self.expected.volumes[name].flushed()
        self.expected.flushes += 1

    async def read(self, name: str) -> None:
        """Read everything, and compare."""
        done, found = await self._on(name, "a read", read_all)
        if done and found is not None and (wrong := differences(found, self.expected.volumes[name].allowed())):
            self.problems.append(f"{name}, read while it was served: {wrong}")

    async def checkpoint(self, name: str) -> None:
        """Bring the map into the metadata."""
        await self._on(name, "a checkpoint", lambda handle: handle._opened.checkpointer.run())

    async def reconnect(self, name: str) -> None:
        """Close the last session, and open one again."""
        handle = self._handles.pop(name, None)
        if handle is not None:
            await self._try(f"closing {name}", handle.close)
        await self._handle(name)

    async def reconnect_and_overwrite(self) -> None:
        """Overwrite in place what is there, in a volume that has no journal yet."""
        await self.reconnect("v")
        await self._write("v", A_CHUNK, 2 * A_CHUNK)

    # --- verbs of the pool ---------------------------------------------------------------------------------------

    async def kill(self) -> None:
        """Kill the daemon; the next step starts it again, and recovers."""
        self._handles.clear()
        with self._disk.paused() if self._disk is not None else nullcontext():
            await self._try("the death of the daemon", self.pool.kill)

    async def end(self, how: str) -> None:
        """Close the pool, or kill the daemon for good."""
        if self.pool.is_up:
            await self._try("the end of the daemon", self.pool.close if how == "close" else self.pool.kill)

    async def copy_metadata(self) -> None:
        """Copy the metadata to each device, and note where, as the worker does that is not running here."""
        engine = self.pool.engine
        paths = engine.storage.paths()
        folders = [path / COPIES for path in paths.values()]
        copies = MetadataCopies(engine.store, engine.storage, engine.context.threads, self.pool.state_dir)

        async def call() -> None:
            try:
                failed = await copies._copy_to(paths)
            except OSError as error:
                raise RuntimeError("that would be the end of the worker") from error
            self.refused += len(failed)
            for device_id in paths.keys() - failed:
                self._copied(paths[device_id] / COPIES)
            await remember_folders(self.pool.state_dir, folders)
            self.expected.copy_folders = folders

        await self._try("copying the metadata", call)

    def _copied(self, folder: Path) -> None:
        with self._disk.paused() if self._disk is not None else nullcontext():
            self.expected.copies[folder] = find_copies([folder])[0].created_ms

    async def snapshot(self, path: str) -> None:
        """Take a snapshot."""
        name, _, own = path.partition("@")
        if await self._handle(name) is None:
            return
        allowed = self.expected.volumes[name].allowed()
        self.expected.snapshots[path] = allowed
        self.expected.uncertain.add(path)
        done, _ = await self._on_pool(f"snapshot {path}", lambda: self.pool.snapshots.create({name: own}))
        if done:
            self.expected.uncertain.discard(path)

    async def seal(self) -> None:
        """Compute checksums."""
        await self._on_pool("sealing", self.pool.seal)

    async def punch(self) -> None:
        """Give freed space back."""
        await self._on_pool("punching", self.pool.punch)

    async def add_device(self, folder: str) -> None:
        """Give the pool another device; what was refused can be done again."""
        path = str(self.pool.state_dir.parent / folder)
        for _ in range(2):
            try:
                done, _ = await self._try(
                    "adding a device", lambda: self.pool.engine.storage.add(path, folder, None, 0, {}, create=True)
                )
            except Exists:
                return
            if done:
                return

    async def clone(self, path: str, name: str) -> None:
        """Make a volume of a snapshot."""
        if path not in self.expected.snapshots:
            return
        try:
            origin = self.pool.snapshots.find(path)
        except BlockvirtError:
            return
        wanted = NewVolume(size_bytes=SIZE_BYTES, name=name)
        self.expected.volumes[name] = Blocks.of(self.expected.snapshots[path])
        self.expected.uncertain.add(name)
        done, _ = await self._try(f"clone {name}", lambda: self.pool.catalogue.create(wanted, origin=origin))
        if done:
            self.expected.uncertain.discard(name)

    async def delete_snapshot(self, path: str) -> None:
        """Delete a snapshot, and wait for its reclaim, well or not."""
        if path not in self.expected.snapshots:
            return
        self.expected.uncertain.add(path)

        async def call() -> None:
            deletion = await self.pool.snapshots.delete([path])
            for job_id in deletion.job_ids:
                await self.pool.job_over(job_id)

        done, _ = await self._on_pool(f"deleting {path}", call)
        if done:
            self.expected.snapshots.pop(path)

    async def delete_volume(self, name: str) -> None:
        """Delete a volume, and wait for its purge, well or not."""
        if name not in self.expected.volumes:
            return
        handle = self._handles.pop(name, None)
        if handle is not None:
            await self._try(f"closing {name}", handle.close)
        self.expected.uncertain.add(name)

        async def call() -> None:
            deletion = await self.pool.catalogue.delete(name, force=True, purge=True)
            await self.pool.job_over(deletion.job_id)

        done, _ = await self._on_pool(f"deleting {name}", call)
        if done:
            self.expected.volumes.pop(name)
            self.expected.stopped.discard(name)


async def _write_fua(handle: Handle, first: int, data: bytes) -> None:
    await handle.write(first * BLOCK_BYTES, memoryview(data), fua=True)
