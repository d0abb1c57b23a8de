"""The services of snapshots over an engine, for served APIs with and without a running pool."""

from collections.abc import Callable
from typing import Any

from blockvirt.meta.keys import POOL_KEY, Table
from blockvirt.meta.records import PoolRecord
from blockvirt.meta.store import Store
from blockvirt.pool.devices import claim_all
from blockvirt.snapshots.catalogue import Snapshots
from blockvirt.snapshots.changed_blocks import ChangedBlocks
from blockvirt.snapshots.cloning import Cloning
from blockvirt.snapshots.export import SnapshotExports
from blockvirt.snapshots.flatten import Flattening
from blockvirt.snapshots.histories import Histories
from blockvirt.snapshots.importing import SnapshotImports
from blockvirt.snapshots.readers import SnapshotReaders
from blockvirt.snapshots.revert import Reverts
from blockvirt.snapshots.scheduled import ScheduledSnapshots
from blockvirt.snapshots.schedules import Schedules
from blockvirt.snapshots.scrub import Clocks, Scrubbing
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.engine import Engine, EngineSettings, volume_context
from blockvirt.volumes.io_threads import IoThreads
from blockvirt.volumes.storage import PoolStorage


def unstarted_engine(store: Store) -> Engine:
    """Return an engine over a store that a test has opened: without devices, and nothing of it runs by itself."""
    with store.read() as reader:
        pool = reader.record(PoolRecord, Table.POOL, POOL_KEY)
    assert pool is not None
    threads = IoThreads(1)
    storage = PoolStorage(store, threads, *claim_all([], pool.id))
    return Engine(volume_context(EngineSettings(), pool, storage, store, threads), storage)


def snapshot_services(
    engine: Engine, catalogue: Catalogue, readers: SnapshotReaders, clock: Callable[[], float]
) -> dict[str, Any]:
    """Return what ``Services`` has for snapshots, by its names."""
    snapshots = Snapshots(engine, readers, clock=clock)
    return {
        "snapshots": snapshots,
        "reverts": Reverts(engine, snapshots, catalogue.promises, clock=clock),
        "cloning": Cloning(engine.store, catalogue, snapshots),
        "flattening": Flattening(engine, readers, clock=clock),
        "changed_blocks": ChangedBlocks(engine, snapshots),
        "exports": SnapshotExports(engine, snapshots, readers),
        "imports": SnapshotImports(engine, catalogue, clock=clock),
        "histories": Histories(engine.context),
        "schedules": Schedules(engine.store, clock, ScheduledSnapshots(engine.store, snapshots)),
        "scrubbing": Scrubbing(engine, clocks=Clocks(time_s=clock)),
        "jobs": engine.jobs,
    }
