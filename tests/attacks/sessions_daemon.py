"""The daemon of the attack "sessions", and what it holds while nobody is connected."""

import json
import re
import secrets
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from blockvirt.units import MIB
from tests.attacks.planted.bugs import command
from tests.attacks.sessions_script import SNAPSHOTS, VICTIM, VICTIM_BYTES
from tests.real.daemon import Daemon

CANARY_BYTES = 1 << 20
REST_S = 20.0
"""For what closed connections left under way: trims and syncs on a disk that others use, too."""
_WITNESS_S = 20.0
_POLL_S = 0.01
_GAUGES = ("connections", "sessions", "inflight_requests", "inflight_bytes")
_KEPT_BUFFERS = 51  # of the pool, which keeps some of each size: they are counted as memory
_MORE_BLOCKS = 5_000
"""Of Python's memory: a map and its journal come and go, and so do caches of names; less than one for a session."""
_MORE_ANON_BYTES = 64 * MIB
"""54 MiB of buffers that the pool keeps for ten seconds, and the holes that large replies leave in the heap."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a daemon holds."""

    gauges: dict[str, int]
    descriptors: int
    tasks: int
    alive: dict[str, int]
    """Objects of ``blockvirt.nbd``, by type."""
    blocks: int
    anon_bytes: int

    def more_than(self, rested: "Standing") -> str:
        """Say what there is more of than in a daemon at rest; nothing: it is as flat as it must be."""
        counts = {**self.gauges, "descriptors": self.descriptors, "tasks": self.tasks, **self.alive}
        allowed = {**rested.gauges, "descriptors": rested.descriptors, "tasks": rested.tasks, **rested.alive}
        allowed["Buffer"] = _KEPT_BUFFERS
        found = [
            f"{name}: {count}, not {allowed.get(name, 0)}"
            for name, count in counts.items()
            if count > allowed.get(name, 0)
        ]
        if self.blocks > rested.blocks + _MORE_BLOCKS:
            found.append(f"blocks of memory: {self.blocks:,} > {rested.blocks:,} + {_MORE_BLOCKS:,}")
        if self.anon_bytes > rested.anon_bytes + _MORE_ANON_BYTES:
            found.append(
                f"memory: {self.anon_bytes >> 20} MiB > {rested.anon_bytes >> 20} MiB + {_MORE_ANON_BYTES >> 20}"
            )
        return ", ".join(found)

    @property
    def is_idle(self) -> bool:
        """Whether nobody is connected, and nothing of anybody under way."""
        last_active = 1  # whose turn it was last is known (Activity.last)
        return not any(self.gauges.values()) and self.alive.get("Session", 0) <= last_active


class FuzzedDaemon(Daemon):
    """A daemon with a volume to be hurt, two snapshots of it, and a canary; with a witness inside."""

    def __init__(self, planted: str) -> None:
        super().__init__()
        self._planted = planted
        self._witness = self.root / "witness"
        self._looked_at = 0
        self.canary = f"canary-{secrets.token_hex(16)}"

    def environment(self) -> dict[str, str]:
        """The daemon's own; little metadata space is kept back."""
        return super().environment() | {"BLOCKVIRT_METADATA_RESERVE": "1MiB"}

    def _blockvirt(self, *arguments: str) -> list[str]:
        return [*command(self._planted), "-s", str(self.state), *arguments]

    def command(self) -> list[str]:
        """`blockvirt serve`, with the witness."""
        rest = super().command()[len(command(self._planted)) :]
        return [sys.executable, "-m", "tests.attacks.sessions_witness", str(self._witness), self._planted or "-", *rest]

    def populate(self) -> None:
        """Make the volumes and snapshots."""
        for name, size_bytes in ((VICTIM, VICTIM_BYTES), (self.canary, CANARY_BYTES)):
            self._post("/v1/volumes", {"name": name, "size": size_bytes})
        for snapshot in SNAPSHOTS:
            self._post("/v1/snapshots", {"volume": VICTIM, "name": snapshot.partition("@")[2]})

    def _post(self, path: str, body: object) -> None:
        status, content = self.http("POST", path, body)
        assert status == 201, content

    def tcp_address(self) -> tuple[str, int]:
        """Where it serves NBD over TCP."""
        found = re.search(r"nbd://127\.0\.0\.1:(\d+)/", self.http("GET", f"/v1/volumes/{VICTIM}")[1].decode())
        assert found is not None
        return "127.0.0.1", int(found[1])

    def standing(self) -> Standing:
        """Return what it holds now."""
        text = self.http("GET", "/metrics")[1].decode()
        gauges = {
            name: int(float(re.findall(rf"^blockvirt_nbd_{name} (.+)$", text, re.MULTILINE)[0])) for name in _GAUGES
        }
        with socket.socket(socket.AF_UNIX) as witness:
            witness.settimeout(_WITNESS_S)
            witness.connect(str(self._witness))
            seen = json.loads(witness.makefile("rb").read())
        process = Path("/proc") / str(self.pid)
        anon = re.findall(r"^RssAnon:\s+(\d+) kB$", (process / "status").read_text(), re.MULTILINE)
        descriptors = len(list((process / "fd").iterdir()))
        return Standing(gauges, descriptors, seen["tasks"], seen["alive"], seen["blocks"], int(anon[0]) << 10)

    def await_rest(self, rested: Standing, within_s: float) -> str:
        """Wait until it holds no more than at rest; returns what it still holds after a while."""
        end_s = time.monotonic() + within_s
        while broken := self.standing().more_than(rested):
            if time.monotonic() > end_s:
                return broken
            time.sleep(_POLL_S)
        return ""

    def rested(self) -> Standing:
        """Wait until nothing is under way and return what it holds then; raises ServerFailed."""
        self.until(lambda: self.standing().is_idle, "the daemon does not come to rest", REST_S)
        return self.standing()

    def answered(self) -> dict[str, int]:
        """Return how much it did for its clients, by what it was."""
        text = self.http("GET", "/metrics")[1].decode()
        wanted = {
            "requests answered": "requests_total",
            "errors": "errors_total",
            "handshakes failed": "handshakes_failed_total",
        }
        return {
            figure: int(sum(map(float, re.findall(rf"^blockvirt_nbd_{name}(?:{{.*}})? (.+)$", text, re.MULTILINE))))
            for figure, name in wanted.items()
        }

    def new_faults(self) -> str:
        """Return the first mistake of its own that it has logged since this was last asked, or nothing."""
        log = self.log_of_this_start()
        new, self._looked_at = log[self._looked_at :], len(log)
        found = re.search(r"^(.* (?:ERROR|CRITICAL) .*|Traceback .*)(?:\n.*){,40}", new, re.MULTILINE)
        return found[0] if found is not None else ""
