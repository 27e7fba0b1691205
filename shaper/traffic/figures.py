"""Power figures of a run, from the true power on a grid of 1 ms.

A window is identified by its end; windows end at every millisecond and lie
wholly within the run. "Unstalled" figures leave out each window that overlaps a
stall, a time in which this machine woke the emulated GPU more than 2 ms late:
the power of such a window says something about the machine, not the policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shaper.core.types import PowerLimit
from shaper.emulator.trace import PowerTrace, Stall

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# The finest window that anyone is held to is 10 ms.
GRID_SECONDS = 0.001
STALL_SECONDS = 0.002
# Above the limit by less than this is the rounding of a decision, not a miss.
TOLERATED_RATIO = 1.01


@dataclass(frozen=True, slots=True)
class PowerGrid:
    """True power of one run, all GPUs of the engine together.

    `watts` [n] is the mean power of each millisecond from `start_seconds`
    (monotonic) on.
    """

    start_seconds: float
    watts: FloatArray
    stalls: tuple[Stall, ...] = ()

    @property
    def times(self) -> FloatArray:
        """[n] start of each millisecond, monotonic seconds."""
        return np.asarray(
            self.start_seconds + np.arange(len(self.watts)) * GRID_SECONDS, dtype=np.float64
        )

    @property
    def joules(self) -> float:
        """Energy of the run."""
        return float(self.watts.sum()) * GRID_SECONDS


@dataclass(frozen=True, slots=True)
class LimitFigures:
    """How well one limit was kept.

    `over_share` and `over_tolerated_share` are shares of the windows, the
    latter above 1.01 times the limit. `over_watt_seconds` integrates what the
    window's mean is above the limit, over the window ends.
    """

    limit: PowerLimit
    windows: int
    over_share: float
    over_tolerated_share: float
    over_watt_seconds: float
    worst_ratio: float
    unstalled_windows: int
    unstalled_over_share: float
    unstalled_over_tolerated_share: float
    unstalled_worst_ratio: float


@dataclass(frozen=True, slots=True)
class PowerFigures:
    """Watts and joules of a run; peaks are of 100 ms means."""

    mean_watts: float
    peak_watts: float
    p999_watts: float
    unstalled_peak_watts: float
    joules: float
    ramp_watts_per_second: float
    """Highest change of the 100 ms mean from one 100 ms to the next, per second."""
    stalls: int
    stall_seconds: float
    stalled_window_share: float
    limits: tuple[LimitFigures, ...]


def grid_between(trace: PowerTrace, from_seconds: float, to_seconds: float) -> PowerGrid:
    """The part of a recorded power trace that belongs to a run, to the millisecond.

    Args:
        trace: what the emulated GPU wrote.
        from_seconds: start of the run, monotonic.
        to_seconds: its end.
    """
    begin, watts = trace.on_grid(GRID_SECONDS)
    first = max(0, math.ceil((from_seconds - begin) / GRID_SECONDS))
    last = max(first, math.floor((to_seconds - begin) / GRID_SECONDS))
    start = begin + first * GRID_SECONDS
    stalls = tuple(s for s in trace.stalls if from_seconds <= s.at_seconds <= to_seconds)
    return PowerGrid(start, watts[first:last], stalls)


def window_means(grid: PowerGrid, window_seconds: float) -> FloatArray:
    """Mean power of every window, by window end.

    Args:
        grid: of the run.
        window_seconds: at least a millisecond.

    Returns:
        [n - w + 1] watts; empty when the run is shorter than the window.
    """
    width = max(1, round(window_seconds / GRID_SECONDS))
    total = np.concatenate(([0.0], np.cumsum(grid.watts)))
    if len(total) <= width:
        return np.empty(0)
    return np.asarray((total[width:] - total[:-width]) / width, dtype=np.float64)


def unstalled_windows(grid: PowerGrid, window_seconds: float) -> BoolArray:
    """Which windows of `window_means` no stall of over 2 ms overlaps."""
    width = max(1, round(window_seconds / GRID_SECONDS))
    keep = np.ones(max(0, len(grid.watts) - width + 1), dtype=bool)
    for stall in grid.stalls:
        if stall.late_seconds <= STALL_SECONDS:
            continue
        begin = (stall.at_seconds - grid.start_seconds) / GRID_SECONDS
        end = begin + stall.late_seconds / GRID_SECONDS
        # Window i covers the milliseconds i to i + width. Times are floats: what lies
        # within a nanosecond of a millisecond's edge is on it.
        first = max(0, math.floor(begin + 1e-6) - width + 1)
        last = max(0, math.ceil(end - 1e-6))
        keep[first:last] = False
    return keep


def limit_figures(grid: PowerGrid, limit: PowerLimit) -> LimitFigures:
    """How well the run kept one limit; NaN ratios where no window is left."""
    means = window_means(grid, limit.window_seconds)
    keep = unstalled_windows(grid, limit.window_seconds)
    kept = means[keep]
    tolerated = limit.watts * TOLERATED_RATIO
    return LimitFigures(
        limit=limit,
        windows=len(means),
        over_share=_share(means > limit.watts),
        over_tolerated_share=_share(means > tolerated),
        over_watt_seconds=float(np.maximum(0.0, means - limit.watts).sum()) * GRID_SECONDS,
        worst_ratio=_max(means) / limit.watts,
        unstalled_windows=len(kept),
        unstalled_over_share=_share(kept > limit.watts),
        unstalled_over_tolerated_share=_share(kept > tolerated),
        unstalled_worst_ratio=_max(kept) / limit.watts,
    )


def power_figures(grid: PowerGrid, limits: tuple[PowerLimit, ...] = ()) -> PowerFigures:
    """All power figures of a run.

    Args:
        grid: of the run, cut to its start and end.
        limits: the budget; several limits are judged one by one.
    """
    means = window_means(grid, 0.1)
    keep = unstalled_windows(grid, 0.1)
    step = round(0.1 / GRID_SECONDS)
    ramps = np.abs(means[step:] - means[:-step]) / 0.1
    counted = [stall for stall in grid.stalls if stall.late_seconds > STALL_SECONDS]
    return PowerFigures(
        mean_watts=float(grid.watts.mean()) if len(grid.watts) else float("nan"),
        peak_watts=_max(means),
        p999_watts=float(np.quantile(means, 0.999)) if len(means) else float("nan"),
        unstalled_peak_watts=_max(means[keep]),
        joules=grid.joules,
        ramp_watts_per_second=_max(ramps),
        stalls=len(counted),
        stall_seconds=sum(stall.late_seconds for stall in counted),
        stalled_window_share=_share(~keep),
        limits=tuple(limit_figures(grid, limit) for limit in limits),
    )


def _share(mask: BoolArray) -> float:
    return float(mask.mean()) if len(mask) else 0.0


def _max(values: FloatArray) -> float:
    return float(values.max()) if len(values) else float("nan")
