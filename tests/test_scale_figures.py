"""The report of `benchmarks.scale` says of each figure whether it is what it should be."""

from benchmarks.scale.figures import Figure, at_least, at_most, below, report


def test_a_limit_is_met_on_its_own_side_only() -> None:
    assert [below(10).met_by(value) for value in (9.9, 10, 10.1)] == [True, False, False]
    assert [at_most(10).met_by(value) for value in (9.9, 10, 10.1)] == [True, True, False]
    assert [at_least(10).met_by(value) for value in (9.9, 10, 10.1)] == [False, True, True]


def test_a_report_says_what_was_met_and_what_was_not_measured() -> None:
    figures = [
        Figure("memory", 1234.56, "MiB", below(2000), "base 60"),
        Figure("ratio", 0.891, "x", at_least(0.9), digits=2),
        Figure("stall", None, "ms", at_most(10), "no fio"),
        Figure("base", 3, "MiB"),
    ]
    assert report(figures).splitlines()[2:] == [
        "| memory | < 2,000 MiB | 1,234.6 MiB (base 60) | yes |",
        "| ratio | >= 0.9 x | 0.89 x | **no** |",
        "| stall | <= 10 ms | not measured (no fio) | - |",
        "| base |  | 3.0 MiB |  |",
    ]
