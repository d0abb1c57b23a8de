"""One guest: a minute of writes on ext4 or XFS, under which the daemon dies again and again; snapshots beside it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from blockvirt.units import GIB
from tests.attacks.attack import Outcome
from tests.attacks.guests_host import EXPORT, Broken, Host, files_in, prove_clean
from tests.attacks.guests_scripts import (
    HAVE_ENDED,
    LOOK,
    MAKE,
    MOUNT_ANEW,
    PREPARE,
    PROGRESS,
    STOP,
    SUMS,
    SUMS_OF_FSYNCED,
    UNMOUNT,
    WORK,
    differences,
    lasting,
    number_of,
    remembered,
    seen,
)
from tests.attacks.kills_daemon import ForkServer
from tests.guest.kernel import Kernel
from tests.guest.machine import Guest, virtio_disk

FILESYSTEMS = ("ext4", "xfs")
"""Of even and of odd seeds."""
SIZE_BYTES = 1 * GIB
PARTS, PART_S, KILLS_IN_A_PART = 3, 20.0, 5
MOST_SNAPSHOTS = 6
MOST_WAIT_S = 1.5
"""From the guest's first word after a kill to the next."""


@dataclass(slots=True)
class Taken:
    """A snapshot."""

    wanted: dict[str, str]
    """Fsynced files that it must hold, with their sums."""
    last: int = 0
    """No file with a greater number was begun when it was answered; 0: it was not answered, and need not be there."""


@dataclass(slots=True)
class Trial:
    """What a seed does."""

    seed: int
    outcome: Outcome
    server: ForkServer
    software: tuple[Kernel, Path]
    folder: Path
    """Of this trial alone; empty."""
    taken: dict[str, Taken] = field(default_factory=dict)

    def run(self) -> None:
        """Carry it out; raises AssertionError or Died where a promise is broken."""
        kind = FILESYSTEMS[self.seed % 2]
        dice = random.Random(f"guests {self.seed}")
        with ExitStack() as stack:
            host = Host(self.server, self.folder, dice, SIZE_BYTES)
            stack.callback(self._count, host)
            stack.callback(host.close)
            with Guest(self.folder, *self.software, virtio_disk(host.socket, EXPORT)) as guest:
                guest.run(f"{MAKE[kind]} && {PREPARE}")
                for part in range(PARTS):
                    guest.run(WORK)
                    self._attack(guest, host, dice, MOST_SNAPSHOTS * (part + 1) // PARTS)
                    self._compare(guest, host, kind)
                rounds, _ = _progress(guest)
            self.outcome.add("fsyncs acknowledged", 2 * rounds)
            self._look_at_snapshots(host, kind)
            host.stop()

    def _count(self, host: Host) -> None:
        self.outcome.add("kills", host.kills)
        self.outcome.add("kills while it starts", host.kills_in_start)
        self.outcome.add("starts in other mount namespaces", host.other_namespaces)
        self.outcome.add("frames replayed", host.frames_replayed())

    def _attack(self, guest: Guest, host: Host, dice: random.Random, most_snapshots: int) -> None:
        """Kill and take snapshots, for a part of the trial."""
        end_s = time.monotonic() + PART_S
        enough = host.kills + KILLS_IN_A_PART
        while time.monotonic() < end_s or host.kills < enough:
            self._await_work(guest)
            time.sleep(dice.uniform(0, MOST_WAIT_S))  # a random moment, which waits for nothing
            if len(self.taken) < most_snapshots and dice.random() < 0.5:
                self._take_snapshot(guest, host, is_killed=dice.random() < 0.5)
            else:
                host.kill()
        self._await_work(guest)

    def _await_work(self, guest: Guest) -> None:
        """Return when the guest has written more; raises Broken where it cannot."""
        before, _ = _progress(guest)

        def goes_on() -> bool:
            rounds, trouble = _progress(guest)
            if trouble:
                raise Broken(f"in the guest: {trouble}; {'; '.join(guest.complaints()[:3])}")
            return rounds > before

        guest.until(goes_on, "the guest's writer came no further")

    def _take_snapshot(self, guest: Guest, host: Host, *, is_killed: bool) -> None:
        name = f"s{len(self.taken)}"
        taken = self.taken[name] = Taken(lasting(remembered(guest.run(SUMS_OF_FSYNCED))))
        if is_killed:
            is_answered = host.take_snapshot_and_kill(name)
        else:
            host.take_snapshot(name)
            is_answered = True
        if is_answered:
            taken.last = _progress(guest)[0] + 1

    def _compare(self, guest: Guest, host: Host, kind: str) -> None:
        """Stop the writers; compare all that they remember, through the guest, and have the filesystem checked."""
        guest.run(STOP)
        guest.until(_ended(guest), "the guest's writers did not end")
        guest.run(UNMOUNT)
        if complaints := guest.complaints():
            raise Broken(f"the guest's kernel complains: {'; '.join(complaints[:3])}")
        wanted = remembered(guest.run(SUMS))
        guest.run(MOUNT_ANEW)
        if wrong := differences(wanted, seen(guest.run(LOOK))):
            raise Broken(f"read back by the guest from {kind}: {'; '.join(wrong)}")
        guest.run(UNMOUNT)
        with host.copy() as image:
            prove_clean(kind, image)
        if complaints := guest.complaints():
            raise Broken(f"the guest's kernel complains: {'; '.join(complaints[:3])}")
        self.outcome.add("files compared", len(wanted))

    def _look_at_snapshots(self, host: Host, kind: str) -> None:
        """Mount a copy of each snapshot, which replays its log, and look for what was fsynced before it."""
        there = host.snapshots()
        if lost := sorted(name for name, taken in self.taken.items() if taken.last and name not in there):
            raise Broken(f"snapshots that were answered are gone: {', '.join(lost)}")
        for name in sorted(there):
            taken = self.taken[name]
            with host.copy(name) as image:
                found = files_in(kind, image, self.folder / "mnt", "file.*")
                prove_clean(kind, image)
            if wrong := differences(taken.wanted, found):
                raise Broken(f"in the snapshot {name} of {kind}: {'; '.join(wrong)}")
            newest = max(map(number_of, found), default=0)
            if taken.last and newest > taken.last:
                raise Broken(f"the snapshot {name} of {kind} holds file.{newest}, from after it")
            self.outcome.add("snapshots mounted")
            self.outcome.add("files compared", len(taken.wanted))


def _progress(guest: Guest) -> tuple[int, str]:
    """Return how many rounds the guest's fsyncing writer has done, and what went wrong for any of them."""
    rounds, _, trouble = guest.run(PROGRESS).partition("\n")
    return int(rounds), trouble.strip()


def _ended(guest: Guest) -> Callable[[], bool]:
    def ended() -> bool:
        said = guest.run(HAVE_ENDED).strip()
        if said not in ("", "ended"):
            raise Broken(f"in the guest: {said}; {'; '.join(guest.complaints()[:3])}")
        return said == "ended"

    return ended
