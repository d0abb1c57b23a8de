"""A running pool with its snapshots, for the tests of this room."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blockvirt.snapshots.catalogue import Snapshots
from blockvirt.snapshots.flatten import Flattening
from blockvirt.snapshots.readers import SnapshotReaders
from blockvirt.snapshots.revert import Reverts
from blockvirt.snapshots.sealing import Sealer
from blockvirt.volumes.catalogue import Catalogue
from tests.volumes.conftest import Pool


class SnapshotPool(Pool):
    """A pool whose volumes can be snapshotted."""

    async def start(self) -> "SnapshotPool":
        await super().start()
        engine = self.engine
        self.catalogue = Catalogue(engine.store, engine.registry, engine.storage)
        self.readers = SnapshotReaders(engine.context)
        self.snapshots = Snapshots(engine, self.readers)
        self.flattening = Flattening(engine, self.readers)
        self.reverts = Reverts(engine, self.snapshots, self.catalogue.promises)
        self.sealer = asyncio.create_task(Sealer(engine).run())
        return self

    async def close(self) -> None:
        self.sealer.cancel()
        await self.readers.close()
        await super().close()


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[SnapshotPool]:
    made = await SnapshotPool(tmp_path).start()
    yield made
    await made.close()
