"""Connections to a volume, by two clients that know nothing of each other: ours, and libnbd where it is installed."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from blockvirt.device import BASE_ALLOCATION
from blockvirt.nbd import constants as c
from blockvirt.nbd.client import NbdClient, RequestFailed
from tests.attacks.fsx_model import Kind, Op
from tests.conftest import LIBNBD_MISSING

READ_BYTES = 512 << 10  # of one request, where a whole image is read
_COMMANDS = {
    Kind.READ: c.CMD_READ,
    Kind.WRITE: c.CMD_WRITE,
    Kind.ZERO: c.CMD_WRITE_ZEROES,
    Kind.TRIM: c.CMD_TRIM,
    Kind.FLUSH: c.CMD_FLUSH,
    Kind.STATUS: c.CMD_BLOCK_STATUS,
}
_ZERO_STATUS = 2


class Lane(Protocol):
    """One connection."""

    async def do(self, op: Op) -> bytes:
        """Send a request and return what was read; for a block status a byte of 1 for each that is told to be zero.

        Raises RequestFailed with the server's error.
        """

    async def close(self) -> None:
        """End the connection."""


class OurLane:
    """A connection of ``blockvirt.nbd.client``, with as many requests in flight as there are."""

    def __init__(self, client: NbdClient) -> None:
        self._client = client

    @classmethod
    async def open(cls, path: Path, export: str) -> "OurLane":
        """Open an export."""
        client = await NbdClient.connect_unix(str(path))
        await client.ask_structured()
        await client.ask_allocation(export)
        await client.go(export)
        return cls(client)

    async def do(self, op: Op) -> bytes:
        """See Lane."""
        if op.kind is Kind.STATUS:
            extents = await self._client.block_status(op.offset, op.length)
            return b"".join(_told(each.length_bytes, int(each.state)) for each in extents)[: op.length]
        payload = op.data if op.kind is Kind.WRITE else b""
        reply = await self._client.start(_COMMANDS[op.kind], op.offset, op.length, payload, op.flags)
        if reply.error:
            raise RequestFailed(reply.error, reply.text)
        return reply.data

    async def close(self) -> None:
        """See Lane."""
        await self._client.disconnect()


def _told(length: int, status: int) -> bytes:
    return bytes([1 if status & _ZERO_STATUS else 0]) * length


class LibnbdLane:
    """A connection of libnbd, in a thread of its own: one request after the other."""

    def __init__(self, handle: Any, thread: ThreadPoolExecutor) -> None:
        self._handle = handle
        self._thread = thread

    @classmethod
    async def open(cls, path: Path, export: str) -> "LibnbdLane":
        """Open an export."""
        import nbd

        handle, thread = nbd.NBD(), ThreadPoolExecutor(1)

        def connect() -> None:
            handle.add_meta_context(BASE_ALLOCATION)
            handle.set_export_name(export)
            handle.connect_unix(str(path))

        try:
            await asyncio.get_running_loop().run_in_executor(thread, connect)
        except BaseException:
            thread.shutdown()
            raise
        return cls(handle, thread)

    async def do(self, op: Op) -> bytes:
        """See Lane."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._do, op)

    def _do(self, op: Op) -> bytes:
        import nbd

        handle = self._handle
        calls: dict[Kind, Callable[[], Any]] = {
            Kind.READ: lambda: handle.pread(op.length, op.offset),
            Kind.WRITE: lambda: handle.pwrite(op.data, op.offset, op.flags),
            Kind.ZERO: lambda: handle.zero(op.length, op.offset, op.flags),
            Kind.TRIM: lambda: handle.trim(op.length, op.offset, op.flags),
            Kind.FLUSH: handle.flush,
            Kind.STATUS: lambda: self._status(op),
        }
        try:
            found = calls[op.kind]()
        except nbd.Error as error:
            raise RequestFailed(error.errnum or 5, error.string) from error
        return bytes(found) if found is not None else b""

    def _status(self, op: Op) -> bytes:
        told = bytearray()

        def extents(context: str, offset: int, entries: list[int], error: int) -> int:
            for place in range(0, len(entries), 2):
                told.extend(_told(entries[place], entries[place + 1]))
            return 0

        self._handle.block_status(op.length, op.offset, extents)
        return bytes(told[: op.length])

    async def close(self) -> None:
        """See Lane."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._handle.shutdown)
        finally:
            self._thread.shutdown(wait=False)


async def open_lanes(path: Path, export: str) -> list[Lane]:
    """Open the connections of a volume's guests."""
    lanes: list[Lane] = [await OurLane.open(path, export), await OurLane.open(path, export)]
    if not LIBNBD_MISSING:
        lanes.append(await LibnbdLane.open(path, export))
    return lanes


async def whole(path: Path, export: str) -> bytes:
    """Read all of an export."""
    async with await NbdClient.connect_unix(str(path)) as client:
        await client.go(export)
        size = client.size_bytes
        replies = [client.start(c.CMD_READ, at, min(READ_BYTES, size - at)) for at in range(0, size, READ_BYTES)]
        parts = []
        for future in replies:
            reply = await future
            if reply.error:
                raise RequestFailed(reply.error, f"{export} cannot be read: {reply.text}")
            parts.append(reply.data)
        return b"".join(parts)


async def dirty_since(path: Path, export: str, snapshot: str) -> list[tuple[int, int, bool]] | None:
    """Return what NBD's dirty bitmap lists of a snapshot, compared with another; None: it has none for that one."""
    context = f"qemu:dirty-bitmap:since-{snapshot}"
    async with await NbdClient.connect_unix(str(path)) as client:
        await client.ask_structured()
        if not await client.set_contexts(export, [context]):
            return None
        await client.go(export)
        found: list[tuple[int, int, bool]] = []
        at = 0
        while at < client.size_bytes:
            for length, status in (await client.statuses(at, client.size_bytes - at))[context]:
                if status:
                    found.append((at, length, False))
                at += length
        return found
