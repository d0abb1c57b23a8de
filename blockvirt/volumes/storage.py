"""The pool's devices and their space, as the data plane and the control plane see them. Figures live on the event loop.

Used bytes are those of chunks that a map entry names, and of freed ones until they are punched out; they are summed up
at start from the file records and the punch queue, and kept as plain integers from then on.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from blockvirt.errors import BlockvirtError, DamagedRecord, DeviceFault, Exists, LimitReached, NotFound, PoolFull
from blockvirt.ids import check_name, new_id
from blockvirt.limits import RESERVE_STEP_MIN_BYTES
from blockvirt.meta.keys import POOL_KEY, Table, split_pair
from blockvirt.meta.records import DeviceRecord, FileRecord, PoolRecord, VolumeRecord, punch_count
from blockvirt.meta.store import Store
from blockvirt.pool.devices import Device, DeviceProblem, FilesystemSpace, space_at
from blockvirt.pool.membership import add_device, check_removable, erase_device
from blockvirt.pool.placement import Candidate, Policy, choose
from blockvirt.pool.space import (
    DeviceFigures,
    DeviceSpace,
    default_reserve_bytes,
    device_space,
    level,
    pool_totals,
)
from blockvirt.tasks import TaskSet
from blockvirt.units import format_size
from blockvirt.volumes.device_records import enter_device, last_device, leave_device
from blockvirt.volumes.device_status import in_use, out_of_use
from blockvirt.volumes.io_threads import IoThreads
from blockvirt.volumes.ports import DeviceStatus, PoolStatus

log = logging.getLogger("blockvirt.pool")


class PoolStorage:
    """Satisfies context.Storage, ports.PoolSpace and ports.DeviceAdmin."""

    def __init__(
        self,
        store: Store,
        threads: IoThreads,
        devices: Sequence[Device],
        problems: Sequence[DeviceProblem],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._threads = threads
        self._clock = clock
        self._devices = {device.record.id: device for device in devices}
        self._problems = {problem.record.id: problem for problem in problems}
        self._identities = {device.record.id: device.identity.digest() for device in devices}
        self._copy_problems: dict[str, str] = {}
        self.counting = asyncio.Lock()
        self._membership = asyncio.Lock()
        """Held while a device comes or goes: what is decided of the others must hold until the record is stored."""
        self._changes = TaskSet("devices")
        self._used_chunks: Counter[int] = Counter()
        """By backing file."""
        self._device_chunks: Counter[str] = Counter()
        self._ahead_bytes: Counter[str] = Counter()
        self._pool = self._pool_record()
        self._chunk_bytes = self._pool.chunk_bytes
        self._sum_up()

    def _pool_record(self) -> PoolRecord:
        with self._store.read() as reader:
            record = reader.record(PoolRecord, Table.POOL, POOL_KEY)
        assert record is not None
        return record

    def _sum_up(self) -> None:
        device_of: dict[int, str] = {}
        with self._store.read() as reader:
            for key, _ in reader.scan(Table.FILES):
                try:
                    file = reader.record(FileRecord, Table.FILES, key)
                except DamagedRecord as error:
                    log.error("%s", error)
                    continue
                if file is not None:
                    device_of[file.number] = file.device_id
                    self.mapped(file.device_id, file.number, file.live_chunks)
            for key, stored in reader.scan(Table.PUNCH):
                number, _ = split_pair(key)
                if number in device_of:
                    try:
                        self.mapped(device_of[number], number, punch_count(key, stored))
                    except DamagedRecord as error:
                        log.error("%s", error)

    # --- context.Storage -------------------------------------------------------------------------------------------

    def path_of(self, device_id: str) -> Path:
        """See Storage."""
        device = self._usable(device_id)
        device.check_reachable()  # who asks is about to open or make a file there
        return device.path

    def _usable(self, device_id: str) -> Device:
        device = self._devices.get(device_id)
        if device is not None:
            return device
        problem = self._problems.get(device_id)
        if problem is not None:
            raise DeviceFault(
                f"device {problem.record.name} is not usable: {problem.fault.message}",
                cause=problem.fault.cause,
                correction=problem.fault.correction,
            )
        raise DeviceFault(f"device {device_id} is not in this pool", correction="run 'blockvirt check'")

    def identity_of(self, device_id: str) -> str:
        """See Storage."""
        self._usable(device_id)
        return self._identities[device_id]

    def paths(self) -> Mapping[str, Path]:
        """See Storage."""
        return {device_id: device.path for device_id, device in self._devices.items() if _is_reachable(device)}

    def place(self, volume: VolumeRecord, needed_bytes: int) -> str:
        """See Storage."""
        self._check_metadata()
        policy = Policy(volume.placement_devices, volume.placement_labels)
        return choose([self._candidate(device) for device in self._devices.values()], policy, needed_bytes).id

    def _candidate(self, device: Device) -> Candidate:
        record = device.record
        try:
            return Candidate(record.id, record.name, self._space(device).free_bytes, record.labels)
        except BlockvirtError as error:
            return Candidate(record.id, record.name, 0, record.labels, problem=error.message)

    def admit(self, device_id: str, needed_bytes: int) -> None:
        """See Storage."""
        self._check_metadata()
        device = self._usable(device_id)
        free_bytes = self._space(device).free_bytes
        if free_bytes < needed_bytes:
            raise PoolFull(
                f"device {device.record.name} has no room for another {format_size(needed_bytes)}",
                cause=f"{format_size(free_bytes)} are free within its limit and reserve",
                correction="add a device ('blockvirt device add DIR'), delete or trim volumes, or raise its limit",
                would_fit_bytes=free_bytes,
            )

    def _check_metadata(self) -> None:
        if not self._store.reserve_ok:
            raise PoolFull(
                "no new chunk is given: the metadata reserve is not whole",
                cause="the filesystem of the state directory is full",
                correction="free space there; reads, overwrites, trims and deletes go on meanwhile",
            )

    def reserved(self, device_id: str, change_bytes: int) -> None:
        """See Storage."""
        self._ahead_bytes[device_id] += change_bytes

    def mapped(self, device_id: str, file: int, change_chunks: int) -> None:
        """See Storage."""
        self._used_chunks[file] += change_chunks
        self._device_chunks[device_id] += change_chunks

    def recounted(self, device_id: str, file: int, chunks: int) -> None:
        """See Storage."""
        self.mapped(device_id, file, chunks - self._used_chunks[file])

    def removed(self, device_id: str, file: int) -> None:
        """See Storage."""
        self._device_chunks[device_id] -= self._used_chunks.pop(file, 0)

    def copied(self, device_id: str, problem: str) -> None:
        """Note why no copy of the metadata could be written to a device; an empty ``problem``: one was."""
        if problem:
            self._copy_problems[device_id] = problem
        else:
            self._copy_problems.pop(device_id, None)

    # --- figures ---------------------------------------------------------------------------------------------------

    def _figures(self, device: Device) -> DeviceFigures:
        space = device.space()
        record = device.record
        return DeviceFigures(
            id=record.id,
            filesystem=space.filesystem,
            free_bytes=space.free_bytes,
            used_bytes=self._used_bytes(record),
            ahead_bytes=max(0, self._ahead_bytes[record.id]),
            limit_bytes=record.limit_bytes,
            reserve_bytes=record.reserve_bytes,
        )

    def _used_bytes(self, record: DeviceRecord) -> int:
        return self._device_chunks[record.id] * self._chunk_bytes

    def _space(self, device: Device) -> DeviceSpace:
        return device_space(self._figures(device))

    def status(self) -> PoolStatus:
        """See PoolSpace: a statvfs (2 us) for each device."""
        figures = []
        devices = []
        for device in self._devices.values():
            try:
                mine = self._figures(device)
            except BlockvirtError as error:
                devices.append(out_of_use(device.record, error, self._used_bytes(device.record)))
                continue
            figures.append(mine)
            devices.append(in_use(device, device_space(mine), self._copy_problems.get(device.record.id, "")))
        devices += [
            out_of_use(problem.record, problem.fault, self._used_bytes(problem.record))
            for problem in self._problems.values()
        ]
        totals = pool_totals(figures)
        pool = self._pool
        reached = level(
            totals,
            near_ratio=pool.near_ratio,
            brake_ratio=pool.brake_ratio,
            least_bytes=RESERVE_STEP_MIN_BYTES,
            metadata_ok=self._store.reserve_ok,
        )
        return PoolStatus(
            id=pool.id,
            chunk_bytes=pool.chunk_bytes,
            capacity_bytes=totals.capacity_bytes,
            used_bytes=totals.used_bytes,
            reserved_bytes=totals.reserved_bytes,
            free_bytes=totals.free_bytes,
            level=reached.value,
            overcommit_ratio=pool.overcommit_ratio,
            near_ratio=pool.near_ratio,
            brake_ratio=pool.brake_ratio,
            devices=tuple(sorted(devices, key=lambda status: status.name)),
        )

    def policy_changed(self) -> None:
        """See PoolSpace."""
        self._pool = self._pool_record()

    # --- ports.DeviceAdmin -----------------------------------------------------------------------------------------

    def list(self) -> Sequence[DeviceStatus]:
        """See DeviceAdmin."""
        return self.status().devices

    async def add(
        self,
        path: str,
        name: str | None,
        limit_bytes: int | None,
        reserve_bytes: int | None,
        labels: Mapping[str, str],
        *,
        create: bool = False,
    ) -> DeviceStatus:
        """See DeviceAdmin. ``create`` makes the directory."""
        adding = self._add(path, name, limit_bytes, reserve_bytes, labels, create=create)
        return await self._to_end(adding, "add a device")

    async def remove(self, name_or_id: str) -> DeviceStatus:
        """See DeviceAdmin."""
        return await self._to_end(self._remove(name_or_id), "remove a device")

    async def _to_end(self, change: Coroutine[Any, Any, DeviceStatus], name: str) -> DeviceStatus:
        """Run a change even if nobody waits for it any more: threads cannot be called back from a directory."""
        return await asyncio.shield(self._changes.start(change, name, awaited=True))

    async def _add(
        self,
        path: str,
        name: str | None,
        limit_bytes: int | None,
        reserve_bytes: int | None,
        labels: Mapping[str, str],
        *,
        create: bool,
    ) -> DeviceStatus:
        async with self._membership:
            members = [device.record for device in self._devices.values()]
            members += [problem.record for problem in self._problems.values()]
            name = name if name is not None else _free_name({member.name for member in members})
            check_name(name, what="device")
            if reserve_bytes is None:
                total_bytes = (await self._threads.run(partial(_space_of_parent, Path(path), name))).total_bytes
                reserve_bytes = default_reserve_bytes(total_bytes)
            wanted = DeviceRecord(new_id(), name, path, self._clock(), limit_bytes, reserve_bytes, dict(labels))
            device = await self._threads.run(lambda: add_device(wanted, self._pool.id, members, create=create))
            record = device.record
            try:
                await self._store.commit(lambda writer: enter_device(writer, record))
            except (Exists, LimitReached):
                if record.id == wanted.id:  # the label is of this add, and surely without a record
                    await self._threads.run(partial(_clear, device))
                device.release()
                raise
            except BaseException:  # perhaps with a record: an add that is repeated takes the label up
                device.release()
                raise
            self._devices[record.id] = device
            self._identities[record.id] = device.identity.digest()
            for warning in device.warnings:
                log.warning("device %s: %s", record.name, warning)
            return in_use(device, self._space(device))

    async def _remove(self, name_or_id: str) -> DeviceStatus:
        async with self._membership:
            device = next((d for d in self._devices.values() if name_or_id in (d.record.name, d.record.id)), None)
            if device is None:
                raise NotFound(f"there is no usable device {name_or_id}", correction="see 'blockvirt device list'")
            record = device.record
            if len(self._devices) == 1:
                raise last_device(record)
            await self._threads.run(lambda: check_removable(device))
            status = in_use(device, self._space(device), self._copy_problems.get(record.id, ""))
            # Out of sight first, so that no file is placed on it between the check and its end.
            del self._devices[record.id]
            try:
                await self._store.commit(lambda writer: leave_device(writer, record))
            except BaseException:
                self._devices[record.id] = device
                raise
            self._copy_problems.pop(record.id, None)
            await self._threads.run(partial(_clear, device))
            return status

    async def close(self) -> None:
        """Let changes of the devices come to their end, then let go of all devices' locks."""
        await self._changes.wait()
        self.release()

    def release(self) -> None:
        """Let go of all devices' locks."""
        for device in self._devices.values():
            device.release()


def _clear(device: Device) -> None:
    """Erase a device that has no record, and let go of it. What cannot be erased stays, and may be added again."""
    try:
        erase_device(device)
    except (OSError, BlockvirtError) as error:
        log.warning("device %s is not in the pool, but %s is not cleared: %s", device.record.name, device.path, error)
    finally:
        device.release()


def _is_reachable(device: Device) -> bool:
    try:
        device.check_reachable()
    except DeviceFault:
        return False
    return True


def _space_of_parent(path: Path, name: str) -> FilesystemSpace:
    """Return the space of the filesystem that a directory, perhaps still to be made, is on."""
    return space_at(path if path.exists() else path.parent, name)


def _free_name(taken: set[str]) -> str:
    return next(name for number in range(1, len(taken) + 2) if (name := f"disk{number}") not in taken)
