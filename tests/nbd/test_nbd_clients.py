"""The clients that people use, against the server in this process: libnbd, QEMU's tools, nbdcopy, fio."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockvirt.nbd import constants as c
from blockvirt.testing.memory_volume import MemoryDisk
from blockvirt.units import KIB, MIB
from tests.nbd.clients import both_transports, in_thread, run, uri
from tests.nbd.conftest import Bench

both_paths = pytest.mark.parametrize("now", [True, False], ids=["now", "slow"])


def scatter(disk: MemoryDisk, seed: int = 5) -> None:
    """Write data into some blocks, leave others alone."""
    chance = random.Random(seed)
    for number in chance.sample(range(len(disk.allocated)), len(disk.allocated) // 3):
        disk.store(number * disk.block_bytes, memoryview(chance.randbytes(disk.block_bytes)))


@pytest.mark.requires("nbdinfo")
@both_transports
async def test_nbdinfo(bench: Bench, transport: str) -> None:
    report = json.loads(await run("nbdinfo", "--json", uri(bench, transport)))
    (export,) = report["exports"]
    assert report["structured"]
    assert export["export-size"] == bench.disk.size_bytes
    assert export["contexts"] == ["base:allocation", "qemu:allocation-depth"]
    assert [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")] == [1, 4096, 32 * MIB]
    features = ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero")
    assert all(export[f"can_{feature}"] for feature in features)
    assert not export["is_read_only"]
    listed = json.loads(await run("nbdinfo", "--list", "--json", uri(bench, transport, "")))
    assert [one["export-name"] for one in listed["exports"]] == ["v"]


@pytest.mark.requires("nbdinfo")
async def test_nbdinfo_map(bench: Bench) -> None:
    bench.disk.store(MIB, memoryview(b"x"))
    extents = json.loads(await run("nbdinfo", "--map", "--json", bench.uri()))
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in extents] == [
        (0, MIB, 3),
        (MIB, 64 * KIB, 0),
        (MIB + 64 * KIB, 63 * MIB - 64 * KIB, 3),
    ]


@pytest.mark.requires("nbdcopy")
@both_transports
@both_paths
async def test_nbdcopy_both_ways(bench: Bench, transport: str, now: bool, tmp_path: Path) -> None:
    bench.disk.now = now
    scatter(bench.disk)
    image = tmp_path / "image"
    await run("nbdcopy", uri(bench, transport), image)
    assert image.read_bytes() == bench.disk.data
    bench.exports.disks["copy"] = copy = MemoryDisk(bench.disk.size_bytes, now=now)
    copy.store(0, memoryview(b"\xff" * MIB))
    await run("nbdcopy", image, uri(bench, transport, "copy"))
    assert copy.data == bench.disk.data
    assert copy.allocated == bench.disk.allocated, "holes stay holes"


@pytest.mark.requires("qemu-img", "qemu-io")
@both_paths
async def test_qemu_tools(bench: Bench, now: bool, tmp_path: Path) -> None:
    bench.disk.now = now
    commands = [
        "write -P 5 1M 3k",
        "read -P 5 1M 3k",
        "write -P 6 513 7",
        "read -P 6 513 7",
        "write -z -u 1M 1k",
        "read -P 0 1M 1k",
        "write -z 2M 64k",
        "write -f -P 9 4M 40M",
        "read -P 9 4M 40M",
        "discard 4M 16M",
        "aio_write -P 1 50M 64k",
        "aio_write -P 2 51M 64k",
        "aio_flush",
        "read -P 2 51M 64k",
        "flush",
    ]
    flags = [word for command in commands for word in ("-c", command)]
    assert "failed" not in await run("qemu-io", "-f", "raw", "-d", "unmap", *flags, bench.uri())
    image = tmp_path / "image.qcow2"
    await run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", bench.uri(), image)
    await run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", bench.uri(), image)
    bench.exports.disks["back"] = back = MemoryDisk(bench.disk.size_bytes, now=now)
    await run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", image, bench.uri("back"))
    assert back.data == bench.disk.data
    extents = json.loads(await run("qemu-img", "map", "--output=json", "-f", "raw", bench.uri()))
    data = {number for number, allocated in enumerate(bench.disk.allocated) if allocated}
    mapped: set[int] = set()
    for extent in extents:
        if extent["data"]:
            first = extent["start"] // (64 * KIB)
            mapped |= set(range(first, first + extent["length"] // (64 * KIB)))
    assert mapped == data


FIO_JOBS = {
    "4k": ["--rw=randwrite", "--bs=4k", "--size=16M", "--iodepth=32", "--verify_backlog=512"],
    "mixed sizes": ["--rw=randrw", "--bsrange=512-128k", "--blockalign=512", "--size=16M", "--iodepth=8", "--fsync=32"],
    "1M": ["--rw=write", "--bs=1M", "--size=32M", "--iodepth=4"],
    "4 jobs": ["--rw=randwrite", "--bs=4k", "--size=8M", "--numjobs=4", "--offset_increment=8M", "--iodepth=8"],
    # fio's own trim_verify_zero frees what it should not; each block trimmed, then written, in order, says as much
    "trims": ["--rw=randtrimwrite", "--bs=16k", "--size=16M", "--iodepth=8", "--serialize_overlap=1"],
}


@pytest.mark.requires("fio")
@both_transports
@both_paths
@pytest.mark.parametrize("job", FIO_JOBS)
async def test_fio_verifies_what_it_wrote(bench: Bench, transport: str, now: bool, job: str) -> None:
    bench.disk.now = now
    output = await run(
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={uri(bench, transport)}",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",  # else fio leaves its state in the current directory
        "--do_verify=1",
        "--output-format=json",
        *FIO_JOBS[job],
    )
    report = json.loads(output[output.index("{") :])
    assert all(one["error"] == 0 for one in report["jobs"])
    assert sum(one["write"]["total_ios"] for one in report["jobs"]) > 0
    stats = bench.server.stats()
    assert stats.errors == {}


@pytest.mark.requires("libnbd")
@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
async def test_libnbd_without_its_own_checks(bench: Bench, structured: bool) -> None:
    """With set_strict_mode(0) libnbd sends whatever it is told to: the server has to say no."""
    nbd: Any = sys.modules["nbd"]

    def work() -> list[str]:
        handle = nbd.NBD()
        handle.set_strict_mode(0)
        handle.set_request_structured_replies(structured)
        if structured:
            handle.add_meta_context("base:allocation")
        handle.connect_uri(bench.uri())
        size = handle.get_size()
        errors = []
        calls: list[Callable[[], object]] = [
            lambda: handle.pread(512, size),
            lambda: handle.pread(1024, 2**63 - 512),
            lambda: handle.pwrite(bytes(512), size),
            lambda: handle.zero(512, size),
            lambda: handle.trim(512, size),
            lambda: handle.cache(512, size),
            lambda: handle.pwrite(bytes(512), 0, c.CMD_FLAG_DF),
            lambda: handle.pread(33 * MIB, 0),
        ]
        for call in calls:
            try:
                call()
                errors.append("none")
            except nbd.Error as error:  # libnbd's own name for an error
                errors.append(str(error.errno))
        handle.pwrite(b"alive", 0, c.CMD_FLAG_FUA)
        assert handle.pread(5, 0) == b"alive"
        handle.flush()
        handle.shutdown()
        return errors

    errors = await in_thread(work)
    assert errors == ["EINVAL", "EINVAL", "ENOSPC", "ENOSPC", "EINVAL", "EINVAL", "EINVAL", "EINVAL"]


async def test_uvloop_serves_as_well(short_tmp_path: Path) -> None:
    """The daemon runs on uvloop: the session's own socket handling must not depend on asyncio's selector loop."""
    script = short_tmp_path / "serve.py"
    script.write_text(UVLOOP)
    output = await run(sys.executable, script, str(short_tmp_path / "s"))
    assert output == "served\n"


UVLOOP = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent.parent)!r})
import asyncio, uvloop
from blockvirt.nbd import constants as c
from blockvirt.nbd.client import NbdClient
from blockvirt.nbd.server import NbdServer
from blockvirt.testing.memory_volume import MemoryDisk, MemoryExports

async def main():
    disk = MemoryDisk(64 << 20)
    server = NbdServer(MemoryExports({{"v": disk}}))
    await server.listen_unix(sys.argv[1])
    client = await NbdClient.connect_unix(sys.argv[1])
    await client.ask_structured()
    await client.go("v")
    for now in (True, False):
        disk.now = now
        for size in (1, 4096, 1 << 20, 9 << 20):
            data = bytes([size % 251]) * size
            reads = [client.start(c.CMD_READ, 0, 1 << 20) for _ in range(20)]
            await client.write(0, data)
            assert await client.read(0, size) == data
            for read in reads:
                assert not (await read).error
    await client.flush()
    await client.disconnect()
    await server.stop()
    assert disk.open_handles == 0 and disk.unsettled_handles == 0
    print("served")

uvloop.run(main())
"""
