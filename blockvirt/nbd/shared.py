"""What the sessions of one server share, and the bounds that each of them keeps."""

from dataclasses import dataclass, field

from blockvirt.limits import (
    NBD_BATCH_REQUESTS,
    NBD_BATCH_S,
    NBD_CONNECTION_BUDGET_BYTES,
    NBD_GLOBAL_BUDGET_BYTES,
    NBD_MAX_INFLIGHT_REQUESTS,
    NBD_SLOW_READER_S,
)
from blockvirt.nbd.budget import Budget
from blockvirt.nbd.buffers import BufferPool
from blockvirt.nbd.stats import ServerStats
from blockvirt.nbd.turns import Turns

SPINS = 40
"""Empty looks at the socket before a session rests, about 40 us: a client at queue depth 1 is back by then."""


@dataclass(slots=True)
class SessionLimits:
    """The bounds of each session; see ``blockvirt.limits`` for the reasons."""

    connection_budget_bytes: int = NBD_CONNECTION_BUDGET_BYTES
    inflight_requests: int = NBD_MAX_INFLIGHT_REQUESTS
    slow_reader_s: float = NBD_SLOW_READER_S
    batch_requests: int = NBD_BATCH_REQUESTS
    batch_s: float = NBD_BATCH_S
    spins: int = SPINS


@dataclass(slots=True)
class SharedResources:
    """What the sessions of one server share."""

    pool: BufferPool = field(default_factory=BufferPool)
    budget: Budget = field(default_factory=lambda: Budget(NBD_GLOBAL_BUDGET_BYTES))
    stats: ServerStats = field(default_factory=ServerStats)
    turns: Turns = field(default_factory=Turns)
    limits: SessionLimits = field(default_factory=SessionLimits)
