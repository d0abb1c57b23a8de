"""Prometheus metrics: one collector over plain integers that the rooms count anyway.

``take`` runs on the event loop and only copies numbers, none of them for each volume; reading those of open volumes and
what is kept in the metadata, and making text of all, happens in a thread. Series by volume exist for open volumes only,
latency histograms by command only, so that a scrape stays small at 10,000 volumes.
"""

import errno
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from blockvirt import __version__
from blockvirt.errors import BlockvirtError, DamagedRecord, MetadataFault
from blockvirt.meta.keys import Table
from blockvirt.meta.store import StoreStats
from blockvirt.nbd.constants import COMMAND_NAMES
from blockvirt.nbd.stats import LATENCY_BOUNDS_S, ServerStats, Traffic
from blockvirt.snapshots.scrub_records import results, standing
from blockvirt.snapshots.scrub_run import ScrubCounters
from blockvirt.snapshots.space_figures import SpaceFigures, SpaceOfVolumes, newest_snapshot_s, trashed_chunks
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.engine import Engine
from blockvirt.volumes.opened import OpenVolume
from blockvirt.volumes.ports import PoolStatus
from blockvirt.volumes.stats import VolumeStats

log = logging.getLogger("blockvirt.metrics")

LEVELS = ("ok", "near", "brake", "stop")
NO_EXPORT = ""
"""Label of the traffic of exports that nobody has open any more, so that sums over volumes stay whole."""


class NbdCounters(Protocol):
    """Where the NBD server's figures come from."""

    def stats(self) -> ServerStats:
        """Return a snapshot."""


@dataclass(frozen=True, slots=True)
class VolumeFigures:
    """One open volume at one moment."""

    id: str
    name: str
    size_bytes: int
    mapped_bytes: int
    journal_fill_ratio: float
    stopped: bool
    stats: VolumeStats


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that one scrape shows."""

    pool: PoolStatus
    promised_bytes: int
    volumes: int
    open_volumes: tuple[VolumeFigures, ...]
    nbd: ServerStats
    store: StoreStats
    jobs: Mapping[tuple[str, str], int]
    """By (kind, state)."""
    scrubs: ScrubCounters


@dataclass(frozen=True, slots=True)
class StoredFigures:
    """What is read from the metadata in a thread. Volumes by their ids; one whose metadata is damaged is missing."""

    trash_volumes: int = 0
    trash_chunks: int = 0
    space: Mapping[str, SpaceFigures] = field(default_factory=dict)
    newest_snapshot_s: Mapping[str, float] = field(default_factory=dict)
    last_scrub_s: float = 0.0
    standing_damage: int = 0


class Metrics:
    """Takes figures on the event loop and gives back what makes text of them."""

    def __init__(
        self,
        engine: Engine,
        catalogue: Catalogue,
        server: NbdCounters,
        *,
        scrubs: ScrubCounters | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read from a running pool, the server in front of it, and its scrubs. ``clock`` measures what figures cost."""
        self._scrubs = scrubs or ScrubCounters()
        self._engine = engine
        self._catalogue = catalogue
        self._server = server
        self._space = SpaceOfVolumes(engine.store, clock=clock)
        self._chunk_bytes = 1 << engine.context.chunk_shift
        self._last: Figures | None = None
        self._last_stored = StoredFigures()

    def take(self) -> Callable[[], bytes]:
        """Copy the numbers as they are now; call the result in a thread.

        Once the metadata store has failed, what lies in it is shown as it was at the scrape before.
        """
        opened, nbd = self._engine.registry.opened(), self._server.stats()
        try:
            figures = Figures(
                pool=self._engine.storage.status(),
                promised_bytes=self._catalogue.promised_bytes,
                volumes=self._catalogue.count(),
                open_volumes=(),
                nbd=nbd,
                store=self._engine.store.stats(),
                jobs=self._engine.jobs.counts(),
                scrubs=replace(self._scrubs),
            )
        except MetadataFault:
            if self._last is None:
                raise
            store = replace(self._last.store, failed=True)
            figures = replace(self._last, nbd=nbd, store=store)
        self._last = figures
        return partial(self._text, figures, opened)

    def _text(self, figures: Figures, opened: Sequence[OpenVolume]) -> bytes:
        figures = replace(figures, open_volumes=tuple(_figures_of(each) for each in opened))
        try:
            self._last_stored = self._stored(figures)
        except BlockvirtError as error:
            log.error("the metadata's figures are shown as they were: %s", error)
        return render(figures, self._last_stored, self._chunk_bytes)

    def _stored(self, figures: Figures) -> StoredFigures:
        space = self._space.figures({volume.id: volume.stats.checkpoints for volume in figures.open_volumes})
        newest_s: dict[str, float] = {}
        with self._engine.store.read() as reader:
            for volume in figures.open_volumes:
                try:
                    newest_s[volume.id] = newest_snapshot_s(reader, volume.id)
                except DamagedRecord as error:
                    log.error("when volume %s was snapshotted cannot be told: %s", volume.name, error)
            scrubs = results(reader)
            last_scrub_s = max((record.ended_s for record in scrubs), default=0.0)
            standing_damage = len(standing(reader, scrubs))
            return StoredFigures(*trashed_chunks(reader), space, newest_s, last_scrub_s, standing_damage)


def _figures_of(opened: OpenVolume) -> VolumeFigures:
    """Read an open volume's plain numbers, in whatever thread: each is right, two may be of different moments."""
    volume = opened.volume
    journal = volume.journal  # it may be closed meanwhile
    mapped_bytes = volume.tail.mapped_chunks * volume.chunk_bytes
    return VolumeFigures(
        id=volume.record.id,
        name=volume.record.name,
        size_bytes=volume.size_bytes,
        mapped_bytes=min(mapped_bytes, volume.size_bytes),
        journal_fill_ratio=journal.fill_ratio() if journal is not None else 0.0,
        stopped=volume.failure is not None,
        stats=replace(volume.stats),
    )


def render(figures: Figures, stored: StoredFigures, chunk_bytes: int) -> bytes:
    """Return the figures in the text format of Prometheus."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(figures, stored, chunk_bytes))
    return generate_latest(registry)


class _Figures(Collector):
    def __init__(self, figures: Figures, stored: StoredFigures, chunk_bytes: int) -> None:
        self._figures = figures
        self._stored = stored
        self._chunk_bytes = chunk_bytes

    def collect(self) -> Iterator[Metric]:
        """Yield all families."""
        yield InfoMetricFamily("blockvirt_build", "The version that runs.", value={"version": __version__})
        yield from _pool(self._figures)
        yield from _volumes(self._figures.open_volumes)
        yield from _snapshots(self._figures, self._stored, self._chunk_bytes)
        yield from _background(self._figures)
        yield from _scrubs(self._figures.scrubs, self._stored)
        yield from _nbd(self._figures.nbd)
        yield from _store(self._figures.store)


def _pool(figures: Figures) -> Iterator[Metric]:
    pool = figures.pool
    for name, value, meaning in (
        ("capacity_bytes", pool.capacity_bytes, "What the devices can hold, limits and reserves applied."),
        ("used_bytes", pool.used_bytes, "Chunks that a map entry names, and freed ones until they are punched."),
        ("promised_bytes", figures.promised_bytes, "The sum of the sizes of all volumes."),
        ("reserved_bytes", pool.reserved_bytes, "Allocated ahead of what is written."),
        ("free_bytes", pool.free_bytes, "What may still be allocated."),
        ("overcommit_ratio", pool.overcommit_ratio, "How much may be promised for each byte of capacity."),
        ("volumes", figures.volumes, "Volumes, open or not."),
    ):
        yield GaugeMetricFamily(f"blockvirt_pool_{name}", meaning, value)
    state = GaugeMetricFamily("blockvirt_pool_state", "1 for the level of fullness that applies.", labels=["state"])
    for level in LEVELS:
        state.add_metric([level], level == pool.level)
    yield state
    capacity = GaugeMetricFamily("blockvirt_device_capacity_bytes", "What a device can hold.", labels=["device"])
    used = GaugeMetricFamily("blockvirt_device_used_bytes", "Chunks on a device that are in use.", labels=["device"])
    online = GaugeMetricFamily("blockvirt_device_online", "Whether a device can be used.", labels=["device"])
    for device in pool.devices:
        capacity.add_metric([device.name], device.capacity_bytes)
        used.add_metric([device.name], device.used_bytes)
        online.add_metric([device.name], device.state == "online")
    yield from (capacity, used, online)


def _volumes(volumes: tuple[VolumeFigures, ...]) -> Iterator[Metric]:
    yield GaugeMetricFamily("blockvirt_open_volumes", "Volumes that hold memory and a journal.", len(volumes))
    for name, meaning in (
        ("size_bytes", "Size of an open volume."),
        ("mapped_bytes", "What an open volume occupies."),
        ("journal_fill_ratio", "How full the journal's running file is."),
        ("stopped", "1: a sync failed, nothing is acknowledged any more."),
    ):
        gauge = GaugeMetricFamily(f"blockvirt_volume_{name}", meaning, labels=["volume"])
        for volume in volumes:
            gauge.add_metric([volume.name], getattr(volume, name))
        yield gauge
    for name, count, seconds, meaning in (
        ("flush", "flushes", "flush_s", "FLUSH and FUA, grouped."),
        ("checkpoint", "checkpoints", "checkpoint_s", "Checkpoints."),
        ("fsync", "syncs", "sync_s", "fdatasync of a volume's files."),
    ):
        summary = SummaryMetricFamily(f"blockvirt_{name}_duration_seconds", meaning, labels=["volume"])
        for volume in volumes:
            summary.add_metric([volume.name], getattr(volume.stats, count), getattr(volume.stats, seconds))
        yield summary
    for name, meaning in (
        ("journal_appends", "Batches of map changes."),
        ("embedded_flushes", "Flushes whose data went into the journal, for one sync instead of two."),
        ("slow_reads", "Reads that a thread did."),
        ("slow_writes", "Writes that a thread did."),
        ("copied_chunks", "Chunks copied on write."),
    ):
        counter = CounterMetricFamily(f"blockvirt_volume_{name}", meaning, labels=["volume"])
        for volume in volumes:
            counter.add_metric([volume.name], getattr(volume.stats, name))
        yield counter


def _snapshots(figures: Figures, stored: StoredFigures, chunk_bytes: int) -> Iterator[Metric]:
    space = stored.space
    exclusive = {volume_id: each.exclusive_chunks * chunk_bytes for volume_id, each in space.items()}
    in_snapshots = {volume_id: each.snapshot_chunks * chunk_bytes for volume_id, each in space.items()}
    for name, values, meaning in (
        ("exclusive_bytes", exclusive, "What purging an open volume with its snapshots would free."),
        ("snapshot_bytes", in_snapshots, "What deleting all snapshots of an open volume would free."),
        ("last_snapshot_timestamp_seconds", stored.newest_snapshot_s, "When it was last snapshotted; 0: never."),
    ):
        gauge = GaugeMetricFamily(f"blockvirt_volume_{name}", meaning, labels=["volume"])
        for volume in figures.open_volumes:
            if volume.id in values:
                gauge.add_metric([volume.name], values[volume.id])
        yield gauge
    rows = figures.store.entries[Table.SNAPSHOTS.value.decode()]
    yield GaugeMetricFamily("blockvirt_snapshots", "Snapshots of all volumes.", rows)
    yield GaugeMetricFamily("blockvirt_trash_volumes", "Volumes in the trash.", stored.trash_volumes)
    held_bytes = stored.trash_chunks * chunk_bytes
    yield GaugeMetricFamily("blockvirt_trash_bytes", "What they hold, with their snapshots.", held_bytes)


def _background(figures: Figures) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("blockvirt_jobs", "Jobs, those that ended lately included.", labels=["kind", "state"])
    for (kind, state), count in figures.jobs.items():
        jobs.add_metric([kind, state], count)
    yield jobs
    for name, table, meaning in (
        ("reclaim", Table.RECLAIM, "Points that went and whose space is not freed yet."),
        ("punch", Table.PUNCH, "Runs of freed chunks that the filesystem has not got back yet."),
    ):
        rows = figures.store.entries[table.value.decode()]
        yield GaugeMetricFamily(f"blockvirt_{name}_backlog_rows", meaning, rows)


def _scrubs(counters: ScrubCounters, stored: StoredFigures) -> Iterator[Metric]:
    for name, value, meaning in (
        ("bytes", counters.read_bytes, "Read by scrubs."),
        ("chunks", counters.chunks, "Sealed chunks that scrubs compared with their checksums."),
        ("damaged", counters.damaged, "Pieces of damage that scrubs found."),
    ):
        yield CounterMetricFamily(f"blockvirt_scrub_{name}", meaning, value)
    for name, number, meaning in (
        ("last_end_timestamp_seconds", stored.last_scrub_s, "When a scrub last came to its end; 0: never."),
        ("standing_damage", stored.standing_damage, "Pieces of damage that the last scrubs found and nothing removed."),
    ):
        yield GaugeMetricFamily(f"blockvirt_scrub_{name}", meaning, number)


def _nbd(nbd: ServerStats) -> Iterator[Metric]:
    requests = CounterMetricFamily("blockvirt_nbd_requests", "Requests answered.", labels=["volume", "command"])
    moved = CounterMetricFamily("blockvirt_nbd_bytes", "Payload bytes.", labels=["volume", "direction"])
    for export, traffic in [*nbd.exports.items(), (NO_EXPORT, _rest(nbd))]:
        for command, count in zip(COMMAND_NAMES, traffic.requests, strict=True):
            if count:
                requests.add_metric([export, command], count)
        moved.add_metric([export, "read"], traffic.bytes_read)
        moved.add_metric([export, "write"], traffic.bytes_written)
    yield from (requests, moved)
    latency = HistogramMetricFamily(
        "blockvirt_nbd_request_duration_seconds", "From a request's arrival to its reply.", labels=["command"]
    )
    for command, histogram in zip(COMMAND_NAMES, nbd.latency, strict=True):
        bounds = [*(str(bound) for bound in LATENCY_BOUNDS_S), "+Inf"]
        latency.add_metric([command], list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.sum_s)
    yield latency
    errors = CounterMetricFamily("blockvirt_nbd_errors", "Error replies by errno.", labels=["code"])
    for code, count in nbd.errors.items():
        errors.add_metric([errno.errorcode.get(code, str(code))], count)
    yield errors
    for name, value, meaning in (
        ("connections", nbd.connections, "Connections, those in the handshake included."),
        ("sessions", nbd.sessions, "Sessions past the handshake."),
        ("inflight_requests", nbd.in_flight, "Slow requests that are not answered yet."),
        ("inflight_bytes", nbd.in_flight_bytes, "Memory that requests and replies in flight hold."),
    ):
        yield GaugeMetricFamily(f"blockvirt_nbd_{name}", meaning, value)
    for name, value, meaning in (
        ("connections_accepted", nbd.accepted_total, "Connections accepted."),
        ("connections_refused", nbd.refused_total, "Connections refused at the limit."),
        ("handshakes_failed", nbd.handshakes_failed_total, "Handshakes that came to nothing."),
        ("stalled_clients_dropped", nbd.stalled_clients_dropped_total, "Clients that took no replies any more."),
    ):
        yield CounterMetricFamily(f"blockvirt_nbd_{name}", meaning, value)


def _rest(nbd: ServerStats) -> Traffic:
    """Return what is counted in total and of no export that is listed."""
    rest = nbd.total.copy()
    for traffic in nbd.exports.values():
        rest.requests = [all_ - some for all_, some in zip(rest.requests, traffic.requests, strict=True)]
        rest.bytes_read -= traffic.bytes_read
        rest.bytes_written -= traffic.bytes_written
    return rest


def _store(store: StoreStats) -> Iterator[Metric]:
    for name, value, meaning in (
        ("map_used_ratio", store.used_ratio, "Used part of LMDB's map, which grows before it is half full."),
        ("map_bytes", store.map_bytes, "Address space that LMDB maps."),
        ("used_bytes", store.used_bytes, "End of the last page that was ever used."),
        ("reserve_ok", store.reserve_ok, "1: the metadata reserve is whole."),
        ("failed", store.failed, "1: metadata can be neither read nor written."),
    ):
        yield GaugeMetricFamily(f"blockvirt_lmdb_{name}", meaning, value)
    yield CounterMetricFamily("blockvirt_lmdb_commits", "Synced transactions.", store.commits)
    entries = GaugeMetricFamily("blockvirt_lmdb_entries", "Rows by table.", labels=["table"])
    for table, rows in store.entries.items():
        entries.add_metric([table], rows)
    yield entries
