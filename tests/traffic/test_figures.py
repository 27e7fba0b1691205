"""Power figures against hand calculations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shaper.core.types import PowerLimit
from shaper.emulator.trace import PowerTrace, Stall
from shaper.traffic.figures import (
    PowerGrid,
    grid_between,
    limit_figures,
    power_figures,
    unstalled_windows,
    window_means,
)


def step_grid(stalls: tuple[Stall, ...] = ()) -> PowerGrid:
    """One second: 400 W, with 800 W from 0.5 s to 0.55 s."""
    watts = np.full(1000, 400.0)
    watts[500:550] = 800.0
    return PowerGrid(100.0, watts, stalls)


def test_window_means_by_hand() -> None:
    """50 ms of 800 W in a 100 ms window of 400 W make 600 W; 901 windows fit a second."""
    means = window_means(step_grid(), 0.1)
    assert len(means) == 901
    assert means.max() == pytest.approx(600.0)
    # The window from 0.44 s holds 40 ms of the burst.
    assert means[440] == pytest.approx(400.0 + 400.0 * 0.4)


def test_a_run_shorter_than_the_window_has_none() -> None:
    """No window fits: the figures are missing, not zero."""
    grid = PowerGrid(0.0, np.full(50, 500.0))
    assert len(window_means(grid, 0.1)) == 0
    figures = power_figures(grid, (PowerLimit(400.0, 0.1),))
    assert math.isnan(figures.peak_watts)
    assert math.isnan(figures.limits[0].worst_ratio)
    assert figures.limits[0].windows == 0


def test_limit_by_hand() -> None:
    """Of 901 windows those with over 25 ms of the burst are above 500 W."""
    figures = limit_figures(step_grid(), PowerLimit(500.0, 0.1))
    # Overlaps of 26 to 50 ms: 25 on the way in, 25 on the way out, 50 full ones between.
    full = 51
    assert figures.over_share == pytest.approx((2 * 24 + full) / 901)
    excess = 2 * sum(4.0 * (ms - 25) for ms in range(26, 50)) + full * 100.0
    assert figures.over_watt_seconds == pytest.approx(excess * 1e-3)
    assert figures.worst_ratio == pytest.approx(1.2)
    # Above 505 W: an overlap of at least 27 ms.
    assert figures.over_tolerated_share == pytest.approx((2 * 23 + full) / 901)


def test_a_limit_that_is_met_exactly_is_kept() -> None:
    """Power at the limit is not above it."""
    figures = limit_figures(PowerGrid(0.0, np.full(300, 500.0)), PowerLimit(500.0, 0.1))
    assert figures.over_share == 0.0
    assert figures.worst_ratio == pytest.approx(1.0)


def test_stalled_windows_are_left_out() -> None:
    """A stall in the burst takes out every window that overlaps it, and no other."""
    stall = Stall(at_seconds=100.52, late_seconds=0.004)
    grid = step_grid((stall,))
    keep = unstalled_windows(grid, 0.1)
    # Windows that start 99 ms before the stall's first millisecond to its last.
    assert np.flatnonzero(~keep).tolist() == list(range(421, 524))
    figures = power_figures(grid, (PowerLimit(500.0, 0.1),))
    assert figures.stalls == 1
    assert figures.stall_seconds == pytest.approx(0.004)
    assert figures.stalled_window_share == pytest.approx(103 / 901)
    assert figures.limits[0].worst_ratio == pytest.approx(1.2)
    assert figures.limits[0].unstalled_windows == 901 - 103
    assert figures.limits[0].unstalled_worst_ratio < 1.2


def test_short_stalls_do_not_count() -> None:
    """Up to 2 ms late is no stall."""
    grid = step_grid((Stall(100.52, 0.002),))
    assert unstalled_windows(grid, 0.1).all()
    assert power_figures(grid).stalls == 0


def test_a_stall_at_the_edge() -> None:
    """A stall at the run's very start or end touches only the windows there."""
    grid = step_grid((Stall(100.0, 0.003), Stall(100.9995, 0.01)))
    keep = unstalled_windows(grid, 0.1)
    assert np.flatnonzero(~keep).tolist() == [0, 1, 2, 900]


def test_means_and_energy() -> None:
    """Mean watts times seconds are the joules."""
    figures = power_figures(step_grid())
    assert figures.joules == pytest.approx(420.0)
    assert figures.mean_watts == pytest.approx(420.0)
    assert figures.peak_watts == pytest.approx(600.0)
    assert figures.p999_watts == pytest.approx(600.0)


def test_ramp_by_hand() -> None:
    """From 400 W to 600 W between one 100 ms and the next is 2,000 W/s."""
    assert power_figures(step_grid()).ramp_watts_per_second == pytest.approx(2000.0)


def test_the_grid_is_cut_to_the_run() -> None:
    """What lies before the start and after the end is not the run's."""
    segments = np.array([[10.0, 11.0, 100.0], [11.0, 12.0, 500.0], [12.0, 13.0, 100.0]])
    trace = PowerTrace(segments, (Stall(10.5, 0.01), Stall(11.5, 0.02)))
    grid = grid_between(trace, 11.0, 12.0)
    assert grid.joules == pytest.approx(500.0, rel=2e-3)
    np.testing.assert_allclose(grid.watts, 500.0)
    assert [stall.at_seconds for stall in grid.stalls] == [11.5]
    assert grid.start_seconds == pytest.approx(11.0, abs=1e-3)
