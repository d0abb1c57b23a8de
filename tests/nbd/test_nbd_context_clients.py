"""Metadata contexts and read-only exports as other people's clients see them: libnbd, nbdinfo, qemu-img, nbdcopy."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockvirt.device import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_SINCE, Capabilities
from blockvirt.testing.memory_volume import MemoryDisk
from blockvirt.units import KIB
from tests.nbd.clients import both_transports, in_thread, run, uri
from tests.nbd.conftest import Bench

BLOCK = 64 * KIB
NAME = "v@monday"
DIRTY_A, DIRTY_B = DIRTY_SINCE + "a", DIRTY_SINCE + "b"
DEPTHS = [(BLOCK, 3), (BLOCK, 2), (BLOCK, 1), (5 * BLOCK, 0)]
DIRTY = [(BLOCK, 0), (2 * BLOCK, 1), (5 * BLOCK, 0)]


@pytest.fixture
def snapshot(bench: Bench) -> MemoryDisk:
    """A read-only export of three layers: blocks 0 and 1 before mark a, 1 and 2 after it, 2 after mark b."""
    disk = MemoryDisk(8 * BLOCK, capabilities=Capabilities(read_only=True))
    disk.store(0, memoryview(b"0" * 2 * BLOCK))
    disk.mark("a")
    disk.store(BLOCK, memoryview(b"1" * 2 * BLOCK))
    disk.mark("b")
    disk.store(2 * BLOCK, memoryview(b"2" * BLOCK))
    bench.exports.disks[NAME] = disk
    return disk


def runs(extents: list[dict[str, Any]], key: str) -> list[tuple[int, Any]]:
    """(length, value) of extents that must lie end to end."""
    at = 0
    for extent in extents:
        assert extent.get("offset", extent.get("start")) == at
        at += extent["length"]
    return [(extent["length"], extent[key]) for extent in extents]


@pytest.mark.requires("nbdinfo")
@both_transports
async def test_nbdinfo_lists_contexts_of_every_export(bench: Bench, snapshot: MemoryDisk, transport: str) -> None:
    listed = json.loads(await run("nbdinfo", "--json", "--list", uri(bench, transport, "")))
    exports = {export["export-name"]: export for export in listed["exports"]}
    assert set(exports) == {"v", NAME}
    assert exports["v"]["contexts"] == [BASE_ALLOCATION, ALLOCATION_DEPTH]
    assert exports[NAME]["contexts"] == [BASE_ALLOCATION, ALLOCATION_DEPTH, DIRTY_A, DIRTY_B]
    assert [exports[name]["is_read_only"] for name in ("v", NAME)] == [False, True]
    assert exports[NAME]["can_multi_conn"]
    assert exports[NAME]["can_flush"]
    assert not exports[NAME]["can_trim"]
    assert not exports[NAME]["can_zero"]


@pytest.mark.requires("nbdinfo")
@pytest.mark.parametrize(("context", "expected"), [(ALLOCATION_DEPTH, DEPTHS), (DIRTY_A, DIRTY)])
async def test_nbdinfo_maps_a_context(
    bench: Bench, snapshot: MemoryDisk, context: str, expected: list[tuple[int, int]]
) -> None:
    extents = json.loads(await run("nbdinfo", f"--map={context}", "--json", bench.uri(NAME)))
    assert runs(extents, "type") == expected


@pytest.mark.requires("qemu-img")
@both_transports
async def test_qemu_img_maps_a_dirty_bitmap(bench: Bench, snapshot: MemoryDisk, transport: str) -> None:
    """QEMU shows what is dirty as unallocated (x-dirty-bitmap is its own experiment)."""
    server = (
        f"server.type=unix,server.path={bench.path}"
        if transport == "unix"
        else f"server.type=inet,server.host=127.0.0.1,server.port={bench.address[1]}"
    )
    options = f"driver=nbd,export={NAME},{server},x-dirty-bitmap={DIRTY_A}"
    extents = json.loads(await run("qemu-img", "map", "--output=json", "--image-opts", options))
    assert runs(extents, "data") == [(length, not dirty) for length, dirty in DIRTY]
    assert bench.exports.handles[-1].contexts == (DIRTY_A,)


@pytest.mark.requires("nbdcopy", "qemu-img")
async def test_a_read_only_export_is_copied(bench: Bench, snapshot: MemoryDisk, tmp_path: Path) -> None:
    for command in (
        ("nbdcopy", bench.uri(NAME), tmp_path / "nbdcopy"),
        ("qemu-img", "convert", "-f", "raw", "-O", "raw", bench.uri(NAME), tmp_path / "qemu-img"),
    ):
        await run(*command)
        assert Path(command[-1]).read_bytes() == snapshot.data


@pytest.mark.requires("libnbd")
async def test_libnbd_asks_for_several_contexts(bench: Bench, snapshot: MemoryDisk) -> None:
    nbd: Any = sys.modules["nbd"]

    def work() -> tuple[list[str], dict[str, list[tuple[int, int]]], list[str]]:
        handle = nbd.NBD()
        handle.set_opt_mode(True)
        handle.set_strict_mode(0)
        handle.connect_uri(bench.uri(NAME))
        listed: list[str] = []
        handle.add_meta_context("qemu:dirty-bitmap:")
        handle.opt_list_meta_context(lambda name: listed.append(name))
        handle.clear_meta_contexts()
        for context in (DIRTY_A, "qemu:dirty-bitmap:never", ALLOCATION_DEPTH, BASE_ALLOCATION):
            handle.add_meta_context(context)
        handle.opt_go()
        assert not handle.can_meta_context("qemu:dirty-bitmap:never")
        assert handle.is_read_only()
        found: dict[str, list[tuple[int, int]]] = {}

        def note(context: str, _offset: int, entries: list[int], _error: Any) -> int:
            assert context not in found
            found[context] = list(zip(entries[::2], entries[1::2], strict=True))
            return 0

        handle.block_status(handle.get_size(), 0, note)
        errors = []
        calls: list[Callable[[], object]] = [
            lambda: handle.pwrite(bytes(512), 0),
            lambda: handle.trim(512, 0),
            lambda: handle.zero(512, 0),
        ]
        for call in calls:
            with pytest.raises(nbd.Error) as failed:
                call()
            errors.append(failed.value.errno)
        handle.flush()
        assert handle.pread(1, 2 * BLOCK) == b"2"
        handle.shutdown()
        return listed, found, errors

    listed, found, errors = await in_thread(work)
    assert listed == [DIRTY_A, DIRTY_B]
    assert found == {
        DIRTY_A: DIRTY,
        ALLOCATION_DEPTH: DEPTHS,
        BASE_ALLOCATION: [(3 * BLOCK, 0), (5 * BLOCK, 3)],
    }
    assert errors == ["EPERM"] * 3


@pytest.mark.requires("libnbd")
async def test_libnbd_without_a_context(bench: Bench, snapshot: MemoryDisk) -> None:
    """With set_strict_mode(0) libnbd asks although nothing was selected."""
    nbd: Any = sys.modules["nbd"]

    def work() -> str:
        handle = nbd.NBD()
        handle.set_strict_mode(0)
        handle.add_meta_context("qemu:dirty-bitmap:never")
        handle.connect_uri(bench.uri(NAME))
        with pytest.raises(nbd.Error) as failed:
            handle.block_status(BLOCK, 0, lambda *_arguments: 0)
        assert handle.pread(1, 0) == b"0"
        handle.shutdown()
        return str(failed.value.errno)

    assert await in_thread(work) == "EINVAL"
