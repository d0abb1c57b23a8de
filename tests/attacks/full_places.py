"""The places in which a pool is full, each with its way to become so, and to have space again."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from blockvirt.limits import MAX_BACKING_FILE_BYTES
from blockvirt.meta.keys import Table
from blockvirt.meta.store import Writer
from blockvirt.units import KIB, MIB
from blockvirt.volumes.engine import EngineSettings
from tests.attacks.faults_pool import SETTINGS, AttackedPool
from tests.attacks.faults_sites import ALWAYS, Cell, Site
from tests.attacks.faulty_disk import FaultyDisk

LARGE_FILES = replace(SETTINGS, backing_file_bytes=MAX_BACKING_FILE_BYTES)


@dataclass(slots=True)
class Place:
    """Where a pool gets full. This one is never full: others say how they are."""

    root: Path
    seed: int
    settings: EngineSettings = LARGE_FILES
    is_of_the_device: bool = True
    """Space comes back with deletes; else only from outside."""

    async def begin(self, pool: AttackedPool) -> None:
        """Prepare the pool that was started."""

    async def fill(self, pool: AttackedPool) -> None:
        """Take away what the pool needs, as far as guests do not do that."""

    async def tidy_up(self, pool: AttackedPool) -> None:
        """Remove what was stored to fill it."""

    def make_space(self) -> None:
        """Give it back."""


class DeviceLimit(Place):
    """A device may use so much of its filesystem."""

    async def begin(self, pool: AttackedPool) -> None:
        """Replace the device by one with a limit."""
        storage = pool.engine.storage
        limit_bytes = 4 * MIB + self.seed % 37 * 20 * KIB
        await storage.add(str(self.root / "disk2"), "disk2", limit_bytes, 0, {}, create=True)
        await storage.remove("disk1")


@dataclass(slots=True)
class Allocation(Place):
    """An allocation finds no space though the filesystem said that there was some."""

    disk: FaultyDisk | None = None
    is_of_the_device: bool = False

    async def fill(self, pool: AttackedPool) -> None:
        """From some allocation on."""
        assert self.disk is not None
        self.disk.arm()

    def make_space(self) -> None:
        """Allocations find space again."""
        assert self.disk is not None
        self.disk.disarm()


@dataclass(slots=True)
class StateDirectory(Place):
    """The filesystem of the state directory is full: commits live on the metadata reserve."""

    is_of_the_device: bool = False

    async def fill(self, pool: AttackedPool) -> None:
        """Take all of it; what was allocated ahead of the reserve goes with rows that belong to nothing."""
        store = pool.engine.store
        with (self.root / "state" / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(64 * KIB)):
                pass
        for number in range(200):
            if not store.reserve_ok:
                break
            row = partial(Writer.put, table=Table.IDEMPOTENCY, key=b"filler-%d" % number, value=bytes(100_000))
            await store.commit(row)

    async def tidy_up(self, pool: AttackedPool) -> None:
        """Delete the rows: that must go while there is no space."""

        def change(writer: Writer) -> None:
            for key, _ in writer.scan(Table.IDEMPOTENCY):
                writer.delete(Table.IDEMPOTENCY, key)

        await pool.engine.store.commit(change)

    def make_space(self) -> None:
        """Remove the filler."""
        (self.root / "state" / "filler").unlink(missing_ok=True)


@contextmanager
def _limit(root: Path, seed: int, patch: pytest.MonkeyPatch) -> Iterator[Place]:
    yield DeviceLimit(root, seed)


@contextmanager
def _mounted(root: Path, folder: str, *arguments: str) -> Iterator[None]:
    (root / folder).mkdir()
    subprocess.run(["mount", *arguments, root / folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", root / folder], check=True)


@contextmanager
def tmpfs(root: Path, seed: int) -> Iterator[None]:
    """Have a small disk in memory at ``root``/disk1."""
    size = f"size={16 * MIB + seed % 31 * 12 * KIB}"
    with _mounted(root, "disk1", "-t", "tmpfs", "-o", size, "tmpfs"):
        yield


@contextmanager
def ext4(root: Path, seed: int) -> Iterator[None]:
    """Have a small ext4 there."""
    image = root / "image"
    with image.open("wb") as file:
        file.truncate(24 * MIB + seed % 13 * 64 * KIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    with _mounted(root, "disk1", "-o", "loop", str(image)):
        yield


@contextmanager
def _on(
    filesystem: Callable[[Path, int], AbstractContextManager[None]], root: Path, seed: int, _: object
) -> Iterator[Place]:
    with filesystem(root, seed):
        yield Place(root, seed)


@contextmanager
def _allocation(root: Path, seed: int, patch: pytest.MonkeyPatch) -> Iterator[Place]:
    call = ("allocate", "create")[seed // 5 % 2]
    disk = FaultyDisk(root, Cell(Site("data", call), "ENOSPC", ALWAYS, 1 + seed // 10 % 4))
    disk.put_in(patch)
    settings = replace(SETTINGS, backing_file_bytes=400 * KIB)
    yield Allocation(root, seed, settings, disk=disk)


@contextmanager
def _state(root: Path, seed: int, patch: pytest.MonkeyPatch) -> Iterator[Place]:
    with _mounted(root, "state", "-t", "tmpfs", "-o", f"size={24 * MIB + seed % 29 * 4 * KIB}", "tmpfs"):
        yield StateDirectory(root, seed)


PLACES: Mapping[str, Callable[[Path, int, pytest.MonkeyPatch], AbstractContextManager[Place]]] = {
    "limit": _limit,
    "small disk": partial(_on, tmpfs),
    "ext4": partial(_on, ext4),
    "allocation": _allocation,
    "state": _state,
}
