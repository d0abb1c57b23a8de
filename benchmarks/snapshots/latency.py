"""How long a snapshot and a clone take over HTTP, beside a bare write and fdatasync of the same bytes.

Before each snapshot one 4 KiB block is written in each of so many leaves: a leaf maps 8 MiB, and each write into a
sealed chunk makes a new one of 16 KiB. The bare figure writes as many chunks to a preallocated file beside the pool
and syncs it once; what a snapshot costs beyond that is ours.
"""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.snapshots.daemon import Daemon
from benchmarks.snapshots.ground import CHUNK_BYTES, LEAF_BYTES, VOLUME, Ground, MappedPool, say, size_of
from benchmarks.snapshots.tables import figure, percentile, table
from blockvirt.nbd.client import NbdClient

BLOCK = b"\x5a" * 4096
IN_FLIGHT = 32
CURVE = (1, 10, 100, 1_000, 10_000)
DIRTY_LEAVES = 10  # in the comparison of sizes: as many as the small volume has, and fewer than the curve goes up to
SAMPLES_OF_MANY = 3  # where a sample takes seconds


@dataclass(slots=True)
class Latencies:
    """Seconds, one figure a sample."""

    snapshot_s: list[float] = field(default_factory=list)
    bare_s: list[float] = field(default_factory=list)
    clone_s: list[float] = field(default_factory=list)


def report(ground: Ground) -> str:
    """Measure and return the tables."""
    options = ground.options
    rows, curve = [], list[list[str]]()
    for size_bytes in (options.small_bytes, options.large_bytes):
        pool = ground.pool(size_bytes)
        title = size_of(size_bytes)
        if not pool.is_sealed:
            with pool.running() as daemon:
                found = _measure(daemon, pool, DIRTY_LEAVES, options.samples)
                rows.append(_row(f"{title}, the first ones, checksums being made", found))
        pool.seal()
        for snapshots in (1, options.snapshots):
            if snapshots > 1:
                pool.age(snapshots)
            with pool.running() as daemon:
                if not daemon.settle():
                    say("the daemon did not come to rest")
                found = _measure(daemon, pool, DIRTY_LEAVES, options.samples)
                rows.append(_row(f"{title}, {snapshots:,} snapshots there", found))
                if snapshots > 1 and size_bytes == options.large_bytes:
                    curve = _curve(daemon, pool, options.samples)
    columns = ["volume", "snapshot p50 ms", "p99 ms", "bare p50 ms", "beyond p50 ms", "clone p50 ms", "p99 ms"]
    heading = f"Snapshot and clone over HTTP, {DIRTY_LEAVES} dirty leaves"
    text = table(heading, columns, rows)
    columns = ["dirty leaves", "snapshot p50 ms", "p99 ms", "bare p50 ms", "beyond p50 ms"]
    heading = f"Snapshot by dirty leaves, {size_of(options.large_bytes)} mapped, {options.snapshots:,} snapshots"
    return text + "\n" + table(heading, columns, curve)


def _curve(daemon: Daemon, pool: MappedPool, samples: int) -> list[list[str]]:
    rows = []
    for leaves in CURVE:
        if leaves > pool.leaves:
            continue
        number = samples if leaves <= 100 else SAMPLES_OF_MANY
        found = _measure(daemon, pool, leaves, number, clones=False)
        rows.append([f"{leaves:,}", *_snapshot_figures(found)])
    return rows


def _row(title: str, found: Latencies) -> list[str]:
    clone_ms = [figure(percentile(found.clone_s, percent) * 1e3) for percent in (50, 99)]
    return [title, *_snapshot_figures(found), *clone_ms]


def _snapshot_figures(found: Latencies) -> list[str]:
    p50_s, bare_s = percentile(found.snapshot_s, 50), percentile(found.bare_s, 50)
    p99_s = percentile(found.snapshot_s, 99)
    return [figure(seconds * 1e3) for seconds in (p50_s, p99_s, bare_s, p50_s - bare_s)]


def _measure(daemon: Daemon, pool: MappedPool, leaves: int, samples: int, *, clones: bool = True) -> Latencies:
    """Dirty some leaves, sync bare, snapshot, clone; again and again. The snapshots stay, the clones go."""
    say(f"snapshots of {size_of(pool.size_bytes)} with {leaves:,} dirty leaves")
    found = Latencies()
    offsets = [leaf * LEAF_BYTES for leaf in range(min(leaves, pool.leaves))]
    with asyncio.Runner() as runner, _bare_file(daemon.device, len(offsets)) as bare:
        client = runner.run(_opened(daemon, VOLUME))  # a guest: the volume stays open
        runner.run(_write(client, offsets))
        daemon.snapshot(VOLUME)
        for _ in range(samples):
            found.bare_s.append(_bare_sync(bare, len(offsets)))  # before the others are dirty: it would sync them too
            runner.run(_write(client, offsets))
            began = time.perf_counter()
            taken = daemon.snapshot(VOLUME)
            found.snapshot_s.append(time.perf_counter() - began)
            if clones:
                began = time.perf_counter()
                clone = daemon.client.call("POST", f"/v1/snapshots/{taken['id']}/clone", {})
                found.clone_s.append(time.perf_counter() - began)
                daemon.client.call("DELETE", f"/v1/volumes/{clone['id']}", query={"purge": "true"})
        runner.run(client.disconnect())
    return found


async def write_blocks(daemon: Daemon, volume: str, offsets: list[int]) -> None:
    """Write a block at each offset, as a client that goes again."""
    client = await _opened(daemon, volume)
    await _write(client, offsets)
    await client.disconnect()


async def _opened(daemon: Daemon, volume: str) -> NbdClient:
    client = await NbdClient.connect_unix(str(daemon.state / "nbd.sock"))
    await client.go(volume)
    return client


async def _write(client: NbdClient, offsets: list[int]) -> None:
    for start in range(0, len(offsets), IN_FLIGHT):
        async with asyncio.TaskGroup() as group:
            for offset in offsets[start : start + IN_FLIGHT]:
                group.create_task(client.write(offset, BLOCK))


@contextmanager
def _bare_file(directory: Path, chunks: int) -> Iterator[int]:
    path = directory.parent / "bare"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.posix_fallocate(fd, 0, chunks * CHUNK_BYTES)
        os.fsync(fd)
        yield fd
    finally:
        os.close(fd)
        path.unlink()


def _bare_sync(fd: int, chunks: int) -> float:
    content = os.urandom(CHUNK_BYTES)
    began = time.perf_counter()
    for chunk in range(chunks):
        os.pwrite(fd, content, chunk * CHUNK_BYTES)
    os.fdatasync(fd)
    return time.perf_counter() - began
