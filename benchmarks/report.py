"""The results as Markdown: medians of every server, our ratios to the peers, and what came of the targets."""

import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.jobs import Measurable, Role
from benchmarks.measure import Sample
from benchmarks.rounds import Results
from benchmarks.targets import TARGETS, Figures, Kind, Verdict, best, judge, ratio_of

PROGRAMS = ("qemu-nbd", "nbdkit", "fio", "nbdcopy", "cc")

Servers = Mapping[str, Role]  # by name, in the order of the columns


def report(cells: Sequence[Measurable], servers: Servers, results: Results) -> str:
    """The targets, then rate, CPU per request and p99 of everybody."""
    rows = [
        (Kind.RATE, "Rate, higher is better", lambda one: one.rate, None),
        (
            Kind.CPU,
            "CPU us of the server per request (256 KiB of nbdcopy's data), lower is better",
            lambda one: one.cpu_us,
            "us",
        ),
        (Kind.P99, "p99 latency, lower is better", lambda one: one.p99_us, "us"),
    ]
    parts = [verdicts(cells, servers, results)]
    parts += [table(kind, heading, cells, servers, results, value, unit) for kind, heading, value, unit in rows]
    return "\n\n".join(parts)


def table(
    kind: Kind,
    heading: str,
    cells: Sequence[Measurable],
    servers: Servers,
    results: Results,
    value: Callable[[Sample], float],
    unit: str | None,
) -> str:
    """One Markdown table of the cells that have such a figure; what a server did not run is a dash.

    `unit`: None where each cell has its own.
    """
    peers = [role for role in Role if role is not Role.OURS and role in servers.values()]
    lines = [f"### {heading}", ""]
    lines.append("| cell | unit | " + " | ".join([*servers, *(f"x {peer}" for peer in peers)]) + " |")
    lines.append("|---|---|" + "---:|" * (len(servers) + len(peers)))
    for cell in cells:
        medians = [median(results.get((cell.name, server), ()), value) for server in servers]
        if not any(medians):
            continue
        row = [cell.title, unit or cell.unit.value, *map(number, medians)]
        ours = figures(cell, Role.OURS, servers, results)
        for peer in peers:
            ratio = ratio_of(kind, ours, figures(cell, peer, servers, results))
            row.append("-" if ratio is None else f"{ratio:.2f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def verdicts(cells: Sequence[Measurable], servers: Servers, results: Results) -> str:
    """Every target of these cells, the ratio of medians that was measured, and whether it is met."""
    judged = [(cell, verdict) for cell in cells for verdict in judged_targets(cell, servers, results)]
    met = sum(verdict.met is True for _, verdict in judged)
    unknown = sum(verdict.met is None for _, verdict in judged)
    lines = [f"### Targets: {met} met, {len(judged) - met - unknown} missed, {unknown} not measured", ""]
    lines += ["| cell | against | target | measured | met | C floor there | Python floor there | volume floor there |"]
    lines += ["|---|---|---|---|---|---:|---:|---:|"]
    for cell, verdict in judged:
        row = [cell.title, verdict.target.peer.value, wanted(verdict), measured(verdict), outcome(verdict)]
        row.append(reachable(cell, verdict, servers, results, (Role.FLOOR, Role.FILE_FLOOR)))
        row.append(reachable(cell, verdict, servers, results, (Role.PYTHON,)))
        row.append(reachable(cell, verdict, servers, results, (Role.VOLUME,)))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def ratios(cells: Sequence[Measurable], servers: Servers, results: Results) -> str:
    """The same in one line a cell, ratios only; what misses its target is bold."""
    lines = ["| cell | best qcow2 | nbdkit file | C floor, bare file | met |", "|---|---|---|---|---|"]
    for cell in cells:
        judged = judged_targets(cell, servers, results)
        entries = [
            ", ".join(marked(verdict) for verdict in judged if verdict.target.peer in peers) or "-"
            for peers in ({Role.QCOW2}, {Role.PLAIN}, {Role.FLOOR, Role.BARE})
        ]
        outcomes = {verdict.met for verdict in judged}
        met = "no" if False in outcomes else "not measured" if None in outcomes else "yes"
        lines.append("| " + " | ".join([cell.title, *entries, met]) + " |")
    return "\n".join(lines)


def judged_targets(cell: Measurable, servers: Servers, results: Results) -> list[Verdict]:
    """What came of each target of a cell."""
    ours = figures(cell, Role.OURS, servers, results)
    mine = [target for target in TARGETS if target.cell == cell.name]
    return [judge(target, ours, figures(cell, target.peer, servers, results)) for target in mine]


def figures(cell: Measurable, role: Role, servers: Servers, results: Results) -> Figures:
    """The medians of a cell, of the servers in a role the best."""
    found = [results.get((cell.name, server), ()) for server, its_role in servers.items() if its_role is role]
    return best(
        [
            Figures(
                rate=median(samples, lambda one: one.rate),
                cpu_us=median(samples, lambda one: one.cpu_us),
                p99_us=median(samples, lambda one: one.p99_us),
                client_cores=median(samples, lambda one: one.client_cores),
            )
            for samples in found
        ]
    )


def reachable(cell: Measurable, verdict: Verdict, servers: Servers, results: Results, floors: Sequence[Role]) -> str:
    """What the barest server has in our place: a target far beyond that is nobody's to meet on this machine.

    In C: nobody's at all; in Python: nobody's on one thread of it. At queue depth 1 it sleeps for each request, where
    we look again for a while.
    """
    target = verdict.target
    if target.peer in floors:
        return "-"
    peer = figures(cell, target.peer, servers, results)
    ratios = (ratio_of(target.kind, figures(cell, floor, servers, results), peer) for floor in floors)
    return next((f"{ratio:.2f}" for ratio in ratios if ratio is not None), "-")


def wanted(verdict: Verdict) -> str:
    """A target in words."""
    target = verdict.target
    text = f"{target.kind.value} {'>=' if target.kind is Kind.RATE else '<='} {target.bound:.2f}"
    if target.stretch is not None:
        text += f" (stretch {target.stretch:.2f})"
    if target.cpu_bound is not None:
        text += f", or with fio's core saturated {Kind.CPU.value} <= {target.cpu_bound:.2f}"
    return text


def measured(verdict: Verdict) -> str:
    """The ratio, and where it matters how busy fio was."""
    if verdict.ratio is None:
        return "-"
    text = f"{verdict.ratio:.2f}"
    if verdict.cpu_ratio is not None and verdict.client_cores is not None:
        text += f" (CPU {verdict.cpu_ratio:.2f}, fio at {verdict.client_cores:.0%} of a core)"
    return text


def marked(verdict: Verdict) -> str:
    """The ratio with its kind unless it is a rate; bold where it misses."""
    kind = {Kind.RATE: "", Kind.CPU: "CPU "}.get(verdict.target.kind, f"{verdict.target.kind.value} ")
    text = kind + measured(verdict)
    return f"**{text}**" if verdict.met is False else text


def outcome(verdict: Verdict) -> str:
    """Whether a target is met, and its stretch where it has one."""
    if verdict.met is None:
        return "not measured"
    text = "yes" if verdict.met else "no"
    if verdict.met_stretch is not None:
        text += ", stretch " + ("too" if verdict.met_stretch else "not")
    return text


def median(samples: Sequence[Sample], value: Callable[[Sample], float]) -> float | None:
    """The median over the rounds; None without any, or where the cell has no such figure."""
    values = [found for found in map(value, samples) if not math.isnan(found)]
    return statistics.median(values) if values else None


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
        f"- Python {platform.python_version()}, " + ", ".join(map(_version, PROGRAMS)),
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
    first = next(iter(said.splitlines()), program)
    return re.sub(r" \([^)]*\)", "", first)
