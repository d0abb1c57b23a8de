"""Faults that only the kernel's side of a call can make: LMDB's own calls, and interruptions. By strace, in a child.

`python -m tests.attacks.faults_traced ROOT SEED ENDING [BUG]` is the child: it does the scenario on the pool in ROOT.
"""

import asyncio
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attacks.attack import Outcome
from tests.attacks.faults_attempts import BLOCKS, SIZE_BYTES
from tests.attacks.faults_hangs import heartbeat
from tests.attacks.faults_model import Blocks, Expected
from tests.attacks.faults_pool import SETTINGS, AttackedPool, quiet, unfinished, without_pauses
from tests.attacks.faults_scenario import Scenario
from tests.attacks.faults_sites import ALWAYS, INTERRUPTIONS, SHORT, Cell
from tests.attacks.faults_verdict import Verdict, judge
from tests.attacks.planted.bugs import bug_named

_CHILD_S = 60
_EXPECTED, _TRACE = "expected", "trace"
_PATHS = {
    "lmdb": "state/metadata/data.mdb",
    "lmdb-lock": "state/metadata/lock.mdb",
    "data-file": "disk1/files/00000001-0000001",
    "journal-file": "disk1/journal/00000001.0",
    "copy-file": "disk1/metadata/metadata.new",
    "copies-list": "state/metadata-copies.txt.new",
}
ROOM = Path(__file__).resolve().parents[2]


def traced_ending_of(seed: int) -> str:
    """Return how the child's life ends."""
    return random.Random(seed).choice(["close", "kill"])


def traced_trial(root: Path, cell: Cell, seed: int, outcome: Outcome, planted: str) -> list[str]:
    """Run one cell; returns what must not be."""
    ending = traced_ending_of(seed)
    with quiet(), pytest.MonkeyPatch.context() as patch:
        without_pauses(patch)
        asyncio.run(_prepare(root))
        died = _child(root, cell, seed, ending, planted)
        outcome.add("hit" if "(INJECTED)" in (root / _TRACE).read_text() else "not reached")
        if died:
            return [died]
        problems: list[str]
        problems, expected, refused, stops = pickle.loads((root / _EXPECTED).read_bytes())
        outcome.add("steps refused", refused)
        outcome.add("stops", stops)
        outcome.add("flushes", expected.flushes)
        problems += synced_again((root / _TRACE).read_text())
        if not problems:
            verdict = asyncio.run(_judge(root, expected))
            problems += verdict.problems
            outcome.add("blocks compared", verdict.blocks)
    return problems


async def _prepare(root: Path) -> None:
    pool = _pool(root)
    await pool.start()
    await pool.volume(SIZE_BYTES, "v")
    await pool.close()


async def _judge(root: Path, expected: Expected) -> Verdict:
    return await judge(_pool(root), expected, power_was_cut=False)


def _pool(root: Path) -> AttackedPool:
    pool = AttackedPool(root, SETTINGS)
    pool.device = root / "disk1"
    return pool


def _child(root: Path, cell: Cell, seed: int, ending: str, planted: str) -> str:
    what = "retval=512" if cell.fault == SHORT else f"error={cell.fault}"
    when = str(cell.nth)
    if cell.how == ALWAYS:
        when = f"{cell.nth}..{cell.nth + INTERRUPTIONS - 1}" if cell.fault == "EINTR" else f"{cell.nth}+"
    call = cell.site.call
    strace = [
        "strace",
        "-f",
        "--seccomp-bpf",
        "-qq",
        "-o",
        str(root / _TRACE),
        "-P",
        str(root / _PATHS[cell.site.files]),
    ]
    strace += ["-e", f"trace={call},openat", "-e", f"inject={call}:{what}:when={when}"]
    child = [sys.executable, "-m", "tests.attacks.faults_traced", str(root), str(seed), ending, planted]
    try:
        done = subprocess.run(
            [*strace, *child], cwd=ROOM, capture_output=True, text=True, timeout=_CHILD_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"the daemon did not end within {_CHILD_S} s"
    if done.returncode:
        return f"the daemon died with code {done.returncode}: {done.stderr[-500:]}"
    return ""


def synced_again(trace: str) -> list[str]:
    """Return which descriptors were synced again after a sync of theirs had failed; one that is opened anew is another.

    Interruptions say nothing of the disk. Nor does ENOSPC to LMDB, which the store cannot tell from a write without
    room: what was to be committed is gone then, and the next transaction writes its pages itself.
    """
    failed: set[str] = set()
    begun: dict[str, str] = {}
    found = []
    for line in trace.splitlines():
        thread, _, call = line.partition(" ")
        if "<unfinished" in call:
            begun[thread] = call
            continue
        if "resumed>" in call:
            call = begun.pop(thread, "") + call
        name, _, rest = call.strip().partition("(")
        result = rest.rpartition(" = ")[2]
        if name == "openat":
            failed.discard(result)
        elif name in ("fdatasync", "fsync"):
            descriptor = re.split(r"\D", rest, maxsplit=1)[0]
            if descriptor in failed:
                found.append(f"descriptor {descriptor} was synced again after a failed sync")
            if "(INJECTED)" in result and not re.search("EINTR|ENOSPC", result):
                failed.add(descriptor)
    return found


def main() -> None:
    """Be the child."""
    root, seed, ending, planted = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    patch = pytest.MonkeyPatch()
    without_pauses(patch)
    if planted:
        bug_named(planted).plant(patch)
    asyncio.run(_child_run(root, seed, ending))


async def _child_run(root: Path, seed: int, ending: str) -> None:
    lost = unfinished(asyncio.get_running_loop())
    pool = _pool(root)
    scenario = Scenario(pool, seed, Expected(volumes={"v": Blocks.zeros(BLOCKS)}))
    with quiet() as complaints:
        with heartbeat(scenario.problems):
            await scenario.run()
            if ending == "close":
                await scenario.end(ending)
        problems = [*scenario.problems, *complaints.found, *lost]
    told = problems, scenario.expected, scenario.refused, scenario.stops
    (root / _EXPECTED).write_bytes(pickle.dumps(told))
    os._exit(0)  # a kill: nothing is closed


if __name__ == "__main__":
    main()
