"""What a scrape costs the event loop, counted in calls: volumes, open or not, are looked at in a thread."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockvirt.ids import new_id
from blockvirt.limits import MAX_VOLUMES
from blockvirt.meta.keys import Table
from blockvirt.meta.records import VolumeRecord
from blockvirt.meta.store import Writer
from blockvirt.metrics import Metrics
from blockvirt.units import MIB
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.engine import Engine, EngineSettings
from blockvirt.volumes.requests import NewVolume
from tests.api.test_metrics import Counters, shown

OPENED = 32


def calls_in(work: Callable[[], Any]) -> int:
    """Return how many functions ``work`` calls in this thread, those in C included."""
    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def least_calls_in(work: Callable[[], Any]) -> int:
    """Return the least of a few: something else of this process (a callback of the collector) may come in between."""
    return min(calls_in(work) for _ in range(5))


def multiply(writer: Writer, volume_id: str, volumes: int) -> None:
    """Write more records like that of a volume: closed ones, which nobody opens."""
    record = writer.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
    assert record is not None
    for number in range(volumes):
        more = replace(record, id=new_id(), name=f"more{number}")
        writer.put_record(Table.VOLUMES, more.id.encode(), more)
        writer.put(Table.VOLUME_NAMES, more.name.encode(), more.id.encode())


@pytest.mark.parametrize("volumes", [OPENED, MAX_VOLUMES])
async def test_the_event_loop_does_the_same_for_any_number_of_volumes(tmp_path: Path, volumes: int) -> None:
    engine = await Engine.start(tmp_path / "state", [tmp_path / "dev"], EngineSettings(metadata_reserve_bytes=MIB))
    catalogue = Catalogue(engine.store, engine.registry, engine.storage)
    made = [(await catalogue.create(NewVolume(MIB))).volume for _ in range(OPENED)]
    await engine.store.commit(lambda writer: multiply(writer, made[0].id, volumes - OPENED))
    metrics = Metrics(engine, catalogue, Counters())
    await shown(metrics)
    closed = least_calls_in(metrics.take)
    assert closed < 500, "a few for each figure of the pool"
    handles = []
    for number, view in enumerate(made):
        handles.append(await engine.registry.open(view.id, f"s{number}"))
        assert least_calls_in(metrics.take) == closed, "nothing for an open volume"
    samples = await shown(metrics)
    assert samples["blockvirt_pool_volumes", ()] == volumes
    assert samples["blockvirt_open_volumes", ()] == len(handles)
    assert len([1 for name, _ in samples if name == "blockvirt_volume_size_bytes"]) == len(handles)
    for handle in handles:
        await handle.close()
    await engine.close()
