"""`python -m benchmarks.snapshots`: what snapshots cost, beside qcow2's internal snapshots and backing chains.

Each part is a table or two. Rounds alternate over all that is compared, so that whatever else the machine does falls
on all of it. Figures are medians over the rounds unless they say otherwise; the daemon has its default configuration.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.ground import ground
from benchmarks.report import machine
from benchmarks.snapshots import first_writes, latency, rate, requests, space
from benchmarks.snapshots.ground import MIB, Ground, Options, say

PARTS: dict[str, Callable[[Ground], str]] = {
    "latency": latency.report,
    "requests": requests.report,
    "first-writes": first_writes.report,
    "rate": rate.report,
    "delete": space.report_deletion,
    "diff": space.report_diff,
}


def main() -> int:
    """Run the parts that the command line asks for, print each when it is done."""
    parts, directory, options = arguments()
    with ground(directory) as scratch:
        print(f"## Snapshots\n\n{machine(scratch)}\n- medians of {options.rounds} alternating rounds\n", flush=True)
        shared = Ground(scratch, options)
        for part in parts:
            began = time.monotonic()
            print(PARTS[part](shared), flush=True)
            say(f"{part}: {time.monotonic() - began:.0f} s")
    return 0


def arguments() -> tuple[list[str], Path | None, Options]:
    """The command line: parts, the directory to work in, everything else."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.snapshots", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--parts", type=chosen, default=list(PARTS), metavar="PART,...", help=", ".join(PARTS))
    add("--rounds", type=int, default=3, help="alternating rounds (default 3)")
    add("--runtime", type=float, default=1.0, metavar="SECONDS", help="of each fio run (default 1)")
    add("--size", type=int, default=512, metavar="MIB", help="of the volumes of 'requests' (default 512)")
    add("--first-writes-size", type=int, default=2048, metavar="MIB", help="of those of 'first-writes' (default 2048)")
    add("--samples", type=int, default=50, help="snapshots for each figure of 'latency' (default 50)")
    add("--large", type=int, default=1 << 20, metavar="MIB", help="the large mapped volume (default 1 TiB)")
    add("--small", type=int, default=1 << 10, metavar="MIB", help="the small mapped volume (default 1 GiB)")
    add("--snapshots", type=int, default=10_000, help="of the longest histories (default 10,000)")
    add("--minutes", type=float, default=10.0, help="of one snapshot a second (default 10)")
    add("--qcow2-seconds", type=float, default=20.0, help="that qcow2 has for each step of its snapshots (default 20)")
    add("--dir", type=Path, help="where all files go (default: XFS on a loop file when root)")
    given = parser.parse_args()
    options = Options(
        rounds=given.rounds,
        runtime_s=given.runtime,
        size_bytes=given.size * MIB,
        first_writes_bytes=given.first_writes_size * MIB,
        samples=given.samples,
        large_bytes=given.large * MIB,
        small_bytes=given.small * MIB,
        snapshots=given.snapshots,
        rate_minutes=given.minutes,
        qcow2_s=given.qcow2_seconds,
    )
    return given.parts, given.dir, options


def chosen(text: str) -> list[str]:
    """The parts in a list with commas, in the order of the report; raises ArgumentTypeError for a word that is none."""
    words = set(text.split(","))
    if unknown := words - PARTS.keys():
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(sorted(unknown))}")
    return [part for part in PARTS if part in words]


if __name__ == "__main__":
    sys.exit(main())
