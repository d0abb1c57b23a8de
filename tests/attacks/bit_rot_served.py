"""What a daemon does while its disk rots under it: writes that copy damage, and files that are cut short meanwhile.

Runs where the daemon runs, in the process that looks (``bit_rot_child``).
"""

import asyncio
import contextlib
import os
import pickle
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from blockvirt.nbd import constants as c
from blockvirt.nbd.client import NbdClient, NbdClientError
from blockvirt.pool.devices import COPIES
from tests.attacks.bit_rot_pool import CHUNK_BYTES, RottingPool

USED_CHUNKS = (3, 700, 1_200)
_PART = b"new"
_PART_AT = 5  # in a chunk
_COPY_S = 30.0


async def use(pool: RottingPool, volume: str) -> None:
    """Write parts of chunks, flush, read back; raises NbdClientError."""
    async with await NbdClient.connect_unix(str(pool.state / "nbd.sock")) as client:
        await client.go(volume)
        await _write_parts(client)
        await client.flush()
        assert await client.read(USED_CHUNKS[1] * CHUNK_BYTES + _PART_AT, len(_PART)) == _PART


async def _write_parts(client: NbdClient) -> None:
    for chunk in USED_CHUNKS:
        await client.write(chunk * CHUNK_BYTES + _PART_AT, _PART)


def used(content: bytes) -> bytes:
    """What a volume holds after ``use``."""
    changed = bytearray(content)
    for chunk in USED_CHUNKS:
        at = chunk * CHUNK_BYTES + _PART_AT
        changed[at : at + len(_PART)] = _PART
    return bytes(changed)


async def copy_up(pool: RottingPool, volume: str, chunk: int, cold: Path | None) -> dict[str, Any]:
    """Write into a chunk that is damaged: parts of it, what lies beside it, then all of it; and compare everything.

    ``cold`` is a backing file that the page cache is to forget first.
    """
    if cold is not None:
        _forget(cold)
    at, beside = chunk * CHUNK_BYTES, (chunk + (1 if chunk % 2 else -1)) * CHUNK_BYTES
    async with pool.daemon(), await NbdClient.connect_unix(str(pool.state / "nbd.sock")) as client:
        await client.go(volume)
        parts = [
            await _outcome(client.write(at + 5, b"new")),
            await _outcome(client.zero(at + 100, 50)),
            await _outcome(client.write(min(at, beside) + CHUNK_BYTES - 9, b"over the edge of both")),
        ]
        rest = [await _outcome(client.write(beside, b"b" * CHUNK_BYTES)), await _outcome(client.flush())]
        differing = {export: await differences(pool, export) for export in pool.contents}
        rest += [
            await _outcome(client.write(at, b"w" * CHUNK_BYTES)),
            await _outcome(client.write(at + 5, b"new")),
            await _outcome(client.flush()),
        ]
        is_new = await client.read(at, CHUNK_BYTES) == b"w" * 5 + b"new" + b"w" * (CHUNK_BYTES - 8)
        status, _ = await pool.ask("GET", "/readyz")
    return {"parts": parts, "rest": rest, "differing": differing, "is_new": is_new, "ready": status}


def _forget(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


async def _outcome(request: Coroutine[Any, Any, None]) -> str:
    try:
        await request
    except NbdClientError as error:
        return str(error)
    return "done"


async def differences(pool: RottingPool, export: str) -> dict[str, list[int]]:
    """Read an export chunk by chunk; returns those that cannot be read, and those that are read otherwise."""
    expected = pool.contents[export]
    async with await NbdClient.connect_unix(str(pool.state / "nbd.sock")) as client:
        await client.go(export)
        return await _differences(client, expected)


async def _differences(client: NbdClient, expected: bytes) -> dict[str, list[int]]:
    refused, others = [], []
    for first in range(0, len(expected), 64 * CHUNK_BYTES):  # so many at once
        places = range(first, min(first + 64 * CHUNK_BYTES, len(expected)), CHUNK_BYTES)
        for at, future in [(at, client.start(c.CMD_READ, at, CHUNK_BYTES)) for at in places]:
            reply = await future
            if reply.error:
                refused.append(at // CHUNK_BYTES)
            elif reply.data != expected[at : at + CHUNK_BYTES]:
                others.append(at // CHUNK_BYTES)
    return {"refused": refused, "others": others}


async def cut_file(pool: RottingPool, path: Path, cut_at: int, untouched: Sequence[str]) -> dict[str, Any]:
    """Cut a backing file short while all exports are open; then read them all, and use volumes that are elsewhere.

    Every volume was written to before, so that each has space reserved at the end of its file.
    """
    pool.contents = {name: content if "@" in name else used(content) for name, content in pool.contents.items()}
    async with pool.daemon(), contextlib.AsyncExitStack() as stack:
        clients = {}
        for export in pool.contents:
            clients[export] = await stack.enter_async_context(
                await NbdClient.connect_unix(str(pool.state / "nbd.sock"))
            )
            await clients[export].go(export)
            if "@" not in export:
                await _write_parts(clients[export])
                await clients[export].flush()
        os.truncate(path, cut_at)
        differing = {export: await _differences(clients[export], pool.contents[export]) for export in clients}
        uses = {volume: await _outcome(use(pool, volume)) for volume in untouched}
        status, _ = await pool.ask("GET", "/readyz")
        listed, _ = await pool.ask("GET", "/v1/volumes")
    return {"differing": differing, "uses": uses, "ready": status, "listed": listed}


async def cut_metadata(pool: RottingPool, cut_at: int, acknowledged: Path) -> dict[str, Any]:
    """Cut ``data.mdb`` short under a daemon that has answered writes, and go on; who calls must end the process.

    What is to be there afterwards, of all exports, is in the file ``acknowledged`` before.
    """
    copies = pool.device / COPIES
    older = set(copies.iterdir())
    daemon = pool.daemon()
    await daemon.__aenter__()  # nobody leaves it: a stop in order would bring the journals into what was cut
    await asyncio.to_thread(_await_copy, copies, older)
    contents, clients = dict(pool.contents), {}
    for number, volume in enumerate(export for export in pool.contents if "@" not in export):
        clients[volume] = await NbdClient.connect_unix(str(pool.state / "nbd.sock"))
        await clients[volume].go(volume)
        await _write_parts(clients[volume])
        if number % 2:
            await clients[volume].flush()
        contents[volume] = used(contents[volume])
    acknowledged.write_bytes(pickle.dumps(contents))
    os.truncate(pool.state / "metadata/data.mdb", cut_at)
    pool.contents = contents
    differing = {volume: await _differences(client, contents[volume]) for volume, client in clients.items()}
    for export in contents:
        if export not in clients:
            with contextlib.suppress(NbdClientError):
                differing[export] = await differences(pool, export)
    uses = [await _outcome(use(pool, volume)) for volume in clients]
    status, _ = await pool.ask("GET", "/readyz")
    listed, _ = await pool.ask("GET", "/v1/volumes")
    return {"differing": differing, "uses": uses, "ready": status, "listed": listed}


def _await_copy(folder: Path, older: set[Path]) -> None:
    """Return when a copy of the metadata is there that was not: each start makes one."""
    ends_s = time.monotonic() + _COPY_S
    while not any(path.suffix == ".mdb" for path in set(folder.iterdir()) - older):
        if time.monotonic() > ends_s:
            raise AssertionError("no copy of the metadata is made")
        time.sleep(0.02)
