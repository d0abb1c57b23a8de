"""Power cuts under a real daemon: filesystem shutdown and SIGKILL in the middle of a load, then a restart.

Metadata and device lie on one filesystem of a loop device. The shutdown loses what the filesystem had not written, as a
power cut does; what it had written stays, and the harness has it write back single files now and then, as the kernel
does. Then: every write that an acknowledged flush or FUA covers, and every acknowledged volume, clone, snapshot and
deletion, is there; every sector that was written to without a flush is old or new; `check` finds no corruption; and the
history goes on from what was found, to the next cut.
"""

import asyncio
import random
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from blockvirt.check import CLEAN, LEAKS
from blockvirt.check import run as run_check
from blockvirt.units import KIB, MIB
from tests.attacks.attack import Attack, Budget, Level, Outcome
from tests.attacks.power_cuts_daemon import DaemonFailed, DaemonPool, Zygote
from tests.attacks.power_cuts_disk import (
    FLUSH_LOG,
    LOSE_LOG,
    Disk,
    loop_device,
    make_filesystem,
    memory_folder,
    random_file,
    with_own_mounts,
)
from tests.attacks.power_cuts_load import REFUSALS, End, Load, examine
from tests.attacks.power_cuts_model import SECTOR_BYTES, PoolModel

CUTS = 5  # in one history
IMAGE_BYTES = 160 * MIB
FILESYSTEMS = ("ext4", "xfs")
_DYING_S = 0.03  # that a daemon may go on after its filesystem is gone, in half of the cuts
NOW, AT = 0, 1  # the model's clock stands still between two cuts


class History:
    """One pool through several power cuts."""

    def __init__(self, seed: int, outcome: Outcome, zygote: Zygote, disk: Disk, log: Path) -> None:
        self.seed = seed
        self.outcome = outcome
        self.dice = random.Random(f"power cuts {seed}")
        self.disk = disk
        self.device = disk.mountpoint / "device"
        self.state_dir = disk.mountpoint / "state"
        self.pool = DaemonPool(zygote, self.state_dir, self.device, log, self.dice.choice((4, 4, 16, 64)) * KIB)
        self.model = PoolModel(lambda: NOW)
        self._dying: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Work, cut, look; until a promise is broken."""
        try:
            await self._run()
        except* (DaemonFailed, *REFUSALS) as errors:
            self.outcome.fail(self.seed, f"an error that nothing was done for: {errors.exceptions!r}")
        finally:
            await self.pool.forget()

    async def _run(self) -> None:
        self.disk.mount()
        await self.pool.start()
        for number in range(self.dice.randrange(1, 4)):
            sectors = self.dice.choice((512, 1024, 2048))
            volume = self.model.add_volume(f"v{number}", [(0,)] * sectors)
            await self.pool.create(volume.name, sectors * SECTOR_BYTES)
            volume.life.made.answered = NOW
        for _ in range(CUTS):
            if not await self._survives_a_cut():
                return
        await self.pool.stop()
        self._check("after the last recovery and a clean stop")

    async def _survives_a_cut(self) -> bool:
        load = Load(
            self.pool, self.model, self.dice, self.dice.randrange(40, 320), self._cut, self._what_the_kernel_does
        )
        await load.run()
        if self._dying is not None:
            self._dying.cancel()
        await self.pool.forget()
        self.pool.kill()
        self.outcome.add("power cuts")
        self.outcome.add(f"on {self.disk.kind}")
        self.outcome.add("acknowledged flushes", load.flushes)
        if load.problem:
            self.outcome.fail(self.seed, f"before the power was cut: {load.problem}")
            return False
        self.disk.unmount()
        self.disk.mount()
        if not self._check("of what the power cut left"):
            return False
        await self.pool.start()
        found = await examine(self.pool, self.model, AT)
        self.outcome.add("volumes compared", len(found.volumes))
        self.outcome.add("snapshots compared", len(found.snapshots))
        for problem in found.problems[:3]:
            self.outcome.fail(self.seed, f"after a power cut on {self.disk.kind}: {problem}")
        self.model.settle(found.volumes, found.snapshots, NOW)
        return not found.problems

    def _cut(self) -> End:
        how = self.dice.choice((LOSE_LOG, LOSE_LOG, LOSE_LOG, FLUSH_LOG))
        if self.dice.random() < 0.5:
            self.disk.shut_down(how)
            self.pool.kill()
            return End.DIES
        with self.pool.between_system_calls():
            self.disk.shut_down(how)
        self._dying = asyncio.get_running_loop().call_later(_DYING_S, self.pool.kill)
        return End.LINGERS

    def _what_the_kernel_does(self, dice: random.Random) -> None:
        file = random_file(self.device, dice)
        if dice.random() < 0.2:
            self.disk.sync_all()
        elif file is not None:
            self.disk.write_back(file)

    def _check(self, what: str) -> bool:
        report = run_check(self.state_dir, repair=False, restore_metadata=False)
        self.outcome.add("checks")
        self.outcome.add("leaks", int(report.exit_code == LEAKS))
        if report.exit_code in (CLEAN, LEAKS):
            return True
        findings = "; ".join(f"{each.code} {each.what}: {each.message}" for each in report.findings[:3])
        self.outcome.fail(
            self.seed, f"check {what} on {self.disk.kind}: exit code {report.exit_code}, not 0 or 3: {findings}"
        )
        return False


def run(budget: Budget) -> Outcome:
    """Cut the power of one history after the other."""
    return with_own_mounts(partial(_run, budget))


def _run(budget: Budget) -> Outcome:
    outcome = Outcome()
    with ExitStack() as stack:
        folder = stack.enter_context(memory_folder(budget.scratch / "ram"))
        zygote = Zygote(budget.planted)
        stack.callback(zygote.close)
        for seed in budget.seeds(outcome):
            _run_one(seed, outcome, zygote, folder, budget.scratch)
    for figure in ("power cuts", "acknowledged flushes", "snapshots compared"):
        if budget.count and not outcome.failures and not outcome.figures.get(figure):
            raise RuntimeError(f"power_cuts did nothing: no {figure}")
    return outcome


def _run_one(seed: int, outcome: Outcome, zygote: Zygote, folder: Path, scratch: Path) -> None:
    kind = FILESYSTEMS[seed % 2]
    with ExitStack() as stack:
        make_filesystem(kind, folder / "image", IMAGE_BYTES)
        disk = Disk(stack.enter_context(loop_device(folder / "image")), kind, scratch / "m")
        stack.callback(disk.close)
        history = History(seed, outcome, zygote, disk, scratch / "log")
        stack.callback(history.pool.kill)
        asyncio.run(history.run())


ATTACK = Attack(
    name="power_cuts",
    unit=f"histories of {CUTS} power cuts",
    promises=("I1", "I2", "I3", "I5", "I6", "I7", "I8"),
    trials={Level.SAMPLE: 2, Level.PROVE: 20, Level.SOAK: 600},
    run=run,
    requires=("root", "loop", "mkfs.ext4", "mkfs.xfs"),
)
