"""The results as Markdown: medians, and how the first server compares with each of the others."""

import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.jobs import Cell
from benchmarks.measure import Sample

Results = Mapping[tuple[str, str], Sequence[Sample]]  # (cell, server) -> one sample a round


def report(cells: Sequence[Cell], servers: Sequence[str], results: Results) -> str:
    """The tables: rate, CPU per request, p99. A ratio is the first server's median over the other's."""
    parts = [
        table("Rate, higher is better", cells, servers, results, lambda one: one.rate, lambda cell: cell.unit.value),
        table(
            "CPU us per request of the server, lower is better",
            cells,
            servers,
            results,
            lambda one: one.cpu_us,
            lambda cell: "us",
        ),
        table("p99 latency, lower is better", cells, servers, results, lambda one: one.p99_us, lambda cell: "us"),
    ]
    return "\n\n".join(parts)


def table(
    heading: str,
    cells: Sequence[Cell],
    servers: Sequence[str],
    results: Results,
    value: Callable[[Sample], float],
    unit: Callable[[Cell], str],
) -> str:
    """One Markdown table; a cell that a server could not run is a dash."""
    first, *others = servers
    lines = [f"### {heading}", ""]
    lines.append("| cell | unit | " + " | ".join([*servers, *(f"x {other}" for other in others)]) + " |")
    lines.append("|---|---|" + "---:|" * (len(servers) + len(others)))
    for cell in cells:
        medians = {server: median(results.get((cell.name, server), ()), value) for server in servers}
        row = [cell.title, unit(cell), *(number(medians[server]) for server in servers)]
        for other in others:
            ours, theirs = medians[first], medians[other]
            row.append("-" if ours is None or not theirs else f"{ours / theirs:.2f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def median(samples: Sequence[Sample], value: Callable[[Sample], float]) -> float | None:
    """The median over the rounds, None without any."""
    return statistics.median(map(value, samples)) if samples else None


def number(value: float | None) -> str:
    """Three digits that matter, thousands apart."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def machine(directory: Path) -> str:
    """What it ran on: without it the numbers mean nothing."""
    processor = _found("model name.*: (.*)", "/proc/cpuinfo")
    memory_gib = int(_found("MemTotal: *([0-9]+)", "/proc/meminfo")) / 2**20
    lines = [
        f"- machine: {os.cpu_count()} x {processor}, {memory_gib:.0f} GiB, {platform.system()} {platform.release()}",
        f"- files on: {filesystem(directory)}",
        f"- Python {platform.python_version()}, {_version('qemu-nbd')}, {_version('nbdkit')}, {_version('fio')}",
    ]
    return "\n".join(lines)


def filesystem(directory: Path) -> str:
    """The type and size of the filesystem that a directory lies on."""
    command = ["df", "--output=fstype,size", "-B1G", str(directory)]
    kind, size = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1].split()
    return f"{kind}, {size} GiB"


def _found(pattern: str, path: str) -> str:
    match = re.search(pattern, Path(path).read_text())
    return match.group(1).strip() if match else "0"


def _version(program: str) -> str:
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return f"no {program}"
    return said.splitlines()[0].partition(" (")[0]
