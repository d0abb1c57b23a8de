"""A client that re-sends what was not answered must not notice that the daemon was killed and started again."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.clients import FIO_VERIFY, running
from tests.real.process import ServerProcess

KILLS = 3
MIB = 1 << 20


@contextlib.contextmanager
def fuse_file(server: ServerProcess, directory: Path) -> Iterator[Path]:
    """The volume as a file, through QEMU's NBD client with `reconnect-delay`."""
    path = directory / "disk"
    path.touch()
    pidfile = directory / "pid"
    where = {"type": "unix", "path": str(server.socket)}
    node = {"driver": "nbd", "node-name": "n", "server": where, "export": server.export, "reconnect-delay": 60}
    export = f"fuse,id=e,node-name=n,mountpoint={path},writable=on,growable=off"
    command = ("qemu-storage-daemon", "--pidfile", pidfile, "--blockdev", json.dumps(node), "--export", export)
    with running(*command) as storage_daemon:
        try:
            server.until(pidfile.exists, "qemu-storage-daemon did not start", 30.0)
            server.until(lambda: path.stat().st_size > 0, "qemu-storage-daemon did not mount", 30.0)
            yield path
        finally:
            storage_daemon.terminate()
            storage_daemon.wait(60)


@pytest.mark.requires("fio", "qemu-storage-daemon", "fuse", "root")
def test_fio_through_a_reconnecting_client_survives_kills(server: ServerProcess, tmp_path: Path) -> None:
    with fuse_file(server, tmp_path) as path:
        options = ["--ioengine=libaio", "--iodepth=16", "--rw=randwrite", "--bsrange=512-64k", "--blockalign=512"]
        options += ["--size=128M", "--fdatasync=64", "--verify=crc32c", "--do_verify=1"]
        with running("fio", "--name=v", f"--filename={path}", *options, *FIO_VERIFY, cwd=tmp_path) as fio:
            # Each kill comes when a further part of the disk has been written: a count, not a clock.
            for kill in range(1, KILLS + 1):
                written = allocated_bytes(server)
                server.until(
                    lambda written=written: allocated_bytes(server) > written + 16 * MIB,  # type: ignore[misc]
                    f"nothing more was written before kill {kill}",
                    60.0,
                )
                assert fio.poll() is None, "fio had ended before the server was killed"
                server.crash_and_restart()
                print("KILLED", kill, allocated_bytes(server))
            said, _ = fio.communicate(timeout=90)
        assert fio.returncode == 0, said


def allocated_bytes(server: ServerProcess) -> int:
    """What the server's files take: it grows while somebody writes to fresh places."""
    return sum(path.stat().st_blocks * 512 for path in server.root.rglob("*") if path.is_file())
