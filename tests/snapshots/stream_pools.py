"""Two pools between which snapshots travel as streams."""

from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from blockvirt.meta.records import SnapshotRecord
from blockvirt.snapshots.export import SnapshotExports
from blockvirt.snapshots.importing import SnapshotImports
from tests.snapshots.conftest import SnapshotPool
from tests.volumes.conftest import read

CHUNK = 4096


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
