"""Trouble around a real daemon: damaged metadata, disks that are wrong, a second daemon. Clear words, nothing lost."""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest

from blockvirt.meta.keys import POOL_KEY, Table
from blockvirt.meta.records import PoolRecord, encode
from blockvirt.meta.store import Store, Writer
from tests.real.daemon import Daemon
from tests.real.process import ServerFailed

MIB = 1 << 20


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon with the volume v, which holds a pattern and is flushed."""
    with Daemon() as started:
        started.create(64 * MIB)
        qemu_io(started, "write -P 7 0 1M", "flush")
        yield started


def uri(daemon: Daemon, name: str = "v") -> str:
    return f"nbd+unix:///{name}?socket={daemon.socket}"


def qemu_io(daemon: Daemon, *commands: str, name: str = "v") -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", "raw", *words, uri(daemon, name)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout, done.stdout


def serve_refused(daemon: Daemon) -> str:
    """Try to start the daemon; returns what it says when it refuses."""
    done = subprocess.run(daemon.command(), capture_output=True, text=True, timeout=60, env=daemon.environment())
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


def change_metadata(daemon: Daemon, change: Callable[[Writer], None]) -> None:
    store = Store.open(daemon.state / "metadata", reserve_bytes=0)
    store.commit_now(change)
    store.close()


@pytest.mark.requires("qemu-io")
@pytest.mark.parametrize("left", ["half", "nothing", "no file"])
def test_truncated_metadata_is_refused_and_the_newest_copy_brings_it_back(daemon: Daemon, left: str) -> None:
    daemon.stop()
    daemon.start()  # makes a copy that knows v
    daemon.stop()
    data = daemon.state / "metadata" / "data.mdb"
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2 if left == "half" else 0])
    if left == "no file":
        data.unlink()
    said = serve_refused(daemon)
    (copy, *_) = sorted((daemon.device / "metadata").glob("*.mdb"), reverse=True)
    assert str(copy) in said
    assert "check --restore-metadata" in said
    daemon.cli("check", "--restore-metadata")
    daemon.start()
    qemu_io(daemon, "read -P 7 0 1M")
    daemon.stop()
    daemon.check()


@pytest.mark.requires("qemu-io")
def test_one_damaged_record_costs_one_volume(daemon: Daemon) -> None:
    daemon.cli("volume", "create", "other", "--size", "1MiB")
    victim = str(daemon.volume()["id"])
    daemon.stop()

    def damage(writer: Writer) -> None:
        stored = writer.get(Table.VOLUMES, victim.encode())
        assert stored is not None
        writer.put(Table.VOLUMES, victim.encode(), stored[:-9] + b"X" + stored[-8:])

    change_metadata(daemon, damage)
    daemon.start()
    qemu_io(daemon, "write -P 3 0 64k", "read -P 3 0 64k", name="other")
    done = subprocess.run(["nbdinfo", uri(daemon)], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    listed = json.loads(daemon.cli("volume", "list", "-o", "json"))
    states = {volume["name"]: volume["state"] for volume in listed}
    assert states == {"other": "available", "v": "damaged"}
    daemon.stop()


def test_a_pool_of_a_newer_format_is_refused_and_left_alone(daemon: Daemon) -> None:
    daemon.stop()

    def age(writer: Writer) -> None:
        pool = writer.record(PoolRecord, Table.POOL, POOL_KEY)
        assert pool is not None
        newer = PoolRecord(pool.id, 99, pool.chunk_bytes, pool.created_s, pool.epoch, pool.next_branch, pool.next_file)
        writer.put(Table.POOL, POOL_KEY, encode(POOL_KEY, newer))

    change_metadata(daemon, age)
    said = serve_refused(daemon)
    assert "format 99" in said
    assert "newer" in said


def test_a_second_daemon_is_refused_with_the_holders_pid(daemon: Daemon) -> None:
    assert str(daemon.pid) in serve_refused(daemon)
    assert daemon.volume()["name"] == "v"


@pytest.mark.requires("qemu-io", "root", "loop", "mkfs.ext4")
@pytest.mark.parametrize("trouble", ["unmounted", "read-only", "foreign"])
def test_a_wrong_disk_keeps_its_volumes_away_and_comes_back_whole(trouble: str) -> None:
    with Daemon() as daemon:
        image = daemon.root / "image"
        with image.open("wb") as file:
            file.truncate(128 * MIB)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        mount = ["mount", "-o", "loop", str(image), str(daemon.device)]
        subprocess.run(mount, check=True)
        shutil.rmtree(daemon.device / "lost+found")
        mounted = True
        try:
            daemon.create(16 * MIB)
            qemu_io(daemon, "write -P 7 0 1M", "flush")
            daemon.stop()
            if trouble == "read-only":
                subprocess.run(["mount", "-o", "remount,ro", daemon.device], check=True)
            else:
                subprocess.run(["umount", daemon.device], check=True)
                mounted = False
            if trouble == "foreign":
                with Daemon() as stranger:
                    stranger.start()
                    stranger.stop()
                    shutil.copy(stranger.device / "blockvirt-device.json", daemon.device)
            before = sorted(daemon.device.rglob("*"))
            daemon.start()
            (device,) = json.loads(daemon.http("GET", "/v1/devices")[1])["devices"]
            assert device["state"] != "online"
            assert str(daemon.device) in device["problem"]
            done = subprocess.run(["nbdinfo", uri(daemon)], capture_output=True, text=True, timeout=60)
            assert done.returncode != 0
            daemon.stop()
            assert sorted(daemon.device.rglob("*")) == before, "a wrong disk was written to"
            if trouble == "read-only":
                subprocess.run(["mount", "-o", "remount,rw", daemon.device], check=True)
            else:
                (daemon.device / "blockvirt-device.json").unlink(missing_ok=True)
                subprocess.run(mount, check=True)
                mounted = True
            daemon.start()
            qemu_io(daemon, "read -P 7 0 1M")
            daemon.stop()
            daemon.check()
        finally:
            daemon.stop()
            if mounted:
                subprocess.run(["umount", daemon.device], check=True)


@pytest.mark.requires("root", "loop", "mkfs.ext4")
def test_status_names_a_disk_that_takes_no_copy_of_the_metadata() -> None:
    with Daemon() as daemon:
        image = daemon.root / "image"
        with image.open("wb") as file:
            file.truncate(32 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(daemon.device)], check=True)
        try:
            shutil.rmtree(daemon.device / "lost+found")
            daemon.start()  # makes it a device of the pool
            daemon.stop()
            with (daemon.device / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
                while filler.write(bytes(4096)):
                    pass
            daemon.start()
            problem = f"device disk1: the metadata cannot be copied to {daemon.device / 'metadata'}: No space left"

            def named() -> bool:
                with pytest.raises(ServerFailed, match="exit code 1") as failed:
                    daemon.cli("status")
                return problem in str(failed.value)

            daemon.until(named, "status does not name the disk", 60)
            daemon.stop()
        finally:
            daemon.stop()
            subprocess.run(["umount", daemon.device], check=True)
