"""Snapshots of a running daemon as backup tools read them: nbdinfo, nbdcopy, qemu-img, libnbd."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.real.clients import CLIENT_DEADLINE_S, ClientFailed, qemu_io, run
from tests.real.daemon import Daemon

KIB = 1 << 10
MIB = 1 << 20
SIZE = 32 * MIB
CHUNK = 16 * KIB
SINCE = "qemu:dirty-bitmap:since-"

pytestmark = pytest.mark.requires("nbdinfo", "nbdcopy", "qemu-img", "qemu-io")


class Disk:
    """The volume `v` of a daemon, and what it must hold: bytes, and by which write each chunk came to be."""

    def __init__(self, daemon: Daemon, seed: int) -> None:
        self.daemon = daemon
        self.content = bytearray(SIZE)
        self.writes: list[int] = [0] * (SIZE // CHUNK)
        """Per chunk the number of the last write that touched it; 0: it is not mapped."""
        self.snapshots: dict[str, tuple[bytes, list[int]]] = {}
        self._generator = random.Random(seed)
        self._count = 0

    def uri(self, name: str) -> str:
        """The NBD URI of an export."""
        return f"nbd+unix:///{name}?socket={self.daemon.socket}"

    def node(self, name: str, **further: str) -> str:
        """An export as QEMU's --image-opts name it."""
        options = {"driver": "nbd", "export": name, "server.type": "unix", "server.path": str(self.daemon.socket)}
        return ",".join(f"{key}={value}" for key, value in (options | further).items())

    def work(self, rounds: int = 24) -> None:
        """Write here and there, trim whole chunks elsewhere; all of it in one session."""
        commands = []
        for _ in range(rounds):
            self._count += 1
            pattern = self._generator.randrange(1, 256)
            if self._generator.random() < 0.8:
                length = self._generator.choice([1, 512, 4 * KIB, 65 * KIB, 300 * KIB])
                offset = self._generator.randrange(SIZE - length)
                commands.append(f"write -P {pattern} {offset} {length}")
                self.content[offset : offset + length] = bytes([pattern]) * length
                touched, number = range(offset // CHUNK, (offset + length - 1) // CHUNK + 1), self._count
            else:
                first, count = self._generator.randrange(SIZE // CHUNK - 8), self._generator.randrange(1, 8)
                commands.append(f"discard {first * CHUNK} {count * CHUNK}")
                self.content[first * CHUNK : (first + count) * CHUNK] = bytes(count * CHUNK)
                touched, number = range(first, first + count), 0
            for chunk in touched:
                self.writes[chunk] = number
        qemu_io(self.daemon, *commands)

    def snapshot(self, name: str) -> None:
        """Take a snapshot."""
        self.daemon.cli("snapshot", "create", f"v@{name}")
        self.snapshots[name] = bytes(self.content), list(self.writes)

    def sessions(self) -> list[dict[str, object]]:
        """The sessions that the daemon lists."""
        listed = json.loads(self.daemon.http("GET", "/v1/sessions")[1])["sessions"]
        assert isinstance(listed, list)
        return listed

    def changed(self, old: str, new: str) -> set[int]:
        """The chunks that differ between two snapshots."""
        before, after = self.snapshots[old][1], self.snapshots[new][1]
        return {chunk for chunk in range(SIZE // CHUNK) if before[chunk] != after[chunk]}

    def dirty_ranges(self, old: str, new: str) -> list[tuple[int, int]]:
        """What qemu-img finds in the bitmap: (offset, length). It shows what is dirty as no data (its own words)."""
        node = self.node(f"v@{new}", **{"x-dirty-bitmap": SINCE + old})
        extents = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", node))
        assert sum(extent["length"] for extent in extents) == SIZE
        return [(extent["start"], extent["length"]) for extent in extents if not extent["data"]]


def chunks_of(ranges: list[tuple[int, int]]) -> set[int]:
    """The chunks of ranges, which must be whole ones."""
    assert all(offset % CHUNK == length % CHUNK == 0 for offset, length in ranges)
    return {chunk for offset, length in ranges for chunk in range(offset // CHUNK, (offset + length) // CHUNK)}


@pytest.fixture
def disk() -> Iterator[Disk]:
    """A daemon with a volume; what it leaves must be sound."""
    with Daemon() as daemon:
        daemon.create(SIZE)
        yield Disk(daemon, seed=1)
        daemon.stop()
        daemon.check()


def test_nbdinfo_says_what_a_snapshot_is(disk: Disk) -> None:
    disk.work()
    disk.snapshot("a")
    disk.daemon.cli("volume", "resize", "v", "--size", str(2 * SIZE))
    disk.snapshot("b")
    (export,) = json.loads(run("nbdinfo", "--json", disk.uri("v@a")))["exports"]
    assert export["export-size"] == SIZE
    assert export["is_read_only"] is True
    for ability, expected in (("can_multi_conn", True), ("can_flush", True), ("can_trim", False), ("can_zero", False)):
        assert export[ability] is expected, ability
    assert export["contexts"] == ["base:allocation", "qemu:allocation-depth"]
    (export,) = json.loads(run("nbdinfo", "--json", disk.uri("v@b")))["exports"]
    assert export["export-size"] == 2 * SIZE
    assert export["contexts"] == ["base:allocation", "qemu:allocation-depth", SINCE + "a"]
    listed = json.loads(run("nbdinfo", "--json", "--list", disk.uri("")))
    assert [each["export-name"] for each in listed["exports"]] == ["v"]
    with pytest.raises(ClientFailed):
        run("nbdinfo", disk.uri("v@c"))


def test_snapshots_are_copied_as_they_were_while_the_volume_goes_on(disk: Disk, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        disk.work()
        disk.snapshot(name)
    copies = {(name, number): tmp_path / f"{name}{number}" for name in disk.snapshots for number in (1, 2)}
    readers = {
        key: subprocess.Popen(["nbdcopy", disk.uri(f"v@{key[0]}"), path], stderr=subprocess.PIPE)
        for key, path in copies.items()
    }
    disk.work()  # beside six readers
    for (name, number), reader in readers.items():
        _, said = reader.communicate(timeout=CLIENT_DEADLINE_S)
        assert reader.returncode == 0, said
        assert copies[name, number].read_bytes() == disk.snapshots[name][0], name
    head = tmp_path / "head"
    run("nbdcopy", disk.uri("v"), head)
    assert head.read_bytes() == disk.content


def test_qemu_img_converts_and_compares_a_snapshot(disk: Disk, tmp_path: Path) -> None:
    disk.work()
    disk.snapshot("a")
    disk.work()
    raw, qcow2 = tmp_path / "raw", tmp_path / "copy.qcow2"
    raw.write_bytes(disk.snapshots["a"][0])
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk.uri("v@a"), qcow2)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, qcow2)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, disk.uri("v@a"))
    with pytest.raises(ClientFailed, match="mismatch"):
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, disk.uri("v"))
    mapped = {chunk for chunk, write in enumerate(disk.snapshots["a"][1]) if write}
    extents = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", disk.uri("v@a")))
    assert chunks_of([(each["start"], each["length"]) for each in extents if each["data"]]) == mapped


def test_bitmaps_are_what_changed_and_survive_kills(disk: Disk) -> None:
    disk.work()
    disk.snapshot("a")
    disk.work()
    disk.daemon.crash_and_restart()
    disk.snapshot("b")
    disk.work()
    disk.snapshot("c")
    disk.daemon.crash_and_restart()
    for old, new in (("a", "b"), ("b", "c"), ("a", "c"), ("c", "a")):
        expected = disk.changed(old, new)
        assert expected
        assert chunks_of(disk.dirty_ranges(old, new)) == expected, (old, new)
    shown = json.loads(run("nbdinfo", f"--map={SINCE}a", "--json", disk.uri("v@c")))
    dirty = [(extent["offset"], extent["length"]) for extent in shown if extent["type"] == 1]
    assert chunks_of(dirty) == disk.changed("a", "c")


def test_an_incremental_copy_made_from_the_bitmap_alone_is_identical(disk: Disk, tmp_path: Path) -> None:
    disk.work()
    disk.snapshot("a")
    copy = tmp_path / "copy"
    run("nbdcopy", disk.uri("v@a"), copy)
    for old, new in (("a", "b"), ("b", "c")):
        disk.work()
        disk.daemon.crash_and_restart()
        disk.snapshot(new)
        disk.work(4)  # what comes after the snapshot is none of its copy's business
        ranges = disk.dirty_ranges(old, new)
        assert sum(length for _, length in ranges) < SIZE // 2, "an increment of everything proves little"
        assert copy.read_bytes() != disk.snapshots[new][0]
        for offset, length in ranges:
            part = f"driver=raw,offset={offset},size={length}"
            nbd = ",".join(f"file.{option}" for option in disk.node(f"v@{new}").split(","))
            target = f"{part},file.driver=file,file.filename={copy}"
            run("qemu-img", "convert", "-n", "--image-opts", f"{part},{nbd}", "--target-image-opts", target)
        assert copy.read_bytes() == disk.snapshots[new][0]


def test_a_snapshot_stays_what_it_is_through_revert_and_deletion_of_its_neighbours(disk: Disk, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        disk.work()
        disk.snapshot(name)
    disk.daemon.cli("snapshot", "revert", "v@a")
    disk.content[:], disk.writes[:] = disk.snapshots["a"]
    disk.work()
    disk.snapshot("d")
    assert chunks_of(disk.dirty_ranges("a", "d")) == disk.changed("a", "d")
    disk.daemon.cli("snapshot", "delete", "v@b")
    copy = tmp_path / "copy"
    for name in ("a", "c", "d"):
        run("nbdcopy", disk.uri(f"v@{name}"), copy)
        assert copy.read_bytes() == disk.snapshots[name][0], name
    assert chunks_of(disk.dirty_ranges("c", "d")) == disk.changed("c", "d"), "also across a revert"


@pytest.mark.requires("libnbd")
def test_a_snapshot_cannot_be_written_and_is_not_deleted_under_its_reader(disk: Disk) -> None:
    nbd: Any = sys.modules["nbd"]
    disk.work()
    disk.snapshot("a")
    client = nbd.NBD()
    client.set_strict_mode(0)
    client.connect_uri(disk.uri("v@a"))
    changes: list[Callable[[], object]] = [
        lambda: client.pwrite(bytes(512), 0),
        lambda: client.trim(CHUNK, 0),
        lambda: client.zero(CHUNK, 0),
    ]
    for change in changes:
        with pytest.raises(nbd.Error) as failed:
            change()
        assert failed.value.errno == "EPERM"
    assert client.pread(SIZE // 2, 0) == disk.snapshots["a"][0][: SIZE // 2]
    (session,) = disk.sessions()
    assert (session["export"], session["mode"]) == ("v@a", "ro")
    assert disk.daemon.http("DELETE", "/v1/snapshots/v@a")[0] == 409
    assert client.pread(512, 0) == disk.snapshots["a"][0][:512]
    assert disk.daemon.http("DELETE", "/v1/snapshots/v@a?force=true")[0] in (200, 202)
    disk.daemon.until(lambda: not disk.sessions(), "the session of the deleted snapshot was not closed", 10.0)
    with pytest.raises(nbd.Error):
        client.pread(512, 0)
    with pytest.raises(ClientFailed):
        run("nbdinfo", disk.uri("v@a"))
