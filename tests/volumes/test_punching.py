"""Giving freed chunks back: few holes for many rows, and one that fails keeps no other from it."""

import errno

import pytest

from blockvirt.meta.keys import Table, pair_key
from blockvirt.meta.records import seal
from blockvirt.meta.store import Writer
from blockvirt.syscalls import punch_hole
from blockvirt.units import KIB, MIB
from blockvirt.volumes import punch
from tests.volumes.conftest import Pool, until, until_punched, write

CHUNK = 4 * KIB
ROWS = {0: 1, 1: 1, 2: 2, 5: 1, 7: 1}
"""First chunk -> how many."""


async def freed(pool: Pool) -> int:
    """Have chunks freed by as many transactions as there are rows; returns the file's number."""
    handle = await pool.open(await pool.volume(MIB))
    await write(handle, 0, bytes([1]) * 8 * CHUNK)
    (file,) = handle._opened.volume.files.own()
    await handle.close()

    def put(writer: Writer) -> None:
        for chunk, count in ROWS.items():
            key = pair_key(file.number, chunk)
            writer.put(Table.PUNCH, key, seal(key, count.to_bytes(8, "little")))

    await pool.engine.store.commit(put)
    return file.number


def left(pool: Pool) -> int:
    with pool.engine.store.read() as reader:
        return reader.count(Table.PUNCH)


@pytest.mark.parametrize(("rows", "holes"), [(100, 3), (2, 4), (1, 5)])
async def test_neighbouring_rows_make_one_hole(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, rows: int, holes: int
) -> None:
    monkeypatch.setattr(punch, "PUNCH_BATCH_ROWS", rows)
    made: list[tuple[int, int]] = []

    def noted(fd: int, offset: int, length: int) -> None:
        made.append((offset // CHUNK, length // CHUNK))
        punch_hole(fd, offset, length)

    monkeypatch.setattr(punch, "punch_hole", noted)
    await freed(pool)
    used_bytes = pool.engine.storage.status().used_bytes
    pool.engine.context.punches.set()
    await until_punched(pool)
    assert len(made) == holes
    assert [chunk for first, count in made for chunk in range(first, first + count)] == [0, 1, 2, 3, 5, 7]
    assert pool.engine.storage.status().used_bytes == used_bytes - 6 * CHUNK


async def test_one_that_fails_keeps_no_other_from_it(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int, offset: int, length: int) -> None:
        if offset == 5 * CHUNK:
            raise OSError(errno.EIO, "planted")
        punch_hole(fd, offset, length)

    with monkeypatch.context() as patched:
        patched.setattr(punch, "punch_hole", failing)
        await freed(pool)
        pool.engine.context.punches.set()
        await until(lambda: left(pool) == 1)
    pool.engine.context.punches.set()
    await until_punched(pool)
