"""Every state that a crash may leave on the disk: the pool recovers from each, and nothing promised is missing.

A load runs on a filesystem whose block device is logged. Then the log is replayed up to any write, or with any part of
what no flush of the device had covered by then lost: whole writes, or pieces of them of 4 KiB, which disks write whole.
Each such state is mounted, recovered by the engine, and compared with what had been acknowledged by that point of the
log. Then once more: a second restart, in some states after another power cut, must find the same; what reads as zeros
must stay zeros when something is written beside it; and `check` must find no corruption, before and after.
"""

import asyncio
import os
import random
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from blockvirt.check import CLEAN, LEAKS
from blockvirt.check import run as run_check
from blockvirt.errors import BlockvirtError
from tests.attacks.attack import Attack, Budget, Level, Outcome
from tests.attacks.crash_states_log import BlockLog, survivors
from tests.attacks.crash_states_pool import EnginePool
from tests.attacks.crash_states_recording import IMAGE_BYTES, Recording, quiet, record
from tests.attacks.power_cuts_disk import Disk, copy_sparse, loop_device, memory_folder, with_own_mounts
from tests.attacks.power_cuts_load import examine, scribble
from tests.attacks.power_cuts_model import PoolModel

STATES = 40  # of one recording; half of them have everything up to a write, the others have lost a part of it
FILESYSTEMS = ("ext4", "xfs")


class Replay:
    """The crash states of one recording, in the order of their seeds."""

    def __init__(self, recording: Recording, folder: Path, mountpoint: Path, stack: ExitStack) -> None:
        self.recording = recording
        self.lock_file = folder / "lock"
        self.log = BlockLog(folder / "log")
        stack.callback(self.log.close)
        self._master = _open(folder / "base", stack)
        """What was flushed before the states to come."""
        self._at = 0
        self._ends = self._places()
        (folder / "state").write_bytes(b"")
        self._image = _open(folder / "state", stack)
        os.truncate(self._image, IMAGE_BYTES)
        self.disk = Disk(stack.enter_context(loop_device(folder / "state")), recording.kind, mountpoint)
        stack.callback(self.disk.close)

    def _places(self) -> list[int]:
        """Choose where in the log the crashes are: soon after promises, in the recovery, and all over it."""
        dice, count = random.Random("where crashes are"), len(self.log.entries)
        places = _spread(self.recording.recovery, STATES // 8)
        for promises in (self.recording.flush_places(), self.recording.change_places()):
            places += [place + dice.choice((0, 1, 1, 2, 3, 5)) for place in _spread(promises, STATES // 3)]
        places += _spread(range(1, count + 1), STATES - len(places))
        return sorted(min(place, count) for place in places)

    def make(self, index: int, dice: random.Random) -> tuple[int, str]:
        """Make the state ``index``; returns how many entries of the log it comes from, and what it is, in words."""
        entries, end = self.log.entries, self._ends[index]
        durable = self.log.unflushed(end)
        for entry in entries[self._at : durable]:
            self.log.apply(entry, self._master)
        self._at = durable
        copy_sparse(self._master, self._image)
        last, is_torn = entries[durable:end], dice.random() < 0.5
        kept = survivors(last, dice) if is_torn else [None] * len(last)
        for entry, pieces in zip(last, kept, strict=True):
            self.log.apply(entry, self._image, pieces)
        lost = f", of the last {len(last)} only a part" if is_torn else ""
        return end, f"{self.recording.kind} after {end} of {len(entries)} writes{lost}"


def _spread(places: Sequence[int], count: int) -> list[int]:
    """Return ``count`` of the places, evenly spread: some twice where there are fewer."""
    return [places[index * len(places) // count] for index in range(count)] if places else []


def _open(path: Path, stack: ExitStack) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


class Trial:
    """One crash state."""

    def __init__(self, seed: int, replay: Replay, outcome: Outcome) -> None:
        self.seed = seed
        self.replay = replay
        self.outcome = outcome
        self.dice = random.Random(f"crash state {seed}")
        self.what = ""

    async def run(self) -> None:
        """Make it, recover, compare."""
        replay, disk, outcome = self.replay, self.replay.disk, self.outcome
        at, self.what = replay.make((self.seed - 1) % STATES, self.dice)
        try:
            disk.mount()
        except OSError:
            outcome.add("not mountable")
            return
        try:
            problem = await self._recovers(at)
        except BlockvirtError as error:
            problem = f"{type(error).__name__}: {error.message} ({error.cause})"
        finally:
            disk.close()
        if problem:
            outcome.fail(self.seed, f"{self.what}: {problem}")

    async def _recovers(self, at: int) -> str:
        """Return what is wrong with the state, which is mounted."""
        recording, model = self.replay.recording, self.replay.recording.model(at)
        pool = EnginePool(self.replay.disk.mountpoint, self.replay.lock_file)
        if at >= recording.ready_at and self.dice.random() < 0.5 and (problem := self._check(pool, "before recovery")):
            return problem
        await pool.start()
        try:
            found = await examine(pool, model, at)
            self.outcome.add("volumes compared", len(found.volumes))
            self.outcome.add("snapshots compared", len(found.snapshots))
            self.outcome.add("recovered to a point with flushes", int(any(_has_flush(model, at))))
            if found.problems:
                return found.problems[0]
            cut = self.dice.random() < 0.25
            if cut:
                pool.hold_metadata()
                self.replay.disk.shut_down()
        finally:
            await pool.close()
        if cut:
            self.outcome.add("power cuts after recovery")
            self.replay.disk.unmount()
            self.replay.disk.mount()
        await pool.start()
        try:
            again = await examine(pool, model, at)
            if (again.volumes, again.snapshots) != (found.volumes, found.snapshots):
                return f"a second recovery{' after a power cut' if cut else ''} finds something else than the first"
            if problem := await scribble(pool, model, again, self.dice):
                return problem
        finally:
            await pool.close()
        return self._check(pool, "after recovery")

    def _check(self, pool: EnginePool, when: str) -> str:
        report = run_check(pool.state_dir, repair=False, restore_metadata=False, data=True)
        self.outcome.add("checks")
        self.outcome.add("leaks", int(report.exit_code == LEAKS))
        if report.exit_code in (CLEAN, LEAKS):
            return ""
        findings = "; ".join(f"{each.code} {each.what}: {each.message}" for each in report.findings[:3])
        return f"check {when}: exit code {report.exit_code}, not 0 or 3: {findings}"


def _has_flush(model: PoolModel, at: int) -> list[bool]:
    return [volume.promised(at) is not None for volume in model.volumes.values()]


def run(budget: Budget) -> Outcome:
    """Recover from one crash state after the other."""
    return with_own_mounts(partial(_run, budget))


def _run(budget: Budget) -> Outcome:
    outcome = Outcome()
    with ExitStack() as stack, quiet():
        folder = stack.enter_context(memory_folder(budget.scratch / "ram"))
        asyncio.run(_states(budget, outcome, folder))
    if outcome.figures.get("not mountable", 0) * 50 > outcome.tried:
        raise RuntimeError("more than one state in fifty cannot be mounted: what is replayed is not what was logged")
    for figure in ("acknowledged flushes", "volumes compared", "recovered to a point with flushes"):
        if budget.count and not outcome.failures and not outcome.figures.get(figure):
            raise RuntimeError(f"crash_states did nothing: no {figure}")
    return outcome


async def _states(budget: Budget, outcome: Outcome, folder: Path) -> None:
    number, mountpoint = -2, budget.scratch / "m"
    with ExitStack() as kept:
        stack = kept.enter_context(ExitStack())
        replay: Replay | None = None
        for seed in budget.seeds(outcome):
            if (seed - 1) // STATES != number:
                number = (seed - 1) // STATES
                stack.close()
                recording = await record(number, FILESYSTEMS[number % 2], folder, mountpoint)
                for problem in recording.problems:
                    outcome.fail(seed, f"{recording.kind}, while it was recorded: {problem}")
                replay = None
                if recording.problems:
                    continue
                replay = Replay(recording, folder, mountpoint, stack)
                outcome.add("recordings")
                outcome.add("writes logged", len(replay.log.entries))
                outcome.add("acknowledged flushes", recording.flushes)
            if replay is not None:
                outcome.add(f"states on {FILESYSTEMS[number % 2]}")
                await Trial(seed, replay, outcome).run()


ATTACK = Attack(
    name="crash_states",
    unit="crash states",
    promises=("I1", "I2", "I3", "I5", "I6", "I8"),
    trials={Level.SAMPLE: 60, Level.PROVE: 2_000, Level.SOAK: 20_000},
    run=run,
    requires=("root", "loop", "fuse", "qemu-storage-daemon", "mkfs.ext4", "mkfs.xfs"),
)
