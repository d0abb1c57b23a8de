"""Failing disks under the store: every write and sync fails once, a filesystem fills up, one is shut down.

What was acknowledged is there afterwards, what was refused is not, and after a failure for another reason than space
nothing more is acknowledged (I7). On a full filesystem commits go on within the reserve (I10).
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blockvirt.errors import MetadataFault, PoolFull
from blockvirt.meta.keys import Table
from blockvirt.meta.reserve import Reserve
from blockvirt.meta.store import Store, Writer
from blockvirt.units import MIB

COMMITS = 4

CHILD = """
import asyncio, sys
from pathlib import Path
from blockvirt.errors import BlockvirtError
from blockvirt.meta.keys import Table
from blockvirt.meta.store import Store

async def main():
    store = Store.open(Path(sys.argv[1]), reserve_bytes=0)
    store.on_failure(lambda fault: print("latched", type(fault).__name__, flush=True))
    print("open", flush=True)
    for number in range(int(sys.argv[2])):
        def change(writer):
            for row in range(8):
                writer.put(Table.FILES, b"%d-%d" % (number, row), bytes(2000))
        try:
            await store.commit(change)
            print("committed", number, flush=True)
        except BlockvirtError as error:
            print(type(error).__name__, number, flush=True)
    await asyncio.sleep(0)
    try:
        with store.read() as reader:
            print("readable", reader.count(Table.FILES), flush=True)
    except BlockvirtError as error:
        print("unreadable", type(error).__name__, flush=True)
    store.close()

asyncio.run(main())
"""


def run_child(path: Path, syscall: str, error: str, when: int) -> list[list[str]]:
    """Run the child with the n-th such call on data.mdb failing; returns its lines, in words."""
    inject = f"inject={syscall}:error={error}:when={when}"
    strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(path / "data.mdb"), "-e", f"trace={syscall}"]
    done = subprocess.run(
        [*strace, "-e", inject, sys.executable, "-c", CHILD, str(path), str(COMMITS)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


# On the data file: pages (writev for runs, pwrite64 for one), the sync behind them, the meta page (pwrite64 as well).
CALLS = [("fdatasync", COMMITS), ("pwrite64", COMMITS + 2), ("writev", COMMITS + 1)]


@pytest.mark.requires("strace")
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize(("syscall", "calls"), CALLS)
def test_each_call_that_fails(tmp_path: Path, syscall: str, calls: int, error: str) -> None:
    failed = 0
    for when in range(1, calls + 1):
        path = tmp_path / f"store-{when}"
        Store.open(path, create=True, reserve_bytes=0).close()
        lines = run_child(path, syscall, error, when)
        assert lines[0] == ["open"]
        results = {
            int(number[0]): what for what, *number in lines[1:] if what not in ("latched", "readable", "unreadable")
        }
        assert sorted(results) == list(range(COMMITS))
        committed = [number for number, what in results.items() if what == "committed"]
        refused = {what for what in results.values() if what != "committed"}
        failed += bool(refused)
        if "MetadataFault" in refused:
            assert ["latched", "MetadataFault"] in lines
            assert lines[-1] == ["unreadable", "MetadataFault"]
            first = min(number for number, what in results.items() if what == "MetadataFault")
            assert all(results[number] == "MetadataFault" for number in range(first, COMMITS))
        else:
            assert refused <= {"PoolFull"}
            assert error == "ENOSPC"
            assert lines[-1] == ["readable", str(8 * len(committed))]
        again = Store.open(path, reserve_bytes=0)
        with again.read() as reader:
            rows = [key for key, _ in reader.scan(Table.FILES)]
        again.close()
        assert rows == sorted(b"%d-%d" % (number, row) for number in committed for row in range(8)), (when, results)
    assert failed == calls, "each of them failed something"


async def test_a_latched_store_refuses_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path / "metadata", create=True, reserve_bytes=0)
    told: list[MetadataFault] = []
    store.on_failure(told.append)
    store._fail(OSError(5, "Input/output error"))
    await asyncio.sleep(0)
    assert [fault.cause for fault in told] == ["[Errno 5] Input/output error"]
    errors: list[BaseException] = []
    for _ in range(2):
        with pytest.raises(MetadataFault) as caught:
            await store.commit(lambda writer: None)
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    for call in (lambda: store.commit_now(lambda writer: None), store.stats, lambda: store.read().__enter__()):
        with pytest.raises(MetadataFault, match="has failed and is stopped"):
            call()
    store.on_failure(told.append)
    assert len(told) == 2, "who asks late is told at once"
    store.close()


def fill_up(directory: Path) -> None:
    """Take every free block of the filesystem."""
    number = 0
    for size_bytes in (1 << 20, 1 << 16, 4096, 512):
        while True:
            try:
                with (directory / f"filler-{number}").open("wb", buffering=0) as file:
                    while file.write(bytes(size_bytes)) == size_bytes:
                        pass
            except OSError:
                break
            finally:
                number += 1
    fd = os.open(directory, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def rows(table: Table, first: int, count: int) -> Callable[[Writer], None]:
    """A change that puts rows of a page each."""

    def change(writer: Writer) -> None:
        for number in range(first, first + count):
            writer.put(table, b"%08d" % number, bytes(3000))

    return change


def without(table: Table, first: int, count: int) -> Callable[[Writer], None]:
    """A change that deletes such rows."""

    def change(writer: Writer) -> None:
        for number in range(first, first + count):
            assert writer.delete(table, b"%08d" % number)

    return change


@pytest.mark.requires("root", "loop", "mkfs.ext4", "mkfs.xfs")
@pytest.mark.parametrize(("fs_type", "size_mib"), [("ext4", 48), ("xfs", 320)])
async def test_commits_go_on_within_the_reserve_of_a_full_filesystem(
    make_filesystem: Callable[[str, int], Path], fs_type: str, size_mib: int
) -> None:
    disk = make_filesystem(fs_type, size_mib)
    store = Store.open(disk / "metadata", create=True, reserve_bytes=4 * MIB)
    await store.commit(rows(Table.LEAVES, 0, 1000))
    assert store.reserve_ok
    fill_up(disk)
    assert os.statvfs(disk).f_bavail < 64
    batches = 0
    while store.reserve_ok:  # what was allocated ahead of the reserve goes first
        await store.commit(rows(Table.BORN, batches * 20, 20))
        batches += 1
    for number in range(20):  # 4 MiB are ~1000 pages: twenty commits of twenty pages fit with all that they copy
        await store.commit(rows(Table.PUNCH, number * 20, 20))
    for first in range(0, 1000, 50):
        await store.commit(without(Table.LEAVES, first, 50))
    assert store.stats().entries["leaves"] == 0
    assert store.stats().entries["punch"] == 400
    assert not store.reserve_ok
    fresh = 0
    refusal: PoolFull | None = None
    while refusal is None:
        try:
            await store.commit(rows(Table.LEAVES, fresh, 200))
            fresh += 200
        except PoolFull as error:
            refusal = error
    assert "free space" in refusal.correction
    entries = store.stats().entries
    assert entries["leaves"] == fresh, "the one that failed left nothing behind"
    for filler in sorted(disk.glob("filler-*"))[:3]:
        filler.unlink()
    assert await store.check_reserve()
    await store.commit(rows(Table.LEAVES, fresh, 200))
    store.close()
    again = Store.open(disk / "metadata", reserve_bytes=4 * MIB)
    assert again.stats().entries == entries | {"leaves": fresh + 200}
    assert again.reserve_ok
    again.close()


@pytest.mark.requires("root", "loop", "mkfs.ext4", "mkfs.xfs", "xfs_io")
@pytest.mark.parametrize(("fs_type", "size_mib"), [("ext4", 48), ("xfs", 320)])
async def test_a_filesystem_that_fails_stops_the_store(
    make_filesystem: Callable[[str, int], Path], fs_type: str, size_mib: int
) -> None:
    disk = make_filesystem(fs_type, size_mib)
    store = Store.open(disk / "metadata", create=True, reserve_bytes=MIB)
    failed: asyncio.Future[MetadataFault] = asyncio.get_running_loop().create_future()
    store.on_failure(failed.set_result)
    await store.commit(rows(Table.LEAVES, 0, 10))
    subprocess.run(["xfs_io", "-x", "-c", "shutdown", str(disk)], check=True, capture_output=True)
    with pytest.raises(MetadataFault, match="has failed and is stopped"):
        await store.commit(rows(Table.LEAVES, 10, 10))
    assert "restart the daemon" in (await failed).correction
    with pytest.raises(MetadataFault), store.read():
        pass
    store.close()


def test_a_filesystem_that_cannot_allocate_ahead_counts_free_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.mdb").touch()

    def unsupported(fd: int, offset: int, length: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("blockvirt.meta.reserve.syscalls.allocate_keep_size", unsupported)
    reserve = Reserve(tmp_path / "data.mdb", MIB)
    reserve.top_up(0)
    assert reserve.whole
    reserve.close()
    huge = Reserve(tmp_path / "data.mdb", 1 << 60)
    huge.top_up(0)
    assert not huge.whole
    huge.close()
    huge.close()
