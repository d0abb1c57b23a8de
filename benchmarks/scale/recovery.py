"""How long a start takes after SIGKILL, with a large map and as much in the journal as there can be at rest.

At half a journal file the daemon begins a checkpoint, so the kill comes just before that. Half of the changes are trims
and half first writes, all over the map: recovery loads, changes and stores nearly every leaf of it.
"""

import asyncio
import random
import statistics
import subprocess
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import MeasurementFailed, cpu_seconds
from benchmarks.processes import end
from benchmarks.scale.figures import Figure, Target, below
from benchmarks.scale.metrics import by_volume
from benchmarks.snapshots.ground import say
from benchmarks.startup import BLOCK_BYTES, CHUNK_BYTES, Pool, Start
from blockvirt.cli.client import Client
from blockvirt.nbd.client import NbdClient
from blockvirt.testing import fixtures  # type: ignore[attr-defined, unused-ignore]

LIMIT_S = 2
FULL_RATIO = 0.48  # of a journal file; a checkpoint begins at a half
IN_FLIGHT = 32
MOST_TURNS = 4_000
LOOK_TURNS = 4
TRIM_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of it."""

    chunks: int
    volumes: tuple[int, ...]
    """One figure each; the chunks are spread evenly over them, and each has a full journal."""
    rounds: int


FULL, QUICK = Sizes(1_000_000, (1, 8), 3), Sizes(20_000, (1, 2), 1)

Work = Callable[[Pool, Sequence[NbdClient], Sequence[str]], Awaitable[str]]
"""What is done to volumes before the kill; says how much that was."""


def measure(directory: Path, quick: bool) -> list[Figure]:
    """Kill and start again, over and over."""
    sizes = QUICK if quick else FULL
    directory.mkdir()
    figures = []
    for volumes in sizes.volumes:
        (home := directory / f"of-{volumes}").mkdir()
        pool = Pool(home)
        say(f"writing the records of {sizes.chunks:,} chunks in {volumes} volumes")
        asyncio.run(fixtures.write_mapped_pool(pool.state, pool.device, volumes, sizes.chunks))
        title = f"start after SIGKILL to the first byte, {sizes.chunks:,} mapped chunks"
        if volumes == 1:
            full = f"{title}, a full journal"
            figures.append(_measure(pool, volumes, sizes.rounds, full, fill_journals, below(LIMIT_S)))
            figures.append(_measure(pool, volumes, 1, f"{title}, all of them trimmed since", trim_all, None))
        else:
            every = f"{title} in {volumes} volumes, each with a full journal"
            figures.append(_measure(pool, volumes, sizes.rounds, every, fill_journals, None))
    return figures


def _measure(pool: Pool, volumes: int, rounds: int, title: str, work: Work, target: Target | None) -> Figure:
    names = [f"v{number:05d}" for number in range(volumes)]
    starts: list[Start] = []
    spent_s: list[float] = []
    told = ""
    _, process = pool.start(names[0])
    try:
        trust_sparse_files(pool)
        for number in range(rounds):
            told = asyncio.run(_kill_after(pool, process, names, work))
            start, process = pool.start(names[0])
            starts.append(start)
            spent_s.append(cpu_seconds(process.pid))
            say(f"round {number + 1}, {told}: ready {start.ready_s:.2f} s, first byte {start.first_byte_s:.2f} s")
    finally:
        end(process)
    byte_s = statistics.median(start.first_byte_s for start in starts)
    ready_s = statistics.median(start.ready_s for start in starts)
    slowest_s = max(start.first_byte_s for start in starts)
    note = (
        f"{told}; slowest {slowest_s:.2f}; {ready_s:.2f} to /readyz; {statistics.median(spent_s):.2f} s of processors"
    )
    return Figure(title, byte_s, "s", target, note, 2)


async def _kill_after(pool: Pool, process: "subprocess.Popen[bytes]", names: Sequence[str], work: Work) -> str:
    async with AsyncExitStack() as sessions:
        clients = []
        for name in names:
            client = await NbdClient.connect_unix(str(pool.state / "nbd.sock"))
            sessions.push_async_callback(client.close)
            await client.go(name)
            clients.append(client)
        told = await work(pool, clients, names)
        process.kill()
        process.wait()
    return told


async def fill_journals(pool: Pool, clients: Sequence[NbdClient], names: Sequence[str]) -> str:
    """Trim and write chunks everywhere until each journal is nearly due for a checkpoint; raises MeasurementFailed."""
    changes = 0
    for client, name in zip(clients, names, strict=True):
        chunks = list(range(client.size_bytes // CHUNK_BYTES))
        random.shuffle(chunks)
        for turn in range(MOST_TURNS):
            start = turn * IN_FLIGHT % len(chunks)
            offsets = [chunk * CHUNK_BYTES for chunk in chunks[start : start + IN_FLIGHT]]
            await _all(client.trim(offset, CHUNK_BYTES) for offset in offsets)
            await _all(client.write(offset, b"\1" * BLOCK_BYTES) for offset in offsets)
            changes += 2 * len(offsets)
            if turn % LOOK_TURNS == 0 and fill_ratio(pool, name) >= FULL_RATIO:
                break
        else:
            raise MeasurementFailed(f"the journal of {name} does not get full")
    least = min(fill_ratio(pool, name) for name in names)  # a checkpoint for its age would have emptied one
    return f"{changes // len(names):,} changes in each journal, whose file is {least:.0%} full or more"


async def trim_all(_pool: Pool, clients: Sequence[NbdClient], _names: Sequence[str]) -> str:
    """Trim every volume from end to end, as mkfs does: few bytes in the journal, and every chunk changed."""
    for client in clients:
        for offset in range(0, client.size_bytes, TRIM_BYTES):
            await client.trim(offset, min(TRIM_BYTES, client.size_bytes - offset))
    return f"trimmed in steps of {TRIM_BYTES >> 30} GiB"


async def _all(requests: Iterable[Coroutine[None, None, None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for request in requests:
            group.create_task(request)


def fill_ratio(pool: Pool, volume: str) -> float:
    """How full the file is that a volume's journal is being written to, 0 to 1; raises MeasurementFailed."""
    ratios = by_volume(pool.state, "blockvirt_volume_journal_fill_ratio")
    if volume not in ratios:
        raise MeasurementFailed(f"/metrics does not tell how full the journal of {volume} is")
    return ratios[volume]


def trust_sparse_files(pool: Pool) -> None:
    """Let chunks be written although records over sparse files say that the pool is nearly full."""
    client = Client(str(pool.state))
    client.call("PATCH", "/v1/pool", {"near_ratio": 1, "brake_ratio": 1})
    client.close()
