"""What open volumes and their snapshots hold, for whoever asks again and again: the metrics.

The figures are exact, but what they cost grows with what changed between the snapshots. So they are kept until a
checkpoint or another point of the history may have changed them, computed in whatever thread asks, and those that are
dear are computed seldom.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from blockvirt.errors import BlockvirtError
from blockvirt.limits import SPACE_FIGURES_COST_RATIO, SPACE_FIGURES_S
from blockvirt.meta.keys import Table, number_key, split_point
from blockvirt.meta.records import FileRecord, SnapshotRecord
from blockvirt.meta.store import Reader, Store
from blockvirt.snapshots.freed import freed_with_snapshots, freed_with_volume
from blockvirt.volumes.deletion import branches_of
from blockvirt.volumes.views import files_of_volume

log = logging.getLogger("blockvirt.snapshots")


@dataclass(frozen=True, slots=True)
class SpaceFigures:
    """One volume, as of its last checkpoint or, where computing that is dear, an earlier one."""

    exclusive_chunks: int
    """What becomes free when it goes for good, with its snapshots."""
    snapshot_chunks: int
    """What becomes free when all of its snapshots go, and it stays."""


@dataclass(frozen=True, slots=True)
class _Kept:
    figures: SpaceFigures | None
    """None: the metadata around the volume is damaged."""
    version: tuple[int, ...]
    computed_s: float
    cost_s: float


class SpaceOfVolumes:
    """Keeps the figures of the volumes that it was last asked for. One per process; ``figures`` may block."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()

    def figures(self, checkpoints: Mapping[str, int]) -> Mapping[str, SpaceFigures]:
        """Return what is known of volumes, given how many checkpoints each has had since it was opened, by its id.

        For a thread: takes up to SPACE_FIGURES_S, and longer only by one volume. Those that it had no time for are
        missing, or as they were; so are all of them where another thread is at it. Raises MetadataFault.
        """
        if self._lock.acquire(blocking=False):
            try:
                self._renew(checkpoints)
            finally:
                self._lock.release()
        kept = self._kept
        return {volume_id: figures for volume_id in checkpoints if (figures := _figures(kept, volume_id)) is not None}

    def _renew(self, checkpoints: Mapping[str, int]) -> None:
        kept = {volume_id: self._kept[volume_id] for volume_id in checkpoints if volume_id in self._kept}
        with self._store.read() as reader:
            history = reader.count(Table.POINTS), reader.count(Table.RECLAIM)
        began_s = self._clock()
        # Those that were never computed first, then the oldest: in the end it is everybody's turn.
        for volume_id in sorted(checkpoints, key=lambda each: kept[each].computed_s if each in kept else -1.0):
            version = (checkpoints[volume_id], *history)
            now_s = self._clock()
            if now_s - began_s > SPACE_FIGURES_S:
                break
            old = kept.get(volume_id)
            if old is not None:
                rest_s = old.cost_s / SPACE_FIGURES_COST_RATIO
                if old.version == version or now_s - old.computed_s < rest_s:
                    continue
            figures = self._compute(volume_id)
            done_s = self._clock()
            kept[volume_id] = _Kept(figures, version, done_s, done_s - now_s)
        self._kept = kept

    def _compute(self, volume_id: str) -> SpaceFigures | None:
        with self._store.read() as reader:
            try:
                return SpaceFigures(freed_with_volume(reader, volume_id), freed_with_snapshots(reader, volume_id))
            except BlockvirtError as error:
                log.error("what volume %s holds cannot be told: %s", volume_id, error)
                return None


def _figures(kept: Mapping[str, _Kept], volume_id: str) -> SpaceFigures | None:
    return kept[volume_id].figures if volume_id in kept else None


def newest_snapshot_s(reader: Reader, volume_id: str) -> float:
    """Return when the newest snapshot of a volume was taken (Unix time); 0: it has none. Raises DamagedRecord."""
    newest_s = 0.0
    for branch in branches_of(reader, volume_id):
        for key, _ in reader.scan(Table.POINTS, prefix=number_key(branch), reverse=True):
            who = split_point(key)[2]
            record = reader.record(SnapshotRecord, Table.SNAPSHOTS, who.encode()) if isinstance(who, str) else None
            if record is not None:
                newest_s = max(newest_s, record.created_s)
                break
    return newest_s


def trashed_chunks(reader: Reader) -> tuple[int, int]:
    """Return how many volumes are in the trash, and how many chunks they hold with their snapshots.

    For a thread: some 100 us a volume. Raises DamagedRecord.
    """
    volumes = [key.decode() for key, _ in reader.scan(Table.TRASH)]
    files: list[FileRecord] = [file for volume_id in volumes for file in files_of_volume(reader, volume_id)]
    return len(volumes), sum(file.live_chunks for file in files)
