"""A volume in memory behind the seam of ``blockvirt.device``: what protocol tests and measurements run against.

``MemoryDisk`` is what sessions share, ``MemoryVolume`` one session's handle on it, ``MemoryExports`` the directory.
A disk can be told to refuse the ``*_now`` verbs, to block a verb until it is let go, and to fail one.
"""

import asyncio
from collections.abc import Callable, Sequence

from blockvirt.device import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    DIRTY_SINCE,
    STATE_DIRTY,
    Capabilities,
    ExportInfo,
    Extent,
    ExtentState,
    Read,
    context_matches,
)
from blockvirt.errors import NotFound, NotSupported
from blockvirt.units import KIB


class Gate:
    """Holds a verb: ``arrived`` is set when somebody waits at it, ``let_go`` lets them and all later ones pass."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self._arrivals = asyncio.Semaphore(0)
        self._open = asyncio.Event()

    async def arrivals(self, count: int) -> None:
        """Return when ``count`` more calls have arrived than earlier waits have seen."""
        for _ in range(count):
            await self._arrivals.acquire()

    def let_go(self) -> None:
        """Open the gate for good."""
        self._open.set()

    async def pass_through(self) -> None:
        """Say that somebody is here and wait until the gate is open."""
        self.arrived.set()
        self._arrivals.release()
        await self._open.wait()


class MemoryDisk:
    """The bytes of one volume, with a map of which blocks have been written."""

    def __init__(
        self,
        size_bytes: int,
        *,
        block_bytes: int = 64 * KIB,
        capabilities: Capabilities | None = None,
        now: bool = True,
    ) -> None:
        self.size_bytes = size_bytes
        self.block_bytes = block_bytes
        self.capabilities = capabilities or Capabilities()
        self.now = now
        """Whether ``read_now`` and ``write_now`` do their work; False sends everything the slow way."""
        self.data = bytearray(size_bytes)
        self.allocated = bytearray(-(-size_bytes // block_bytes))
        self.dirty: dict[str, bytearray] = {}
        """By the name of each mark, oldest first, which blocks were changed after it."""
        self._layers = bytearray(len(self.allocated))
        self.gates: dict[str, Gate] = {}
        self.failures: dict[str, Exception] = {}
        self.calls: dict[str, int] = {}
        self.unsettled_handles = 0
        """How many handles let the loop run, or answered, with unsettled writes: always 0 with a correct caller."""
        self.open_handles = 0
        self.most_asked = 0
        """The longest range that ``extents`` or ``block_status`` was asked about."""

    def block(self, verb: str) -> Gate:
        """Hold every further call of an async ``verb`` at the returned gate.

        The verbs: read, write, write_fua, zero, flush, extents, block_status.
        """
        self.gates[verb] = Gate()
        return self.gates[verb]

    def fail(self, verb: str, error: Exception | None) -> None:
        """Let every further call of ``verb`` (of a handle, or "open") raise ``error``; None ends that."""
        if error is None:
            self.failures.pop(verb, None)
        else:
            self.failures[verb] = error

    def called(self, verb: str) -> None:
        """Count a call and fail it if it is to fail."""
        self.calls[verb] = self.calls.get(verb, 0) + 1
        if (error := self.failures.get(verb)) is not None:
            raise error

    def _blocks(self, offset: int, length: int) -> slice:
        return slice(offset // self.block_bytes, -(-(offset + length) // self.block_bytes))

    def store(self, offset: int, data: memoryview) -> None:
        """Write bytes and mark their blocks allocated."""
        self.data[offset : offset + len(data)] = data
        blocks = self._blocks(offset, len(data))
        self.allocated[blocks] = b"\1" * (blocks.stop - blocks.start)
        self._changed(blocks)

    def clear(self, offset: int, length: int, *, punch: bool) -> None:
        """Zero bytes; whole blocks become unallocated with ``punch``, and all touched ones allocated without."""
        self.data[offset : offset + length] = bytes(length)
        blocks = self._blocks(offset, length)
        self._changed(blocks)
        if not punch:
            self.allocated[blocks] = b"\1" * (blocks.stop - blocks.start)
            return
        end = offset + length
        first = -(-offset // self.block_bytes)
        last = len(self.allocated) if end == self.size_bytes else end // self.block_bytes
        if last > first:
            self.allocated[first:last] = bytes(last - first)

    def mark(self, name: str) -> None:
        """Begin a layer, as a snapshot would: from here on, what changes is dirty since ``name``. At most 255 times."""
        self.dirty[name] = bytearray(len(self.allocated))

    def _changed(self, blocks: slice) -> None:
        if self.dirty:
            count = blocks.stop - blocks.start
            self._layers[blocks] = bytes([len(self.dirty)]) * count
            for changed in self.dirty.values():
                changed[blocks] = b"\1" * count

    def contexts(self) -> list[str]:
        """Return the names of all metadata contexts."""
        return [BASE_ALLOCATION, ALLOCATION_DEPTH, *(DIRTY_SINCE + name for name in self.dirty)]

    def status(self, context: str, block: int) -> int:
        """Return the status of a block in a metadata context."""
        if context.startswith(DIRTY_SINCE):
            return STATE_DIRTY if self.dirty[context.removeprefix(DIRTY_SINCE)][block] else 0
        if context == ALLOCATION_DEPTH:
            return len(self.dirty) - self._layers[block] + 1 if self.allocated[block] else 0
        return int(ExtentState.DATA if self.allocated[block] else ExtentState.HOLE | ExtentState.ZERO)


class MemoryVolume:
    """One handle on a ``MemoryDisk``; keeps the contract of ``VolumeHandle`` and watches that its caller does too."""

    def __init__(self, disk: MemoryDisk, contexts: Sequence[str] = ()) -> None:
        self._disk = disk
        self.contexts = tuple(contexts)
        self._loop = asyncio.get_running_loop()
        self._unsettled = False
        self._closed = False
        self._flushing: set[asyncio.Task[None]] = set()
        self.size_bytes = disk.size_bytes
        self.block_bytes = disk.block_bytes
        self.capabilities = disk.capabilities
        self.lost: asyncio.Future[None] = self._loop.create_future()
        disk.open_handles += 1

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Copy bytes out, if the disk answers now."""
        disk = self._disk
        if not disk.now:
            return False
        if disk.failures:
            disk.called("read_now")
        into[:] = memoryview(disk.data)[offset : offset + len(into)]
        return True

    def write_now(self, offset: int, data: memoryview) -> bool:
        """Copy bytes in, if the disk answers now; checks that ``settle`` follows before the loop runs."""
        disk = self._disk
        if not disk.now:
            return False
        if disk.failures:
            disk.called("write_now")
        disk.store(offset, data)
        if not self._unsettled:
            self._unsettled = True
            self._loop.call_soon(self._check_settled)
        return True

    def _check_settled(self) -> None:
        if self._unsettled:
            self._disk.unsettled_handles += 1
            self._unsettled = False

    def settle(self) -> None:
        """Note that the batch is complete."""
        self._unsettled = False
        self._disk.called("settle")

    async def _enter(self, verb: str) -> None:
        assert not self._closed, f"{verb} on a closed handle"
        self._disk.called(verb)
        if (gate := self._disk.gates.get(verb)) is not None:
            await gate.pass_through()

    async def read(self, reads: Sequence[Read]) -> Sequence[Exception | None]:
        """Copy bytes out; each read is a call of "read" of its own, all at once."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._read(*read)) for read in reads]
        return [task.result() for task in tasks]

    async def _read(self, offset: int, into: memoryview) -> Exception | None:
        try:
            await self._enter("read")
        except Exception as error:
            return error
        into[:] = memoryview(self._disk.data)[offset : offset + len(into)]
        return None

    async def write(self, offset: int, data: memoryview, *, fua: bool = False) -> None:
        """Copy bytes in."""
        await self._enter("write_fua" if fua else "write")
        self._disk.store(offset, data)

    async def zero(self, offset: int, length: int, *, punch: bool, fast: bool = False, fua: bool = False) -> None:
        """Zero a range in steps of 16 MiB, letting others run in between."""
        await self._enter("zero")
        if fast and not punch:
            raise NotSupported("zeroing with allocation is no faster than writing")
        step = 16 * KIB * KIB
        for at in range(offset, offset + length, step):
            self._disk.clear(at, min(step, offset + length - at), punch=punch)
            await asyncio.sleep(0)

    def start_flush(self, then: Callable[[BaseException | None], None]) -> None:
        """Count the flush: memory has no power to lose."""
        flushing = self._loop.create_task(self._enter("flush"))
        self._flushing.add(flushing)

        def ended(_: "asyncio.Task[None]") -> None:
            self._flushing.discard(flushing)
            then(asyncio.CancelledError() if flushing.cancelled() else flushing.exception())

        flushing.add_done_callback(ended)

    async def extents(self, offset: int, length: int) -> Sequence[Extent]:
        """Describe the range block by block, neighbours merged."""
        await self._enter("extents")
        return [Extent(size, ExtentState(state)) for size, state in self._runs(BASE_ALLOCATION, offset, length)]

    async def block_status(self, context: str, offset: int, length: int) -> Sequence[tuple[int, int]]:
        """Describe the range block by block, neighbours merged; checks that the context was named at the opening."""
        await self._enter("block_status")
        assert context in self.contexts, f"{context} was not negotiated"
        return self._runs(context, offset, length)

    def _runs(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        disk, end = self._disk, offset + length
        disk.most_asked = max(disk.most_asked, length)
        found: list[tuple[int, int]] = []
        while offset < end:
            number = offset // disk.block_bytes
            step = min((number + 1) * disk.block_bytes, end) - offset
            status = disk.status(context, number)
            if found and found[-1][1] == status:
                found[-1] = found[-1][0] + step, status
            else:
                found.append((step, status))
            offset += step
        return found

    async def close(self) -> None:
        """Let go of the disk."""
        if not self._closed:
            self._closed = True
            self._disk.open_handles -= 1


class MemoryExports:
    """A directory of memory disks by export name."""

    def __init__(self, disks: dict[str, MemoryDisk] | None = None) -> None:
        self.disks = dict(disks or {})
        self.handles: list[MemoryVolume] = []

    def names(self) -> Sequence[str]:
        """Return all names, sorted."""
        return sorted(self.disks)

    def _find(self, name: str) -> MemoryDisk:
        try:
            return self.disks[name]
        except KeyError:
            raise NotFound(f"there is no export named {name[:80]!r}", correction="list the exports") from None

    async def describe(self, name: str) -> ExportInfo:
        """Describe a disk; raises NotFound."""
        disk = self._find(name)
        return ExportInfo(name, f"memory disk {name}", disk.size_bytes, disk.block_bytes, disk.capabilities)

    def contexts(self, name: str, query: str) -> Sequence[str]:
        """Return the disk's contexts that match; raises NotFound."""
        return [context for context in self._find(name).contexts() if context_matches(context, query)]

    async def open(self, name: str, session_id: str, contexts: Sequence[str] = ()) -> MemoryVolume:
        """Open a handle; raises NotFound, and what the disk was told to fail with."""
        disk = self._find(name)
        if (error := disk.failures.get("open")) is not None:
            raise error
        handle = MemoryVolume(disk, contexts)
        self.handles.append(handle)
        return handle
