"""Choosing a device for a new backing file: the volume's policy first, then the most free space. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from blockvirt.errors import PoolFull
from blockvirt.units import format_size


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device as placement sees it."""

    id: str
    name: str
    free_bytes: int
    """What may still be allocated on it, limits and reserves applied."""
    labels: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""
    """Why it cannot be used at all; empty when it can."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Where a volume's data may lie."""

    devices: tuple[str, ...] = ()
    """Names of the devices allowed; empty: any."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """All of these must be among the device's labels."""


def choose(candidates: Sequence[Candidate], policy: Policy, needed_bytes: int) -> Candidate:
    """Return the allowed device with the most free space; raises PoolFull that says of each why it does not fit.

    ``needed_bytes`` is the least that has to be allocated there now. Equal devices are taken in order of name.
    """
    refusals = {candidate.name: why_not(candidate, policy, needed_bytes) for candidate in candidates}
    fitting = [candidate for candidate in candidates if not refusals[candidate.name]]
    if fitting:
        return min(fitting, key=lambda candidate: (-candidate.free_bytes, candidate.name))
    refusals |= {name: "is no device of this pool" for name in policy.devices if name not in refusals}
    reasons = "; ".join(f"{name} {why}" for name, why in sorted(refusals.items()))
    raise PoolFull(
        f"no device can take {format_size(needed_bytes)} of new data",
        cause=reasons or "the pool has no device",
        correction="add a device, free space, or widen the volume's placement",
        needed_bytes=needed_bytes,
        devices=refusals,
    )


def why_not(candidate: Candidate, policy: Policy, needed_bytes: int) -> str:
    """Return why ``candidate`` cannot be chosen, as the rest of a sentence; nothing if it can."""
    if policy.devices and candidate.name not in policy.devices:
        return "is not among the devices of the volume's placement"
    lacking = [f"{key}={value}" for key, value in sorted(policy.labels.items()) if candidate.labels.get(key) != value]
    if lacking:
        return f"lacks the label {', '.join(lacking)} of the volume's placement"
    if candidate.problem:
        return f"cannot be used: {candidate.problem}"
    if candidate.free_bytes < needed_bytes:
        return f"has {format_size(max(0, candidate.free_bytes))} left"
    return ""
