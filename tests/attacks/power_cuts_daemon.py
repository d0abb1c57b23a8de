"""A real daemon that is started, killed and started again in a few milliseconds, driven over NBD and HTTP."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

from blockvirt.nbd import constants as c
from blockvirt.nbd.client import NbdClient
from tests.attacks.power_cuts_load import Kind, Request, Volume
from tests.attacks.power_cuts_model import SECTOR_BYTES

ROOT = Path(__file__).resolve().parents[2]
READY_S = 30.0
_LOOK_S = 0.5  # between two looks whether the daemon still lives while it starts
_STOPPED_S = 10.0  # until the last system call of a stopped daemon has ended
_COMMANDS = {Kind.WRITE: c.CMD_WRITE, Kind.ZERO: c.CMD_WRITE_ZEROES, Kind.ALLOCATE: c.CMD_WRITE_ZEROES}
_COMMANDS |= {Kind.TRIM: c.CMD_TRIM, Kind.FLUSH: c.CMD_FLUSH}


class DaemonFailed(Exception):
    """The daemon did not start, or refused what it should do; carries its log."""


class Zygote:
    """The process that daemons are forked from: it has imported everything, and the planted bug is in it."""

    def __init__(self, planted: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.attacks.power_cuts_zygote", planted],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def fork(self, log: Path, environment: dict[str, str], arguments: list[str]) -> int:
        """Start a child; returns its process id. The child before it must have been reaped."""
        assert self._process.stdin is not None
        print(json.dumps([str(log), environment, arguments]), file=self._process.stdin, flush=True)
        return self._number()

    def reap(self) -> int:
        """Wait for the end of the child; returns its exit code, negative for a signal."""
        return self._number()

    def _number(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise DaemonFailed("the process that daemons are forked from has ended")
        return int(line)

    def close(self) -> None:
        """End it. No child may be left."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class DaemonPool:
    """A daemon over one pool; ``power_cuts_load.Pool``."""

    def __init__(self, zygote: Zygote, state_dir: Path, device: Path, log: Path, chunk_bytes: int) -> None:
        self._zygote = zygote
        self._state_dir = state_dir
        self._device = device
        self._log = log
        self._environment = {
            "BLOCKVIRT_CHUNK_SIZE": f"{chunk_bytes}B",
            "BLOCKVIRT_METADATA_RESERVE": "1MiB",
            "BLOCKVIRT_HTTP": "none",
            "BLOCKVIRT_NBD": "none",
        }
        self._pid = 0
        self._http: aiohttp.ClientSession | None = None

    # --- its life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the daemon and wait until it says that it serves."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
            notified.setblocking(False)
            notified.bind("")  # Linux picks an abstract name
            name = "@" + notified.getsockname()[1:].decode()
            self._log.unlink(missing_ok=True)
            environment = self._environment | {"NOTIFY_SOCKET": name}
            self._pid = self._zygote.fork(
                self._log, environment, ["-s", str(self._state_dir), "serve", "--device", str(self._device)]
            )
            try:
                async with asyncio.timeout(READY_S):
                    await self._ready(notified)
            except TimeoutError:
                raise DaemonFailed(f"the daemon is not ready after {READY_S:.0f} s\n{self.log()}") from None
        connector = aiohttp.UnixConnector(str(self._state_dir / "http.sock"))
        self._http = aiohttp.ClientSession("http://localhost", connector=connector)

    async def _ready(self, notified: socket.socket) -> None:
        word = asyncio.create_task(asyncio.get_running_loop().sock_recv(notified, 4096))
        while not (await asyncio.wait({word}, timeout=_LOOK_S))[0]:
            try:
                os.kill(self._pid, 0)
            except ProcessLookupError:
                word.cancel()
                raise DaemonFailed(f"the daemon ended before it was ready\n{self.log()}") from None
        assert b"READY=1" in word.result()

    def kill(self) -> None:
        """End it with SIGKILL, if it runs."""
        if self._pid:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._pid = 0
            self._zygote.reap()

    @contextmanager
    def between_system_calls(self) -> Iterator[None]:
        """Hold the daemon still, none of its threads inside the kernel; then it goes on.

        A sync that is running while a filesystem is shut down may say that it succeeded, and its data is lost: ext4 and
        XFS drop the extents that it wrote to, and report no error. No power cut is survived by who would be told so.
        """
        os.kill(self._pid, signal.SIGSTOP)
        deadline_s = time.monotonic() + _STOPPED_S
        while not all(_is_stopped(task) for task in Path(f"/proc/{self._pid}/task").iterdir()):
            if time.monotonic() > deadline_s:
                raise DaemonFailed(f"the daemon cannot be stopped\n{self.log()}")
        try:
            yield
        finally:
            os.kill(self._pid, signal.SIGCONT)

    async def stop(self) -> None:
        """End it as systemd does; raises DaemonFailed where that fails."""
        pid, self._pid = self._pid, 0
        os.kill(pid, signal.SIGTERM)
        code = await asyncio.to_thread(self._zygote.reap)
        await self.forget()
        if code:
            raise DaemonFailed(f"the daemon ended with code {code}\n{self.log()}")

    async def forget(self) -> None:
        """Drop the HTTP connections."""
        if self._http is not None:
            await self._http.close()
            self._http = None

    def log(self) -> str:
        """What it said."""
        return self._log.read_text(errors="replace")[-4000:] if self._log.exists() else "(no log)"

    # --- power_cuts_load.Pool --------------------------------------------------------------------------------------

    async def _call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        assert self._http is not None
        async with self._http.request(method, path, json=body) as answer:
            text = await answer.text()
            if answer.status >= 300:
                raise DaemonFailed(f"{method} {path}: {answer.status} {text}\n{self.log()}")
            found: dict[str, Any] = json.loads(text)
            return found

    async def create(self, volume: str, size_bytes: int) -> None:
        """See Pool."""
        await self._call("POST", "/v1/volumes", {"name": volume, "size": size_bytes})

    async def clone(self, snapshot: str, volume: str) -> None:
        """See Pool."""
        await self._call("POST", f"/v1/snapshots/{snapshot}/clone", {"name": volume})

    async def delete(self, volume: str) -> None:
        """See Pool."""
        await self._call("DELETE", f"/v1/volumes/{volume}?purge=true&force=true")

    async def snapshot(self, volume: str, name: str) -> None:
        """See Pool."""
        await self._call("POST", "/v1/snapshots", {"volume": volume, "name": name})

    async def delete_snapshot(self, snapshot: str) -> None:
        """See Pool."""
        await self._call("DELETE", f"/v1/snapshots/{snapshot}?force=true")

    async def open(self, volume: str) -> Volume:
        """See Pool."""
        return NbdVolume(await self._client(volume))

    async def read(self, export: str) -> bytes:
        """See Pool."""
        async with await self._client(export) as client:
            step = 1 << 20
            size = client.size_bytes
            return b"".join([await client.read(at, min(step, size - at)) for at in range(0, size, step)])

    async def names(self) -> tuple[list[str], list[str]]:
        """See Pool."""
        volumes = await self._call("GET", "/v1/volumes?limit=1000")
        snapshots = await self._call("GET", "/v1/snapshots?limit=1000")
        return (
            [each["name"] for each in volumes["volumes"]],
            [f"{each['volume']}@{each['name']}" for each in snapshots["snapshots"]],
        )

    async def _client(self, export: str) -> NbdClient:
        client = await NbdClient.connect_unix(str(self._state_dir / "nbd.sock"))
        try:
            await client.go(export)
        except BaseException:
            await client.close()
            raise
        return client


def _is_stopped(task: Path) -> bool:
    """Tell whether a thread is stopped; proc(5), /proc/pid/stat: the state follows the name, which is in brackets."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return True  # it ended


class NbdVolume:
    """A connection to a volume; ``power_cuts_load.Volume``."""

    def __init__(self, client: NbdClient) -> None:
        self._client = client

    async def send(self, request: Request, data: bytes) -> None:
        """See Volume. A checkpoint cannot be asked for over NBD."""
        if request.kind is Kind.CHECKPOINT:
            return
        flags = c.CMD_FLAG_FUA if request.fua else 0
        if request.kind is Kind.ALLOCATE:
            flags |= c.CMD_FLAG_NO_HOLE
        offset, length = request.first * SECTOR_BYTES, request.count * SECTOR_BYTES
        reply = await self._client.start(_COMMANDS[request.kind], offset, length, data, flags)
        if reply.error:
            raise DaemonFailed(f"{request}: NBD error {reply.error} {reply.text}")

    async def close(self) -> None:
        """See Volume."""
        await self._client.disconnect()
