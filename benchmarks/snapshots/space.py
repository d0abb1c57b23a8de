"""Deleting snapshots and getting their space back; what changed between two of them, over HTTP."""

import asyncio
import statistics
import time
from typing import Any

from benchmarks import measure
from benchmarks.jobs import FILL
from benchmarks.snapshots.daemon import Daemon, wait_until
from benchmarks.snapshots.ground import LEAF_BYTES, VOLUME, Ground, MappedPool, say, size_of
from benchmarks.snapshots.latency import write_blocks
from benchmarks.snapshots.qcow2 import FILL_RUNTIME_S
from benchmarks.snapshots.tables import figure, table

HELD_CHUNKS = 32  # that the snapshot to be deleted holds alone: one in each of so many leaves
RECLAIMED_BYTES = 1 << 30
FREED_DEADLINE_S = 120.0
BLOCK_UNIT_BYTES = 512  # of st_blocks
DIFF_LIMIT = 10_000  # ranges in one page: as many as the API gives


def report_deletion(ground: Ground) -> str:
    """Measure and return the tables."""
    rows = []
    for size_bytes in (ground.options.small_bytes, ground.options.large_bytes):
        pool = ground.pool(size_bytes)
        pool.seal()
        with pool.running() as daemon:
            daemon.settle()
            rows += _little_held(daemon, pool, ground.options.rounds)
    columns = ["snapshot", "said freed KiB", "given back KiB", "DELETE ms", "until given back ms"]
    text = table(f"Deleting a snapshot that holds {HELD_CHUNKS} chunks alone", columns, rows)
    return text + "\n" + _reclaim(ground)


def _little_held(daemon: Daemon, pool: MappedPool, rounds: int) -> list[list[str]]:
    """The only one, then one between two others."""
    say(f"deletions in a volume of {size_of(pool.size_bytes)}")
    offsets = [leaf * LEAF_BYTES for leaf in range(min(HELD_CHUNKS, pool.leaves))]
    found: dict[str, list[tuple[float, ...]]] = {"the newest of two": [], "a middle one": []}
    for number in range(rounds):
        for title, after in (("the newest of two", 0), ("a middle one", 1)):
            ids: list[str] = []
            for _ in range(2 + after):
                asyncio.run(write_blocks(daemon, VOLUME, offsets))
                ids.append(daemon.snapshot(VOLUME, f"d{number}-{after}-{len(ids)}")["id"])
            if not after:
                asyncio.run(write_blocks(daemon, VOLUME, offsets))
                daemon.checkpoint(VOLUME)
            daemon.settle()
            found[title].append(_delete(daemon, ids[1]))
            daemon.delete_all([ids[0], *ids[2:]])
    return [
        [
            f"{title}, {size_of(pool.size_bytes)}",
            *(figure(statistics.median(values)) for values in zip(*found[title], strict=True)),
        ]
        for title in found
    ]


def _delete(daemon: Daemon, snapshot: str) -> tuple[float, float, float, float]:
    """KiB said to be freed, KiB given back by the files, ms of the request, ms until they were given back."""
    before = _allocated_bytes(daemon)
    began = time.perf_counter()
    deletion = daemon.delete(snapshot)
    answered_s = time.perf_counter() - began
    freed_bytes = deletion["freed_bytes"]
    if not wait_until(lambda: before - _allocated_bytes(daemon) >= freed_bytes, FREED_DEADLINE_S, 0.002):
        say(f"{freed_bytes} bytes were to be given back, {before - _allocated_bytes(daemon)} were")
    freed_s = time.perf_counter() - began
    return freed_bytes / 1024, (before - _allocated_bytes(daemon)) / 1024, answered_s * 1e3, freed_s * 1e3


def _reclaim(ground: Ground) -> str:
    """A volume written again from end to end after a snapshot: all of its old data goes with that."""
    daemon = Daemon(ground.directory / "reclaim")
    rows = []
    daemon.start()
    try:
        daemon.create("v", RECLAIMED_BYTES)
        measure.run(FILL, daemon.served("v"), RECLAIMED_BYTES, FILL_RUNTIME_S)
        for number in range(ground.options.rounds):
            snapshot = daemon.snapshot("v", f"s{number}")["id"]
            measure.run(FILL, daemon.served("v"), RECLAIMED_BYTES, FILL_RUNTIME_S)
            daemon.checkpoint("v")
            daemon.settle()
            rows.append(_delete(daemon, snapshot))
    finally:
        daemon.stop()
    said, given, answered_ms, freed_ms = (statistics.median(values) for values in zip(*rows, strict=True))
    row = [
        "all of 1 GiB, written in order",
        figure(said / 1024, 0),
        figure(given / 1024, 0),
        figure(answered_ms),
        figure(freed_ms),
    ]
    columns = ["snapshot", "said freed MiB", "given back MiB", "DELETE ms", "until given back ms", "MiB/s"]
    title = f"all of {size_of(RECLAIMED_BYTES)}, written in order"
    mib = [figure(said / 1024, 0), figure(given / 1024, 0)]
    row = [title, *mib, figure(answered_ms), figure(freed_ms), figure(given / 1024 / (freed_ms / 1e3), 0)]
    return table("Deleting a snapshot that holds a whole volume", columns, [row])


def _allocated_bytes(daemon: Daemon) -> int:
    """What the backing files take on disk."""
    return sum(file.stat().st_blocks * BLOCK_UNIT_BYTES for file in (daemon.device / "files").iterdir())


def report_diff(ground: Ground) -> str:
    """Measure and return the table."""
    pool, past = ground.pool(ground.options.large_bytes), ground.options.snapshots
    pool.age(past)
    rows = []
    with pool.running() as daemon:
        daemon.settle()
        pairs = [
            ("neighbours: one leaf changed", f"past{past - 1:05d}", f"past{past - 2:05d}"),
            (f"{past - 1:,} snapshots apart", f"past{past - 1:05d}", "past00000"),
            (f"each of {pool.leaves:,} leaves changed", "wide00000", f"past{past - 1:05d}"),
            ("with nothing: all data", "wide00000", None),
        ]
        for title, new, old in pairs:
            for limit in (1_000, DIFF_LIMIT):
                measured = [_diff(daemon, new, old, limit) for _ in range(ground.options.rounds)]
                pages, ranges, _ = measured[0]
                seconds = [each for _, _, each in measured]
                rows.append([title, f"{ranges:,}", f"{limit:,}", f"{pages:,}", figure(statistics.median(seconds), 3)])
    heading = f"Changed blocks of two snapshots of {size_of(pool.size_bytes)}, over HTTP"
    return table(heading, ["compared", "ranges", "ranges a page", "pages", "all of it, s"], rows)


def _diff(daemon: Daemon, new: str, old: str | None, limit: int) -> tuple[int, int, float]:
    """Pages, ranges and seconds of a whole list."""
    query: dict[str, Any] = {"limit": limit} | ({"since": f"{VOLUME}@{old}"} if old else {})
    pages = ranges = 0
    began = time.perf_counter()
    while True:
        page = daemon.client.call("GET", f"/v1/snapshots/{VOLUME}@{new}/changes", query=query)
        pages, ranges = pages + 1, ranges + len(page["changes"])
        if "next_offset_bytes" not in page:
            return pages, ranges, time.perf_counter() - began
        query["offset"] = page["next_offset_bytes"]
