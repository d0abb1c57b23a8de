"""Our daemon with its pool in a directory of its own, stopped and started as the parts need it."""

import time
from collections.abc import Callable
from typing import Any

from benchmarks.measure import cpu_seconds
from benchmarks.processes import answers_ready, blockvirt, end
from benchmarks.servers import Blockvirt, Volume
from blockvirt.cli.client import Client

QUIET_WINDOW_S = 0.5
QUIET_RATIO = 0.04  # of a processor: less is timers and the like
QUIET_DEADLINE_S = 90.0
JOB_WAIT_S = 60.0
IDS_PER_REQUEST = 1_000  # 40 KiB, of the 64 KiB that a body may have


class Daemon(Blockvirt):
    """Like the server of the other benchmarks, with its HTTP API at hand; its pool may be there already."""

    def start(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.state, self.device = self.directory / "state", self.directory / "device"
        self.device.mkdir(exist_ok=True)
        arguments = ["--device", str(self.device), "--http", "127.0.0.1:0", "--nbd", "127.0.0.1:0"]
        self._process = self.spawn(
            blockvirt(self.state, "serve", *arguments), lambda: answers_ready(self.state / "http.sock")
        )
        self.client = Client(str(self.state))
        self._running.callback(end, self._process)
        self._running.callback(self.client.close)

    @property
    def pid(self) -> int:
        """Of the daemon that runs now."""
        return self._process.pid

    def served(self, volume: str) -> Volume:
        """One of its volumes, for fio."""
        return Volume(f"nbd+unix:///{volume}?socket={self.state / 'nbd.sock'}", self.pid)

    def create(self, volume: str, size_bytes: int) -> None:
        """Make an empty volume."""
        self.client.call("POST", "/v1/volumes", {"name": volume, "size": size_bytes})

    def snapshot(self, volume: str, name: str | None = None) -> dict[str, Any]:
        """Take a snapshot."""
        return self.client.call("POST", "/v1/snapshots", {"volume": volume} | ({"name": name} if name else {}))

    def snapshots(self, volume: str) -> int:
        """How many snapshots a volume has."""
        return len(list(self.client.pages("/v1/snapshots", "snapshots", {"volume": volume})))

    def schedule(self, volume: str, name: str, keep: int) -> None:
        """Have a snapshot taken each minute, and so many of these kept."""
        body = {"name": name, "volume": volume, "cron": "* * * * *", "keep": {"last": keep}}
        self.client.call("POST", "/v1/schedules", body)

    def delete(self, snapshot: str) -> dict[str, Any]:
        """Delete a snapshot; its space comes back in the background."""
        return self.client.call("DELETE", f"/v1/snapshots/{snapshot}")

    def finish(self, deletion: dict[str, Any]) -> None:
        """Return when the jobs of a deletion are over."""
        for job in deletion["job_ids"]:
            while self.client.call("GET", f"/v1/jobs/{job}", query={"wait_s": JOB_WAIT_S})["state"] != "done":
                pass

    def checkpoint(self, volume: str) -> None:
        """Bring what was written to a volume into its map: from then on what deletions free is exact."""
        self.client.call("GET", f"/v1/volumes/{volume}/changes", query={"limit": 1})

    def clear(self, volume: str) -> None:
        """Delete all snapshots of a volume, and wait until they are gone."""
        found = self.client.pages("/v1/snapshots", "snapshots", {"volume": volume})
        self.delete_all([snapshot["id"] for snapshot in found])

    def delete_all(self, snapshots: list[str]) -> None:
        """Delete snapshots by their ids, and wait until they are gone."""
        for start in range(0, len(snapshots), IDS_PER_REQUEST):
            ids = snapshots[start : start + IDS_PER_REQUEST]
            self.finish(self.client.call("POST", "/v1/snapshots/delete", {"snapshots": ids}))

    def trust_sparse_files(self) -> None:
        """Let volumes be made although records over sparse files say that the pool is nearly full."""
        self.client.call("PATCH", "/v1/pool", {"near_ratio": 1, "brake_ratio": 1, "overcommit_ratio": 1000})

    def settle(self) -> bool:
        """Return when the background (checksums, reclaim, punches) has come to rest; False: it did not in time."""
        return wait_until(self._rests, QUIET_DEADLINE_S)

    def _rests(self) -> bool:
        before_s = cpu_seconds(self.pid)
        time.sleep(QUIET_WINDOW_S)
        return cpu_seconds(self.pid) - before_s < QUIET_RATIO * QUIET_WINDOW_S


def wait_until(reached: Callable[[], bool], deadline_s: float, poll_s: float = 0.005) -> bool:
    """Ask again and again; False where it was not so within the deadline."""
    limit = time.monotonic() + deadline_s
    while not reached():
        if time.monotonic() > limit:
            return False
        time.sleep(poll_s)
    return True
