"""A daemon that dies: what was answered is there (I3b); after a power cut, what was flushed (I3). Random histories."""

import asyncio
import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from blockvirt.errors import DeviceFault, VolumeStopped
from blockvirt.meta.store import Store, Writer
from tests.volumes.conftest import Pool, abandon, findings, read, until_punched, write

BLOCK = 1024
BLOCKS = 1500  # of 4 KiB chunks: a little less than one leaf
SIZE = BLOCK * BLOCKS


@pytest.mark.parametrize("power_cut", [False, True])
@pytest.mark.parametrize("seed", range(10))
async def test_random_history_survives_the_daemon(tmp_path: Path, seed: int, power_cut: bool) -> None:
    dice = random.Random(seed)
    pool = await Pool(tmp_path).start()
    volume_id = await pool.volume(SIZE)
    handle = await pool.open(volume_id)
    now = [0] * BLOCKS
    since_flush: list[set[int]] = [{0} for _ in range(BLOCKS)]  # what each block may hold after a power cut
    stamp = 0
    for _round in range(4):
        for _step in range(60):
            action = dice.random()
            first = dice.randrange(BLOCKS)
            count = min(BLOCKS - first, dice.choice([1, 1, 3, 4, 8, 40, 400]))
            if action < 0.6:
                stamp += 1
                await write(handle, first * BLOCK, stamp.to_bytes(4, "little") * (BLOCK // 4) * count)
                value = stamp
            elif action < 0.75:
                await handle.zero(first * BLOCK, count * BLOCK, punch=dice.random() < 0.7)
                value = 0
            else:
                if action < 0.9:
                    await handle.flush()
                else:
                    await handle._opened.checkpointer.run()
                since_flush = [{value} for value in now]
                continue
            for block in range(first, first + count):
                now[block] = value
                since_flush[block].add(value)
        await abandon(pool, power_cut=power_cut)
        await pool.start()
        handle = await pool.open(volume_id)
        content = await read(handle, 0, SIZE)
        for block in range(BLOCKS):
            got = int.from_bytes(content[block * BLOCK : block * BLOCK + 4], "little")
            assert content[block * BLOCK : (block + 1) * BLOCK] == got.to_bytes(4, "little") * (BLOCK // 4)
            may = since_flush[block] if power_cut else {now[block]}
            assert got in may, f"seed {seed}: block {block} holds {got}, may hold {sorted(may)}"
            now[block] = got
        since_flush = [{value} for value in now]
        assert not findings(pool), f"seed {seed}"
    await handle.close()
    assert not findings(pool), f"seed {seed}"
    await pool.close()


async def test_a_power_cut_takes_exactly_what_was_not_flushed(pool: Pool) -> None:
    handle = await pool.open(volume_id := await pool.volume(SIZE))
    await write(handle, 0, b"a" * 8192)
    await handle.flush()
    await write(handle, 8192, b"b" * 4096)
    await handle.zero(0, 4096, punch=True)
    await abandon(pool, power_cut=True)
    await pool.start()
    handle = await pool.open(volume_id)
    assert await read(handle, 0, 16384) == b"a" * 8192 + bytes(8192)
    # The address of the lost chunk is handed out again: what was in it must not show.
    await write(handle, 20_000, b"c")
    assert (await read(handle, 16384, 8192)).strip(b"\0") == b"c"
    await handle.close()


async def test_frozen_leaves_do_not_change_while_their_checkpoint_is_written(pool: Pool) -> None:
    handle = await pool.open(await pool.volume(SIZE))
    await write(handle, 0, b"a" * 4096)
    table = handle._opened.volume.map
    before = table.leaf(0).entries[:]
    (frozen,) = table.freeze()
    table.put(5, 12345)
    assert frozen.entries == before
    assert table.leaf(0).entries[5] == 12345
    table.leaf(0).entries[5] = 0
    table.dirty.clear()


async def test_trimmed_space_goes_back_to_the_filesystem(pool: Pool) -> None:
    handle = await pool.open(await pool.volume(SIZE))
    await write(handle, 0, b"a" * SIZE)
    await handle.flush()
    (file,) = (pool.device / "files").iterdir()
    full = file.stat().st_blocks
    await handle.zero(0, SIZE, punch=True)
    await handle.close()
    await until_punched(pool)
    assert file.stat().st_blocks * 512 < full * 512 - SIZE * 9 // 10
    assert pool.engine.storage.status().used_bytes == 0
    assert not findings(pool, leaks=True)


async def test_closing_covers_what_was_written_while_a_checkpoint_ran(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await pool.open(volume_id := await pool.volume(SIZE))
    await write(handle, 0, b"a" * 4096)
    committing, go_on = asyncio.Event(), asyncio.Event()
    store = pool.engine.store
    commit = type(store).commit

    async def slow_commit(self: Store, change: Callable[[Writer], object]) -> object:
        committing.set()
        await go_on.wait()
        return await commit(self, change)

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "commit", slow_commit)
        running = asyncio.ensure_future(handle._opened.checkpointer.run())
        await committing.wait()
        await write(handle, 8192, b"b" * 4096)
        closing = asyncio.ensure_future(handle.close())
        await asyncio.sleep(0)
        go_on.set()
        await running
        await closing
    handle = await pool.open(volume_id)
    assert await read(handle, 0, 12288) == b"a" * 4096 + bytes(4096) + b"b" * 4096
    await handle.close()
    assert not findings(pool, leaks=True)


@pytest.mark.parametrize("killed", [False, True])
async def test_a_truncated_file_is_an_error_and_never_zeros(pool: Pool, killed: bool) -> None:
    handle = await pool.open(volume_id := await pool.volume(SIZE))
    await write(handle, 0, b"a" * 4096 * 8)
    if killed:
        await abandon(pool, power_cut=False)
    else:
        await handle.close()
        await pool.close()
    (file,) = (pool.device / "files").iterdir()
    os.truncate(file, 4096 * 5)
    await pool.start()
    handle = await pool.open(volume_id)
    assert await read(handle, 0, 4096 * 5) == b"a" * 4096 * 5
    for _attempt in range(2):
        with pytest.raises(DeviceFault, match="ends"):
            await read(handle, 4096 * 6, 4096)
        await write(handle, 4096 * 20, b"b" * 4096)  # into a new file
    assert await read(handle, 4096 * 20, 4096) == b"b" * 4096
    await handle.close()
    assert [finding.code for finding in findings(pool)] == ["file-short"]


async def test_a_file_that_is_truncated_while_it_is_open_stays_short(pool: Pool) -> None:
    """A close gives back what was reserved behind the last chunk. It must not make the file longer again, by zeros."""
    handle = await pool.open(volume_id := await pool.volume(SIZE))
    await write(handle, 0, b"a" * 4096 * 8)
    await handle.flush()
    (file,) = (pool.device / "files").iterdir()
    os.truncate(file, 4096 * 5)
    for _daemon in range(2):
        assert await read(handle, 0, 4096 * 5) == b"a" * 4096 * 5
        with pytest.raises(DeviceFault, match="ends"):
            await read(handle, 4096 * 6, 4096)
        await handle.close()
        assert file.stat().st_size == 4096 * 5
        assert [finding.code for finding in findings(pool)] == ["file-short"]
        handle = await pool.open(volume_id)
    await handle.close()


async def test_what_a_dead_daemon_wrote_in_place_is_synced_before_the_volume_opens(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overwrites in place need no journal, so there is no recovery; and no flush of a new daemon knows of them."""
    handle = await pool.open(volume_id := await pool.volume(SIZE))
    await write(handle, 0, b"a" * 4096)
    await handle.close()
    handle = await pool.open(volume_id)
    await write(handle, 0, b"b" * 4096)
    assert handle._opened.volume.journal is None
    await abandon(pool, power_cut=False)
    await pool.start()
    synced: list[str] = []
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).parent.name)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    handle = await pool.open(volume_id)
    assert synced == ["files"]
    await handle.close()
    await (await pool.open(volume_id)).close()
    assert synced == ["files"], "once is enough: what this daemon writes it syncs itself"


async def test_a_volume_whose_files_cannot_be_synced_before_it_opens_waits_for_its_administrator(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await pool.open(volume_id := await pool.volume(SIZE))
    await write(handle, 0, b"a" * 4096)
    await handle.close()
    await abandon(pool, power_cut=False)
    await pool.start()

    def fdatasync(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fdatasync)
        with pytest.raises(DeviceFault, match="cannot be recovered"):
            await pool.open(volume_id)
    with pytest.raises(VolumeStopped):
        await pool.open(volume_id)
    await pool.engine.registry.reopen(volume_id)
    handle = await pool.open(volume_id)
    assert await read(handle, 0, 4096) == b"a" * 4096
    await handle.close()
