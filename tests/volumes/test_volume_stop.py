"""I7: after one failed sync or commit nothing more is acknowledged, until an administrator reopens the volume."""

import asyncio
import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockvirt.errors import DeviceFault, InUse, VolumeStopped
from blockvirt.meta.keys import Table
from blockvirt.meta.records import BranchRecord
from blockvirt.meta.store import Writer
from blockvirt.pool.backing import BackingFile
from blockvirt.volumes import leftovers
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.context import VolumeContext
from blockvirt.volumes.recovery import go_back_to_disk
from tests.volumes.conftest import Pool, abandon, findings, read, write

SIZE = 64 * 4096


class FailingSyncs:
    """os.fdatasync that fails in one folder, and counts what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
        self.asked = 0
        self._folder = folder
        self._real = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self._sync)

    def _sync(self, fd: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{fd}")).parent.name == self._folder:
            self.asked += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._real(fd)


@pytest.mark.parametrize("folder", ["files", "journal"])
async def test_a_failed_sync_stops_the_volume_for_good(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    volume_id = await pool.volume(SIZE, "v")
    handle = await pool.open(volume_id)
    await write(handle, 0, b"flushed!" * 512)
    await handle.flush()
    await write(handle, 4096, b"not" * 20_000)  # more than a flush takes into the journal
    with monkeypatch.context() as patched:
        failing = FailingSyncs(patched, folder)
        with pytest.raises(VolumeStopped):
            await handle.flush()
        asked = failing.asked
        assert asked == 1
        for attempt in (
            lambda: handle.flush(),
            lambda: write(handle, 0, b"x"),
            lambda: read(handle, 0, 1),
            lambda: handle.zero(0, 4096, punch=True),
            lambda: handle.extents(0, 4096),
        ):
            with pytest.raises(VolumeStopped, match="stopped"):
                await attempt()
        await handle.close()
        assert failing.asked == asked, "a failed sync must never be tried again"
    with pytest.raises(VolumeStopped, match="v has stopped"):
        await pool.open(volume_id)
    await pool.close()
    await pool.start()  # a restart does not make it forget
    with pytest.raises(VolumeStopped):
        await pool.open(volume_id)
    await pool.engine.registry.reopen(volume_id)
    handle = await pool.open(volume_id)
    content = await read(handle, 0, 65536)
    assert content[:4096] == b"flushed!" * 512
    if folder == "files":  # where the mark could not be synced, what it speaks for may be there or not
        assert not any(content[4096:])
    await handle.close()
    assert not findings(pool)


async def test_the_note_in_the_journal_outlives_a_kill(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    volume_id = await pool.volume(SIZE, "v")
    handle = await pool.open(volume_id)
    await write(handle, 0, b"lost" * 1024)
    with monkeypatch.context() as patched:
        FailingSyncs(patched, "files")
        with pytest.raises(VolumeStopped):
            await handle.flush()
    await abandon(pool, power_cut=False)  # before the metadata could note anything
    await pool.start()
    with pytest.raises(VolumeStopped):
        await pool.open(volume_id)
    await pool.engine.registry.reopen(volume_id)
    handle = await pool.open(volume_id)
    assert await read(handle, 0, 4096) == bytes(4096)
    await handle.close()


async def test_a_failed_commit_stops_every_open_volume(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await pool.open(await pool.volume(SIZE, "first"))
    second = await pool.open(await pool.volume(SIZE, "second"))
    await write(first, 0, b"a" * 4096)
    await write(second, 0, b"b" * 4096)
    pool.engine.store._fail(RuntimeError("planted"))
    for handle in (first, second):
        with pytest.raises(VolumeStopped):
            await handle.flush()
        with pytest.raises(VolumeStopped):
            await write(handle, 0, b"c")
        await handle.close()


async def test_a_volume_that_works_is_not_reopened(pool: Pool) -> None:
    handle = await pool.open(volume_id := await pool.volume(SIZE, "v"))
    with pytest.raises(InUse):
        await pool.engine.registry.reopen(volume_id)
    await handle.close()
    with pool.engine.store.read() as reader:
        assert not reader.count(Table.LEAVES)


@pytest.mark.parametrize("journal", [True, False])
async def test_a_reopened_volume_reads_what_is_on_disk(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, journal: bool
) -> None:
    # The kernel keeps pages that it failed to write, as clean ones: the next flush would find nothing to do.
    handle = await pool.open(volume_id := await pool.volume(SIZE, "v"))
    await write(handle, 0, b"a" * 4096)
    await handle.flush()
    if not journal:
        await handle.close()
        handle = await pool.open(volume_id)
    await write(handle, 0, b"b" * 4096)
    assert (handle._opened.volume.journal is not None) is journal
    with monkeypatch.context() as patched:
        FailingSyncs(patched, "files")
        with pytest.raises(VolumeStopped):
            await handle.flush()
    dropped: list[str] = []
    real = os.posix_fadvise

    def fadvise(fd: int, offset: int, length: int, advice: int) -> None:
        if (offset, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED):
            dropped.append(Path(os.readlink(f"/proc/self/fd/{fd}")).parent.name)
        real(fd, offset, length, advice)

    with monkeypatch.context() as patched:
        # What the kernel drops is up to it (a page may be in use just then): what counts is that it is asked.
        patched.setattr(os, "posix_fadvise", fadvise)
        await pool.engine.registry.reopen(volume_id)
    assert dropped == ["files"]
    await handle.close()
    handle = await pool.open(volume_id)
    assert await read(handle, 0, 4096) == b"b" * 4096  # here it did reach the disk: only the answer was planted
    await handle.close()
    assert not findings(pool)


async def test_a_journal_that_cannot_be_made_is_the_devices_fault(pool: Pool) -> None:
    handle = await pool.open(await pool.volume(SIZE))
    (pool.device / "journal").rename(pool.device / "elsewhere")
    with pytest.raises(DeviceFault, match=r"no journal of volume .* can be made on .*: No such file"):
        await write(handle, 0, b"x" * 4096)  # a bare ENOENT would reach the guest as "invalid argument"
    (pool.device / "elsewhere").rename(pool.device / "journal")
    await write(handle, 0, b"x" * 4096)
    await handle.close()


async def test_a_stopped_volume_is_shown_as_such_at_every_moment(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = await pool.open(volume_id := await pool.volume(SIZE, "v"))
    catalogue = Catalogue(pool.engine.store, pool.engine.registry, pool.engine.storage)
    assert catalogue.get("v").state == "in-use"
    await write(handle, 0, b"a" * 4096)
    with monkeypatch.context() as patched:
        FailingSyncs(patched, "files")
        with pytest.raises(VolumeStopped):
            await handle.flush()
    shown = catalogue.get("v")
    assert (shown.state, shown.sessions) == ("stopped", 1), "its session is still open"
    assert "Input/output error" in shown.damage
    closing = asyncio.create_task(handle.close())
    states = set()
    while not closing.done():
        states.add(catalogue.get("v").state)
        await asyncio.sleep(0)
    assert states == {"stopped"}
    assert (catalogue.get("v").state, catalogue.get("v").sessions) == ("stopped", 0)
    await pool.engine.registry.reopen(volume_id)
    assert catalogue.get("v").state == "available"
    handle = await pool.open(volume_id)
    assert (catalogue.get("v").state, catalogue.get("v").damage) == ("in-use", "")
    await handle.close()


async def test_a_failed_sync_of_recovery_stops_the_volume(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered is gone then: a guest that reconnects must hear of it, and no later try may believe in it."""
    handle = await pool.open(volume_id := await pool.volume(SIZE, "v"))
    await write(handle, 0, b"flushed!" * 512)
    await handle.flush()
    await write(handle, 4096, b"answered" * 512)
    await abandon(pool, power_cut=False)
    with monkeypatch.context() as patched:
        failing = FailingSyncs(patched, "files")
        await pool.start()
        assert failing.asked == 1
        with pytest.raises(VolumeStopped, match="v has stopped"):
            await pool.open(volume_id)
        with pytest.raises(DeviceFault, match="cannot be recovered"):
            await pool.engine.registry.reopen(volume_id)  # the disk is not mended
    with pytest.raises(VolumeStopped):
        await pool.open(volume_id)
    await pool.engine.registry.reopen(volume_id)
    handle = await pool.open(volume_id)
    assert await read(handle, 0, 8192) == b"flushed!" * 512 + bytes(4096)
    await handle.close()
    assert not findings(pool)


async def test_a_recovery_that_cannot_cut_a_file_loses_nothing(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = await pool.open(volume_id := await pool.volume(SIZE, "v"))
    await write(handle, 0, b"answered" * 512)
    await abandon(pool, power_cut=False)
    tried: list[Path] = []
    real = BackingFile.cut

    def cut(self: BackingFile) -> None:
        tried.append(self.path)
        if len(tried) == 1:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        real(self)

    monkeypatch.setattr(BackingFile, "cut", cut)
    await pool.start()
    assert len(tried) == 1, "it is tried again when somebody wants the volume"
    handle = await pool.open(volume_id)
    assert await read(handle, 0, 4096) == b"answered" * 512
    await handle.close()


async def test_reopening_keeps_what_the_background_changed_meanwhile(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flatten of an origin gives a branch new pins while the disk is being asked."""
    volume_id = await pool.volume(SIZE)

    def change(writer: Writer, **fields: Any) -> None:
        (key, _), *_ = writer.scan(Table.BRANCHES)
        branch = writer.record(BranchRecord, Table.BRANCHES, key)
        assert branch is not None
        writer.put_record(Table.BRANCHES, key, replace(branch, **fields))

    await pool.engine.store.commit(lambda writer: change(writer, stopped="planted"))

    def meanwhile(context: VolumeContext, branch: BranchRecord) -> None:
        go_back_to_disk(context, branch)
        context.store.commit_now(lambda writer: change(writer, pins=((7, 7),)))

    monkeypatch.setattr(leftovers, "go_back_to_disk", meanwhile)
    await pool.engine.registry.reopen(volume_id)
    with pool.engine.store.read() as reader:
        (key, _), *_ = reader.scan(Table.BRANCHES)
        branch = reader.record(BranchRecord, Table.BRANCHES, key)
    assert branch is not None
    assert (branch.pins, branch.stopped) == (((7, 7),), "")
