"""Requests to a pool in which some transaction finds LMDB's map full: what administrators ask for, beside guests.

Each request is answered, or refused as a whole: then nothing of it is there, and once there is room it goes.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from blockvirt.api.idempotency import Idempotency
from blockvirt.errors import BlockvirtError, InUse, NotFound, PoolFull, VolumeStopped
from blockvirt.lun.presentation import Presentation
from blockvirt.lun.units import flag_host, flag_units
from blockvirt.meta.keys import Table, unit_key
from blockvirt.snapshots.export import SnapshotExports
from blockvirt.snapshots.flatten import FLATTEN
from blockvirt.snapshots.importing import SnapshotImports
from blockvirt.snapshots.scheduled import ScheduledSnapshots
from blockvirt.snapshots.schedules import NewSchedule, ScheduleChange, Schedules
from blockvirt.snapshots.scrub import Scrubbing
from blockvirt.volumes.requests import NewVolume, VolumeChange
from tests.attacks.faults_attempts import SIZE_BYTES
from tests.attacks.faults_model import Blocks, Expected
from tests.attacks.faults_pool import AttackedPool
from tests.attacks.faults_scenario import A_CHUNK, Scenario
from tests.attacks.full_map import FullMap
from tests.snapshots.stream_pools import pieces
from tests.volumes.conftest import until

_DAY_S = 86_400.0
_CATALOGUE = (
    *(Table.POOL, Table.DEVICES, Table.VOLUMES, Table.VOLUME_NAMES, Table.SNAPSHOTS, Table.SNAPSHOT_NAMES, Table.TRASH),
    *(Table.HOSTS, Table.HOST_NAMES, Table.UNITS, Table.VOLUME_UNITS, Table.SCHEDULES, Table.SCHEDULE_NAMES),
    *(Table.IDEMPOTENCY, Table.SCRUBS),
)
"""What no guest's write and no job changes."""


class _NoSessions:
    """Nobody has a logical unit open."""

    def sessions(self) -> Sequence[Any]:
        return ()

    async def drop(self, session_id: str) -> bool:
        return False


class AdministeredPool(AttackedPool):
    """A pool with everything that commits."""

    async def start(self) -> "AdministeredPool":
        """Start what the daemon starts."""
        await super().start()
        engine = self.engine
        self.now_s = 1e9
        self.scrubbing = Scrubbing(engine, rate_bytes=1 << 40)
        self.exports = SnapshotExports(engine, self.snapshots, self.readers)
        self.imports = SnapshotImports(engine, self.catalogue)
        self.presentation = Presentation(engine.store, _NoSessions())
        self.schedules = Schedules(engine.store, lambda: self.now_s, ScheduledSnapshots(engine.store, self.snapshots))
        self.idempotency = Idempotency(engine.store)
        await self.imports.take_back_all()
        await self.presentation.finish_deletions()
        return self

    async def close(self) -> None:
        """Close everything in order."""
        await self.imports.close()
        await super().close()


class Requests(Scenario):
    """Each request once, in one order; one of their transactions finds no room."""

    pool: AdministeredPool

    def __init__(self, pool: AdministeredPool, seed: int, full: FullMap) -> None:
        super().__init__(pool, seed, Expected())
        self.full = full
        self.tried_again = 0
        """Requests that were refused, and went when there was room again."""

    async def run(self) -> None:
        """Ask for everything."""
        await self.pool.start()
        parts = (self._volumes, self._snapshots, self._hosts, self._schedules, self._streams, self._copies, self._ends)
        for part in parts:
            try:
                await part()
            except BlockvirtError:  # of what is not there
                if not self.problems:
                    raise
            if self.problems:
                return

    async def _ask(self, what: str, call: Callable[[], Awaitable[object]], *, is_whole: bool = True) -> None:
        """Ask for something. ``is_whole``: one transaction changes the catalogue: what is refused leaves nothing."""
        before = self._rows() if is_whole else []
        done, _ = await self._on_pool(what, call)
        if done:
            if is_whole and self._rows() == before:
                self.problems.append(f"{what} was answered, and nothing of it is there")
            return
        if is_whole and self._rows() != before:
            self.problems.append(f"{what} was refused, and something of it is there")
        for name in filter(self.is_stopped, list(self.expected.volumes)):  # a checkpoint without room does so
            await self._stopped(name)
        self.full.make_room()
        for name in list(self.expected.volumes):
            await self._revive(name)
        done, _ = await self._on_pool(what, call)
        if done:
            self.tried_again += 1
        else:
            self.problems.append(f"{what} was refused though there is room again: {self.last_error!r}")

    async def _revive(self, name: str) -> None:
        """Reopen a volume that has stopped. Where there was no room to note that, only an error tells of it."""
        if name in self.expected.stopped or isinstance(self.last_error, VolumeStopped):
            with suppress(InUse):  # it has not stopped
                await self.pool.catalogue.reopen(name)
        if name in self.expected.stopped:
            await self._reopen(name)

    def _rows(self) -> list[tuple[bytes, bytes]]:
        with self.pool.engine.store.read() as reader:
            return [row for table in _CATALOGUE for row in reader.scan(table)]

    async def _let_go(self, name: str) -> None:
        """End the session, as most requests want it."""
        if (handle := self._handles.pop(name, None)) is not None:
            await self._try(f"closing {name}", handle.close)

    # --- what is asked for ---------------------------------------------------------------------------------------

    async def _volumes(self) -> None:
        catalogue = self.pool.catalogue
        for name in ("v", "a"):
            wanted = NewVolume(size_bytes=SIZE_BYTES, name=name)
            await self._ask(f"creating {name}", lambda wanted=wanted: catalogue.create(wanted))  # type: ignore[misc]
            self.expected.volumes[name] = Blocks.zeros(SIZE_BYTES // 512)
        await self._write("v", 0, 8 * A_CHUNK)
        await self.flush("v")
        await self._ask("labelling", lambda: catalogue.change("a", VolumeChange(labels={"a": "b"})))
        await self._ask("growing", lambda: catalogue.change("a", VolumeChange(size_bytes=2 * SIZE_BYTES)))
        await self._ask("a policy", lambda: catalogue.set_policy(overcommit_ratio=1000.0))
        await self._ask("asking what a deletion would do", lambda: catalogue.delete("v", dry_run=True), is_whole=False)

    async def _snapshots(self) -> None:
        snapshots = self.pool.snapshots
        await self._take("s")
        await self.write("v")
        await self._take("t")
        await self._ask("a hold", lambda: snapshots.hold("v@s"))
        await self._ask("a release", lambda: snapshots.release("v@s"))
        await self._ask("sealing", self.pool.seal, is_whole=False)
        await self._let_go("v")
        await self._ask("a revert", lambda: self.pool.reverts.revert("v@s", safety_name="before"))
        self.expected.snapshots["v@before"] = self.expected.volumes["v"].allowed()
        self.expected.volumes["v"] = Blocks.of(self.expected.snapshots["v@s"])
        await self.overwrite("v")
        await self._ask("a scrub", self._scrub, is_whole=False)

    async def _take(self, own: str) -> None:
        await self._ask(f"snapshot v@{own}", lambda: self.pool.snapshots.create({"v": own}), is_whole=False)
        self.expected.snapshots[f"v@{own}"] = self.expected.volumes["v"].allowed()

    async def _scrub(self) -> None:
        await self.pool.job_over(await self.pool.scrubbing.start())

    async def _hosts(self) -> None:
        hosts, answers = self.pool.presentation, self.pool.idempotency
        volume_id = self.pool.catalogue.get("a").id
        record = answers.answer("key", "00", 201, "{}", "/")
        await self._ask("keeping an answer", lambda: answers.keep_alone(record))
        await self._ask("making a host", lambda: hosts.create_host("h", {}))
        await self._ask("mapping a unit", lambda: hosts.map("h", volume_id, 1))
        await self._ask("unmapping it", self._unmap, is_whole=False)
        await self._ask("mapping another unit", lambda: hosts.map("h", volume_id, 2))
        host_id = hosts.host("h").id
        # As a crash leaves it between the two transactions of a deletion.
        key = unit_key(host_id, 2)
        await self._ask("flagging a unit", lambda: self.pool.engine.store.commit(lambda each: flag_units(each, [key])))
        await self._ask("ending what was begun", hosts.finish_deletions, is_whole=False)
        await self._ask("deleting a host", lambda: hosts.delete_host("h"), is_whole=False)
        await self._ask("making another host", lambda: hosts.create_host("g", {}))
        other_id = hosts.host("g").id
        flag = partial(flag_host, host_id=other_id, with_units=True)
        await self._ask("flagging a host", lambda: self.pool.engine.store.commit(flag))
        await self._ask("ending what was begun with it", hosts.finish_deletions, is_whole=False)
        if hosts.exports():
            self.problems.append(f"{hosts.exports()} are there after their deletion")

    async def _unmap(self) -> None:
        """Again, if it is flagged already: whoever asks twice does so."""
        with suppress(NotFound):
            await self.pool.presentation.unmap("h", 1)

    async def _schedules(self) -> None:
        schedules = self.pool.schedules
        wanted = NewSchedule("c", "0 3 * * *", volume="v", keep={"last": 1})
        await self._ask("making a schedule", lambda: schedules.create(wanted))
        await self._ask("changing it", lambda: schedules.change("c", ScheduleChange(keep={"last": 2})))
        worker = asyncio.create_task(schedules.run())
        try:
            await self._ask("a run of it", self._run_schedule, is_whole=False)
        finally:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)
        for found in (await self.pool.snapshots.list("v")).snapshots:
            self.expected.snapshots.setdefault(f"v@{found.name}", self.expected.volumes["v"].allowed())
        await self._ask("deleting it", lambda: schedules.delete("c"))

    async def _run_schedule(self) -> None:
        """Have a run due, and see it noted."""
        schedules, hits = self.pool.schedules, self.full.hits
        self.pool.now_s += _DAY_S
        due_s = self.pool.now_s
        schedules._worker.wake(schedules.show("c").id)

        def is_noted() -> bool:
            return (schedules.show("c").last_run_s or 0.0) >= due_s

        def is_over() -> bool:
            return is_noted() or (self.full.hits > hits and not schedules._worker.is_running(schedules.show("c").id))

        await until(is_over)
        if not is_noted():
            raise PoolFull("the run is owed", cause="it could not be noted", correction="wait")

    async def _streams(self) -> None:
        async with self.pool.exports.export("v@s") as export:
            stream = b"".join([block async for block in export.blocks()])
        await self._ask("an import", lambda: self._import("i", stream), is_whole=False)
        self.expected.snapshots["i@s"] = self.expected.snapshots["v@s"]
        self.expected.volumes["i"] = Blocks.of(self.expected.snapshots["v@s"])
        await self._ask("an import that is cut off", lambda: self._import("j", stream[:-1], ends=False), is_whole=False)
        self.full.make_room()
        await self.pool.imports.take_back_all()
        if [each.name for each in (await self.pool.catalogue.list()).volumes if each.name == "j"]:
            self.problems.append("what an import has left is there though it was taken back")
        async with self.pool.exports.export("v@t", "v@s") as export:
            stream = b"".join([block async for block in export.blocks()])
        await self._ask("an import that goes on", lambda: self._import("i", stream), is_whole=False)
        self.expected.snapshots["i@t"] = self.expected.snapshots["v@t"]
        self.expected.volumes["i"] = Blocks.of(self.expected.snapshots["v@t"])

    async def _import(self, name: str, stream: bytes, *, ends: bool = True) -> None:
        """Import; as a start does, take back first what an import before has left."""
        await self.pool.imports.take_back_all()
        try:
            await self.pool.imports.run(name, pieces(stream, 1 << 14))
        except PoolFull:
            raise
        except BlockvirtError:
            if ends:
                raise
            await self.pool.imports.take_back_all()

    async def _copies(self) -> None:
        """A clone that is made whole, a device that goes, a volume that stops, and the trash."""
        await self.clone("v@s", "c")
        if "c" in self.expected.uncertain:
            self.full.make_room()
            await self.clone("v@s", "c")
        await self.overwrite("c")
        await self._ask("a flatten", self._flatten, is_whole=False)
        folder = str(self.pool.state_dir.parent / "disk3")
        storage = self.pool.engine.storage
        await self._ask("adding a device", lambda: storage.add(folder, "disk3", None, 0, {}, create=True))
        await self._ask("removing it", lambda: storage.remove("disk3"))
        await self._stop_and_reopen()
        catalogue = self.pool.catalogue
        catalogue._trash_s = _DAY_S
        await self._ask("putting a volume into the trash", lambda: catalogue.delete("a"))
        await self._ask("taking it out", lambda: catalogue.trash.restore("a", "b"))
        await self._ask("putting it there again", lambda: catalogue.delete("b"))
        await self._ask("emptying the trash", self._empty_trash, is_whole=False)
        del self.expected.volumes["a"]
        catalogue._trash_s = 0.0

    async def _flatten(self) -> None:
        """Flatten c, or go on with it."""
        jobs = self.pool.engine.jobs
        failed = [job for job in jobs.list(state="failed") if job.kind == FLATTEN]
        job_id = (await jobs.resume(failed[0].id)).id if failed else await self.pool.flattening.start("c")
        await self.pool.job_over(job_id)
        if (job := jobs.get(job_id)).state == "failed":
            raise PoolFull("a flatten has failed", cause=job.error, correction="resume it")

    async def _empty_trash(self) -> None:
        await self.pool.job_over(await self.pool.catalogue.trash.purge("b"))

    async def _stop_and_reopen(self) -> None:
        """A disk fails under overwrites in place: that is noted in the metadata, for want of a journal."""
        await self.reconnect("v")
        handle = await self._handle("v")
        if handle is None:
            return
        hits = self.full.hits
        volume = handle._opened.volume
        volume.stop("its disk has failed", OSError("planted"))
        await volume.tasks.wait()
        self.expected.stopped.add("v")
        await self._let_go("v")
        if not self.is_stopped("v") and self.full.hits == hits:
            self.problems.append("nothing says that v has stopped")
        if self.is_stopped("v"):
            await self._ask("reopening v", self._reopen_v, is_whole=False)
        await self._reopen("v")

    async def _reopen_v(self) -> None:
        if self.is_stopped("v"):
            await self.pool.catalogue.reopen("v")

    async def _ends(self) -> None:
        """Deletions, which need room in the metadata for a while, and give some back."""
        await self._ask("deleting v@t", lambda: self._delete_snapshot("v@t"), is_whole=False)
        del self.expected.snapshots["v@t"]
        await self._let_go("c")
        await self._ask("deleting c", lambda: self._delete_volume("c"), is_whole=False)
        del self.expected.volumes["c"]
        await self._ask("looking at the reserve", self.pool.engine.store.check_reserve, is_whole=False)
        await self.read("v")
        await self.write("v")
        await self.read("v")

    async def _delete_snapshot(self, path: str) -> None:
        for job_id in (await self.pool.snapshots.delete([path])).job_ids:
            await self.pool.job_over(job_id)

    async def _delete_volume(self, name: str) -> None:
        await self.pool.job_over((await self.pool.catalogue.delete(name, force=True, purge=True)).job_id)
