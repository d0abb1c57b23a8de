"""Requests for the attack "api": made from the daemon's own OpenAPI document, then aimed at what is there."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import hypothesis
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode

VOLUMES = ("v0", "v1", "v2")
SNAPSHOTS = ("s0", "s1")
THERE: dict[str, Sequence[Any]] = {
    "volume": (*VOLUMES, "v9"),
    "snapshot": tuple(f"{volume}@{snapshot}" for volume in VOLUMES for snapshot in SNAPSHOTS),
    "since": ("s0", "v0@s0", "v1@s1"),
    "host": ("h0", "h1"),
    "schedule": ("c0", "c1"),
    "device": ("disk1", "disk2"),
    "lun": ("lun0", "lun1"),
    "number": (0, 1),
    "tag": ("t0",),
    "name": ("v2", "v9", "s1", "c1", "h1"),
    "safety_name": ("s7", "s8"),
    "cron": ("0 3 * * *", "*/7 1-5 * JAN *"),
    "size": ("4MiB", 1 << 20, "17B", "1PiB"),
    "kind": ("reclaim",),
    "label": (["a=b"], ["a"]),
    "volumes": (["v0"], ["v0", "v1"]),
    "snapshots": (["v0@s0"], ["v1@s0", "v1@s1"]),
    "labels": ({"a": "b"}, {}),
    "keep": ({"last": 2}, {"daily": 1}),
}
"""What a field of a name may hold, so that a request meets something."""
_WAIT_S = "0.05"
_PATH_CHARS = 60


def cases_of(operation: Any, seed: int, count: int) -> list[Case[Any]]:
    """Return so many requests of an operation; half of all seeds give such as do not fit the document."""
    wanted = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    random.Random(seed).shuffle(wanted)
    for mode in wanted:
        found = _generated(operation, mode, seed, count)
        if found:  # where nothing is taken, nothing can be wrong: then such as fit
            return [found[number % len(found)] for number in range(count)]
    raise AssertionError(f"no request of {operation.label} can be made")


def _generated(operation: Any, mode: GenerationMode, seed: int, count: int) -> list[Case[Any]]:
    found: list[Case[Any]] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(operation.as_strategy(mode))
    def collect(case: Case[Any]) -> None:
        found.append(case)

    try:
        collect()
    except Unsatisfiable:
        return []
    return found


def aim(case: Case[Any], dice: random.Random, jobs: Sequence[str], folder: Path) -> None:
    """Have a request name what is there, most of the time; keep it from the rest of the machine, and short."""
    there: dict[str, Sequence[Any]] = {**THERE, "job": tuple(jobs) or ("none",)}
    body: Any = case.body
    parts: list[tuple[Any, float]] = [(case.path_parameters, 0.8), (case.query, 0.5), (body, 0.6)]
    for fields, share in parts:
        if isinstance(fields, dict):
            for name in sorted(fields.keys() & there.keys()):
                if dice.random() < share:
                    fields[name] = dice.choice(there[name])
    if isinstance(case.query, dict) and "wait_s" in case.query and _is_number(case.query["wait_s"]):
        case.query["wait_s"] = _WAIT_S  # a request that waits for a job takes up to a minute: no more of these
    path = body.get("path") if isinstance(body, dict) else None
    if isinstance(path, str):
        # A device may be any directory that the daemon can write to: here only such as belong to the attack.
        inside = folder / (
            dice.choice(("disk2", "disk3")) if dice.random() < 0.5 else "at-" + quote(path, safe="")[:_PATH_CHARS]
        )
        body["path"] = str(inside)


def _is_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return True
