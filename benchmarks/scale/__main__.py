"""`python -m benchmarks.scale`: how far one daemon goes, each figure beside the target that it should meet.

Every measurement has a daemon of its own, with the default configuration, and runs alone. Where two things are
compared their rounds alternate, so that whatever else the machine does falls on both.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ground import ground
from benchmarks.measure import MeasurementFailed
from benchmarks.report import machine
from benchmarks.scale import allocation, busy, cold, connections, memory, neighbour, recovery
from benchmarks.scale.figures import Figure, report
from benchmarks.servers import ServerUnavailable
from benchmarks.snapshots.ground import say
from blockvirt.errors import BlockvirtError
from blockvirt.nbd.client import NbdClientError


@dataclass(frozen=True, slots=True)
class Measurement:
    """One word of the command line."""

    measure: Callable[[Path, bool], list[Figure]]
    """Takes a directory to work in, and whether small sizes will do."""
    meaning: str


MEASUREMENTS = {
    "connections": Measurement(connections.measure, "memory with 1,000 idle connections"),
    "busy": Measurement(busy.measure, "fairness and the API with 256 busy volumes"),
    "cold": Measurement(cold.measure, "reads with a cold cache, and who reads warm data meanwhile"),
    "neighbour": Measurement(neighbour.measure, "what a neighbour's writes and flushes cost a reader"),
    "memory": Measurement(memory.measure, "memory for a map of 1 TiB"),
    "recovery": Measurement(recovery.measure, "start after SIGKILL with a full journal"),
    "allocation": Measurement(allocation.measure, "volumes allocated per second"),
}


def main() -> int:
    """Run what the command line asks for and print the table; 0 when all of it could be measured, else 1."""
    options = arguments()
    allow_open_files()
    figures: list[Figure] = []
    failures, ran_on = 0, ""
    for name in options.names or MEASUREMENTS:
        measurement = MEASUREMENTS[name]
        began_s, load = time.monotonic(), os.getloadavg()[0]
        with ground(options.dir) as directory:  # one for each: what the last one wrote is gone
            ran_on = ran_on or machine(directory)
            try:
                found = measurement.measure(directory / name, options.quick)
            except (MeasurementFailed, ServerUnavailable, BlockvirtError, NbdClientError, OSError) as error:
                found = [Figure(measurement.meaning, None, "", note=" ".join(str(error).split()))]
                failures += 1
        took_s = time.monotonic() - began_s
        say(f"{name}: {took_s:.0f} s, the machine's load {load:.1f} before and {os.getloadavg()[0]:.1f} after")
        for each in found:
            say("  " + " | ".join(each.row()))
        figures += found
    print(f"## Scale{', small sizes' if options.quick else ''}\n\n{ran_on}\n\n{report(figures)}")
    return 1 if failures else 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=(__doc__ or "").splitlines()[0])
    words = "; ".join(f"{name}: {each.meaning}" for name, each in MEASUREMENTS.items())
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{words} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that all of it works")
    parser.add_argument("--dir", type=Path, help="where all files go (default: XFS on a loop file when root)")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in MEASUREMENTS]:
        parser.error(f"no such measurement: {', '.join(unknown)}")
    return options


def allow_open_files() -> None:
    """Raise the limit on descriptors as far as allowed: a thousand clients are in this one process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
