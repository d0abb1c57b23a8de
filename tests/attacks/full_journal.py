"""No room for a journal: neither for its first file nor for its second, in whole or in part (I10).

A volume that was opened anew has none. Until it can have one its map cannot change: new chunks and trims are refused
as "no space", reads and overwrites in place go on, deletions too, and nothing is left of what could not be made.
"""

import contextlib
import errno
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest

from blockvirt.errors import BlockvirtError, VolumeStopped
from blockvirt.units import KIB, MIB
from tests.attacks.faults_pool import AttackedPool
from tests.attacks.faults_sites import ALWAYS, SHORT, Cell, Site
from tests.attacks.faulty_disk import FaultyDisk
from tests.attacks.full_places import Allocation, Place, ext4, tmpfs
from tests.attacks.full_scenario import FullPool

_LEFT_BYTES = (0, 40 * KIB, 300 * KIB, 400 * KIB)
"""What is left on a real filesystem: nothing, a part of a small journal's first file, or of its second."""


class FullJournal(FullPool):
    """A volume ``v`` and a volume ``f``; neither has a journal."""

    async def run(self) -> None:
        """Use what is there, delete, use what came back."""
        await self._begin()
        await self._make_to_delete("e")
        await self._must("closing and opening v", lambda: self.reconnect("v"))
        await self.place.fill(self.pool)
        for _ in range(2):
            await self._use_without_a_journal()
            await self._must("closing and opening v", lambda: self.reconnect("v"))
        await self._must("deleting a snapshot", lambda: self.delete_snapshot("v@s"))
        await self._delete_a_volume("d")
        await self._delete_a_volume("e")
        if self.place.is_of_the_device:  # what both had is more than a small journal
            await self._must("a trim after volumes were deleted", self._trim)
        await self.read("v")
        self.place.make_space()
        await self._must("a trim after space was made", self._trim)
        await self._must("a new chunk after space was made", lambda: self._write_new(64 * KIB))
        await self._must("a flush after that", lambda: self.flush("v"))
        await self.read("v")
        if self.stops:
            self.problems.append("a volume stopped for lack of space")

    async def _use_without_a_journal(self) -> None:
        await self._use_in_place()
        await self._must_lack_room("a trim", self._trim)
        await self._must_lack_room("a new chunk", lambda: self._write_new(4 * KIB))
        folder = self.pool.device / "journal"
        if left := sorted(path.name for path in folder.iterdir()):
            self.problems.append(f"of journals that could not be made {left} are left")

    async def _must_lack_room(self, what: str, call: Callable[[], Awaitable[object]]) -> None:
        """Do what must be refused for lack of space, and for nothing else."""
        refused, self.last_error = self.refused, None
        try:
            await self._try(what, call)
        except VolumeStopped:
            self.refused += 1
        found = self.last_error
        if self.refused == refused or found is None:
            self.problems.append(f"{what} was done, though there is no room for a journal")
            return
        number = found.nbd_errno if isinstance(found, BlockvirtError) else getattr(found, "errno", 0)
        if number != errno.ENOSPC or isinstance(found, VolumeStopped):
            self.problems.append(f"{what} was refused with {found!r}, which is not for lack of space")
        self.refused_for_space += 1


class FilledFromOutside(Place):
    """Somebody else has taken what the filesystem had, and the reserve too."""

    async def fill(self, pool: AttackedPool) -> None:
        """Leave less than a journal needs."""
        assert self._filler.parent == pool.device
        with self._filler.open("wb", buffering=0) as file:
            for piece in (bytes(MIB), bytes(4 * KIB)):
                with contextlib.suppress(OSError):
                    while file.write(piece) == len(piece):
                        pass
            size_bytes = file.tell()
            file.truncate(size_bytes - _LEFT_BYTES[self.seed // 100 % len(_LEFT_BYTES)])

    def make_space(self) -> None:
        """They remove it."""
        self._filler.unlink(missing_ok=True)

    @property
    def _filler(self) -> Path:
        return self.root / "disk1" / "filler"


@contextmanager
def _refused(call: str, fault: str, nth: int, root: Path, seed: int, patch: pytest.MonkeyPatch) -> Iterator[Place]:
    disk = FaultyDisk(root, Cell(Site("journal", call), fault, ALWAYS, nth))
    disk.put_in(patch)
    yield Allocation(root, seed, disk=disk)


@contextmanager
def _on(
    filesystem: Callable[[Path, int], AbstractContextManager[None]], root: Path, seed: int, _: object
) -> Iterator[Place]:
    with filesystem(root, seed):
        yield FilledFromOutside(root, seed)


JOURNALS: tuple[Callable[[Path, int, pytest.MonkeyPatch], AbstractContextManager[Place]], ...] = (
    partial(_on, tmpfs),
    partial(_on, ext4),
    *(
        partial(_refused, call, fault, nth)
        for call, fault in (("create", "ENOSPC"), ("write", "ENOSPC"), ("write", SHORT), ("sync", "ENOSPC"))
        for nth in (1, 2)
    ),
)
"""What keeps a journal from being made, of its first file or of its second."""
