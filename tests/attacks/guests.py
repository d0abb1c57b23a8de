"""Guests under fire: ext4 and XFS on a volume whose daemon is killed again and again, and which has snapshots taken.

A Linux guest under QEMU has the volume as its disk. Two writers work on its filesystem, one of which fsyncs all, the
other nothing. The daemon is killed with SIGKILL at random moments, also while it takes a snapshot or starts, and
starts again, now and then in another mount namespace. The guest must notice none of it: no error, and three times
in a trial all that its writers remember is read back by it, and its filesystem is clean in the eyes of the host. Then
each snapshot is mounted, and holds what was fsynced before it was asked for, and nothing from after it.

The moments, the chunk size and the filesystem are functions of the seed; what the guest does meanwhile is not.
"""

import logging
import shutil
from contextlib import ExitStack
from functools import partial

import pytest

from tests.attacks.attack import Attack, Budget, Level, Outcome
from tests.attacks.guests_trial import KILLS_IN_A_PART, PARTS, Trial
from tests.attacks.kills_clients import Died
from tests.attacks.kills_daemon import ForkServer
from tests.attacks.power_cuts_disk import with_own_mounts
from tests.guest import initramfs
from tests.guest.kernel import Kernel, debian_kernel

TOOLS = ("mkfs.ext4", "mkfs.xfs")
_SILENCE = logging.NullHandler()


def run(budget: Budget) -> Outcome:
    """Boot one guest after the other."""
    return with_own_mounts(partial(_run, budget)) if budget.count else Outcome()


def _run(budget: Budget) -> Outcome:
    outcome = Outcome()
    with ExitStack() as stack:
        logger = logging.getLogger("blockvirt")
        logger.addHandler(_SILENCE)  # what the check in this process has to say is looked at
        stack.callback(logger.removeHandler, _SILENCE)
        server = ForkServer(budget.planted)
        stack.callback(server.close)
        kernel = _kernel()
        software = kernel, initramfs.build(kernel, budget.scratch, TOOLS)
        for seed in budget.seeds(outcome):
            folder = budget.scratch / "t"
            folder.mkdir()
            try:
                Trial(seed, outcome, server, software, folder).run()
            except (AssertionError, Died) as error:
                outcome.fail(seed, str(error))
            shutil.rmtree(folder)
            budget.say(f"guests: {outcome.tried + 1:,} of {budget.count:,}, {len(outcome.failures)} broken")
    if not outcome.failures:
        least = {"kills": outcome.tried * PARTS * KILLS_IN_A_PART, "fsyncs acknowledged": 1, "files compared": 1}
        least |= {"snapshots mounted": 1, "frames replayed": 1}
        for figure, count in least.items():
            if outcome.figures.get(figure, 0) < count:
                raise AssertionError(f"guests: nothing was attacked: {figure!r} is {outcome.figures.get(figure, 0)}")
    return outcome


def _kernel() -> Kernel:
    """The guest's kernel; raises RuntimeError where it cannot be had."""
    try:
        return debian_kernel("xfs")
    except pytest.skip.Exception as reason:
        raise RuntimeError(f"guests: {reason}") from reason


ATTACK = Attack(
    name="guests",
    unit="guests of 60 s",
    promises=("I3b", "I4", "I5", "I6"),
    # None in a sample: tests/guest does the like, shorter, in every `make test`.
    trials={Level.SAMPLE: 0, Level.PROVE: 2, Level.SOAK: 20},
    run=run,
    slices=2,
    requires=(
        *("root", "loop", "qemu-system-x86_64", "busybox", "cpio", "depmod", "modprobe", "nbdcopy"),
        *("mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair"),
    ),
)
