"""What a flush syncs: the data, the data and a mark, or the journal alone with data in it; and what recovery does."""

import os
from pathlib import Path

import pytest

from blockvirt.limits import FLUSH_EMBED_BYTES, FLUSH_EMBED_RANGES
from blockvirt.lun.address import chunk_of, file_of
from blockvirt.volumes.flush import sync_data
from blockvirt.volumes.handle import Handle
from tests.volumes.conftest import Pool, abandon, findings, read, write

CHUNK = 4096
SIZE = CHUNK * 400
FIRST = b"a" * CHUNK
SECOND = b"b" * CHUNK


class Syncs:
    """Notes every sync: in which directory the file lies, and how large each backing file was."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[str] = []
        self.sizes_bytes: dict[Path, int] = {}
        self._real = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self._fdatasync)

    def _fdatasync(self, fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        self.order.append(path.parent.name)
        self.sizes_bytes[path] = os.fstat(fd).st_size
        self._real(fd)

    def taken(self) -> list[str]:
        """Return where was synced since the last call."""
        order, self.order = self.order, []
        return order


def lose_at_home(handle: Handle, chunk: int, content: bytes) -> None:
    """Put other content where a chunk lies in its backing file: what a power cut left there."""
    volume = handle._opened.volume
    entry = volume.map.readable(chunk)
    with volume.files.get(file_of(entry)).path.open("r+b") as file:
        file.seek(chunk_of(entry) * CHUNK)
        file.write(content)


async def opened(pool: Pool) -> tuple[str, Handle]:
    """Return a volume with one chunk that is flushed: its journal is there, and its file's size is durable."""
    volume_id = await pool.volume(SIZE)
    handle = await pool.open(volume_id)
    await write(handle, 0, FIRST)
    await handle.flush()
    return volume_id, handle


async def again(pool: Pool, volume_id: str, *, power_cut: bool) -> Handle:
    """Return the volume after the daemon died."""
    await abandon(pool, power_cut=power_cut)
    await pool.start()
    return await pool.open(volume_id)


async def test_what_is_synced_and_in_which_order(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = Syncs(monkeypatch)
    _, handle = await opened(pool)
    assert syncs.taken()[-2:] == ["files", "journal"]  # the file is new: its size must be durable too
    await handle.flush()
    assert syncs.taken() == []  # nothing was written since
    await write(handle, 0, SECOND)
    await handle.flush()
    assert syncs.taken() == ["files"]  # the map did not change
    await write(handle, CHUNK, FIRST)
    await handle.flush()
    assert syncs.taken() == ["journal"]  # it brings the data along
    await write(handle, CHUNK, SECOND)
    await handle.flush()
    assert syncs.taken() == ["journal"]  # a sync of the file would be undone by what lies in the journal
    await handle.zero(0, CHUNK, punch=True)
    await handle.flush()
    assert syncs.taken() == ["journal"]
    await write(handle, 2 * CHUNK, bytes(FLUSH_EMBED_BYTES + 1))
    await handle.flush()
    assert syncs.taken() == ["files", "journal"]  # too much
    await write(handle, CHUNK, FIRST)
    await handle.flush()
    assert syncs.taken() == ["files"]  # nothing of the journal would undo it
    for number in range(FLUSH_EMBED_RANGES + 1):
        await write(handle, (20 + number) * CHUNK, b"x")
    await handle.flush()
    assert syncs.taken() == ["files", "journal"]  # too many
    await write(handle, 100 * CHUNK, FIRST)
    await handle.zero(CHUNK, CHUNK, punch=False)
    await handle.flush()
    assert syncs.taken() == ["files", "journal"]  # no bytes that could be copied
    await handle.close()


async def test_data_in_the_journal_goes_home_after_a_power_cut(pool: Pool) -> None:
    volume_id, handle = await opened(pool)
    await write(handle, CHUNK, FIRST)
    await handle.flush()
    await write(handle, CHUNK, SECOND)
    await write(handle, 3 * CHUNK, FIRST)
    await handle.flush()
    await write(handle, CHUNK + 100, b"not flushed")
    for chunk in (1, 3):
        lose_at_home(handle, chunk, bytes(CHUNK))
    handle = await again(pool, volume_id, power_cut=True)
    assert await read(handle, 0, 4 * CHUNK) == FIRST + SECOND + bytes(CHUNK) + FIRST
    await handle.close()
    assert not findings(pool)


async def test_a_flush_speaks_for_what_was_written_and_not_for_the_page_cache(pool: Pool) -> None:
    """The kernel may drop a page whose write-back failed; what is read then is older than what was answered."""
    volume_id, handle = await opened(pool)
    await write(handle, CHUNK, FIRST)
    lose_at_home(handle, 1, bytes(CHUNK))
    await handle.flush()
    handle = await again(pool, volume_id, power_cut=True)
    assert await read(handle, CHUNK, CHUNK) == FIRST
    await handle.close()


async def test_after_sigkill_home_is_newer_than_the_journal(pool: Pool) -> None:
    volume_id, handle = await opened(pool)
    await write(handle, CHUNK, FIRST)
    await handle.flush()
    await write(handle, CHUNK, SECOND)
    handle = await again(pool, volume_id, power_cut=False)
    assert await read(handle, CHUNK, CHUNK) == SECOND
    await handle.close()


async def test_a_mark_without_data_makes_older_data_void(pool: Pool) -> None:
    volume_id, handle = await opened(pool)
    await write(handle, CHUNK, FIRST)
    await handle.flush()
    await write(handle, CHUNK, SECOND)
    await write(handle, 10 * CHUNK, bytes(FLUSH_EMBED_BYTES + 1))
    await handle.flush()
    handle = await again(pool, volume_id, power_cut=True)
    assert await read(handle, CHUNK, CHUNK) == SECOND
    await handle.close()


async def test_a_checkpoints_first_sync_makes_nothing_void(pool: Pool) -> None:
    """What it synced must be in the journal all the same: until the commit older data lies there."""
    volume_id, handle = await opened(pool)
    await write(handle, CHUNK, FIRST)
    await handle.flush()
    await write(handle, CHUNK, SECOND)
    await sync_data(handle._opened.volume)
    await handle.flush()
    handle = await again(pool, volume_id, power_cut=True)
    assert await read(handle, CHUNK, CHUNK) == SECOND
    await handle.close()


async def test_a_flush_speaks_for_no_chunk_behind_the_durable_size(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = Syncs(monkeypatch)
    _, handle = await opened(pool)
    volume = handle._opened.volume
    embedded = grown = 0
    for chunk in range(1, 350):
        await write(handle, chunk * CHUNK, b"x")
        syncs.taken()
        await handle.flush()
        embedded += syncs.taken() == ["journal"]
        for file in volume.files.own():
            grown += file.grown
            assert syncs.sizes_bytes[file.path] >= file.used_chunks * CHUNK
    assert embedded > 300
    assert volume.stats.embedded_flushes == embedded
    await handle.close()


async def test_a_journal_full_of_data_gets_a_checkpoint(pool: Pool) -> None:
    volume_id, handle = await opened(pool)
    volume = handle._opened.volume
    await write(handle, CHUNK, FIRST)
    await handle.flush()
    assert volume.journal is not None
    generation = volume.journal.generation
    number = 0
    while volume.journal.generation < generation + 2:
        number += 1
        assert number < 10_000
        await write(handle, CHUNK, number.to_bytes(2, "little") * (CHUNK // 2))
        await write(handle, 2 * CHUNK, b"x")
        await handle.flush()
        await handle.zero(2 * CHUNK, CHUNK, punch=True)
    await write(handle, CHUNK, SECOND)
    await handle.flush()
    handle = await again(pool, volume_id, power_cut=True)
    assert await read(handle, CHUNK, CHUNK) == SECOND
    await handle.close()
    assert not findings(pool)
