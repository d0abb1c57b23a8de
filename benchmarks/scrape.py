"""`python -m benchmarks.scrape`: what a scrape of /metrics costs the requests that run beside it.

One client reads 4 KiB blocks, one after the other, while another process scrapes without a pause; the same client
without scrapes is measured in turn with it. With many volumes, few and many of them open.
"""

import argparse
import asyncio
import statistics
import sys
import time
from contextlib import AsyncExitStack
from http.client import HTTPConnection
from pathlib import Path
from socket import AF_UNIX, socket

from benchmarks.ground import ground
from benchmarks.processes import START_DEADLINE_S, end
from benchmarks.report import machine
from benchmarks.startup import BLOCK_BYTES, CHUNK_BYTES, Pool
from blockvirt.nbd.client import NbdClient
from blockvirt.testing import fixtures  # type: ignore[attr-defined, unused-ignore]

SCRAPER = "scrape-until-killed"


def scrape(path: str) -> tuple[float, int]:
    """One scrape over a unix socket: its seconds and its bytes."""
    connection = HTTPConnection("localhost", timeout=START_DEADLINE_S)
    with socket(AF_UNIX) as client:
        client.connect(path)
        connection.sock = client
        began = time.monotonic()
        connection.request("GET", "/metrics")
        return time.monotonic() - began, len(connection.getresponse().read())


async def window(client: NbdClient, chunks: int, seconds: float) -> list[float]:
    """Read for some seconds; the milliseconds of each request."""
    took_ms = []
    until = time.monotonic() + seconds
    number = 0
    while (began := time.monotonic()) < until:
        number += 1
        await client.read(number % chunks * CHUNK_BYTES, BLOCK_BYTES)
        took_ms.append((time.monotonic() - began) * 1e3)
    return took_ms


async def measure(pool: Pool, opened: int, rounds: int, seconds: float) -> str:
    """Return a line of the table for this number of open volumes."""
    quiet: list[list[float]] = []
    scraped: list[list[float]] = []
    counts: list[int] = []
    path = str(pool.state / "http.sock")
    names = []
    async with AsyncExitStack() as sessions:
        for number in range(opened):
            client = await NbdClient.connect_unix(str(pool.state / "nbd.sock"))
            sessions.push_async_callback(client.close)
            names.append(f"v{number:05d}")
            await client.go(names[-1])
        chunks = client.size_bytes // CHUNK_BYTES
        for _ in range(rounds):
            quiet.append(await window(client, chunks, seconds))
            scraper = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "benchmarks.scrape", f"--{SCRAPER}", path, stdout=asyncio.subprocess.PIPE
            )
            assert scraper.stdout is not None
            await scraper.stdout.readline()  # the first is done
            scraped.append(await window(client, chunks, seconds))
            scraper.terminate()
            counts.append(len((await scraper.stdout.read()).splitlines()))
            await scraper.wait()
    size = scrape(path)[1]
    cells = [f"{opened:,}", f"{size >> 10:,}", f"{statistics.median(counts) / seconds:.1f}"]
    for windows in (quiet, scraped):
        every = sorted(each for taken in windows for each in taken)
        cells += [f"{every[len(every) * part // 1000]:.2f}" for part in (500, 999)]
        cells.append(f"{statistics.median(max(taken) for taken in windows):.1f}")
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Write the pool, start the daemon over it, print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scrape", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--volumes", type=int, default=10_000)
    parser.add_argument("--chunks", type=int, default=1_000_000, help="mapped, over all volumes")
    parser.add_argument("--open", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--dir", type=Path, help="where all files go (default: XFS on a loop file when root)")
    parser.add_argument(f"--{SCRAPER}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if path := vars(options)[SCRAPER.replace("-", "_")]:
        while True:
            print(scrape(path), flush=True)
    with ground(options.dir) as directory:
        pool = Pool(directory)
        asyncio.run(fixtures.write_mapped_pool(pool.state, pool.device, options.volumes, options.chunks))
        _, process = pool.start(None)
        try:
            print(f"## Reads beside scrapes, {options.volumes:,} volumes\n\n{machine(directory)}\n")
            print("Milliseconds of a 4 KiB read; `most`: the median of the rounds' longest.\n")
            print("| open volumes | KiB a scrape | scrapes/s | p50 | p99.9 | most | p50, scraped | p99.9 | most |")
            print("|" + "---:|" * 9)
            for opened in options.open:
                print(asyncio.run(measure(pool, opened, options.rounds, options.seconds)), flush=True)
        finally:
            end(process)
    return 0


if __name__ == "__main__":
    sys.exit(main())
