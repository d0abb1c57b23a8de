"""`python -m benchmarks.run`: the speed report, beside qemu-nbd on qcow2, nbdkit's file plugin and the bare minimum.

Everything is measured in alternating rounds on one filesystem after the other; figures are medians over the rounds.
The report says of every target whether it is met. This daemon and its peers have their defaults, always.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.ground import MAKE, can_mount, ground
from benchmarks.jobs import CELLS, Measurable
from benchmarks.measure import MeasurementFailed
from benchmarks.report import machine, ratios, report
from benchmarks.rounds import MIB, STRIPE_BYTES, Bench, Scale, say
from benchmarks.servers import Blockvirt, NbdkitFile, QemuNbd, Server, ServerUnavailable
from benchmarks.yardsticks import BareFile, FileFloor, Floor, PythonFloor, ThreadedFileFloor, VolumeFloor

# By the word for --servers, in the order of the report's columns.
SERVERS: dict[str, Callable[[Path], Server]] = {
    "blockvirt": Blockvirt,
    "qcow2-uring": lambda directory: QemuNbd(directory, "io_uring"),
    "qcow2-threads": lambda directory: QemuNbd(directory, "threads"),
    "nbdkit": NbdkitFile,
    "floor": Floor,
    "file-floor": FileFloor,
    "thread-floor": ThreadedFileFloor,
    "python-floor": PythonFloor,
    "volume-floor": VolumeFloor,
    "bare": BareFile,
}
QUICK = {"rounds": 1, "runtime": 0.5, "size": 256, "copy_size": 512}


def main() -> int:
    """Run what the command line asks for; 0 when every cell was measured, 1 when some could not be.

    A target that is missed is a result, not a failure.
    """
    options = arguments()
    cells = [cell for cell in CELLS if cell.name in options.cells]
    copy_bytes = options.copy_size * MIB // (2 * STRIPE_BYTES) * (2 * STRIPE_BYTES)
    scale = Scale(options.size * MIB, copy_bytes, options.runtime)
    print("## blockvirt beside its peers\n")
    results = [measured(options, cells, scale, filesystem) for filesystem in options.ground]
    return 0 if all(results) else 1


def measured(options: argparse.Namespace, cells: Sequence[Measurable], scale: Scale, filesystem: str) -> bool:
    """Measure on one filesystem and print its part of the report; False when some cell could not be measured."""
    room_bytes = scale.room_bytes(len(options.servers))
    with ground(options.dir, filesystem, room_bytes) as directory, ExitStack() as stack:
        servers = started(options.servers, directory, stack)
        if not servers:
            say("no server could be started")
            return False
        try:
            bench = Bench(servers, cells, scale, directory, stack)
        except (MeasurementFailed, ServerUnavailable) as error:
            say(f"no volume to measure on: {error}")
            return False
        for number in range(options.rounds):
            bench.round(number, options.rounds)
        print(machine(directory))
        print(f"- medians of alternating rounds, {options.rounds} of them; {options.runtime:g} s a cell")
        print(f"- volumes of {options.size} MiB, to copy {options.copy_size} MiB; every server with its defaults\n")
        write = ratios if options.quick else report
        print(write(cells, {server.name: server.role for server in servers}, bench.results), flush=True)
        print()
    for failure in bench.failures:
        say(failure)
    return not bench.failures


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
    add = parser.add_argument
    add("--quick", action="store_true", help="a table of ratios in less than 3 minutes: one short round on XFS")
    add("--rounds", type=int, default=5, help="alternating rounds (default 5)")
    add("--runtime", type=float, default=3.0, metavar="SECONDS", help="per cell (default 3)")
    add("--size", type=int, default=1024, metavar="MIB", help="of each volume (default 1024)")
    add("--copy-size", type=int, default=4096, metavar="MIB", help="of what nbdcopy copies (default 4096)")
    add("--cells", nargs="+", choices=names, default=names, metavar="CELL", help=", ".join(names))
    add("--servers", nargs="+", choices=list(SERVERS), default=list(SERVERS), metavar="SERVER", help=", ".join(SERVERS))
    add("--ground", nargs="+", choices=list(MAKE), help="filesystems in loop files (default: both)")
    add("--dir", type=Path, help="measure in this directory instead; without root, under /var/tmp")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args()
    mountable = [] if options.dir else [filesystem for filesystem in MAKE if can_mount(filesystem)]
    if options.ground is None:
        options.ground = mountable[: 1 if options.quick else None] or list(MAKE)[:1]  # the directory itself, then
    elif missing := set(options.ground) - set(mountable):
        parser.error(f"no loop mount of {', '.join(sorted(missing))}: it takes root, its mkfs, and no --dir")
    return options


if __name__ == "__main__":
    sys.exit(main())
