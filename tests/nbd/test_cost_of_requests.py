"""What requests cost: counted, not timed, so that every machine, filesystem and Python says the same.

A real session serves a real volume; ``COSTS`` says what that calls. Whoever makes a request dearer, or cheaper, on
purpose changes that table: the failure prints the new line.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from blockvirt.limits import DEFAULT_CHUNK_BYTES
from blockvirt.nbd import constants as c
from blockvirt.nbd.handshake import Negotiated
from blockvirt.nbd.session import Session
from blockvirt.nbd.shared import SharedResources
from blockvirt.snapshots.catalogue import Snapshots
from blockvirt.snapshots.readers import SnapshotReaders
from blockvirt.units import KIB, MIB
from blockvirt.volumes.engine import EngineSettings
from blockvirt.volumes.handle import Handle
from tests.nbd.call_counter import CallCounter
from tests.nbd.conftest import PATIENCE_S
from tests.nbd.lockstep import LockstepClient, Request
from tests.volumes.conftest import Pool, write

CHUNK = DEFAULT_CHUNK_BYTES
BLOCK = 4 * KIB
MAPPED_CHUNKS = 4 * MIB // CHUNK
REQUESTS = 64
Requests = Callable[[int], list[Request]]
"""Makes the requests of a run: 0 warms up, 1 is counted."""


class Cost(NamedTuple):
    """Of all requests of a run together."""

    requests: int
    calls: int
    """Of Python's and of built-in functions, by the product and of it."""
    system: dict[str, int]
    """System calls and calls of LMDB among them."""


LOOKUP = {"Environment.begin": 1, "Transaction.cursor": 1, "Transaction.abort": 1}
"""Of the leaf that new chunks lie in."""

COSTS = {
    "read 4 KiB, depth 1": Cost(64, 1927, {"recv_into": 127, "preadv": 64, "sendmsg": 64}),
    "read 4 KiB, depth 32": Cost(64, 410, {"recv_into": 2, "preadv": 64, "sendmsg": 2}),
    "read 4 KiB, depth 8, 4 connections": Cost(64, 680, {"recv_into": 8, "preadv": 64, "sendmsg": 8}),
    "read 1 MiB": Cost(8, 472, {"recv_into": 16, "preadv": 8, "sendmsg": 8}),
    "write 4 KiB, depth 1": Cost(64, 2503, {"recv_into": 127, "pwrite": 64, "sendmsg": 64}),
    "write 4 KiB, header and payload apart": Cost(64, 2567, {"recv_into": 191, "pwrite": 64, "sendmsg": 64}),
    "write 4 KiB, depth 32": Cost(64, 800, {"recv_into": 2, "pwrite": 64, "sendmsg": 2}),
    "write 4 KiB, depth 8, 4 connections": Cost(64, 1088, {"recv_into": 8, "pwrite": 64, "sendmsg": 8}),
    "write 4 KiB to new chunks, depth 32": Cost(64, 2347, {"recv_into": 2, **LOOKUP, "pwrite": 66, "sendmsg": 2}),
    "write 4 KiB first after a snapshot, depth 32": Cost(
        64,
        2436,
        {
            "recv_into": 2,
            "preadv": 64,
            "Environment.begin": 1,
            "Transaction.get": 1,
            "Transaction.abort": 1,
            "pwrite": 4,
            "sendmsg": 2,
        },
    ),
    "write 1 MiB": Cost(8, 525, {"recv_into": 24, "pwrite": 8, "sendmsg": 8}),
    "write 1 MiB to new chunks": Cost(4, 595, {"recv_into": 12, **LOOKUP, "pwrite": 8, "sendmsg": 4}),
    "write 4 KiB, flush": Cost(
        32,
        2080,
        {"recv_into": 64, "pwrite": 16, "sendmsg": 32, "fdatasync": 16, "eventfd_write": 16, "eventfd_read": 16},
    ),
    "write 4 KiB to a new chunk, flush": Cost(
        32,
        3317,
        {
            "recv_into": 64,
            **LOOKUP,
            "pwrite": 48,
            "sendmsg": 32,
            "fdatasync": 16,
            "eventfd_write": 16,
            "eventfd_read": 16,
        },
    ),
    "trim a chunk": Cost(32, 4060, {"recv_into": 64, "pwrite": 32, "sendmsg": 32}),
}


@dataclass(frozen=True)
class Workload:
    """What is asked of a volume whose first MAPPED_CHUNKS are allocated."""

    requests: Requests
    depth: int = 1
    """How many requests a client sends at once; it waits for all replies."""
    clients: int = 1
    after_snapshot: bool = False
    """Count what comes first after a snapshot."""
    apart: bool = False
    """Payloads come after their headers."""


def blocks(command: int) -> Requests:
    """A block of allocated chunks, in no order."""

    def requests(run: int) -> list[Request]:
        chunks = random.Random(run).sample(range(MAPPED_CHUNKS), REQUESTS)
        return [Request(command, chunk * CHUNK + chunk * BLOCK % CHUNK, BLOCK) for chunk in chunks]

    return requests


def new_blocks(run: int) -> list[Request]:
    """A block of chunks that are not allocated, in their order."""
    first = (run + 1) * MAPPED_CHUNKS
    return [Request(c.CMD_WRITE, chunk * CHUNK, BLOCK) for chunk in range(first, first + REQUESTS)]


def large(command: int) -> Requests:
    """Every allocated MiB twice."""
    return lambda _: [Request(command, offset, MIB) for offset in range(0, MAPPED_CHUNKS * CHUNK, MIB)] * 2


def new_mibs(run: int) -> list[Request]:
    """As many chunks as are allocated, a MiB at a time."""
    first = (run + 1) * MAPPED_CHUNKS * CHUNK
    return [Request(c.CMD_WRITE, offset, MIB) for offset in range(first, first + MAPPED_CHUNKS * CHUNK, MIB)]


def flushed(writes: Requests) -> Requests:
    """A flush after each of 16 writes."""
    return lambda run: [each for one in writes(run)[:16] for each in (one, Request(c.CMD_FLUSH))]


def trims(run: int) -> list[Request]:
    """Half as many allocated chunks, every other one."""
    return [Request(c.CMD_TRIM, chunk * CHUNK, CHUNK) for chunk in range(run, REQUESTS, 2)]


WORKLOADS = {
    "read 4 KiB, depth 1": Workload(blocks(c.CMD_READ)),
    "read 4 KiB, depth 32": Workload(blocks(c.CMD_READ), depth=32),
    "read 4 KiB, depth 8, 4 connections": Workload(blocks(c.CMD_READ), depth=8, clients=4),
    "read 1 MiB": Workload(large(c.CMD_READ)),
    "write 4 KiB, depth 1": Workload(blocks(c.CMD_WRITE)),
    "write 4 KiB, header and payload apart": Workload(blocks(c.CMD_WRITE), apart=True),
    "write 4 KiB, depth 32": Workload(blocks(c.CMD_WRITE), depth=32),
    "write 4 KiB, depth 8, 4 connections": Workload(blocks(c.CMD_WRITE), depth=8, clients=4),
    "write 4 KiB to new chunks, depth 32": Workload(new_blocks, depth=32),
    "write 4 KiB first after a snapshot, depth 32": Workload(blocks(c.CMD_WRITE), depth=32, after_snapshot=True),
    "write 1 MiB": Workload(large(c.CMD_WRITE)),
    "write 1 MiB to new chunks": Workload(new_mibs),
    "write 4 KiB, flush": Workload(flushed(blocks(c.CMD_WRITE))),
    "write 4 KiB to a new chunk, flush": Workload(flushed(new_blocks)),
    "trim a chunk": Workload(trims),
}


@pytest.fixture
def counter() -> Iterator[CallCounter]:
    counter = CallCounter()
    with counter.watching():
        yield counter


@pytest.fixture
async def pool(counter: CallCounter, short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pool]:
    """A pool in which nothing happens by itself, and nothing because of the machine."""
    # Not every filesystem can say what it has in the page cache; here all of it is.
    monkeypatch.setattr("blockvirt.pool.backing.READ_CACHED", 0)
    monkeypatch.setattr("blockvirt.volumes.volume.READ_CACHED", 0)
    monkeypatch.setattr("blockvirt.pool.backing.filesystem_type", lambda _: 0)  # ext4 is written to in pieces
    # No batch ends because its time is over, and a session that looks for more looks as often as it may.
    monkeypatch.setattr("blockvirt.nbd.session.perf_counter", lambda: 0.0)
    monkeypatch.setattr("blockvirt.volumes.engine.METADATA_RESERVE_RETRY_S", 3600.0)
    pool = await Pool(short_tmp_path, EngineSettings(metadata_reserve_bytes=MIB, checkpoint_age_s=3600.0)).start()
    # Others may write so much that writes go to threads.
    monkeypatch.setattr(pool.engine.context.pressure, "_ratio", float)
    yield pool
    await pool.close()


@asynccontextmanager
async def connected(pool: Pool, volume_id: str, workload: Workload) -> AsyncIterator[list[LockstepClient]]:
    """The workload's clients of a volume, each with its session."""
    shared = SharedResources()
    clients = [LockstepClient(apart=workload.apart) for _ in range(workload.clients)]
    sessions = []
    for client in clients:
        handle = await pool.open(volume_id)
        sessions.append(Session("s", client.served, handle, Negotiated("v", structured=True), shared))
        sessions[-1].start()
    try:
        yield clients
    finally:
        for session, client in zip(sessions, clients, strict=True):
            session.abandon("the test is over")
            await session.close()
            client.close()
    assert not shared.stats.errors, "other requests were counted than those that were meant"


async def reserve(handle: Handle) -> None:
    """Have a file to append to, with so much room that no thread makes more meanwhile."""
    opened = handle._opened
    await opened.volume.tail.make_room(4 * MAPPED_CHUNKS, opened.slow._admit_device)


async def serve(
    clients: Sequence[LockstepClient], requests: Sequence[Request], depth: int, counter: CallCounter
) -> None:
    """Have requests answered, and count what that calls: up to the last look for more."""
    batches = [requests[start : start + depth] for start in range(0, len(requests), depth)]
    working = set(clients)
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def finished(client: LockstepClient) -> None:
        working.remove(client)
        if not working:
            counter.running = False
            done.set_result(None)

    counter.running = True
    for number, client in enumerate(clients):
        client.start(batches[number :: len(clients)], partial(finished, client))
    async with asyncio.timeout(PATIENCE_S):
        await done


async def cost(pool: Pool, counter: CallCounter, workload: Workload) -> Cost:
    volume_id = await pool.volume(1024 * CHUNK, name="v")
    handle = await pool.open(volume_id)
    for chunk in range(MAPPED_CHUNKS):
        await write(handle, chunk * CHUNK, b"o" * CHUNK)
    await handle.flush()
    await reserve(handle)
    async with connected(pool, volume_id, workload) as clients:
        await serve(clients, workload.requests(0), workload.depth, CallCounter())
        if workload.after_snapshot:
            await Snapshots(pool.engine, SnapshotReaders(pool.engine.context)).create({"v": "s"})
            await reserve(handle)
        requests = workload.requests(1)
        await serve(clients, requests, workload.depth, counter)
    await handle.close()
    return Cost(len(requests), counter.calls, counter.system)


def report(name: str, was: Cost, now: Cost) -> str:
    """What changed, and what to do if that was the purpose."""
    names = [what for what in was.system | now.system if was.system.get(what) != now.system.get(what)]
    return "\n".join(
        [
            f"'{name}', {now.requests} requests, cost something else than COSTS says:",
            f"  all calls: was {was.calls}, is {now.calls}",
            *(f"  {what}: was {was.system.get(what, 0)}, is {now.system.get(what, 0)}" for what in names),
            "If that is wanted, change COSTS in tests/nbd/test_cost_of_requests.py and say why in the commit:",
            f'    "{name}": Cost({now.requests}, {now.calls}, {json.dumps(now.system)}),',
        ]
    )


def test_the_table_and_the_workloads_go_together() -> None:
    assert list(COSTS) == list(WORKLOADS)


@pytest.mark.parametrize("name", WORKLOADS)
async def test_requests_cost_what_the_table_says(pool: Pool, counter: CallCounter, name: str) -> None:
    was, now = COSTS[name], await cost(pool, counter, WORKLOADS[name])
    if now != was:
        pytest.fail(report(name, was, now), pytrace=False)
