"""The attack "bit_rot": disks that change what was written, a bit, a value or the end of a file at a time.

Who looks is a process of its own (``bit_rot_child``), because damage may end it: that is a failure like any other.
What means something (``bit_rot_pages``) must be found by ``blockvirt check``, or change nothing that anybody reads;
what means nothing must not be called damage. Under a daemon one volume may fail, with an error, and no other; its scrub
must name what is damaged of chunks and of rows, and nothing in a pool that is sound.
"""

import json
import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.attacks.attack import Attack, Budget, Level, Outcome
from tests.attacks.bit_rot_damage import Damage, Kind, Rot, label_of
from tests.attacks.bit_rot_pool import CHUNK_BYTES, Kept, RottingPool, leave_journal, make
from tests.attacks.fsx import SmallChunks
from tests.real.daemon import CHECKOUT

_ANSWER_S = 30.0  # a check takes a twentieth of a second when the machine is quiet
_CHUNKS_ARE_READ = (Kind.CHUNK, Kind.CUT)
_SCRUBBED = (Kind.CHUNK, Kind.SERVED)  # every second one of them


class Watcher:
    """The process that looks at a pool; a new one where the last has ended."""

    def __init__(self, root: Path, planted: str) -> None:
        self._command = [
            sys.executable,
            "-m",
            "tests.attacks.bit_rot_child",
            str(root),
            *([planted] if planted else []),
        ]
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=CHECKOUT
        )

    def ask(self, what: str) -> dict[str, Any]:
        """Have it look; the answer, or how it ended."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(what.encode() + b"\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            is_there = bool(selector.select(_ANSWER_S))
        line = process.stdout.readline() if is_there else b""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.close()
        self._process = self._start()
        return {"fault": f"it ended with code {process.returncode}" if is_there else "it hangs"}

    def close(self) -> None:
        """End it."""
        process = self._process
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        process.wait()


@dataclass(slots=True)
class Bench:
    """The pools, and who looks at them."""

    pool: RottingPool
    rot: Rot
    kept: Kept
    watcher: Watcher
    journal_watcher: Watcher
    digest: str
    """Of all rows of the pool at rest."""
    files: dict[int, tuple[int, Path]]
    users: dict[int, frozenset[str]]


def run(budget: Budget) -> Outcome:
    """Damage one thing after the other, each alone."""
    outcome = Outcome()
    with _bench(budget) as bench:
        for seed in budget.seeds(outcome):
            damage = bench.rot.damage(seed)
            outcome.add(damage.kind.value)
            broken = _trial(bench, seed, damage, outcome)
            if not broken and not bench.rot.is_whole():
                broken = "the check changed the metadata, which it must only read"
                bench.kept.restore()
            if broken:
                outcome.fail(seed, f"{damage.what}: {broken}")
            if not (seed + 1) % 200:
                budget.say(f"bit_rot: seed {seed}: {outcome.tried + 1} damaged, {len(outcome.failures)} broken")
    if outcome.tried >= 20 and not outcome.failures and not outcome.figures.get("found"):
        raise AssertionError("bit_rot proves nothing: nothing was found in twenty trials")
    if outcome.figures.get("scrubs", 0) >= 5 and not outcome.failures and not outcome.figures.get("found by a scrub"):
        raise AssertionError("bit_rot proves nothing of scrubs: they found nothing")
    return outcome


@contextmanager
def _bench(budget: Budget) -> Iterator[Bench]:
    with ExitStack() as stack:
        root = budget.scratch / "p"
        pool = make(root)
        daemon = stack.enter_context(SmallChunks(budget.planted))
        frames = leave_journal(daemon)
        rot = Rot(pool.state / "metadata/data.mdb", label_of(pool.device), pool.sealed_chunks(), frames)
        watchers = [Watcher(each, budget.planted) for each in (root, daemon.root)]
        for watcher in watchers:
            stack.callback(watcher.close)
            if (found := watcher.ask("check-data")).get("found") != []:
                raise AssertionError(f"the pool is not sound before anything is damaged: {found}")
        digest = watchers[0].ask("check")["digest"]
        files, users = pool.backing_files(), pool.users_of_branches()
        kept = Kept(root, budget.scratch / "aside")
        sound = watchers[0].ask("scrub")
        if sound.get("findings") != [] or sound["chunks"] != len(rot.sealed):
            raise AssertionError(f"a scrub of {len(rot.sealed)} sound chunks: {sound}")
        kept.restore()
        yield Bench(pool, rot, kept, watchers[0], watchers[1], digest, files, users)


def _trial(bench: Bench, seed: int, damage: Damage, outcome: Outcome) -> str:
    """Damage, look, put back; returns what was promised and not held."""
    undo = damage.apply()
    is_scrubbed = damage.kind in _SCRUBBED and not seed % 2
    try:
        if is_scrubbed and (broken := _scrubbed(damage, bench.watcher.ask("scrub"), outcome)):
            return broken
        if damage.kind is Kind.SERVED:
            return _served(bench, damage, bench.watcher.ask("serve"), outcome)
        watcher = bench.journal_watcher if damage.kind is Kind.JOURNAL else bench.watcher
        answer = watcher.ask("check-data" if damage.kind in _CHUNKS_ARE_READ else "check")
        return _checked(bench, damage, answer, outcome)
    finally:
        if is_scrubbed or damage.kind in (Kind.SERVED, Kind.CUT):
            bench.kept.restore()
        else:
            undo.apply()


def _checked(bench: Bench, damage: Damage, answer: dict[str, Any], outcome: Outcome) -> str:
    if "fault" in answer:
        return f"a check must say what is wrong: {answer['fault']}"
    if damage.kind is Kind.FREE:
        if answer["digest"] != bench.digest:
            return "a flip in what nothing uses has changed rows"
        return f"what nothing uses is called damaged: {answer['found']}" if answer["found"] else ""
    if answer["found"]:
        outcome.add("found")
        outcome.add("found in live metadata", damage.kind in (Kind.METADATA, Kind.EXCHANGED))
        return ""
    is_metadata = damage.path == bench.rot.data_file
    if is_metadata and answer["digest"] == bench.digest:
        outcome.add("of no effect")
        return ""
    return "a check finds nothing" + (", and rows have changed" if is_metadata else "")


def _scrubbed(damage: Damage, answer: dict[str, Any], outcome: Outcome) -> str:
    """Tell what a scrub should have found and did not: the chunk where it lies, or that a row is damaged."""
    outcome.add("scrubs")
    if answer.get("state") != "done" or answer["ready"] != 200:
        return f"a scrub must come to its end: {answer}"
    if damage.kind is Kind.SERVED:
        if any(each["kind"] == "record" for each in answer["findings"]):
            outcome.add("found by a scrub")
            return ""
        return "a scrub finds nothing"
    at = damage.edits[0][0] // CHUNK_BYTES * CHUNK_BYTES
    if answer["findings"] != [{"kind": "chunk", "where": at}]:
        return f"a scrub finds {answer['findings']}, and the chunk at {at} is damaged"
    outcome.add("found by a scrub")
    return ""


def _served(bench: Bench, damage: Damage, answer: dict[str, Any], outcome: Outcome) -> str:
    if "exports" not in answer or answer["listed"] != 200:
        return f"a daemon must serve what is not damaged: {answer}"
    branch = damage.number
    if damage.table in ("files", "checksums"):
        branch = bench.files[branch][0]
    concerned = bench.users[branch]
    for export, state in answer["exports"].items():
        if state.startswith("differs"):
            return f"{export} is read with other bytes than were written"
        if state != "same":
            outcome.add("exports refused")
            if export.partition("@")[0] not in concerned:
                return f"{export} is not concerned: {state}"
    outcome.add("exports the same", sum(state == "same" for state in answer["exports"].values()))
    return ""


ATTACK = Attack(
    name="bit_rot",
    unit="pieces of damage",
    promises=("I4", "I5", "I6"),
    trials={Level.SAMPLE: 60, Level.PROVE: 1_400, Level.SOAK: 14_000},
    run=run,
)
