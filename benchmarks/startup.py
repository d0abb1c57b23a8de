"""`python -m benchmarks.startup`: how long a daemon with many volumes and a large map takes to serve, and its memory.

A fixture writes real map records for a pool whose data was never written (the backing files are sparse), so that a
million chunks cost seconds to make and not 16 GiB. Then the daemon is started over it, after a clean stop and after
SIGKILL with journals to replay: the time to `/readyz` 200, and to the first byte read over NBD.
"""

import argparse
import asyncio
import http.client
import json
import socket
import statistics
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ground import ground
from benchmarks.measure import resident_bytes
from benchmarks.processes import START_DEADLINE_S, answers_ready, blockvirt, end, environment
from benchmarks.report import machine
from blockvirt.limits import DEFAULT_CHUNK_BYTES
from blockvirt.nbd.client import NbdClient, NbdClientError
from blockvirt.testing import fixtures  # type: ignore[attr-defined, unused-ignore]

POLL_S = 0.001
BUSY_VOLUMES = 8
BLOCK_BYTES = 4 << 10
CHUNK_BYTES = DEFAULT_CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class Start:
    """What one start took."""

    ready_s: float
    first_byte_s: float
    idle_bytes: int  # resident, when nothing has been asked but that byte


class Pool:
    """A pool on disk and the daemon that is started over it."""

    def __init__(self, directory: Path) -> None:
        self.state, self.device = directory / "state", directory / "device"
        self.state.mkdir(mode=0o700)
        self.device.mkdir()
        self._log = directory / "log"

    def start(self, export: str | None) -> tuple[Start, "subprocess.Popen[bytes]"]:
        """Start the daemon and time it; `export` is read from, or else the first volume that the API lists."""
        arguments = ["--device", str(self.device), "--http", "127.0.0.1:0", "--nbd", "127.0.0.1:0"]
        with self._log.open("ab") as log:
            began = time.monotonic()
            process = subprocess.Popen(
                blockvirt(self.state, "serve", *arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
            )
        while not answers_ready(self.state / "http.sock"):
            if process.poll() is not None or time.monotonic() - began > START_DEADLINE_S:
                process.kill()
                process.wait()
                raise SystemExit(f"the daemon did not start: {self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(POLL_S)
        ready_s = time.monotonic() - began
        asyncio.run(self.read_a_byte(export or self.volumes(1)[0]))
        return Start(ready_s, time.monotonic() - began, resident_bytes(process.pid)), process

    async def kill_at_work(self, process: "subprocess.Popen[bytes]") -> None:
        """SIGKILL the daemon while open sessions hold much to recover: trims and writes, none of them flushed."""
        async with AsyncExitStack() as sessions:
            for name in self.volumes(BUSY_VOLUMES):
                client = await NbdClient.connect_unix(str(self.state / "nbd.sock"))
                sessions.push_async_callback(client.close)
                await client.go(name)
                await client.trim(0, client.size_bytes)  # every volume is mapped from end to end
                for offset in range(0, client.size_bytes, CHUNK_BYTES):
                    await client.write(offset, b"\1" * BLOCK_BYTES)
            process.kill()
            process.wait()

    async def read_a_byte(self, export: str) -> None:
        """One byte over NBD; raises NbdClientError."""
        async with await NbdClient.connect_unix(str(self.state / "nbd.sock")) as client:
            await client.go(export)
            if len(await client.read(0, 1)) != 1:
                raise NbdClientError(f"{export} gave no byte")

    def volumes(self, limit: int) -> list[str]:
        """The names of the first volumes in the API's list."""
        connection = http.client.HTTPConnection("localhost", timeout=START_DEADLINE_S)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.state / "http.sock"))
            connection.sock = client
            connection.request("GET", f"/v1/volumes?limit={limit}")
            return [str(volume["name"]) for volume in json.loads(connection.getresponse().read())["volumes"]]


def main() -> int:
    """Write the pool, start the daemon over it some times, print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--volumes", type=int, default=10_000)
    parser.add_argument("--chunks", type=int, default=1_000_000, help="mapped, over all volumes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where all files go (default: XFS on a loop file when root)")
    options = parser.parse_args()
    with ground(options.dir) as directory:
        pool = Pool(directory)
        began = time.monotonic()
        asyncio.run(fixtures.write_mapped_pool(pool.state, pool.device, options.volumes, options.chunks))
        print(f"pool written in {time.monotonic() - began:.1f} s", file=sys.stderr)
        first, process = pool.start(None)  # warms the page cache and says which volume there is; not counted
        export = pool.volumes(1)[0]
        print(f"first start {first.ready_s:.2f} s", file=sys.stderr)
        clean, killed = [], []
        for _ in range(options.rounds):
            end(process)
            start, process = pool.start(export)
            clean.append(start)
            asyncio.run(pool.kill_at_work(process))
            start, process = pool.start(export)
            killed.append(start)
        end(process)
        print(
            f"## Start with {options.volumes:,} volumes and {options.chunks:,} mapped chunks\n\n{machine(directory)}\n"
        )
        print("| start | to /readyz 200, s | to the first byte, s | resident, MiB |\n|---|---:|---:|---:|")
        for title, starts in (("after SIGTERM", clean), ("after SIGKILL", killed)):
            ready_s, byte_s = (
                statistics.median(values)
                for values in zip(*((start.ready_s, start.first_byte_s) for start in starts), strict=True)
            )
            idle_mib = statistics.median(start.idle_bytes for start in starts) / 2**20
            print(f"| {title} | {ready_s:.2f} | {byte_s:.2f} | {idle_mib:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
