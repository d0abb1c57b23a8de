"""4 KiB random reads and writes on volumes with ever more snapshots, beside qcow2 with snapshots and with chains.

All of it is in the page cache. Reads find most of what they ask for in map versions as old as the history; before the
writes every volume is written once more from end to end, so that they overwrite what the head owns already (first
writes are a part of their own).
"""

import asyncio
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from benchmarks.jobs import FILL, WARM, Cell
from benchmarks.measure import Sample
from benchmarks.servers import Volume
from benchmarks.snapshots.daemon import Daemon
from benchmarks.snapshots.fio import random_cell, run_counted
from benchmarks.snapshots.ground import Ground, Options, say
from benchmarks.snapshots.history import History, write_histories
from benchmarks.snapshots.qcow2 import FILL_RUNTIME_S, Qcow2
from benchmarks.snapshots.tables import figure, median_or_none, table

READS = (random_cell("read", 32), random_cell("read", 1))
WRITES = (random_cell("write", 32), random_cell("write", 1))
INTERNAL = (0, 100, 1_000, 10_000)  # snapshots in a qcow2 image
CHAINS = (10, 100)  # overlays over one


@dataclass(frozen=True, slots=True)
class Subject:
    """A volume that is measured, under its title in the report."""

    title: str
    volume: Volume


Samples = dict[tuple[str, str], list[tuple[Sample, float | None]]]


def report(ground: Ground) -> str:
    """Measure and return the tables."""
    options = ground.options
    daemon = Daemon(ground.directory / "requests")
    histories = _make_ours(daemon, options)
    images = [*_internal(ground.directory, options), *_chains(ground.directory, options)]
    samples: Samples = defaultdict(list)
    with ExitStack() as stack:
        daemon.start()
        stack.callback(daemon.stop)
        subjects = [Subject(title, daemon.served(name)) for name, title in histories.items()]
        subjects += [Subject(title, stack.enter_context(image.served())) for title, image in images]
        for subject in subjects:
            measure.run(WARM, subject.volume, options.size_bytes, FILL_RUNTIME_S)
        daemon.settle()
        _rounds(READS, subjects, options, samples)
        for subject in subjects:
            measure.run(FILL, subject.volume, options.size_bytes, FILL_RUNTIME_S)
        daemon.settle()
        _rounds(WRITES, subjects, options, samples)
    for _, image in images:
        image.remove()
    return "\n".join(_table(cell, [subject.title for subject in subjects], samples) for cell in (*READS, *WRITES))


def _make_ours(daemon: Daemon, options: Options) -> dict[str, str]:
    """Fill volumes, seal them by a first snapshot and write the rest of their histories; returns titles by name."""
    counts = [count for count in (0, 0, 100, 1_000, 10_000) if count <= options.snapshots]
    names = {f"v{number}": count for number, count in enumerate(counts)}
    daemon.start()
    try:
        for name, count in names.items():
            say(f"filling a volume for {count:,} snapshots")
            daemon.create(name, options.size_bytes)
            measure.run(FILL, daemon.served(name), options.size_bytes, FILL_RUNTIME_S)
            if count:
                daemon.snapshot(name)
        daemon.settle()
    finally:
        daemon.stop()
    histories = [History(name, count - 1) for name, count in names.items() if count]
    asyncio.run(write_histories(daemon.state, histories))
    titles = {name: f"blockvirt, {count:,} snapshots" for name, count in names.items()}
    titles["v1"] = "blockvirt, 0 snapshots again"
    return titles


def _internal(directory: Path, options: Options) -> Iterator[tuple[str, Qcow2]]:
    for count in INTERNAL:
        if count > options.snapshots:
            continue
        image = Qcow2(directory / f"internal-{count}", options.size_bytes)
        image.fill()
        image.snapshot_until(count, options.qcow2_s)
        say(f"a qcow2 image with {image.snapshots:,} of {count:,} internal snapshots")
        yield f"qcow2, {image.snapshots:,} internal snapshots", image
        if image.snapshots < count:
            return


def _chains(directory: Path, options: Options) -> Iterator[tuple[str, Qcow2]]:
    for count in CHAINS:
        image = Qcow2(directory / f"chain-{count}", options.size_bytes)
        image.fill()
        image.overlay_until(count)
        say(f"a qcow2 image with {count} overlays")
        yield f"qcow2, chain of {count} overlays", image


def _rounds(cells: Sequence[Cell], subjects: Sequence[Subject], options: Options, samples: Samples) -> None:
    for number in range(options.rounds):
        turn = number * len(subjects) // options.rounds
        for cell in cells:
            for subject in (*subjects[turn:], *subjects[:turn]):
                sample, calls = run_counted(cell, subject.volume, options.size_bytes, options.runtime_s)
                samples[cell.name, subject.title].append((sample, calls))
                say(f"round {number + 1} {cell.name:9} {subject.title:34} {sample.rate:9,.0f} IOPS")


def _table(cell: Cell, titles: Sequence[str], samples: Samples) -> str:
    rows = []
    for title in titles:
        found = samples[cell.name, title]
        rates = [sample.rate for sample, _ in found]
        rows.append(
            [
                title,
                figure(statistics.median(rates), 0),
                f"{min(rates):,.0f} to {max(rates):,.0f}",
                figure(statistics.median(sample.cpu_us for sample, _ in found)),
                figure(median_or_none([calls for _, calls in found]), 3),
                figure(statistics.median(sample.p99_us for sample, _ in found), 0),
            ]
        )
    columns = ["volume", "IOPS", "lowest to highest", "CPU us/request", "syscalls/request", "p99 us"]
    return table(cell.title, columns, rows)
