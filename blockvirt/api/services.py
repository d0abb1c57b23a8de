"""What the handlers work with: one frozen object that the daemon puts together."""

from collections.abc import Callable
from dataclasses import dataclass

from blockvirt.api.idempotency import Idempotency
from blockvirt.lun.presentation import Presentation
from blockvirt.snapshots.catalogue import Snapshots
from blockvirt.snapshots.changed_blocks import ChangedBlocks
from blockvirt.snapshots.cloning import Cloning
from blockvirt.snapshots.export import SnapshotExports
from blockvirt.snapshots.flatten import Flattening
from blockvirt.snapshots.histories import Histories
from blockvirt.snapshots.importing import SnapshotImports
from blockvirt.snapshots.revert import Reverts
from blockvirt.snapshots.schedules import Schedules
from blockvirt.snapshots.scrub import Scrubbing
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.jobs import JobBoard
from blockvirt.volumes.ports import DeviceAdmin, Endpoints, PoolSpace, SessionControl


@dataclass(frozen=True, slots=True)
class Services:
    """The rooms behind the API."""

    catalogue: Catalogue
    presentation: Presentation
    sessions: SessionControl
    space: PoolSpace
    devices: DeviceAdmin
    idempotency: Idempotency
    snapshots: Snapshots
    reverts: Reverts
    cloning: Cloning
    flattening: Flattening
    changed_blocks: ChangedBlocks
    exports: SnapshotExports
    imports: SnapshotImports
    histories: Histories
    schedules: Schedules
    scrubbing: Scrubbing
    jobs: JobBoard
    endpoints: Callable[[], Endpoints]
    """Where the daemon listens; asked on each request, because ports are known late."""
    not_ready: Callable[[], str]
    """Why the daemon does not serve: 'starting', 'stopping' ('...: more'), else what has failed; empty when it does."""
    metrics: Callable[[], Callable[[], bytes]]
    """Takes the figures on the event loop; what it returns makes text of them and runs in a thread."""
