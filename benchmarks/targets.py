"""What the report has to show: every target as data, and whether what was measured meets it. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from benchmarks.jobs import Role

SATURATED_CORES = 0.95  # from so much of a core on fio itself is what limits the rate


class Kind(StrEnum):
    """What is compared, always as our figure over the peer's."""

    RATE = "rate"
    CPU = "CPU per request"
    P99 = "p99"
    TIME = "time"  # of one request at queue depth 1


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a ratio: at least, for a rate; at most, for everything else."""

    cell: str
    peer: Role
    kind: Kind
    bound: float
    stretch: float | None = None
    """The bound that would be better still."""
    cpu_bound: float | None = None
    """Where fio's own core is saturated, CPU per request in this ratio will do as well."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians of one server, or the best of several; None: not measured."""

    rate: float | None = None
    cpu_us: float | None = None
    p99_us: float | None = None
    client_cores: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a target; None: one of the two sides was not measured."""

    target: Target
    ratio: float | None
    met: bool | None
    met_stretch: bool | None = None
    """None also where there is none."""
    cpu_ratio: float | None = None
    """Given where it could stand in for the rate."""
    client_cores: float | None = None
    """fio's, in our runs; given beside `cpu_ratio`."""


def best(servers: Sequence[Figures]) -> Figures:
    """The best of each figure, whichever server it is of."""
    return Figures(
        rate=max(_known(each.rate for each in servers), default=None),
        cpu_us=min(_known(each.cpu_us for each in servers), default=None),
        p99_us=min(_known(each.p99_us for each in servers), default=None),
        client_cores=max(_known(each.client_cores for each in servers), default=None),
    )


def judge(target: Target, ours: Figures, peer: Figures) -> Verdict:
    """Compare our figures of the target's cell with the peer's."""
    ratio = ratio_of(target.kind, ours, peer)
    if ratio is None:
        return Verdict(target, None, None)
    met = _within(target.kind, ratio, target.bound)
    met_stretch = None if target.stretch is None else _within(target.kind, ratio, target.stretch)
    if target.cpu_bound is None:
        return Verdict(target, ratio, met, met_stretch)
    cpu_ratio = ratio_of(Kind.CPU, ours, peer)
    saturated = ours.client_cores is not None and ours.client_cores >= SATURATED_CORES
    if saturated and cpu_ratio is not None:
        met = met or _within(Kind.CPU, cpu_ratio, target.cpu_bound)
    return Verdict(target, ratio, met, met_stretch, cpu_ratio, ours.client_cores)


def ratio_of(kind: Kind, ours: Figures, peer: Figures) -> float | None:
    """Our figure over the peer's; None where one is missing, or the peer's is too small to be measured."""
    if kind is Kind.RATE:
        return _divided(ours.rate, peer.rate)
    if kind is Kind.CPU:
        return _divided(ours.cpu_us, peer.cpu_us)
    if kind is Kind.P99:
        return _divided(ours.p99_us, peer.p99_us)
    return _divided(peer.rate, ours.rate)


def _within(kind: Kind, ratio: float, bound: float) -> bool:
    return ratio >= bound if kind is Kind.RATE else ratio <= bound


def _divided(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _rates(cells: Sequence[str], qcow2: float, plain: float | None) -> list[Target]:
    targets = []
    for cell in cells:
        targets.append(Target(cell, Role.QCOW2, Kind.RATE, qcow2))
        if plain is not None:
            targets.append(Target(cell, Role.PLAIN, Kind.RATE, plain))
    return targets


def _saturating(cell: str) -> list[Target]:
    return [
        Target(cell, Role.QCOW2, Kind.RATE, 2.0, cpu_bound=0.55),
        Target(cell, Role.PLAIN, Kind.RATE, 1.2, cpu_bound=0.85),
        Target(cell, Role.FLOOR, Kind.CPU, 1.7),
    ]


def _bare(cell: str) -> Target:
    return Target(cell, Role.BARE, Kind.TIME, 1.15)


TARGETS: tuple[Target, ...] = (
    *_saturating("read-32"),
    *_saturating("write-32"),
    *_rates(["write-fresh-32"], 2.0, 1.0),
    *_rates(["write-snapshot-32"], 2.0, None),
    *_rates(["read-1"], 1.7, 1.5),
    Target("read-1", Role.QCOW2, Kind.P99, 1.0),
    *_rates(["write-1"], 1.7, 1.5),
    Target("write-1", Role.QCOW2, Kind.P99, 1.0),
    Target("seq-read", Role.QCOW2, Kind.RATE, 2.0),
    Target("seq-read", Role.PLAIN, Kind.RATE, 0.9, stretch=1.0),
    Target("seq-read", Role.FLOOR, Kind.RATE, 0.6),
    *_rates(["seq-again"], 2.0, 1.0),
    Target("seq-again", Role.FLOOR, Kind.RATE, 0.6),
    *_rates(["seq-fresh"], 2.0, 2.0),
    Target("seq-fresh", Role.FLOOR, Kind.RATE, 0.6),
    *_rates(["mixed-16k"], 2.0, 1.2),
    *_rates(["flush-1"], 1.0, 1.0),
    _bare("flush-1"),
    *_rates(["flush-fresh-1"], 2.0, 1.5),
    _bare("flush-fresh-1"),
    *_rates(["flush-16x1"], 1.5, 1.2),
    *_rates(["read-4x16", "write-4x16", "read-32x4", "write-32x4"], 2.0, 1.2),
    *_rates(["copy-out", "copy-in"], 1.5, 1.0),
)
