"""Figures of a power signal that several proofs share."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from shaper.core.types import PowerLimit
from shaper.traffic.figures import GRID_SECONDS, PowerGrid, window_means

FloatArray = NDArray[np.float64]

# Above a limit by less than this share is the rounding of the 1 ms grid and of sums.
EXACT_RATIO = 1e-3


def window_ends(grid: PowerGrid, limit: PowerLimit) -> tuple[FloatArray, FloatArray]:
    """Ends of all windows of a limit in seconds, and their mean watts."""
    means = window_means(grid, limit.window_seconds)
    begins = grid.start_seconds + np.arange(len(means)) * GRID_SECONDS
    return np.asarray(begins + limit.window_seconds, dtype=np.float64), means


def over_budget(
    grid: PowerGrid,
    limits: tuple[PowerLimit, ...],
    span: tuple[float, float] = (0.0, math.inf),
) -> tuple[float, float]:
    """The worst window as a ratio of its limit, and the share of windows above theirs.

    Args:
        grid: of the run.
        limits: judged one by one; each answer is that of the worst.
        span: windows that end outside it are left out.
    """
    worst = share = 0.0
    for limit in limits:
        ends, means = window_ends(grid, limit)
        ratios = means[(ends >= span[0]) & (ends < span[1])] / limit.watts
        if len(ratios):
            worst = max(worst, float(ratios.max()))
            share = max(share, float((ratios > 1.0 + EXACT_RATIO).mean()))
    return worst, share


def peak_to_peak_watts(grid: PowerGrid, window_seconds: float, span: tuple[float, float]) -> float:
    """Highest less lowest mean of this window among those that lie inside `span`."""
    ends, means = window_ends(grid, PowerLimit(1.0, window_seconds))
    inside = means[(ends >= span[0] + window_seconds) & (ends <= span[1])]
    return float(np.ptp(inside)) if len(inside) else float("nan")


def cycle_watts(grid: PowerGrid, window_seconds: float, span: tuple[float, float]) -> float:
    """The largest limit cycle: peak to peak of the strongest sine in the window's mean.

    Only periods from two windows to a quarter of the span count: shorter ones are the
    steps themselves, which the window's mean is there to hide, longer ones drift.
    """
    ends, means = window_ends(grid, PowerLimit(1.0, window_seconds))
    inside = means[(ends >= span[0] + window_seconds) & (ends <= span[1])]
    if len(inside) < 8:
        return float("nan")
    shape = np.hanning(len(inside))
    lines = np.abs(np.fft.rfft((inside - inside.mean()) * shape)) * 2.0 / shape.sum()
    hertz = np.fft.rfftfreq(len(inside), GRID_SECONDS)
    seconds = len(inside) * GRID_SECONDS
    counted = (hertz >= 4.0 / seconds) & (hertz <= 1.0 / (2.0 * window_seconds))
    return 2.0 * float(lines[counted].max()) if counted.any() else float("nan")


def limits_text(limits: tuple[PowerLimit, ...]) -> str:
    """Limits as an operator writes them."""
    return ", ".join(
        f"{x.watts:.0f}W@{x.window_seconds * 1e3:g}ms"
        if x.window_seconds < 1.0
        else f"{x.watts:.0f}W@{x.window_seconds:g}s"
        for x in limits
    )
