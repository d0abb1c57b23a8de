"""Two pools between which snapshots travel as streams."""

import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from blockvirt.meta.records import SnapshotRecord
from blockvirt.snapshots.export import SnapshotExports
from blockvirt.snapshots.importing import SnapshotImports
from tests.snapshots.conftest import SnapshotPool
from tests.volumes.conftest import read, write

CHUNK = 4096
SIZE = 600 * CHUNK
MIB = 1 << 20


class StreamPool(SnapshotPool):
    """A pool that snapshots leave and enter."""

    async def start(self) -> "StreamPool":
        await super().start()
        self.exports = SnapshotExports(self.engine, self.snapshots, self.readers)
        self.imports = SnapshotImports(self.engine, self.catalogue)
        await self.imports.take_back_all()
        return self

    async def close(self) -> None:
        await self.imports.close()
        await super().close()

    async def export(self, name: str, since: str | None = None) -> bytes:
        """The whole stream of a snapshot."""
        async with self.exports.export(name, since) as export:
            return b"".join([block async for block in export.blocks()])

    async def take_in(self, volume: str, stream: bytes, piece_bytes: int = 1 << 16) -> list[SnapshotRecord]:
        """Import a stream."""
        return await self.imports.run(volume, pieces(stream, piece_bytes))

    async def content(self, name: str) -> bytes:
        """All bytes of a snapshot."""
        record = self.snapshots.find(name)
        handle = self.readers.open(record, "test-content")
        try:
            return await read(handle, 0, record.size_bytes)  # type: ignore[arg-type]  # reads alike
        finally:
            await handle.close()

    async def head(self, volume: str) -> bytes:
        """All bytes of a volume as it is now."""
        found = self.catalogue.get(volume)
        handle = await self.open(found.id)
        try:
            return await read(handle, 0, found.size_bytes)
        finally:
            await handle.close()


async def pieces(stream: bytes, piece_bytes: int) -> AsyncIterator[bytes]:
    """A stream in pieces, as it comes out of a pipe."""
    for start in range(0, len(stream), piece_bytes):
        yield stream[start : start + piece_bytes]


async def pool_in(folder: Path) -> StreamPool:
    """A running pool in a folder of its own."""
    folder.mkdir()
    return await StreamPool(folder).start()


def names(records: Iterable[SnapshotRecord]) -> list[str]:
    """The names of snapshots."""
    return [each.name for each in records]


class Chain:
    """Two streams: 'web' whole, as it was at 's0', and what 's1' has differently."""

    def __init__(self, first: bytes, second: bytes, contents: list[bytes]) -> None:
        self.first = first
        self.second = second
        self.contents = contents


async def chain(pool: StreamPool) -> Chain:
    """Make them: at 's1' parts are overwritten, trimmed, and new."""
    volume = await pool.volume(SIZE, "web")
    handle = await pool.open(volume)
    await write(handle, 0, os.urandom(40 * CHUNK))
    await pool.snapshots.create({volume: "s0"})
    await write(handle, 10 * CHUNK, os.urandom(20 * CHUNK))
    await handle.zero(2 * CHUNK, 3 * CHUNK, punch=True)
    await write(handle, 550 * CHUNK, os.urandom(CHUNK))
    await handle.close()
    await pool.snapshots.create({volume: "s1"})
    contents = [await pool.content("web@s0"), await pool.content("web@s1")]
    return Chain(await pool.export("web@s0"), await pool.export("web@s1", "web@s0"), contents)
