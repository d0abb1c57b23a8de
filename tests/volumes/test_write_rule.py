"""Copy-on-write: when the head steps to a new epoch, what the older one saw never changes (the seed of I5)."""

import random
from collections.abc import Sequence

import pytest

from blockvirt.lun.address import ADDRESS_MASK, chunk_of, file_of
from blockvirt.meta.keys import Table, snapshot_point_key
from blockvirt.meta.store import Writer
from blockvirt.volumes.checkpoint import checkpoint_and_step
from blockvirt.volumes.commit import MapChange
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.versions import visible_version
from tests.volumes.conftest import Pool, read, write

CHUNK = 4096
CHUNKS = 40
SIZE = CHUNK * CHUNKS


async def step_epoch(handle: Handle) -> int:
    """Close the head's epoch and keep it readable, as a snapshot does. Returns it."""

    def keep(writer: Writer, changes: Sequence[MapChange]) -> int:
        (change,) = changes
        writer.put(Table.POINTS, snapshot_point_key(change.branch, change.epoch, "s"), b"")
        return change.epoch

    return await checkpoint_and_step([handle._opened.checkpointer], keep)


def content_of_epoch(pool: Pool, handle: Handle, epoch: int) -> bytes:
    """Read the volume as an epoch saw it, past the open volume: from stored leaves and the backing files."""
    volume = handle._opened.volume
    with pool.engine.store.read() as reader:
        found = visible_version(reader, volume.map.branch, 0, epoch)
    content = bytearray(SIZE)
    for chunk, entry in enumerate(found[1][:CHUNKS] if found else []):
        if entry & ADDRESS_MASK:
            part = memoryview(content)[chunk * CHUNK : (chunk + 1) * CHUNK]
            volume.files.get(file_of(entry)).read(part, chunk_of(entry) * CHUNK)
    return bytes(content)


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("seed", range(6))
async def test_older_epochs_keep_their_bytes(
    pool: Pool, seed: int, cold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(seed)
    handle = await pool.open(await pool.volume(SIZE))
    volume = handle._opened.volume
    if cold:  # every copy goes through a thread
        monkeypatch.setattr(volume, "_fill_old", lambda entry, content: False)
    model = bytearray(SIZE)
    frozen: dict[int, bytes] = {}
    for _epoch in range(5):
        for _step in range(30):
            offset = dice.randrange(SIZE)
            length = min(SIZE - offset, dice.choice([1, 100, CHUNK, 3 * CHUNK, 10 * CHUNK]))
            if dice.random() < 0.75:
                data = dice.randbytes(length)
                await write(handle, offset, data)
            else:
                data = bytes(length)
                await handle.zero(offset, length, punch=dice.random() < 0.7)
            model[offset : offset + length] = data
        assert await read(handle, 0, SIZE) == bytes(model), f"seed {seed}"
        frozen[await step_epoch(handle)] = bytes(model)
        for epoch, content in frozen.items():
            assert content_of_epoch(pool, handle, epoch) == content, f"seed {seed}: epoch {epoch} changed"
    assert volume.stats.copied_chunks
    await handle.close()
