"""The fixture pool is a real one: clean, and readable."""

from pathlib import Path

from blockvirt.check import run
from blockvirt.limits import DEFAULT_CHUNK_BYTES
from blockvirt.testing.fixtures import write_mapped_pool
from blockvirt.volumes.engine import Engine


async def test_a_mapped_pool_is_clean_and_its_volumes_open(tmp_path: Path) -> None:
    await write_mapped_pool(tmp_path / "state", tmp_path / "disk", volumes=7, mapped_chunks=7 * 600 + 3)
    assert run(tmp_path / "state", repair=False, restore_metadata=False).findings == ()
    engine = await Engine.start(tmp_path / "state", [tmp_path / "disk"])
    assert engine.storage.status().used_bytes == (7 * 600 + 3) * DEFAULT_CHUNK_BYTES
    await engine.close()
