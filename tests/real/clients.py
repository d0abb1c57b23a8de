"""The NBD clients that people use, run to their end and judged by their exit code."""

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.real.process import ServerProcess

CLIENT_DEADLINE_S = 90.0


class ClientFailed(AssertionError):
    """A client ended in failure; carries what it said."""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a tool; its standard output. Raises ClientFailed with all of its output when it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=CLIENT_DEADLINE_S,
        cwd=cwd,
    )
    if done.returncode != 0:
        raise ClientFailed(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def qemu_io(server: ServerProcess, *commands: str) -> str:
    """qemu-io commands on one connection, in order; a pattern that does not match is a ClientFailed."""
    flags = [word for command in commands for word in ("-c", command)]
    # Always raw: guessing the format of a guest's disk is CVE-2026-24708.
    return run("qemu-io", "-f", "raw", "-d", "unmap", *flags, server.uri)


@contextlib.contextmanager
def running(*command: str | Path, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A tool that runs during the block, its output in a pipe; it is killed if it still runs at the end."""
    words = [str(word) for word in command]
    with subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


FIO_VERIFY = (
    "--verify_fatal=1",  # the first wrong block ends the job with an error
    "--verify_dump=0",  # no files of received and expected blocks in the current directory
    "--exitall_on_error",
    "--group_reporting",
    "--randrepeat=1",
)


def fio(server: ServerProcess, directory: Path, *options: str) -> str:
    """One fio run with its nbd engine against the volume, in `directory` (fio leaves its state files there).

    Quirks of fio 3.33's engine: the URI may hold an export name and `?socket=` (nothing in it needs escaping); a
    missing export fails the run; each job is one connection (and a process); it cannot `fdatasync=`, only `fsync=`,
    which it sends as a FLUSH; it prints "connected to NBD server" before the JSON on standard output, so ask for
    `--output=FILE`.
    """
    return run("fio", "--ioengine=nbd", f"--uri={server.uri}", *options, cwd=directory)


@contextlib.contextmanager
def loop_device(server: ServerProcess, directory: Path) -> Iterator[Path]:
    """The volume as a block device of this kernel: nbdfuse makes a file of it, losetup a device of the file."""
    mountpoint = directory / "fuse"
    mountpoint.mkdir()
    pidfile = directory / "nbdfuse.pid"
    with running("nbdfuse", "-P", pidfile, mountpoint / "nbd", server.uri) as nbdfuse:
        try:
            # nbdfuse writes the file when the mount answers.
            server.until(pidfile.exists, f"nbdfuse did not mount {server.uri}", 30.0)
            device = run("losetup", "--find", "--show", mountpoint / "nbd").strip()
            try:
                yield Path(device)
            finally:
                run("losetup", "--detach", device)
        finally:
            # Lazily: after a failure something may still hold it, and nbdfuse must end in any case.
            subprocess.run(["fusermount3", "-u", "-z", str(mountpoint)], check=False)
            nbdfuse.wait(30)


@contextlib.contextmanager
def mounted(device: Path, mountpoint: Path, options: Sequence[str] = ()) -> Iterator[Path]:
    """A filesystem mounted for the block's duration."""
    mountpoint.mkdir(exist_ok=True)
    flags = ["-o", ",".join(options)] if options else []
    run("mount", *flags, device, mountpoint)
    try:
        yield mountpoint
    finally:
        run("umount", mountpoint)
