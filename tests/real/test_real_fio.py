"""fio writes checksummed blocks and reads them back: in flight, over several connections, with trims, after SIGKILL.

The kill tests are those of I3b: fio remembers which writes were answered (`verify_state_save`), the trigger kills the
server while many are in flight, and the verify-only run after the restart demands every one of them.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.real.clients import FIO_VERIFY, ClientFailed, fio, qemu_io, run
from tests.real.peers import ForgetfulQemuNbd, LyingQemuNbd
from tests.real.process import ServerProcess

MIB = 1 << 20

MANY_IN_FLIGHT = ("--rw=randwrite", "--bs=4k", "--iodepth=32")
RANDOM_WRITES = ("--name=v", *MANY_IN_FLIGHT, "--size=64M", "--verify=crc32c", *FIO_VERIFY)
VERIFY_ONLY = ("--verify_only=1", "--verify_state_load=1")


pytestmark = pytest.mark.requires("fio", "nbdcopy", "qemu-io", "qemu-nbd")


def test_pipelined_random_writes(server: ServerProcess, tmp_path: Path) -> None:
    fio(server, tmp_path, *RANDOM_WRITES, "--do_verify=1", "--verify_backlog=1024")


def test_every_block_size_and_alignment(server: ServerProcess, tmp_path: Path) -> None:
    sizes = ("--bsrange=512-128k", "--blockalign=512", "--verify=md5", "--fsync=32")
    fio(server, tmp_path, "--name=v", "--rw=randrw", "--size=32M", "--iodepth=16", *sizes, *FIO_VERIFY)


def test_four_connections_at_once(server: ServerProcess, tmp_path: Path) -> None:
    apart = ("--numjobs=4", "--offset_increment=64M", "--size=24M")
    what = ("--rw=randwrite", "--bsrange=4k-64k", "--iodepth=16", "--verify=crc32c", "--do_verify=1", "--fsync=64")
    fio(server, tmp_path, "--name=v", *apart, *what, *FIO_VERIFY)


def test_four_connections_inside_the_same_chunks(server: ServerProcess, tmp_path: Path) -> None:
    # Interleaved by 4 KiB: each job writes every fourth block, so all four change each 64 KiB chunk.
    jobs: list[str] = []
    for job in range(4):
        jobs += [f"--name=j{job}", f"--offset={job * 4}k", "--rw=write:12k", "--bs=4k", "--size=16M", "--io_size=4M"]
        jobs += ["--iodepth=8", "--verify=crc32c", "--do_verify=1", *FIO_VERIFY]
    fio(server, tmp_path, *jobs)


def test_every_block_trimmed_then_written_again(server: ServerProcess, tmp_path: Path) -> None:
    # Without serialize_overlap fio has the trim and the write of one block in flight together, in no order.
    fio(server, tmp_path, *RANDOM_WRITES, "--rw=randtrimwrite", "--size=24M", "--serialize_overlap=1", "--do_verify=1")


def test_trims_while_others_write_hit_what_they_name_and_nothing_else(server: ServerProcess, tmp_path: Path) -> None:
    qemu_io(server, "write -P 0x77 0 16M")
    trims = ("--name=trims", "--rw=trim:4k", "--bs=4k", "--size=16M", "--io_size=8M", "--iodepth=8")
    writes = ("--name=writes", *MANY_IN_FLIGHT, "--offset=16M", "--size=16M", "--verify=crc32c", "--do_verify=1")
    fio(server, tmp_path, *trims, *writes, *FIO_VERIFY)
    copy = tmp_path / "copy"
    run("nbdcopy", server.uri, copy)
    with copy.open("rb") as stream:
        content = stream.read(16 * MIB)
    assert content == (bytes(4096) + b"\x77" * 4096) * (16 * MIB // 8192)


def test_a_block_zeroed_behind_its_back_is_noticed(server: ServerProcess, tmp_path: Path) -> None:
    fio(server, tmp_path, *RANDOM_WRITES, "--do_verify=0", "--verify_state_save=1")
    fio(server, tmp_path, *RANDOM_WRITES, *VERIFY_ONLY)
    qemu_io(server, f"write -z {20 * MIB} 4k")
    with pytest.raises(ClientFailed, match="verify"):
        fio(server, tmp_path, *RANDOM_WRITES, *VERIFY_ONLY)


def crash_while_fio_writes(server: ServerProcess, directory: Path, *options: str) -> None:
    """SIGKILL the server a second into fio's writes (by fio's trigger), restart it, and demand every answered write."""
    # At this rate the 160 MiB take two seconds, so the trigger comes in the middle of them on any machine.
    job = (*RANDOM_WRITES, "--size=160M", *options)
    save = ("--rate_iops=20000", "--do_verify=0", "--verify_state_save=1")
    fio(server, directory, *job, *save, "--trigger-timeout=1", f"--trigger=kill -9 {server.pid}")
    server.reap()
    server.start()
    report = directory / "verified.json"
    fio(server, directory, *job, *VERIFY_ONLY, "--output-format=json", f"--output={report}")
    (done,) = json.loads(report.read_text())["jobs"]
    assert done["read"]["total_ios"] > 1000, "fio had nothing to verify"


def test_sigkill_loses_no_answered_write(server: ServerProcess, tmp_path: Path) -> None:
    crash_while_fio_writes(server, tmp_path)


def test_sigkill_between_flushes_loses_no_answered_write(server: ServerProcess, tmp_path: Path) -> None:
    crash_while_fio_writes(server, tmp_path, "--fsync=50")


def test_sigkill_of_a_server_that_forgets_is_noticed(
    control: Callable[[Callable[[], ServerProcess]], ServerProcess], tmp_path: Path
) -> None:
    with pytest.raises(ClientFailed, match="verify"):
        crash_while_fio_writes(control(ForgetfulQemuNbd), tmp_path)


def test_sigkill_of_a_server_that_lies_about_flushes_is_noticed(
    control: Callable[[Callable[[], ServerProcess]], ServerProcess], tmp_path: Path
) -> None:
    with pytest.raises(ClientFailed, match="verify"):
        crash_while_fio_writes(control(LyingQemuNbd), tmp_path, "--fsync=50")
