"""One snapshot a second for minutes on end, the oldest deleted as fast, beside a client that writes all the while.

A schedule, whose shortest period is a minute, takes and prunes its own beside them.
"""

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from benchmarks import measure
from benchmarks.jobs import FILL
from benchmarks.measure import resident_bytes
from benchmarks.snapshots.daemon import Daemon
from benchmarks.snapshots.fio import random_cell
from benchmarks.snapshots.ground import MIB, Ground, say
from benchmarks.snapshots.qcow2 import FILL_RUNTIME_S
from benchmarks.snapshots.tables import figure, percentile, table

VOLUME_BYTES = 1 << 30
PERIOD_S = 1.0
KEPT = 30
SCHEDULED_KEPT = 2
WRITE_IOPS = 2_000
DEPTH = 16
WARM_UP_S = 2.0  # for fio to start and to connect


@dataclass(slots=True)
class Course:
    """What happened, second by second."""

    snapshot_s: list[float] = field(default_factory=list)
    delete_s: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    late: int = 0
    """Snapshots that could not be begun within their second."""


def report(ground: Ground) -> str:
    """Measure and return the table."""
    duration_s = ground.options.rate_minutes * 60
    daemon = Daemon(ground.directory / "rate")
    daemon.start()
    try:
        daemon.create("v", VOLUME_BYTES)
        daemon.schedule("v", "minutely", SCHEDULED_KEPT)
        measure.run(FILL, daemon.served("v"), VOLUME_BYTES, FILL_RUNTIME_S)
        cell = random_cell("write", DEPTH, f"--rate_iops={WRITE_IOPS}")
        with ThreadPoolExecutor(1) as threads:
            load = threads.submit(measure.run, cell, daemon.served("v"), VOLUME_BYTES, duration_s + WARM_UP_S)
            threading.Event().wait(WARM_UP_S)
            course = _course(daemon, duration_s)
            backlog = len(list(daemon.client.pages("/v1/jobs", "jobs", {"state": "running"})))
            backlog += len(list(daemon.client.pages("/v1/jobs", "jobs", {"state": "queued"})))
            scheduled = daemon.snapshots("v") - min(KEPT, len(course.snapshot_s))
            sample = load.result()
    finally:
        daemon.stop()
    fifth = max(1, len(course.resident) // 5)
    memory = [statistics.median(course.resident[at : at + fifth]) / MIB for at in range(0, fifth * 5, fifth)]
    rows = [
        ["snapshots taken", f"{len(course.snapshot_s):,} in {duration_s:,.0f} s"],
        ["begun more than a second late", f"{course.late:,}"],
        ["snapshot p50 / p99 / worst, ms", _milliseconds(course.snapshot_s)],
        ["deletion (of the oldest, keep 30) p50 / p99 / worst, ms", _milliseconds(course.delete_s)],
        [f"of a schedule's snapshots (each minute, keep {SCHEDULED_KEPT}) left at the end", f"{scheduled:,}"],
        ["reclaim jobs left at the end", f"{backlog:,}"],
        [f"client's writes a second (limited to {WRITE_IOPS:,})", figure(sample.rate, 0)],
        ["client's write p99, ms", figure(sample.p99_us / 1e3)],
        ["CPU us per write, snapshots included", figure(sample.cpu_us)],
        ["resident MiB at the start, at the end", f"{course.resident[0] / MIB:.1f}, {course.resident[-1] / MIB:.1f}"],
        ["resident MiB, median of each fifth", ", ".join(f"{value:.1f}" for value in memory if value)],
    ]
    return table("A snapshot a second under 4 KiB random writes", ["", "figure"], rows)


def _course(daemon: Daemon, duration_s: float) -> Course:
    course, taken = Course(), list[str]()
    began = time.monotonic()
    pause = threading.Event()
    while (number := len(course.snapshot_s)) * PERIOD_S < duration_s:
        due = began + number * PERIOD_S
        pause.wait(max(0.0, due - time.monotonic()))
        course.late += time.monotonic() - due > PERIOD_S
        course.resident.append(resident_bytes(daemon.pid))
        start = time.perf_counter()
        taken.append(daemon.snapshot("v")["id"])
        course.snapshot_s.append(time.perf_counter() - start)
        if len(taken) > KEPT:
            start = time.perf_counter()
            daemon.delete(taken.pop(0))
            course.delete_s.append(time.perf_counter() - start)
        if number % 60 == 59:
            say(f"{number + 1:,} snapshots, {course.resident[-1] / MIB:.1f} MiB resident")
    return course


def _milliseconds(seconds: list[float]) -> str:
    if not seconds:
        return "-"
    return " / ".join(figure(percentile(seconds, percent) * 1e3) for percent in (50, 99, 100))
