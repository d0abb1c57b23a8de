"""What the server counts, in plain integers. Pure; ``metrics`` and the session list read it."""

from bisect import bisect_left
from dataclasses import dataclass, field

from blockvirt.nbd.constants import COMMAND_NAMES

LATENCY_BOUNDS_S = (50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 5.0)
"""Upper bounds of the histogram's buckets; one more bucket follows for what is slower."""

COMMANDS = len(COMMAND_NAMES)


@dataclass(slots=True)
class Histogram:
    """Latencies of one command. ``counts`` are per bucket, not cumulative."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    sum_s: float = 0.0

    @property
    def count(self) -> int:
        """How many were observed."""
        return sum(self.counts)

    def copy(self) -> "Histogram":
        """Return a snapshot."""
        return Histogram(list(self.counts), self.sum_s)

    def observe(self, duration_s: float, times: int = 1) -> None:
        """Count ``times`` requests that took ``duration_s`` each."""
        self.counts[bisect_left(LATENCY_BOUNDS_S, duration_s)] += times
        self.sum_s += duration_s * times


@dataclass(slots=True)
class Traffic:
    """Requests (by command number) and payload bytes of one session, one export, or all of them."""

    requests: list[int] = field(default_factory=lambda: [0] * COMMANDS)
    bytes_read: int = 0
    bytes_written: int = 0

    def copy(self) -> "Traffic":
        """Return a snapshot."""
        return Traffic(list(self.requests), self.bytes_read, self.bytes_written)

    def add(self, other: "Traffic") -> None:
        """Add what another has counted."""
        self.requests = [one + more for one, more in zip(self.requests, other.requests, strict=True)]
        self.bytes_read += other.bytes_read
        self.bytes_written += other.bytes_written


@dataclass(slots=True)
class ServerStats:
    """Everything the server counts since it started; ``exports`` only knows exports with an open session."""

    exports: dict[str, Traffic] = field(default_factory=dict)
    total: Traffic = field(default_factory=Traffic)
    errors: dict[int, int] = field(default_factory=dict)
    """Error replies by errno, before the mapping to what NBD knows."""
    latency: list[Histogram] = field(default_factory=lambda: [Histogram() for _ in range(COMMANDS)])
    """By command number. Requests answered on the spot share the duration of their batch."""
    connections: int = 0
    sessions: int = 0
    in_flight: int = 0
    """Slow requests that have started and are not answered."""
    in_flight_bytes: int = 0
    accepted_total: int = 0
    refused_total: int = 0
    handshakes_failed_total: int = 0
    stalled_clients_dropped_total: int = 0

    def error(self, code: int) -> None:
        """Count an error reply."""
        self.errors[code] = self.errors.get(code, 0) + 1
