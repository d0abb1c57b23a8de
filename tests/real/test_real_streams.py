"""A chain of snapshots carried from one daemon to another through pipes, by the commands that people type."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from blockvirt.nbd.client import NbdClient
from tests.real.daemon import Daemon

MIB = 1 << 20
SIZE = 24 * MIB
DEADLINE_S = 60.0


@pytest.fixture
def daemons() -> Iterator[tuple[Daemon, Daemon]]:
    """Two running daemons, the first with a volume `v`; what they leave behind must be sound."""
    with ExitStack() as stack:
        here, there = stack.enter_context(Daemon()), stack.enter_context(Daemon())
        here.create(SIZE)
        there.start()
        yield here, there
        for daemon in (here, there):
            daemon.stop()
            daemon.check()


def command(daemon: Daemon, *words: str) -> list[str]:
    return [*daemon.command()[:5], *words]


def begun(daemon: Daemon, *words: str, **pipes: Any) -> subprocess.Popen[bytes]:
    """A command that is at work."""
    return subprocess.Popen(command(daemon, *words), env=daemon.environment(), **pipes)


def exported(daemon: Daemon, *words: str) -> bytes:
    """The stream that a command writes."""
    done = subprocess.run(
        command(daemon, "snapshot", "export", *words),
        env=daemon.environment(),
        capture_output=True,
        check=True,
        timeout=DEADLINE_S,
    )
    assert done.stderr == b""
    return done.stdout


def imported(daemon: Daemon, volume: str, stream: bytes) -> subprocess.CompletedProcess[bytes]:
    """What became of an import."""
    return subprocess.run(
        command(daemon, "snapshot", "import", volume, "-o", "json"),
        env=daemon.environment(),
        input=stream,
        capture_output=True,
        check=False,
        timeout=DEADLINE_S,
    )


def volumes(daemon: Daemon) -> list[str]:
    return [each["name"] for each in json.loads(daemon.cli("volume", "list", "-o", "json"))]


def snapshots(daemon: Daemon, volume: str) -> list[str]:
    return [each["name"] for each in json.loads(daemon.cli("snapshot", "list", volume, "-o", "json"))]


async def write(daemon: Daemon, seed: int, writes: int = 12) -> None:
    """Write, zero and trim here and there in `v`."""
    dice = random.Random(seed)
    async with await NbdClient.connect_unix(str(daemon.socket)) as client:
        await client.go("v")
        for _ in range(writes):
            offset, length = dice.randrange(0, SIZE - MIB), dice.randrange(1, MIB)
            if dice.random() < 0.8:
                await client.write(offset, dice.randbytes(length))
            else:
                await client.trim(offset, length)
        await client.disconnect()


async def content(daemon: Daemon, export: str) -> bytes:
    """All that an export holds, read by NBD."""
    async with await NbdClient.connect_unix(str(daemon.socket)) as client:
        await client.go(export)
        found = b"".join([await client.read(at, MIB) for at in range(0, SIZE, MIB)])
        await client.disconnect()
        return found


async def test_a_chain_is_carried_through_a_pipe(daemons: tuple[Daemon, Daemon], tmp_path: Path) -> None:
    here, there = daemons
    await write(here, 0)
    here.cli("snapshot", "create", "v@s0", "--label", "team=web")
    with (
        begun(here, "snapshot", "export", "v@s0", stdout=subprocess.PIPE) as sender,
        begun(there, "snapshot", "import", "copy", stdin=sender.stdout, stdout=subprocess.PIPE) as receiver,
    ):
        out, _ = receiver.communicate(timeout=DEADLINE_S)
        assert (sender.wait(DEADLINE_S), receiver.returncode) == (0, 0)
    assert b"copy@s0" in out
    for number in range(1, 4):
        await write(here, number, 4)
        here.cli("snapshot", "create", f"v@s{number}")
    # Two of them in one file, as 'cat' would put them; then the last by itself.
    stream = exported(here, "v@s1", "--since", "v@s0") + exported(here, "v@s2", "--since", "v@s1")
    done = imported(there, "copy", stream)
    assert [each["name"] for each in json.loads(done.stdout)] == ["s1", "s2"], done.stderr
    assert imported(there, "copy", exported(here, "v@s3", "--since", "v@s2")).returncode == 0
    assert snapshots(there, "copy") == ["s0", "s1", "s2", "s3"]
    for number in range(4):
        assert await content(there, f"copy@s{number}") == await content(here, f"v@s{number}")
    assert await content(there, "copy") == await content(here, "v")


async def test_what_is_refused_says_so_by_its_exit_code(daemons: tuple[Daemon, Daemon]) -> None:
    here, there = daemons
    await write(here, 0)
    here.cli("snapshot", "create", "v@s0")
    await write(here, 1, 2)
    here.cli("snapshot", "create", "v@s1")
    whole, later = exported(here, "v@s0"), exported(here, "v@s1", "--since", "v@s0")
    assert imported(there, "copy", later).returncode == 4
    assert imported(there, "copy", whole[: len(whole) // 2]).returncode == 1
    altered = bytearray(whole)
    altered[len(whole) // 2] ^= 1
    refused = imported(there, "copy", bytes(altered))
    assert (refused.returncode, json.loads(refused.stderr)["code"]) == (1, "stream-damaged")
    assert imported(there, "copy", b"").returncode == 1
    assert volumes(there) == []
    half = imported(there, "copy", whole + later[:-1])
    assert (half.returncode, json.loads(half.stderr)["details"]["imported"]) == (1, ["s0"])
    assert imported(there, "copy", whole).returncode == 5
    assert snapshots(there, "copy") == ["s0"]
    missing = subprocess.run(command(here, "snapshot", "export", "v@none"), capture_output=True, check=False)
    assert (missing.returncode, missing.stdout) == (4, b"")
    assert b"v@none" in missing.stderr or b"'none'" in missing.stderr


def send_half(daemon: Daemon, receiver: subprocess.Popen[bytes], stream: bytes) -> None:
    """Send half of a stream, and return when it has been applied as far as it can be."""
    assert receiver.stdin is not None
    receiver.stdin.write(stream[: len(stream) // 2])
    receiver.stdin.flush()

    def arrived() -> bool:
        status, body = daemon.http("GET", "/v1/volumes/copy")
        return status == 200 and json.loads(body)["mapped_bytes"] > 2 * MIB

    daemon.until(arrived, "nothing of the stream has come in", DEADLINE_S)


@pytest.mark.parametrize("base", [False, True], ids=["new", "base"])
@pytest.mark.parametrize("end", ["kill -9 of the daemon", "ctrl-C", "kill -9 of the sender"])
async def test_half_a_stream_leaves_nothing(daemons: tuple[Daemon, Daemon], base: bool, end: str) -> None:
    here, there = daemons
    before = b""
    if base:
        await write(here, 7, 2)
        here.cli("snapshot", "create", "v@base")
        assert imported(there, "copy", exported(here, "v@base")).returncode == 0
        before = await content(there, "copy")
    await write(here, 0, 24)
    here.cli("snapshot", "create", "v@s")
    stream = exported(here, "v@s", *(("--since", "v@base") if base else ()))
    with begun(there, "snapshot", "import", "copy", stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as receiver:
        send_half(there, receiver, stream)
        if end == "kill -9 of the daemon":
            there.crash_and_restart()
            receiver.kill()
        else:
            receiver.send_signal(signal.SIGINT if end == "ctrl-C" else signal.SIGKILL)
        code = receiver.wait(DEADLINE_S)
    assert end != "ctrl-C" or code == 130
    there.until(lambda: _is_free(there, base), "the import is not taken back", DEADLINE_S)
    assert volumes(there) == (["copy"] if base else [])
    if base:
        assert snapshots(there, "copy") == ["base"]
        assert await content(there, "copy") == before
    assert imported(there, "copy", stream).returncode == 0
    assert await content(there, "copy@s") == await content(here, "v@s")


def _is_free(daemon: Daemon, base: bool) -> bool:
    """Whether the volume is what it was, and may be used again."""
    return daemon.http("GET", "/v1/volumes/copy/changes")[0] == 200 if base else not volumes(daemon)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 96 MiB."""
    image, folder = tmp_path / "image", tmp_path / "small"
    with image.open("wb") as file:
        file.truncate(96 * MIB)
    folder.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    (folder / "pool").mkdir(mode=0o700)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def take_space(folder: Path, but_bytes: int = 0) -> Path:
    """Take all of a filesystem but so much, as another program would; returns the file that holds it."""
    filler = folder / "filler"
    filesystem = os.statvfs(folder)
    with filler.open("wb", buffering=0) as file:
        if but_bytes:
            os.posix_fallocate(file.fileno(), 0, filesystem.f_bavail * filesystem.f_frsize - but_bytes)
            return filler
        with contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
    return filler


def files_of(folder: Path) -> set[str]:
    """The files that hold something; what is never trimmed holds it as long as its volume lives."""
    return {path.name for path in (folder / "files").iterdir() if path.stat().st_blocks}


async def go_on_writing(client: NbdClient, ended: asyncio.Event) -> int:
    """Write what is mapped already, again and again, as a guest does beside an import; returns how often."""
    rounds = 0
    while not ended.is_set():
        rounds += 1
        for at in range(4):
            await client.write(at * MIB, bytes([rounds % 251 + 1]) * 65536)
        await client.flush()
    return rounds


async def cut_off(there: Daemon, stream: bytes, disk: Path) -> tuple[int, bytes]:
    """Import a stream, half way through which another program takes all the space; exit code and standard error."""
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    with begun(there, "snapshot", "import", "copy", "-o", "json", **pipes) as receiver:
        await asyncio.to_thread(send_half, there, receiver, stream)
        take_space(disk)
        _, said = await asyncio.to_thread(receiver.communicate, stream[len(stream) // 2 :], DEADLINE_S)
        return receiver.returncode, said


@pytest.mark.requires("root", "loop", "mkfs.ext4")
@pytest.mark.parametrize("filled_by", ["the import", "another program"])
@pytest.mark.parametrize("base", [False, True], ids=["new", "base"])
async def test_a_disk_that_fills_up_during_an_import(
    small_disk: Path, daemons: tuple[Daemon, Daemon], base: bool, filled_by: str
) -> None:
    here, there = daemons
    there.cli("device", "add", str(small_disk / "pool"), "--reserve", "0")
    there.cli("device", "remove", "disk1")
    there.device = small_disk / "pool"
    there.cli("volume", "create", "v", "--size", "8MiB")
    if base:
        here.cli("snapshot", "create", "v@base")
        assert imported(there, "copy", exported(here, "v@base")).returncode == 0
    async with await NbdClient.connect_unix(str(here.socket)) as source:
        await source.go("v")
        for at in range(0, SIZE, MIB):
            await source.write(at, random.Random(at).randbytes(MIB))
        await source.disconnect()
    here.cli("snapshot", "create", "v@s")
    stream = exported(here, "v@s", *(("--since", "v@base") if base else ()))
    async with await NbdClient.connect_unix(str(there.socket)) as guest:
        await guest.go("v")
        for at in range(4):
            await guest.write(at * MIB, bytes(65536))
        await guest.flush()
        before = files_of(small_disk / "pool")
        ended = asyncio.Event()
        writing = asyncio.create_task(go_on_writing(guest, ended))
        if filled_by == "the import":
            take_space(small_disk, SIZE // 2)
            done = await asyncio.to_thread(imported, there, "copy", stream)
            code, said = done.returncode, done.stderr
        else:
            code, said = await cut_off(there, stream, small_disk)
        assert (code, json.loads(said)["code"]) == (6, "pool-full"), said
        there.until(lambda: files_of(small_disk / "pool") == before, "its space is not given back", DEADLINE_S)
        ended.set()
        rounds = await writing
        assert sorted(volumes(there)) == (["copy", "v"] if base else ["v"])
        await guest.write(5 * MIB, b"there is room again")
        assert await guest.read(3 * MIB, 65536) == bytes([rounds % 251 + 1]) * 65536
        await guest.disconnect()
    there.stop()
    there.check()
    there.start()
    if base:
        assert snapshots(there, "copy") == ["base"]
        assert await content(there, "copy") == bytes(SIZE)
    (small_disk / "filler").unlink()
    assert imported(there, "copy", stream).returncode == 0
    assert await content(there, "copy@s") == await content(here, "v@s")
