"""The arithmetic of the speed report: what counts as met, and which of several servers is the best."""

import math
from collections.abc import Sequence

import pytest

from benchmarks.jobs import CELLS, Cell, Role, State
from benchmarks.measure import Sample
from benchmarks.report import figures, judged_targets, ratios, verdicts
from benchmarks.targets import TARGETS, Figures, Kind, Target, best, judge

OURS = Figures(rate=300.0, cpu_us=10.0, p99_us=50.0, client_cores=0.5)
PEER = Figures(rate=200.0, cpu_us=20.0, p99_us=40.0, client_cores=0.4)
SERVERS = {"blockvirt": Role.OURS, "io_uring": Role.QCOW2, "threads": Role.QCOW2, "nbdkit file": Role.PLAIN}
READ = next(cell for cell in CELLS if cell.name == "read-1")


def target(kind: Kind, bound: float, *, stretch: float | None = None, cpu_bound: float | None = None) -> Target:
    """One of a cell that does not matter."""
    return Target("cell", Role.QCOW2, kind, bound, stretch, cpu_bound)


def samples(*rates: float, p99_us: float = math.nan) -> list[Sample]:
    """One a round."""
    return [Sample(rate, p99_us, 1.0, 1) for rate in rates]


@pytest.mark.parametrize(
    ("kind", "ratio", "met_by", "missed_by"),
    [
        (Kind.RATE, 1.5, 1.5, 1.51),
        (Kind.CPU, 0.5, 0.5, 0.49),
        (Kind.P99, 1.25, 1.25, 1.24),
        (Kind.TIME, 200 / 300, 0.67, 0.66),
    ],
)
def test_a_rate_is_at_least_and_a_cost_at_most(kind: Kind, ratio: float, met_by: float, missed_by: float) -> None:
    """Always ours over the peer's; a time is the inverse of a rate."""
    assert judge(target(kind, met_by), OURS, PEER).ratio == pytest.approx(ratio)
    assert judge(target(kind, met_by), OURS, PEER).met is True
    assert judge(target(kind, missed_by), OURS, PEER).met is False


@pytest.mark.parametrize(
    ("rate_bound", "client_cores", "cpu_bound", "met"),
    [
        (2.0, 0.95, 0.5, True),
        (2.0, 0.94, 0.5, False),  # fio could have taken more
        (2.0, 0.99, 0.49, False),
        (2.0, None, 0.5, False),
        (1.5, 0.2, 0.1, True),  # the rate alone will do
        (1.5, 0.99, 0.1, True),
    ],
)
def test_cpu_stands_in_for_a_rate_only_where_fio_is_saturated(
    rate_bound: float, client_cores: float | None, cpu_bound: float, met: bool
) -> None:
    """A client that can take no more hides how much faster we are."""
    ours = Figures(rate=300.0, cpu_us=10.0, client_cores=client_cores)
    verdict = judge(target(Kind.RATE, rate_bound, cpu_bound=cpu_bound), ours, PEER)
    assert verdict.met is met
    assert verdict.ratio == pytest.approx(1.5)
    assert verdict.cpu_ratio == pytest.approx(0.5)


def test_a_stretch_is_judged_beside_the_bound() -> None:
    """It changes nothing about whether the target is met."""
    near, far = judge(target(Kind.RATE, 1.4, stretch=1.6), OURS, PEER), judge(target(Kind.RATE, 1.6), OURS, PEER)
    assert (near.met, near.met_stretch) == (True, False)
    assert (far.met, far.met_stretch) == (False, None)


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    """Nor is a figure too small to be divided by."""
    for ours, peer in ((Figures(), PEER), (OURS, Figures()), (OURS, Figures(rate=0.0, cpu_us=0.0))):
        assert judge(target(Kind.RATE, 1.0), ours, peer).met is None
        assert judge(target(Kind.CPU, 1.0), ours, peer).ratio is None


def test_the_best_of_several_is_the_best_of_each_figure() -> None:
    """One may have the highest rate, another the lowest tail."""
    quick, calm = Figures(300.0, 20.0, 90.0, 0.9), Figures(200.0, 10.0, 40.0, 0.5)
    assert best([quick, calm, Figures()]) == Figures(300.0, 10.0, 40.0, 0.9)
    assert best([]) == Figures()


def test_medians_are_compared_with_the_better_qcow2() -> None:
    """Over the rounds first, then over its servers; a figure that a cell has not (nan) does not count."""
    results = {
        ("read-1", "blockvirt"): samples(190.0, 400.0, 10.0, p99_us=30.0),
        ("read-1", "io_uring"): samples(90.0, 95.0, 1000.0, p99_us=60.0),
        ("read-1", "threads"): samples(100.0, 1.0, 110.0, p99_us=20.0),
    }
    found = {(each.target.peer, each.target.kind): each for each in judged_targets(READ, SERVERS, results)}
    assert found[Role.QCOW2, Kind.RATE].ratio == pytest.approx(1.9)
    assert found[Role.QCOW2, Kind.RATE].met is True
    assert found[Role.QCOW2, Kind.P99].ratio == pytest.approx(1.5)
    assert found[Role.QCOW2, Kind.P99].met is False
    assert found[Role.PLAIN, Kind.RATE].met is None
    assert figures(READ, Role.QCOW2, SERVERS, {("read-1", "threads"): samples(1.0)}).p99_us is None


def test_the_tables_say_what_was_missed() -> None:
    """In a summary, target by target, and in bold where there is one line a cell."""
    results = {
        (READ.name, server): samples(rate, p99_us=9.0) for server, rate in zip(SERVERS, (17, 10, 9, 12), strict=True)
    }
    text = verdicts([READ], SERVERS, results)
    assert "2 met, 1 missed, 0 not measured" in text
    assert f"| {READ.title} | best qcow2 | rate >= 1.70 | 1.70 | yes | - |" in text
    assert f"| {READ.title} | nbdkit file | rate >= 1.50 | 1.42 | no | - |" in text
    results[READ.name, "C floor"] = samples(15, p99_us=18.0)
    text = verdicts([READ], {**SERVERS, "C floor": Role.FLOOR}, results)
    assert f"| {READ.title} | best qcow2 | rate >= 1.70 | 1.70 | yes | 1.50 |" in text  # beyond what C has
    assert f"| {READ.title} | best qcow2 | p99 <= 1.00 | 1.00 | yes | 2.00 |" in text
    assert ratios([READ], SERVERS, results).splitlines()[-1] == f"| {READ.title} | 1.70, p99 1.00 | **1.42** | - | no |"


def test_every_cell_has_its_targets() -> None:
    """And every target a cell in which its peer takes part."""
    cells = {cell.name: cell for cell in CELLS}
    assert len(cells) == len(CELLS)
    assert {target.cell for target in TARGETS} == set(cells)
    assert not [target for target in TARGETS if target.peer not in cells[target.cell].roles]
    compared = [(target.cell, target.peer, target.kind) for target in TARGETS]
    assert len(set(compared)) == len(compared)
    for name, cell in cells.items():
        floors = {Role.FLOOR, Role.FILE_FLOOR, Role.PYTHON, Role.VOLUME}  # also there to show what can be reached
        assert {Role.OURS, *(target.peer for target in TARGETS if target.cell == name)} - floors == cell.roles - floors


def bounds(command: Sequence[str]) -> set[str]:
    """What ends a fio job."""
    return {word.partition("=")[0] for word in command} & {"--runtime", "--time_based", "--io_size"}


@pytest.mark.parametrize("cell", [cell for cell in CELLS if isinstance(cell, Cell)], ids=lambda cell: cell.name)
def test_no_job_comes_round_to_what_was_fresh(cell: Cell) -> None:
    """A volume of its own ends the job at its end at the latest; only a filled one is written for as long as asked."""
    ends = bounds(cell.command((), 1 << 20, 1.0, "report"))
    assert ("--time_based" in ends) == (cell.state is State.FILLED)
    assert ends <= {"--runtime", "--time_based"} or ends == {"--io_size"}
