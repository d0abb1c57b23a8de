"""When the figures of volumes are computed anew, and when they are shown as they were."""

import pytest

from blockvirt.limits import SPACE_FIGURES_COST_RATIO, SPACE_FIGURES_S
from blockvirt.meta.store import Reader
from blockvirt.snapshots import space_figures
from blockvirt.snapshots.freed import freed_with_volume
from blockvirt.snapshots.space_figures import SpaceFigures, SpaceOfVolumes
from tests.snapshots.conftest import SnapshotPool

CHUNK = 4096


class Clock:
    """Time that passes only when told to, or when something is computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.cost_s = 0.0
        self.computed: list[str] = []

        def dear(reader: Reader, volume_id: str) -> int:
            self.now_s += self.cost_s
            self.computed.append(volume_id)
            return freed_with_volume(reader, volume_id)

        monkeypatch.setattr(space_figures, "freed_with_volume", dear)

    def __call__(self) -> float:
        return self.now_s


async def test_figures_are_kept_until_something_changed(pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    space = SpaceOfVolumes(pool.engine.store, clock=clock)
    volume_id = await pool.volume(64 * CHUNK, "v")
    handle = await pool.open(volume_id)
    await handle.write(0, memoryview(bytes(b"a" * CHUNK)))
    await pool.snapshots.create({"v": "one"})
    assert space.figures({volume_id: 1}) == {volume_id: SpaceFigures(1, 0)}
    space.figures({volume_id: 1})
    assert clock.computed == [volume_id]
    space.figures({volume_id: 2})
    assert clock.computed == [volume_id] * 2, "a checkpoint brings changes"
    await pool.snapshots.create({"v": "two"})
    space.figures({volume_id: 2})
    assert clock.computed == [volume_id] * 3, "so does a point of the history"
    assert space.figures({}) == {}
    await handle.close()


async def test_dear_figures_are_computed_seldom(pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    space = SpaceOfVolumes(pool.engine.store, clock=clock)
    volume_id = await pool.volume(64 * CHUNK, "v")
    clock.cost_s = 2.0
    assert volume_id in space.figures({volume_id: 1})
    assert volume_id in space.figures({volume_id: 2})
    assert clock.computed == [volume_id]
    clock.now_s += 2.0 / SPACE_FIGURES_COST_RATIO
    space.figures({volume_id: 2})
    assert clock.computed == [volume_id] * 2


async def test_one_scrape_takes_a_bounded_time_and_each_volume_has_its_turn(
    pool: SnapshotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    clock.cost_s = SPACE_FIGURES_S * 0.6
    space = SpaceOfVolumes(pool.engine.store, clock=clock)
    volumes = [await pool.volume(64 * CHUNK, f"v{number}") for number in range(5)]
    for checkpoints, known in ((1, 2), (2, 4), (3, 5)):
        assert len(space.figures(dict.fromkeys(volumes, checkpoints))) == known
        clock.now_s += clock.cost_s / SPACE_FIGURES_COST_RATIO
    assert sorted(set(clock.computed)) == sorted(volumes), "although those that were first have changed since"


async def test_a_volume_that_is_gone_costs_itself_only(pool: SnapshotPool) -> None:
    volume_id = await pool.volume(64 * CHUNK, "v")
    found = SpaceOfVolumes(pool.engine.store).figures({"nobody": 1, volume_id: 1})
    assert found[volume_id] == SpaceFigures(0, 0)
