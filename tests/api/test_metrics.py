"""Metrics over a real pool and a real NBD server's counters."""

import asyncio
import errno
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from blockvirt.errors import MetadataFault
from blockvirt.limits import DEFAULT_CHUNK_BYTES
from blockvirt.meta.keys import Table, pair_key
from blockvirt.meta.store import Store
from blockvirt.metrics import Metrics
from blockvirt.nbd.constants import COMMAND_NAMES
from blockvirt.nbd.stats import ServerStats, Traffic
from blockvirt.snapshots.catalogue import Snapshots
from blockvirt.snapshots.readers import SnapshotReaders
from blockvirt.snapshots.scrub import Scrubbing
from blockvirt.snapshots.sealing import Sealer
from blockvirt.units import KIB, MIB
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.engine import Engine, EngineSettings
from blockvirt.volumes.requests import NewVolume
from tests.volumes.conftest import until

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Counters:
    """What an NBD server would have counted."""

    def __init__(self) -> None:
        self.figures = ServerStats()

    def stats(self) -> ServerStats:
        """The figures."""
        return self.figures


def parse(text: bytes) -> Samples:
    """Every sample by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


async def shown(metrics: Metrics) -> Samples:
    """A scrape as the API makes one: the text in a thread."""
    return parse(await asyncio.to_thread(metrics.take()))


async def test_what_a_pool_in_use_shows(tmp_path: Path) -> None:
    engine = await Engine.start(tmp_path / "state", [tmp_path / "dev"], EngineSettings(metadata_reserve_bytes=MIB))
    try:
        catalogue = Catalogue(engine.store, engine.registry, engine.storage)
        counters = Counters()
        metrics = Metrics(engine, catalogue, counters)
        volume = (await catalogue.create(NewVolume(64 * MIB, name="v"))).volume
        await catalogue.create(NewVolume(64 * MIB, name="closed"))
        handle = await engine.registry.open(volume.id, "s1")
        await handle.write(0, memoryview(b"x" * MIB))
        await handle.flush()
        samples = parse(metrics.take()())
        await handle.close()
    finally:
        await engine.close()
    in_volume = (("volume", "v"),)
    assert samples["blockvirt_pool_promised_bytes", ()] == 128 * MIB
    assert samples["blockvirt_pool_capacity_bytes", ()] > samples["blockvirt_pool_used_bytes", ()] >= MIB
    assert sum(value for (name, _), value in samples.items() if name == "blockvirt_pool_state") == 1
    assert samples["blockvirt_pool_volumes", ()] == 2
    assert samples["blockvirt_open_volumes", ()] == 1
    assert samples["blockvirt_volume_size_bytes", in_volume] == 64 * MIB
    assert samples["blockvirt_volume_mapped_bytes", in_volume] == MIB
    assert samples["blockvirt_flush_duration_seconds_count", in_volume] == 1
    assert samples["blockvirt_flush_duration_seconds_sum", in_volume] > 0
    assert samples["blockvirt_fsync_duration_seconds_count", in_volume] >= 1
    assert 0 < samples["blockvirt_volume_journal_fill_ratio", in_volume] < 1
    assert 0 < samples["blockvirt_lmdb_map_used_ratio", ()] < 1
    assert not [key for key in samples if ("volume", "closed") in key[1]], "series by volume are for open ones"


async def test_what_snapshots_hold(tmp_path: Path) -> None:
    engine = await Engine.start(tmp_path / "state", [tmp_path / "dev"], EngineSettings(metadata_reserve_bytes=MIB))
    try:
        catalogue = Catalogue(engine.store, engine.registry, engine.storage, trash_s=3600.0)
        snapshots = Snapshots(engine, SnapshotReaders(engine.context), clock=lambda: 1_700_000_000.5)
        metrics = Metrics(engine, catalogue, Counters(), clock=lambda: 0.0)
        volume = (await catalogue.create(NewVolume(64 * MIB, name="v"))).volume
        handle = await engine.registry.open(volume.id, "s1")
        await handle.write(0, memoryview(b"x" * MIB))
        await snapshots.create({"v": "one"})
        at_snapshot = await shown(metrics)
        await handle.write(0, memoryview(b"y" * (256 * KIB)))
        (opened,) = engine.registry.opened()
        await opened.checkpointer.run()
        at_checkpoint = await shown(metrics)
        await snapshots.delete(["v@one"])
        assert all([(await engine.jobs.finished(job.id)).state == "done" for job in engine.jobs.list()])
        after_reclaim = await shown(metrics)
        origin = (await snapshots.create({"v": "two"}))[0]
        await catalogue.create(NewVolume(64 * MIB, name="clone"), origin=origin)
        await handle.write(MIB, memoryview(b"z" * (64 * KIB)))
        await opened.checkpointer.run()
        cloned = await shown(metrics)
        await handle.close()
        await catalogue.delete("v")
        trashed = await shown(metrics)
    finally:
        await engine.close()
    in_volume = (("volume", "v"),)
    names = [f"blockvirt_volume_{name}" for name in ("exclusive_bytes", "snapshot_bytes")]

    def space(samples: Samples) -> list[float]:
        return [samples[name, in_volume] / KIB for name in names]

    assert space(at_snapshot) == [1024, 0]
    assert space(at_checkpoint) == [1024 + 256, 256]
    assert space(after_reclaim) == [1024, 0]
    assert space(cloned) == [64, 0], "what a clone sees does not come back"
    newest = "blockvirt_volume_last_snapshot_timestamp_seconds"
    assert at_snapshot[newest, in_volume] == 1_700_000_000.5
    assert after_reclaim[newest, in_volume] == 0
    assert [samples["blockvirt_snapshots", ()] for samples in (at_snapshot, after_reclaim, cloned)] == [1, 0, 1]
    assert after_reclaim["blockvirt_jobs", (("kind", "reclaim"), ("state", "done"))] == 1
    assert after_reclaim["blockvirt_jobs", (("kind", "reclaim"), ("state", "failed"))] == 0
    assert after_reclaim["blockvirt_reclaim_backlog_rows", ()] == 0
    assert ("blockvirt_punch_backlog_rows", ()) in after_reclaim
    assert (cloned["blockvirt_trash_volumes", ()], trashed["blockvirt_trash_volumes", ()]) == (0, 1)
    assert (cloned["blockvirt_trash_bytes", ()], trashed["blockvirt_trash_bytes", ()]) == (0, MIB + 64 * KIB)
    assert (newest, in_volume) not in trashed, "series by volume are for open ones"


async def test_rows_that_wait_are_counted(tmp_path: Path) -> None:
    engine = await Engine.start(tmp_path / "state", [tmp_path / "dev"], EngineSettings(metadata_reserve_bytes=MIB))
    try:
        await engine.store.commit(lambda writer: writer.put(Table.RECLAIM, pair_key(7, 3), b""))
        metrics = Metrics(engine, Catalogue(engine.store, engine.registry, engine.storage), Counters())
        assert (await shown(metrics))["blockvirt_reclaim_backlog_rows", ()] == 1
        await engine.store.commit(lambda writer: writer.delete(Table.RECLAIM, pair_key(7, 3)))
    finally:
        await engine.close()


async def test_nbd_counters_keep_their_sums(tmp_path: Path) -> None:
    engine = await Engine.start(tmp_path / "state", [tmp_path / "dev"], EngineSettings(metadata_reserve_bytes=MIB))
    try:
        counters = Counters()
        stats = counters.figures
        read, write = COMMAND_NAMES.index("read"), COMMAND_NAMES.index("write")
        stats.total.requests[read], stats.total.requests[write], stats.total.bytes_read = 10, 4, 4096
        stats.exports["web1/lun0"] = Traffic(bytes_read=1024)
        stats.exports["web1/lun0"].requests[read] = 7
        stats.error(errno.ENOSPC)
        stats.latency[read].observe(75e-6, 9)
        stats.latency[read].observe(99.0)
        stats.connections = 3
        metrics = Metrics(engine, Catalogue(engine.store, engine.registry, engine.storage), counters)
        samples = parse(metrics.take()())
    finally:
        await engine.close()
    requests = "blockvirt_nbd_requests_total"
    assert samples[requests, (("command", "read"), ("volume", "web1/lun0"))] == 7
    assert samples[requests, (("command", "read"), ("volume", ""))] == 3
    assert sum(value for (name, _), value in samples.items() if name == requests) == 14
    assert samples["blockvirt_nbd_bytes_total", (("direction", "read"), ("volume", ""))] == 3072
    assert samples["blockvirt_nbd_errors_total", (("code", "ENOSPC"),)] == 1
    assert samples["blockvirt_nbd_connections", ()] == 3
    bucket = "blockvirt_nbd_request_duration_seconds_bucket"
    assert samples[bucket, (("command", "read"), ("le", "5e-05"))] == 0
    assert samples[bucket, (("command", "read"), ("le", "0.0001"))] == 9
    assert samples[bucket, (("command", "read"), ("le", "5.0"))] == 9
    assert samples[bucket, (("command", "read"), ("le", "+Inf"))] == 10
    assert samples["blockvirt_nbd_request_duration_seconds_count", (("command", "read"),)] == 10


async def test_what_scrubs_have_found(tmp_path: Path) -> None:
    engine = await Engine.start(tmp_path / "state", [tmp_path / "dev"], EngineSettings(metadata_reserve_bytes=MIB))
    try:
        catalogue = Catalogue(engine.store, engine.registry, engine.storage)
        scrubbing = Scrubbing(engine)
        snapshots = Snapshots(engine, SnapshotReaders(engine.context))
        volume = (await catalogue.create(NewVolume(MIB, name="v"))).volume
        handle = await engine.registry.open(volume.id, "s1")
        await handle.write(0, memoryview(b"x" * MIB))
        await handle.close()
        await snapshots.create({"v": "one"})
        sealing = asyncio.create_task(Sealer(engine).run())
        await until(lambda: not engine.store.stats().entries["seals"])
        sealing.cancel()
        metrics = Metrics(engine, catalogue, Counters(), scrubs=scrubbing.counters)
        before = await shown(metrics)
        with next((tmp_path / "dev" / "files").iterdir()).open("r+b") as file:
            file.write(b"!")
        job = await engine.jobs.finished(await scrubbing.start())
        after = await shown(metrics)
    finally:
        await engine.close()
    names = [f"blockvirt_scrub_{name}" for name in ("bytes_total", "chunks_total", "damaged_total", "standing_damage")]
    assert [before[name, ()] for name in names] == [0, 0, 0, 0]
    assert before["blockvirt_scrub_last_end_timestamp_seconds", ()] == 0
    assert after[names[0], ()] > MIB
    assert [after[name, ()] for name in names[1:]] == [MIB // DEFAULT_CHUNK_BYTES, 1, 1]
    assert job.created_s < after["blockvirt_scrub_last_end_timestamp_seconds", ()] <= (job.finished_s or 0)
    assert after["blockvirt_jobs", (("kind", "scrub"), ("state", "done"))] == 1


async def test_a_failed_store_still_has_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await Engine.start(tmp_path / "state", [tmp_path / "dev"], EngineSettings(metadata_reserve_bytes=MIB))
    try:
        metrics = Metrics(engine, Catalogue(engine.store, engine.registry, engine.storage), Counters())
        assert parse(metrics.take()())["blockvirt_lmdb_failed", ()] == 0

        def failed(self: Store) -> None:
            raise MetadataFault("the store has failed")

        with monkeypatch.context() as patch:
            patch.setattr(Store, "stats", failed)
            patch.setattr(Store, "read", failed)
            assert parse(metrics.take()())["blockvirt_lmdb_failed", ()] == 1
    finally:
        await engine.close()
