"""One measurement: run fio or nbdcopy on a volume, and ask the kernel what the server's processes spent on it."""

import json
import math
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.jobs import WARM, Cell, Copy, Unit
from benchmarks.servers import Volume

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
SLACK_S = 120.0  # beyond the runtime, before a run counts as stuck
COPY_REQUEST_BYTES = 256 << 10  # nbdcopy's own choice


class MeasurementFailed(Exception):
    """The client ended in failure; the message carries what it said."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one run of a cell against one server gave; nan is what it could not give."""

    rate: float  # in the cell's unit
    p99_us: float  # of the slowest kind of request in the cell; a flush counts as one
    cpu_us: float  # of the server, per read or write; a write and its flush count once
    requests: int  # reads and writes that the client made
    client_cores: float = math.nan  # CPU that a job of fio used while it ran: with 1 its own core is the limit
    longest_us: float = math.nan  # of all reads and writes


def run(cell: Cell, volume: Volume, size_bytes: int, runtime_s: float) -> Sample:
    """Measure a cell; raises MeasurementFailed."""
    os.sync()  # nobody pays for what the one before left dirty
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        report, said = Path(scratch) / "fio.json", Path(scratch) / "said"
        before_s = _spent(volume)
        status = _fio(cell.command(volume.engine, size_bytes, runtime_s, str(report)), said, runtime_s + SLACK_S)
        spent_s = _spent(volume) - before_s
        if status != 0:
            ended = "did not end" if status is None else f"ended with {status}"
            raise MeasurementFailed(f"{cell.name}: fio {ended}: {said.read_text(errors='replace')}".strip())
        (done,) = json.loads(report.read_text())["jobs"]
    return sample(cell, done, spent_s)


def warm(volume: Volume, size_bytes: int) -> None:
    """Read a volume once from end to end, so that it is in the page cache; raises MeasurementFailed."""
    run(WARM, volume, size_bytes, SLACK_S)


def copy(cell: Copy, volume: Volume, image: Path, data_bytes: int) -> Sample:
    """Measure a copy of so much data, between holes that do not count; raises MeasurementFailed."""
    os.sync()
    before_s, began = _spent(volume), time.monotonic()
    done = subprocess.run(
        cell.command(volume.uri, str(image)), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SLACK_S
    )
    took_s, spent_s = time.monotonic() - began, _spent(volume) - before_s
    if done.returncode != 0:
        raise MeasurementFailed(f"{cell.name}: nbdcopy ended with {done.returncode}: {done.stderr}".strip())
    requests = data_bytes // COPY_REQUEST_BYTES
    return Sample(data_bytes / took_s / 1e6, math.nan, spent_s * 1e6 / requests, requests)


def _fio(command: list[str], said: Path, timeout_s: float) -> int | None:
    """Run fio, with what it says in a file, and return its status; None: it had to be killed.

    Not in a pipe: a job of fio that got stuck outlives it with the pipe open, and whoever reads that waits for ever.
    """
    with said.open("wb") as stream:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, timeout=timeout_s, cwd=said.parent
            )
        except subprocess.TimeoutExpired:
            return None
    return done.returncode


def sample(cell: Cell, done: dict[str, Any], spent_s: float) -> Sample:
    """Read one job group of fio's JSON report."""
    kinds = [done[kind] for kind in ("read", "write") if done[kind]["total_ios"]]
    requests = sum(kind["total_ios"] for kind in kinds)
    if not requests:
        raise MeasurementFailed(f"{cell.name}: fio did nothing")
    rate = sum(kind["bw_bytes"] for kind in kinds) / 1e6
    if cell.unit is Unit.IOPS:
        rate = sum(kind["iops"] for kind in kinds)
    slowest_ns = [kind["clat_ns"]["percentile"]["99.000000"] for kind in kinds]
    if done["sync"]["lat_ns"]["N"]:  # unlike total_ios it counts fdatasyncs, too
        slowest_ns.append(done["sync"]["lat_ns"]["percentile"]["99.000000"])
    client_cores = (done["usr_cpu"] + done["sys_cpu"]) / 100  # fio's getrusage over its own runtime
    longest_us = max(kind["clat_ns"]["max"] for kind in kinds) / 1e3
    return Sample(rate, max(slowest_ns) / 1e3, spent_s * 1e6 / requests, requests, client_cores, longest_us)


def _spent(volume: Volume) -> float:
    return math.nan if volume.pid is None else cpu_seconds(volume.pid)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, all of its threads and the children below it, ended (and reaped) or not."""
    parents: dict[int, list[int]] = {}
    spent: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            text = (entry / "stat").read_text()
        except OSError:
            continue  # it ended while we looked
        # proc(5): the command's name may hold anything, but nothing after its closing bracket does.
        fields = text.rpartition(")")[2].split()
        spent[int(entry.name)] = sum(int(field) for field in fields[11:15]) / TICKS_PER_SECOND
        parents.setdefault(int(fields[1]), []).append(int(entry.name))
    total, todo = 0.0, [pid]
    while todo:
        current = todo.pop()
        total += spent.get(current, 0.0)
        todo += parents.get(current, [])
    return total


def resident_bytes(pid: int) -> int:
    """Resident memory of one process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(f"process {pid} has no memory: it has ended")
