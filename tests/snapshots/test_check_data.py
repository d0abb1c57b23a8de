"""``check --data``: what a disk changed behind the daemon's back is found, and who is concerned is named."""

import os
from pathlib import Path

from blockvirt.check import run
from blockvirt.meta.keys import Table
from blockvirt.volumes.requests import NewVolume
from tests.snapshots.conftest import SnapshotPool
from tests.volumes.conftest import until, write

CHUNK = 4096
CHUNKS = 100
SIZE = CHUNKS * CHUNK


async def made(pool: SnapshotPool) -> None:
    """Make a volume of which 'a' saw all and 'b' half of it anew, and a clone of 'a'; everything sealed."""
    handle = await pool.open(await pool.volume(SIZE, "v"))
    await write(handle, 0, os.urandom(SIZE))
    (first,) = await pool.snapshots.create({"v": "a"})
    await write(handle, 0, os.urandom(SIZE // 2))
    await pool.snapshots.create({"v": "b"})
    await handle.close()
    await pool.catalogue.create(NewVolume(size_bytes=SIZE, name="clone"), origin=first)

    def sealed() -> bool:
        with pool.engine.store.read() as reader:
            return not reader.count(Table.SEALS)

    await until(sealed)
    await pool.close()


def data_files(pool: SnapshotPool) -> tuple[Path, Path]:
    """Return what was written before the first snapshot, and what after it."""
    before, after = sorted((pool.device / "files").iterdir())
    return before, after


def flip(path: Path, chunk: int) -> None:
    content = bytearray(path.read_bytes())
    content[chunk * CHUNK + 5] ^= 1
    path.write_bytes(content)


async def test_what_is_whole_is_clean_and_all_of_it_is_read(tmp_path: Path) -> None:
    pool = await SnapshotPool(tmp_path).start()
    await made(pool)
    told: list[tuple[int, int]] = []
    report = run(pool.state_dir, repair=False, restore_metadata=False, data=True, progress=lambda *t: told.append(t))
    assert (report.exit_code, report.findings) == (0, ())
    assert told[-1] == (SIZE + SIZE // 2, SIZE + SIZE // 2)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


async def test_damage_is_named_with_whom_it_concerns(tmp_path: Path) -> None:
    pool = await SnapshotPool(tmp_path).start()
    await made(pool)
    before, after = data_files(pool)
    flip(before, 3)  # seen by 'a' and the clone alone
    flip(before, CHUNKS - 1)  # by all
    flip(after, 7)  # by 'b' and the volume
    assert run(pool.state_dir, repair=False, restore_metadata=False).exit_code == 0, "only --data reads data"
    report = run(pool.state_dir, repair=False, restore_metadata=False, data=True)
    assert report.exit_code == 2
    assert [finding.code for finding in report.findings] == ["data-damaged"] * 3
    concerned = [finding.message.rpartition("concerns ")[2] for finding in report.findings]
    assert concerned == ["v@a, clone", "v, v@a, v@b, clone", "v, v@b"]
    assert f"byte {7 * CHUNK} of its volume" in report.findings[2].message


async def test_a_file_that_is_cut_is_damaged_and_does_not_end_the_reading(tmp_path: Path) -> None:
    pool = await SnapshotPool(tmp_path).start()
    await made(pool)
    os.truncate(data_files(pool)[1], 10 * CHUNK)
    report = run(pool.state_dir, repair=False, restore_metadata=False, data=True)
    assert {finding.code for finding in report.findings} == {"file-short", "data-damaged"}
    assert sum(finding.code == "data-damaged" for finding in report.findings) == CHUNKS // 2 - 10
