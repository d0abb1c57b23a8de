"""What the daemon is killed in: short stories, each on the same pool.

``empty`` was never written; ``full`` has chunks in both of its leaves; ``snapped`` has the snapshots s1 and s2, and its
head differs from both; ``clone`` comes from s1 and was written to. Ranges are (first, count) in chunks; volumes have
514, which are two leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from blockvirt.units import MIB
from tests.attacks.kills_driver import Driver
from tests.attacks.kills_model import Snapshot, Volume, World

CHUNKS = 514


@dataclass(frozen=True, slots=True)
class Scenario:
    """One story."""

    name: str
    tell: Callable[[Driver], None]
    base: str = "clean"
    """The pool that it begins with: ``clean``; ``dirty``, left by a killed daemon; ``none``: there is no pool."""
    armed: bool = False
    """The start of the daemon belongs to it."""


def prepare(driver: Driver) -> None:
    """Make the pool that the stories begin with."""
    for volume in ("empty", "full", "snapped"):
        driver.create(volume, CHUNKS)
    driver.write("full", (0, 40), (100.5, 3), (505, 9))
    driver.write("snapped", (0, 8), (100, 4), (508, 6))
    driver.snapshot("snapped", "s1")
    driver.write("snapped", (0, 4), (200, 2.5))
    driver.snapshot("snapped", "s2")
    driver.write("snapped", (2, 3), (508, 2))
    driver.clone("snapped", "s1", "clone")
    driver.write("clone", (1, 1.5), (300, 1))
    driver.streams["whole"] = driver.daemon.api.bytes_of("GET", "/v1/snapshots/snapped@s1/stream")
    driver.streams["part"] = driver.daemon.api.bytes_of("GET", "/v1/snapshots/snapped@s2/stream?since=snapped@s1")


def leave(driver: Driver) -> None:
    """Do what the daemon of the dirty pool had done when it was killed."""
    driver.write("full", (3, 2), (300, 5))
    driver.flush("full")
    driver.trim("full", (6, 3), (505, 9))
    driver.write("snapped", (0, 2), (100.5, 1), (512, 2))
    driver.write("empty", (0, 3), (400.5, 0.25))
    driver.write("clone", (2, 6), (509, 1))


def _nothing(driver: Driver) -> None:
    """The daemon starts, and stops."""


def _first_write(driver: Driver) -> None:
    driver.write("empty", (5.5, 0.25))
    driver.write("empty", (5, 1), (6, 1), (7.25, 0.5), (511, 3))
    driver.disconnect("empty")


def _overwrites(driver: Driver) -> None:
    driver.write("full", (0, 1))
    driver.write("full", (1, 1), (2.5, 2), (100, 4), (511, 2), (60, 2))
    driver.write("full", (3, 0.5), (60.5, 0.5), (506, 1))
    driver.disconnect("full")


def _copies(driver: Driver) -> None:
    driver.write("snapped", (0.25, 0.5))
    driver.write("snapped", (1, 1), (100.5, 2), (508.5, 3), (200, 1))
    driver.write("snapped", (1.5, 0.25), (0, 1), (101, 1))
    driver.disconnect("snapped")


def _cold_copies(driver: Driver) -> None:
    driver.write("snapped", (410, 1))
    driver.forget_cached()
    driver.write("snapped", (0.25, 0.5), (1.5, 2), (100.5, 2))
    driver.write("clone", (0.25, 0.5), (101.5, 1), (508.5, 3))
    driver.forget_cached()
    driver.write("snapped", (0.5, 0.25), (508.25, 0.5), (200.25, 1))
    driver.trim("clone", (3.5, 1))
    driver.disconnect("snapped", "clone")


def _copies_of_clones(driver: Driver) -> None:
    driver.write("clone", (0.25, 0.5), (4, 1))
    driver.write("clone", (1, 2), (101.5, 1), (508.5, 3), (301, 1))
    driver.write("snapped", (0, 1))
    driver.disconnect("clone", "snapped")


def _trims(driver: Driver) -> None:
    driver.trim("full", (2, 3))
    driver.trim("full", (10.5, 3), (505, 9), (30, 1))
    driver.write("full", (11.25, 0.25), (506, 1))
    driver.trim("snapped", (0, 8), (300, 4), (510.5, 3.5))
    driver.write("snapped", (3.5, 0.25))
    driver.disconnect("full", "snapped")


def _zeroes(driver: Driver) -> None:
    driver.zero("full", (2, 3), (10.5, 2), hole=False)
    driver.zero("full", (20, 3), (505, 9), hole=True)
    driver.zero("snapped", (0.5, 4), (300, 2), (509, 2), hole=False)
    driver.write("snapped", (1.25, 0.25), (300.5, 0.25))
    driver.disconnect("full", "snapped")


def _flushes(driver: Driver) -> None:
    driver.write("full", (0, 1), (200, 2))
    driver.flush("full")
    driver.flush("full")
    driver.write("full", (201, 2), (1, 0.5))
    driver.write("snapped", (0, 1))
    driver.flush("full")
    driver.flush("snapped")
    driver.write("full", (203, 1))
    driver.disconnect("full")


def _fua(driver: Driver) -> None:
    driver.write("full", (0, 1), (200, 2), fua=True)
    driver.write("full", (201, 1))
    driver.write("full", (202, 1), (203.5, 0.25), fua=True)
    driver.write("empty", (0, 2), fua=True)
    driver.disconnect("full", "empty")


def _snapshots(driver: Driver) -> None:
    driver.write("full", (0, 2), (200, 2))
    driver.snapshot("full", "one")
    driver.write("full", (0, 1), (201, 1.5), (511, 2))
    driver.snapshot("full", "two")
    driver.write("full", (0.5, 1), (202, 1))
    driver.trim("full", (200, 1))
    driver.disconnect("full")


def _groups(driver: Driver) -> None:
    driver.write("full", (0, 2))
    driver.write("snapped", (0, 2))
    driver.group("both", "full", "snapped")
    driver.write("full", (1, 2))
    driver.write("snapped", (1, 2))
    driver.group("again", "full", "snapped", "empty")
    driver.write("empty", (1, 2))
    driver.disconnect("full", "snapped")


def _snapshot_under_writes(driver: Driver) -> None:
    driver.write("full", (200, 2))
    batches = tuple(((first, 1.0), (200 + first, 0.5), (300 + first, 1)) for first in range(0, 40, 2))
    driver.snapshot_under("full", "beside", *batches)
    driver.write("full", (0, 1), (1, 1))
    driver.snapshot_under("full", "later", ((2, 1), (3, 0.5)), ((100, 2), (320, 1)), ((4, 1), (505, 3)))
    driver.disconnect("full")


def _writes_in_checkpoint(driver: Driver) -> None:
    for number, name in enumerate(("one", "two")):  # the volume has two files then, which it writes to in turns
        driver.write("full", (number, 1), (200 + number, 1))
        driver.snapshot("full", name)
    driver.write("full", (2, 1), (202, 1))
    batches = tuple(((first, 1.0), (200 + first, 0.5), (300 + first, 1)) for first in range(0, 8, 2))
    driver.snapshot_under("full", "three", *batches, hold=True)
    driver.write("full", (0.5, 1))
    driver.disconnect("full")


def _clones(driver: Driver) -> None:
    driver.clone("snapped", "s2", "made")
    driver.write("made", (0, 1), (200.5, 1), (410.5, 0.25))
    driver.snapshot("made", "own")
    driver.clone("made", "own", "more")
    driver.write("more", (1, 1), (200.5, 1))
    driver.disconnect("made")


def _reverts(driver: Driver) -> None:
    driver.write("snapped", (0, 1), (410.5, 0.25))
    driver.alone("snapped")
    driver.revert("snapped", "s1", "before")
    driver.write("snapped", (1, 1), (200.5, 1), (410.25, 0.125))
    driver.alone("snapped")
    driver.revert("snapped", "before", "")
    driver.write("snapped", (3, 0.5))
    driver.alone("snapped")


def _deletion(driver: Driver) -> None:
    driver.write("clone", (0, 1))
    driver.delete("snapped")
    driver.write("clone", (3, 1))
    driver.delete("full")
    driver.alone("clone")
    driver.delete("clone")


def _snapshot_deletion(driver: Driver) -> None:
    driver.write("snapped", (0, 1))
    driver.delete_snapshots("snapped@s2")
    driver.write("snapped", (0, 2), (200, 1))
    driver.snapshot("snapped", "s3")
    driver.write("snapped", (0, 1))
    driver.delete_snapshots("snapped@s3", "snapped@s1")
    driver.write("snapped", (100, 1))
    driver.disconnect("snapped")


def _growth(driver: Driver) -> None:
    driver.grow("full", 100)
    driver.write("full", (512, 4), (600, 1.5))
    driver.disconnect("full")
    driver.grow("snapped", 600)
    driver.write("snapped", (1024, 2))
    driver.snapshot("snapped", "grown")
    driver.disconnect("snapped")


def _devices(driver: Driver) -> None:
    driver.add_device("second", "disk2")
    driver.create("wide", CHUNKS, "second")
    driver.write("wide", (0, 1))
    driver.alone("wide")
    driver.delete("wide")
    driver.remove_device("second")
    driver.add_device("third", "disk2")


def _two_devices(driver: Driver) -> None:
    """One is full, and the volume goes on on the other: the journal must know of it first."""
    driver.add_device("second", "disk2", limit=3 * MIB, reserve=0)
    driver.add_device("third", "disk3", limit=4 * MIB, reserve=0)
    driver.create("wide", 1024, "second", "third")
    for first in range(0, 1024, 128):
        driver.write("wide", (first, 90))
    driver.snapshot("wide", "far")
    driver.write("wide", (0, 2), (1000, 2))
    driver.trim("wide", (256, 50))
    driver.disconnect("wide")


def _names_and_trash(driver: Driver) -> None:
    driver.write("snapped", (0, 1))
    driver.rename("snapped", "other")
    driver.write("full", (0, 1))
    driver.alone("snapped", "full")
    driver.throw_away("other")
    driver.rename("full", "snapped")
    driver.write("snapped", (1, 1))
    driver.restore("other")
    driver.write("other", (1, 1))
    driver.alone("snapped", "other")
    driver.throw_away("snapped")


def _imports(driver: Driver) -> None:
    s1, s2 = (driver.world.volumes["snapped"].snapshots[name].content for name in ("s1", "s2"))

    def whole(world: World) -> None:
        world.volumes["copy"] = Volume(bytearray(s1), {"s1": Snapshot(s1)})

    def part(world: World) -> None:
        world.volumes["copy"].content[:] = s2
        world.volumes["copy"].snapshots["s2"] = Snapshot(s2)

    driver.take_in("copy", "whole", whole)
    driver.take_in("copy", "part", part)
    driver.write("copy", (0, 1))
    driver.disconnect("copy")


def _creation(driver: Driver) -> None:
    driver.create("new", CHUNKS)
    driver.write("new", (0, 1), (511, 2))
    driver.create("newer", CHUNKS)
    driver.disconnect("new")


def _flattening(driver: Driver) -> None:
    driver.write("clone", (0, 1))
    driver.flatten("clone")
    driver.write("clone", (1, 1), (4, 1))
    driver.disconnect("clone")
    driver.delete("snapped")


def _ends(driver: Driver) -> None:
    """The daemon is stopped while sessions are open."""
    leave(driver)


SCENARIOS = (
    Scenario("first-write", _first_write),
    Scenario("overwrites", _overwrites),
    Scenario("copies", _copies),
    Scenario("cold-copies", _cold_copies),
    Scenario("copies-of-clones", _copies_of_clones),
    Scenario("trims", _trims),
    Scenario("zeroes", _zeroes),
    Scenario("flushes", _flushes),
    Scenario("fua", _fua),
    Scenario("snapshots", _snapshots),
    Scenario("groups", _groups),
    Scenario("snapshot-under-writes", _snapshot_under_writes),
    Scenario("writes-in-checkpoint", _writes_in_checkpoint),
    Scenario("clones", _clones),
    Scenario("reverts", _reverts),
    Scenario("deletion", _deletion),
    Scenario("snapshot-deletion", _snapshot_deletion),
    Scenario("growth", _growth),
    Scenario("devices", _devices),
    Scenario("two-devices", _two_devices),
    Scenario("names-and-trash", _names_and_trash),
    Scenario("imports", _imports),
    Scenario("creation", _creation),
    Scenario("flattening", _flattening),
    Scenario("ends", _ends),
    Scenario("recovery", _first_write, base="dirty", armed=True),
    Scenario("recovery-in-use", leave, base="dirty", armed=True),
    Scenario("new-pool", _nothing, base="none", armed=True),
)
