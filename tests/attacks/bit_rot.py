"""The attack "bit_rot": disks that change what was written, a bit, a value or the end of a file at a time.

Who looks is a process of its own (``bit_rot_child``), because damage may end it: that is a failure like any other.
What means something (``bit_rot_pages``) must be found by ``blockvirt check``, also where no reader looks at it: who
writes does. What means nothing must not be called damage, and no row may have changed. Under a daemon one volume may
fail, with an error, and no other; its scrub must name what is damaged of chunks and of rows, and nothing in a pool that
is sound (``bit_rot_verdicts``).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tests.attacks.attack import Attack, Budget, Level, Outcome
from tests.attacks.bit_rot_damage import Damage, Kind, Rot, label_of
from tests.attacks.bit_rot_pool import Kept, leave_journal, make
from tests.attacks.bit_rot_verdicts import (
    copied,
    cut_while_served,
    judge_journal,
    judge_scrub,
    judge_served,
    metadata_cut_while_served,
)
from tests.attacks.bit_rot_watch import Bench, Side, Watcher
from tests.attacks.fsx import SmallChunks

_CHUNKS_ARE_READ = (Kind.CHUNK, Kind.CUT)
_SCRUBBED = (Kind.CHUNK, Kind.SERVED)  # every second one of them
_OF_THE_KILLED = (Kind.JOURNAL, Kind.JOURNAL_CUT)  # every second one also under a daemon
_CUT_MEANWHILE = (Kind.SERVED_CUT, Kind.METADATA_CUT)


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
                bench.rest.kept.restore()
            if broken:
                outcome.fail(seed, f"{damage.what}: {broken}")
            if not (seed + 1) % 200:
                budget.say(f"bit_rot: seed {seed}: {outcome.tried + 1} damaged, {len(outcome.failures)} broken")
    if outcome.tried >= 20 and not outcome.failures and not outcome.figures.get(f"{Kind.METADATA} found"):
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
        killed, frames = leave_journal(daemon)
        rot = Rot(
            pool.state / "metadata/data.mdb", label_of(pool.device), pool.sealed_chunks(), frames, pool.seen_chunks()
        )
        sides = []
        for each, aside in ((pool, "aside"), (killed, "killed")):
            watcher = Watcher(each.root, budget.planted)
            stack.callback(watcher.close)
            sides.append(Side(each, Kept(each.root, budget.scratch / aside), watcher))
            if (found := watcher.ask("check-data")).get("found") != []:
                raise AssertionError(f"the pool is not sound before anything is damaged: {found}")
            served = watcher.ask("serve")
            if set(served.get("exports", {}).values()) != {"same"} or served["ready"] != 200:
                raise AssertionError(f"the pool is not as it was written before anything is damaged: {served}")
            sides[-1].kept.restore()
        rest, journalled = sides
        digest = rest.watcher.ask("check")["digest"]
        files, users, heads = pool.backing_files(), pool.users_of_branches(), pool.files_of_heads()
        bench = Bench(rot, rest, journalled, digest, files, users, heads, budget.scratch / "acknowledged")
        sound = bench.rest.watcher.ask("scrub")
        if sound.get("findings") != [] or sound["chunks"] != len(rot.sealed):
            raise AssertionError(f"a scrub of {len(rot.sealed)} sound chunks: {sound}")
        bench.rest.kept.restore()
        yield bench


def _trial(bench: Bench, seed: int, damage: Damage, outcome: Outcome) -> str:
    """Damage, look, put back; returns what was promised and not held."""
    side = bench.killed if damage.kind in _OF_THE_KILLED else bench.rest
    is_served = not seed % 2 and damage.kind in (*_SCRUBBED, *_OF_THE_KILLED)
    if damage.kind in _CUT_MEANWHILE:
        try:
            if damage.kind is Kind.SERVED_CUT:
                return cut_while_served(bench, damage, outcome)
            return metadata_cut_while_served(bench, damage, bench.acknowledged, outcome)
        finally:
            side.kept.restore()
    undo = damage.apply()
    try:
        if damage.kind is Kind.COPIED:
            return copied(bench, seed, damage, outcome)
        is_scrubbed = is_served and damage.kind in _SCRUBBED
        if is_scrubbed and (broken := judge_scrub(damage, side.watcher.ask("scrub"), outcome)):
            return broken
        if damage.kind is Kind.SERVED:
            return judge_served(bench, damage, side.watcher.ask("serve"), outcome)
        answer = side.watcher.ask("check-data" if damage.kind in _CHUNKS_ARE_READ else "check")
        broken = _checked(bench, damage, answer, outcome)
        if not broken and is_served and side is bench.killed:
            return judge_journal(side.watcher.ask("serve"), outcome)
        return broken
    finally:
        if is_served or damage.cut_at is not None or damage.kind in (Kind.SERVED, Kind.COPIED):
            side.kept.restore()
        else:
            undo.apply()


def _checked(bench: Bench, damage: Damage, answer: dict[str, Any], outcome: Outcome) -> str:
    if "fault" in answer:
        return f"a check must say what is wrong: {answer['fault']}"
    if damage.kind is Kind.FREE:
        if answer["digest"] != bench.digest:
            return "a flip in what nothing uses has changed rows"
        if answer["found"]:
            return f"what nothing uses is called damaged: {answer['found']}"
        outcome.add(f"{damage.kind} proven harmless")
        return ""
    if answer["found"]:
        outcome.add(f"{damage.kind} found")
        return ""
    if damage.path == bench.rot.data_file:
        return (
            f"a check finds nothing, and rows {'are the same' if answer['digest'] == bench.digest else 'have changed'}"
        )
    return "a check finds nothing"


ATTACK = Attack(
    name="bit_rot",
    unit="pieces of damage",
    promises=("I4", "I5", "I6"),
    trials={Level.SAMPLE: 60, Level.PROVE: 1_400, Level.SOAK: 14_000},
    run=run,
)
