"""Rounds of measurements: each cell against one server after the other, each round beginning with another server.

So whatever else the machine does falls on all of them. Before each cell that reads, its volume is read once through,
the same for every server: whoever hosts this machine may have emptied its page cache meanwhile. They may also take free
memory away until it is touched again: before a cell that allocates in bulk so much is touched and let go.
"""

import mmap
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from benchmarks.jobs import CELLS, FILL, HOLELESS, Cell, Copy, Measurable, State
from benchmarks.measure import MeasurementFailed, Sample
from benchmarks.servers import Server, ServerUnavailable, Volume

MIB = 1 << 20
STRIPE_BYTES = 4 * MIB  # of data, then as much of a hole
READ_BYTES = MIB
TOUCHED = 3  # times what is written: the page cache has it, and that of the loop file
COPY_IN = next(cell for cell in CELLS if isinstance(cell, Copy) and cell.state is State.FRESH)

Results = Mapping[tuple[str, str], Sequence[Sample]]  # (cell, server) -> one sample a round


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything."""

    size_bytes: int
    copy_bytes: int
    runtime_s: float

    def room_bytes(self, servers: int) -> int:
        """What a filesystem needs for it: long-lived volumes, one of a measurement's own, and a reserve."""
        return servers * self.size_bytes + max(3 * self.size_bytes, self.copy_bytes) + 4096 * MIB


class Bench:
    """The servers, each with its long-lived volume, and the samples so far."""

    def __init__(
        self, servers: Sequence[Server], cells: Sequence[Measurable], scale: Scale, directory: Path, stack: ExitStack
    ) -> None:
        self._servers = list(servers)
        self._cells = cells
        self._scale = scale
        self._samples: defaultdict[tuple[str, str], list[Sample]] = defaultdict(list)
        self.failures: list[str] = []
        self._filled: dict[str, Volume] = {}
        for server in servers:
            if any(cell.state is State.FILLED and server.role in cell.roles for cell in cells):
                say(f"filling a volume of {server.name}")
                volume = stack.enter_context(server.volume(scale.size_bytes))
                self._fill(volume)
                self._filled[server.name] = volume
        self._half_empty, self._full = directory / "half-empty", directory / "full"
        if any(isinstance(cell, Copy) for cell in cells):
            write_image(self._half_empty, scale.copy_bytes, hole_bytes=STRIPE_BYTES)
            write_image(self._full, scale.copy_bytes // 2, hole_bytes=0)

    @property
    def results(self) -> Results:
        """All samples, by cell and server."""
        return self._samples

    def round(self, number: int, rounds: int) -> None:
        """Every cell against every server that takes part in it, once."""
        turn = number % len(self._servers)
        for cell in self._cells:
            for server in self._servers[turn:] + self._servers[:turn]:
                if server.role not in cell.roles:
                    continue
                try:
                    sample = self._measure(cell, server)
                except (MeasurementFailed, ServerUnavailable, subprocess.TimeoutExpired) as error:
                    self.failures.append(f"{server.name}, {cell.name}: {error}")
                    say(self.failures[-1])
                    continue
                self._samples[cell.name, server.name].append(sample)
                say(
                    f"round {number + 1}/{rounds} {cell.name:17} {server.name:23} {sample.rate:9,.0f} {cell.unit.value}"
                    f" {sample.cpu_us:8.1f} us CPU {sample.p99_us:10,.0f} us p99 {sample.client_cores:5.2f} of fio"
                )

    def _measure(self, cell: Measurable, server: Server) -> Sample:
        with self._volume(cell, server) as volume:
            if isinstance(cell, Cell):
                if cell.reads:
                    measure.warm(volume, self._scale.size_bytes)
                elif cell.state is State.FRESH and cell.share is not None:
                    touch_memory(int(TOUCHED * cell.share * self._scale.size_bytes))
                return measure.run(cell, volume, self._scale.size_bytes, self._scale.runtime_s)
            image = self._image(server)
            if cell.state is State.COPIED:
                measure.warm(volume, image.stat().st_size)
            else:
                read_through(image)
                touch_memory(TOUCHED * self._scale.copy_bytes // 2)
            return measure.copy(cell, volume, image, self._scale.copy_bytes // 2)

    @contextmanager
    def _volume(self, cell: Measurable, server: Server) -> Iterator[Volume]:
        size_bytes = self._image(server).stat().st_size if isinstance(cell, Copy) else self._scale.size_bytes
        if cell.state is State.FILLED:
            yield self._filled[server.name]
        elif cell.state is State.SNAPSHOT:
            with server.snapshotted(size_bytes, self._fill) as volume:
                yield volume
        else:
            with server.volume(size_bytes) as volume:
                if cell.state is State.COPIED:
                    measure.copy(COPY_IN, volume, self._image(server), self._scale.copy_bytes // 2)
                yield volume

    def _image(self, server: Server) -> Path:
        return self._full if server.role in HOLELESS else self._half_empty

    def _fill(self, volume: Volume) -> None:
        measure.run(FILL, volume, self._scale.size_bytes, self._scale.runtime_s)


def write_image(image: Path, size_bytes: int, hole_bytes: int) -> None:
    """Make a file of stripes that nothing compresses, with a hole behind each."""
    data = os.urandom(STRIPE_BYTES)
    with image.open("xb") as stream:
        for offset in range(0, size_bytes, STRIPE_BYTES + hole_bytes):
            stream.seek(offset)
            stream.write(data)
        stream.truncate(size_bytes)


def read_through(image: Path) -> None:
    """Read a file once, so that it is in the page cache."""
    with image.open("rb", buffering=0) as stream:
        while stream.read(READ_BYTES):
            pass


def touch_memory(size_bytes: int) -> None:
    """Have the first touch of so much free memory behind us: where a host has to find it, that takes 1.5 ms a MiB.

    Never more than is free: the rest would be taken from the page cache, in which what is measured next lies.
    """
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    mmap.mmap(
        -1,
        max(MIB, min(size_bytes, free_bytes * 3 // 4)),
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE,
    ).close()


def say(line: str) -> None:
    """Progress, to standard error: standard output is the report."""
    print(line, file=sys.stderr, flush=True)
