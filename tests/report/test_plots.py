"""Plots: what is drawn, from which numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shaper.report.decisions import chunk_sizes, decision_counts, lines
from shaper.report.distributions import distribution
from shaper.report.power import LimitLine, PowerSeries, fine_power, window_power
from shaper.report.style import extremes


def titles(figure: Any) -> list[str]:
    layout = figure.to_dict()["layout"]
    return [
        axis["title"]["text"]
        for name, axis in layout.items()
        if name.startswith(("xaxis", "yaxis"))
    ]


def series(name: str, count: int = 5000) -> PowerSeries:
    fine = np.full(count, 400.0)
    fine[count // 2] = 900.0
    window = np.full(count - 99, 400.0)
    window[count // 2] = 405.0
    times = np.arange(len(window)) * 1e-3 + 0.1
    return PowerSeries(name, times, window, fine, np.array([0.1, 0.2]), np.array([390.0, 395.0]))


def test_thinning_out_keeps_every_extreme() -> None:
    """The highest and the lowest point survive, in order of time."""
    values = np.sin(np.arange(10_000.0))
    values[1234], values[7777] = 5.0, -5.0
    times, kept = extremes(np.arange(10_000.0), values, 50)
    assert len(kept) <= 100
    assert kept.max() == 5.0
    assert kept.min() == -5.0
    assert (np.diff(times) > 0).all()


def test_short_curves_are_left_as_they_are() -> None:
    """Nothing is thinned out that fits."""
    times, kept = extremes(np.arange(10.0), np.arange(10.0), 5)
    assert kept.tolist() == times.tolist() == list(range(10))


def test_window_power_shows_all_runs_and_the_limit() -> None:
    """The peak of each run is drawn, and the limit as a line over the whole time."""
    figure = window_power([series("a"), series("b")], [LimitLine("limit 402 W", 402.0)])
    assert [trace.name for trace in figure.data] == ["a", "b", "limit 402 W"]
    assert max(figure.data[0].y) == 405.0
    assert set(figure.data[2].y) == {402.0}
    assert titles(figure) == ["time since the replay's start (s)", "mean power over the window (W)"]


def test_fine_power_keeps_single_milliseconds_and_the_meter() -> None:
    """A burst of one millisecond among thousands is drawn, and each meter reading."""
    figure = fine_power([series("a"), series("b")], [LimitLine("l", 500.0)])
    highest = [max(trace.y) for trace in figure.data]
    assert highest.count(900.0) == 2
    meters = [trace for trace in figure.data if trace.mode == "markers"]
    assert [list(trace.y) for trace in meters] == [[390.0, 395.0]] * 2
    assert figure.layout.yaxis.range[1] > 900.0


def test_an_empty_run_can_be_drawn() -> None:
    """A run without power data gives empty axes, not an exception."""
    none = np.empty(0)
    empty = PowerSeries("a", none, none, none, none, none)
    assert len(fine_power([empty]).data) == 2
    assert len(window_power([empty]).data) == 1


@pytest.mark.parametrize("tail", [False, True])
def test_distribution_by_hand(tail: bool) -> None:
    """The median of 1 to 101 is 51; the shares run the right way."""
    figure = distribution(["a", "none"], [np.arange(1.0, 102.0), np.empty(0)], "x", tail=tail)
    (trace,) = figure.data
    at = int(np.argmin(np.abs(np.asarray(trace.x) - 51.0)))
    assert trace.y[at] == pytest.approx(50.0)
    assert bool(trace.y[0] > trace.y[-1]) is tail
    assert figure.layout.xaxis.type == "log"


def test_decisions_are_counted_by_reason_and_second() -> None:
    """Heights are decisions per second; what held nothing back is grey."""
    times = np.array([0.1, 0.2, 0.3, 1.5, 1.6])
    reasons = ["unconstrained", "pause", "pause", "pause", "unconstrained"]
    figure = decision_counts(times, reasons, 1.0)
    heights = {trace.name: list(trace.y)[:2] for trace in figure.data}
    assert heights == {"pause": [2.0, 1.0], "unconstrained": [1.0, 1.0]}
    colours = {trace.name: trace.marker.color for trace in figure.data}
    assert colours["pause"] != colours["unconstrained"]


def test_chunks_without_tokens_or_limit_are_not_drawn() -> None:
    """Decode-only steps and steps without a limit leave no point."""
    figure = chunk_sizes(
        np.arange(3.0), np.array([0.0, 512.0, 256.0]), np.array([np.nan, np.nan, 256.0])
    )
    assert [list(trace.y) for trace in figure.data] == [[512.0, 256.0], [256.0]]


def test_lines_leave_out_what_is_missing() -> None:
    """NaN is no point."""
    (trace,) = lines(np.arange(3.0), [("a", np.array([1.0, np.nan, 3.0]))], "y").data
    assert list(trace.x) == [0.0, 2.0]
