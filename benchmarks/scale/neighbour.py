"""What a reader loses to a neighbour on another volume that writes and flushes in a loop.

The neighbour's client and its syncs take processor and disk from the reader whoever serves them. So it is also put
behind a qemu-nbd of its own: what the reader loses then is the machine's doing, not the daemon's.
"""

import statistics
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure as fio
from benchmarks.jobs import CELLS, FILL, WARM, Cell
from benchmarks.measure import Sample
from benchmarks.scale.beside import run_beside
from benchmarks.scale.figures import Figure, below
from benchmarks.servers import QemuNbd, ServerUnavailable, Volume
from benchmarks.snapshots.daemon import Daemon
from benchmarks.snapshots.fio import random_cell
from benchmarks.snapshots.ground import MIB, say
from benchmarks.snapshots.qcow2 import AIO, FILL_RUNTIME_S

LIMIT_PERCENT = 10
DEPTHS = (1, 32)
NEIGHBOUR = next(cell for cell in CELLS if cell.name == "flush-1" and isinstance(cell, Cell))
ALONE, BESIDE, BESIDE_QEMU = "alone", "neighbour", "neighbour behind qemu-nbd"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of it."""

    volume_bytes: int
    rounds: int
    runtime_s: float


FULL, QUICK = Sizes(512 * MIB, 7, 2.0), Sizes(64 * MIB, 1, 1.0)

Found = dict[tuple[int, str], list[tuple[Sample, Sample | None]]]
"""By depth and situation: the reader's sample, and the neighbour's where there was one."""


def measure(directory: Path, quick: bool) -> list[Figure]:
    """Alternate between a reader alone and one with a neighbour."""
    sizes = QUICK if quick else FULL
    directory.mkdir()
    daemon = Daemon(directory / "ours")
    with ExitStack() as stack:
        daemon.start()
        stack.callback(daemon.stop)
        for name in ("reader", "writer"):
            daemon.create(name, sizes.volume_bytes)
            fio.run(FILL, daemon.served(name), sizes.volume_bytes, FILL_RUNTIME_S)
        neighbours: dict[str, Volume | None] = {ALONE: None, BESIDE: daemon.served("writer")}
        server = QemuNbd(directory / "qemu", AIO)
        try:
            server.start()
            neighbours[BESIDE_QEMU] = qemu = stack.enter_context(server.volume(sizes.volume_bytes))
            fio.run(FILL, qemu, sizes.volume_bytes, FILL_RUNTIME_S)
        except ServerUnavailable as error:
            say(str(error))
        found = _rounds(daemon.served("reader"), neighbours, sizes)
    figures = []
    for depth in DEPTHS:
        figures.append(_figure(depth, BESIDE, found, target=True))
        if BESIDE_QEMU in neighbours:
            figures.append(_figure(depth, BESIDE_QEMU, found, target=False))
    return figures


def _rounds(reader: Volume, neighbours: dict[str, Volume | None], sizes: Sizes) -> Found:
    found: Found = defaultdict(list)
    names = list(neighbours)
    for number in range(sizes.rounds):
        turn = number % len(names)
        for depth in DEPTHS:
            cell = random_cell("read", depth)
            for name in names[turn:] + names[:turn]:
                writer, size_bytes = neighbours[name], sizes.volume_bytes
                beside: Sample | None = None
                fio.run(WARM, reader, size_bytes, FILL_RUNTIME_S)  # what rests may have left the page cache
                if writer is None:
                    sample = fio.run(cell, reader, size_bytes, sizes.runtime_s)
                else:
                    sample, beside = run_beside(
                        cell, reader, size_bytes, sizes.runtime_s, NEIGHBOUR, writer, size_bytes
                    )
                found[depth, name].append((sample, beside))
                say(f"round {number + 1} QD{depth:<3} {name:26} {sample.rate:9,.0f} IOPS {sample.p99_us:8,.0f} us p99")
    return found


def _figure(depth: int, name: str, found: Found, *, target: bool) -> Figure:
    alone = statistics.median(sample.rate for sample, _ in found[depth, ALONE])
    rate = statistics.median(sample.rate for sample, _ in found[depth, name])
    writes = statistics.median(beside.rate for _, beside in found[depth, name] if beside is not None)
    title = f"cost of a {name} that writes and flushes, 4 KiB random read QD{depth}"
    note = f"{alone:,.0f} to {rate:,.0f} IOPS; the neighbour made {writes:,.0f} a second"
    return Figure(title, 100 * (1 - rate / alone), "%", below(LIMIT_PERCENT) if target else None, note)
