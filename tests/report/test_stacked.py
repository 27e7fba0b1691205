"""Power stacked by engine: the sum's peaks survive the thinning out."""

from __future__ import annotations

import numpy as np

from shaper.report.power import LimitLine
from shaper.report.stacked import StackedPower, highest_of_buckets, stacked_power


def run(name: str, count: int = 20_000) -> StackedPower:
    watts = np.full((2, count), 300.0)
    watts[:, 12_345] = (700.0, 690.0)
    watts[0, 15_000] = 900.0  # a peak of one engine, and none of the sum
    watts[1, 15_000] = 0.0
    return StackedPower(name, ("server 0", "server 1"), np.arange(count) * 1e-3, watts)


def test_the_highest_sum_of_each_span_is_drawn() -> None:
    """One place a span, in order of time, for all engines the same."""
    places = highest_of_buckets(run("a").watts, 100)
    assert len(places) == 100
    assert 12_345 in places
    assert (np.diff(places) > 0).all()
    short = np.arange(10.0).reshape(2, 5)
    assert highest_of_buckets(short, 5).tolist() == [0, 1, 2, 3, 4]


def test_engines_stand_on_each_other_on_one_scale() -> None:
    """A row for each run, the peak of the sum in it, the limit as a line in every row."""
    figure = stacked_power([run("unshaped"), run("shared")], [LimitLine("limit", 1000.0)])
    assert [trace.name for trace in figure.data] == ["server 0", "server 1"] * 2
    assert [trace.showlegend for trace in figure.data] == [True, True, False, False]
    assert len({trace.stackgroup for trace in figure.data}) == 2
    total = np.array(figure.data[0].y) + np.array(figure.data[1].y)
    assert total.max() == 1390.0
    assert len(total) < 1000
    assert [shape.y0 for shape in figure.layout.shapes] == [1000.0, 1000.0]
    assert figure.layout.yaxis.range == figure.layout.yaxis2.range


def test_nothing_is_drawn_of_a_run_that_was_too_short() -> None:
    """A run shorter than the window has no mean."""
    empty = StackedPower("short", ("server 0",), np.empty(0), np.empty((1, 0)))
    assert len(stacked_power([empty]).data[0].y) == 0
