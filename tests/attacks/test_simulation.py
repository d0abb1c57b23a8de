"""The simulation itself: one seed is one history, and the model knows what may be seen."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attacks.attack import Outcome
from tests.attacks.simulation import trial
from tests.attacks.simulation_disk import SECTOR, Disk, Loss
from tests.attacks.simulation_model import Broken, Group, Snapshot, Volume, taken

ROOT = Path(__file__).parents[2]


def test_the_same_seed_is_the_same_history_in_another_process_too(tmp_path: Path) -> None:
    log: list[str] = []
    trace = trial(7, tmp_path / "a", Outcome(), log)
    again: list[str] = []
    assert trial(7, tmp_path / "b", Outcome(), again) == trace, next(
        (one, other) for one, other in zip(log, again, strict=False) if one != other
    )
    assert trial(8, tmp_path / "c", Outcome()) != trace
    code = (
        "import sys, pathlib; from tests.attacks.attack import Outcome; from tests.attacks.simulation import trial;"
        "print(trial(7, pathlib.Path(sys.argv[1]), Outcome()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}  # no order may come out of a set of strings
    other = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "d")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(other.stdout) == trace


def test_a_write_is_out_of_sight_once_a_later_one_was_answered() -> None:
    volume = Volume("v")
    first = volume.begin(1, [0], 10)
    assert {write.stamp for write in volume.now(0, 11)} == {0, 1}
    volume.end(first, 12, answered=True)
    assert {write.stamp for write in volume.now(0, 13)} == {1}
    second, third = volume.begin(2, [0], 14), volume.begin(3, [0], 15)
    volume.end(third, 16, answered=True)
    volume.end(second, 17, answered=False)
    assert {write.stamp for write in volume.now(0, 18)} == {2, 3}, "they ran beside one another"


def test_a_power_cut_takes_what_no_flush_covers() -> None:
    volume = Volume("v")
    for tick, stamp in ((10, 1), (20, 2), (30, 3)):
        volume.end(volume.begin(stamp, [0], tick), tick + 1, answered=True)
        if stamp == 1:
            volume.flush(15)
    volume.died(40, power=False)
    with pytest.raises(Broken, match="what was answered is gone"):
        volume.found({0: 2}, 41)
    volume.died(42, power=True)
    with pytest.raises(Broken, match="what was flushed is gone"):
        volume.found({0: 0}, 43)
    volume.found({0: 1}, 44)
    volume.died(45, power=True)
    with pytest.raises(Broken):
        volume.found({0: 3}, 46)


def test_a_snapshot_is_of_one_instant_and_never_changes() -> None:
    volume = Volume("v", size_cells=2)
    group = Group(10)
    volume.end(volume.begin(1, [0], 11), 12, answered=True)
    volume.end(volume.begin(2, [1], 13), 14, answered=True)
    for content in ({0: 0, 1: 0}, {0: 1, 1: 0}, {0: 1, 1: 2}):
        taken(volume, "s", Group(10)).found("v", content)
    snapshot: Snapshot = taken(volume, "s", group)
    with pytest.raises(Broken, match="not of one instant"):
        snapshot.found("v", {0: 0, 1: 2})
    snapshot = taken(volume, "s", Group(10))
    snapshot.found("v", {0: 1, 1: 0})
    with pytest.raises(Broken, match="changed"):
        snapshot.found("v", {0: 1, 1: 2})


def test_the_disk_loses_what_was_not_synced_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "disk" / "files").mkdir(parents=True)
    seen: set[bytes] = set()
    for seed in range(40):
        disk = Disk(tmp_path / "disk", random.Random(seed))
        path = str(tmp_path / "disk" / "files" / f"{seed}")
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            file = disk.created(path)
            disk.directory_synced(os.path.dirname(path), disk.tick())
            disk.write(file, fd, b"a" * 2 * SECTOR, 0)
            began = disk.tick()
            disk.write(file, fd, b"b" * SECTOR, 0)
            disk.synced(file, began)
            disk.write(file, fd, b"c" * SECTOR, 0)
            loss = disk.cut_power()
            content = os.pread(fd, 3 * SECTOR, 0)
            assert content[SECTOR:] == b"a" * SECTOR
            assert content[:1] in {Loss.ALL: b"a", Loss.NOTHING: b"c", Loss.SOME: b"abc"}[loss]
            seen.add(content[:1])
        finally:
            os.close(fd)
    assert seen == {b"a", b"b", b"c"}
