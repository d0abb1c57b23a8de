"""Data that flushes leave in the journal: what takes room there, and what it must not look like."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from blockvirt.meta.keys import Table, number_key
from blockvirt.meta.records import BranchRecord
from blockvirt.meta.store import Writer
from blockvirt.volumes.journal import FILE_SIZES_BYTES, Journal, JournalHeader
from blockvirt.volumes.journal_frames import CHANGE, Kind, pack
from tests.volumes.conftest import Pool, abandon, findings, read, until, write
from tests.volumes.test_flush import CHUNK, FIRST, again, opened


async def test_a_journal_without_room_for_data_has_room_for_marks(pool: Pool) -> None:
    _, handle = await opened(pool)
    journal = handle._opened.volume.journal
    assert journal is not None
    while journal.embed(journal.map_sequence, [(1, 0, b"x")]):
        pass
    for _ in range(64):
        assert journal.mark(journal.map_sequence)
    await handle.close()


@pytest.mark.parametrize("file_bytes", FILE_SIZES_BYTES[:-1])
async def test_a_small_journal_takes_no_data(tmp_path: Path, file_bytes: int) -> None:
    """A large request needs nearly all of it."""
    (tmp_path / "journal").mkdir()
    journal = Journal.create(tmp_path, JournalHeader("pool", 1), BranchRecord(1, "volume", 1), file_bytes)
    assert not journal.embed(0, [(1, 0, b"x")])
    assert journal.room() * CHANGE.size > file_bytes // 2
    journal.close(remove=True)


async def test_a_guests_bytes_are_no_frames(pool: Pool) -> None:
    """They lie in the journal as data; a later generation in the same file ends among them. The guest can count."""
    volume_id, handle = await opened(pool)
    volume = handle._opened.volume
    journal = volume.journal
    assert journal is not None
    generation, begun = journal.generation, volume.branch_record.covered_sequence
    count = 0
    while journal.generation < generation + 2:
        # Half zeros: the seed of a frame behind a damaged one is then 0.
        frames = b"".join(pack(Kind.MARK, generation + 2, count + number, b"", 0)[0] for number in range(400))
        await write(handle, 8 * CHUNK, bytes(3 * CHUNK) + frames)
        await write(handle, 2 * CHUNK, b"y")
        await handle.flush()
        await handle.zero(2 * CHUNK, CHUNK, punch=True)
        count = journal.sequence - begun
    for chunk in range(100, 120):
        await write(handle, chunk * CHUNK, FIRST)
    await until(lambda: journal._may_switch)  # else the daemon is not killed here, but fails a checkpoint
    handle = await again(pool, volume_id, power_cut=False)
    assert await read(handle, 100 * CHUNK, 20 * CHUNK) == FIRST * 20
    await handle.close()


async def test_the_check_believes_no_frame_of_a_volume_that_the_metadata_call_stopped(pool: Pool) -> None:
    """Its journal could not take the note; and a recovery that failed has cut its file back to what was flushed."""
    volume_id = await pool.volume(64 * CHUNK)
    handle = await pool.open(volume_id)
    await write(handle, 0, FIRST)
    volume = handle._opened.volume
    branch, (file,) = volume.branch_record, volume.files.own()

    def stop(writer: Writer) -> None:
        writer.put_record(Table.BRANCHES, number_key(branch.number), replace(branch, stopped="it cannot be written"))

    pool.engine.store.commit_now(stop)
    await abandon(pool, power_cut=False)
    os.truncate(file.path, 0)
    await pool.start()
    assert not findings(pool)
