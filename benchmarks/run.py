"""`python -m benchmarks.run`: the same fio jobs against this daemon, qemu-nbd on qcow2, and nbdkit's file plugin.

In every round each cell is run against one server after the other, each round starting with another server, so that
whatever else the machine does falls on all of them. Results are medians over the rounds.
"""

import argparse
import sys
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

from benchmarks import measure
from benchmarks.ground import ground
from benchmarks.jobs import CELLS, Cell, Ground
from benchmarks.measure import MeasurementFailed, Sample
from benchmarks.report import Results, machine, report
from benchmarks.servers import SERVERS, Server, ServerUnavailable, Volume

MIB = 1 << 20


def main() -> int:
    """Run what the command line asks for; 0 when every cell was measured, 1 when some could not be."""
    options = arguments()
    cells = [cell for cell in CELLS if cell.name in options.cells]
    with ground(options.dir) as directory, ExitStack() as stack:
        servers = started(options.servers, directory, stack)
        if not servers:
            say("no server could be started")
            return 1
        try:
            bench = Bench(servers, options.size * MIB, options.runtime, stack)
        except (MeasurementFailed, ServerUnavailable) as error:
            say(f"no volume to measure on: {error}")
            return 1
        for number in range(options.rounds):
            bench.round(number, cells, options.rounds)
        print(f"## blockvirt beside its peers: medians of {options.rounds} alternating rounds\n")
        print(machine(directory))
        print(f"- volumes of {options.size} MiB, {options.runtime:g} s a cell, every server with its defaults\n")
        print(report(cells, [server.name for server in servers], bench.results))
    for failure in bench.failures:
        say(failure)
    return 1 if bench.failures else 0


class Bench:
    """The servers, each with its long-lived volume, and the samples so far."""

    def __init__(self, servers: list[Server], size_bytes: int, runtime_s: float, stack: ExitStack) -> None:
        self._servers = servers
        self._size_bytes = size_bytes
        self._runtime_s = runtime_s
        self._samples: defaultdict[tuple[str, str], list[Sample]] = defaultdict(list)
        self.failures: list[str] = []
        self._filled: dict[str, Volume] = {}
        fill = next(cell for cell in CELLS if cell.whole)
        for server in servers:
            say(f"filling a volume of {server.name}")
            volume = stack.enter_context(server.volume(size_bytes))
            measure.run(fill, volume, size_bytes, runtime_s)
            self._filled[server.name] = volume

    @property
    def results(self) -> Results:
        """All samples, by cell and server."""
        return self._samples

    def round(self, number: int, cells: list[Cell], rounds: int) -> None:
        """Every cell against every server once."""
        turn = number % len(self._servers)
        for cell in cells:
            for server in self._servers[turn:] + self._servers[:turn]:
                try:
                    sample = self._measure(cell, server)
                except (MeasurementFailed, ServerUnavailable) as error:
                    self.failures.append(f"{server.name}, {cell.name}: {error}")
                    say(self.failures[-1])
                    continue
                self._samples[cell.name, server.name].append(sample)
                say(
                    f"round {number + 1}/{rounds} {cell.name:15} {server.name:23} {sample.rate:9,.0f} {cell.unit.value}"
                    f" {sample.cpu_us:8.1f} us CPU {sample.p99_us:10,.0f} us p99"
                )

    def _measure(self, cell: Cell, server: Server) -> Sample:
        if cell.ground is Ground.FILLED:
            return measure.run(cell, self._filled[server.name], self._size_bytes, self._runtime_s)
        with server.volume(self._size_bytes) as volume:
            return measure.run(cell, volume, self._size_bytes, self._runtime_s)


def started(names: list[str], directory: Path, stack: ExitStack) -> list[Server]:
    """The servers that could be started, in the order asked for; the others are named."""
    servers: list[Server] = []
    for name in names:
        server = SERVERS[name](directory / name)
        try:
            server.start()
        except ServerUnavailable as error:
            say(str(error))
            continue
        stack.callback(server.stop)
        servers.append(server)
    return servers


def arguments() -> argparse.Namespace:
    """The command line."""
    names = [cell.name for cell in CELLS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds (default 3)")
    parser.add_argument("--runtime", type=float, default=4.0, metavar="SECONDS", help="per cell (default 4)")
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="of each volume (default 1024)")
    parser.add_argument("--cells", nargs="+", choices=names, default=names, metavar="CELL", help=", ".join(names))
    parser.add_argument(
        "--servers", nargs="+", choices=list(SERVERS), default=list(SERVERS), metavar="SERVER", help=", ".join(SERVERS)
    )
    parser.add_argument("--dir", type=Path, help="where all files go (default: XFS on a loop file when root)")
    parser.add_argument("--quick", action="store_true", help="one short round on small volumes, under 3 minutes")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.runtime, options.size = 1, 1.0, 256
    return options


def say(line: str) -> None:
    """Progress, to standard error: standard output is the report."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
