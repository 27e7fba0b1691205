"""One limit of a budget, and the energy curve that it sees."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shaper.core.ledger.curve import Array, EnergyCurve

Run = tuple[float, float, float]
"""Start seconds, end seconds, joules."""

# A window's curve has about this many corners; what merging may hide is kept free.
_CORNERS_PER_WINDOW = 512
# Below this part of a limit a run can't be what a window is too full of. No margin is larger.
_COOL_RATIO = 0.8
RAMP_WINDOW_SECONDS = 0.1
RAMP_SECONDS = 1.0
# A step asked about ends less than this after its start, or its end is bound by less past.
_RAMP_HORIZON_SECONDS = 0.4


class Window:
    """One limit and the curve that it sees."""

    def __init__(self, watts: float, window_seconds: float) -> None:
        self.watts = watts
        self.window_seconds = window_seconds
        self.keep_seconds = window_seconds
        self.spacing_seconds = window_seconds / _CORNERS_PER_WINDOW
        self._old_until_seconds = -math.inf
        self._old_ratio = 1.0
        self.hot_seconds = -math.inf
        """The end of the last run that drew more than most of the limit."""
        self.curve = EnergyCurve(0.0, self.keep_seconds, self.spacing_seconds)

    def begin(self, times: Array, joules: Array, in_flight: Sequence[Run]) -> None:
        """Take over a curve's corners, from a window ago on."""
        end, total = float(times[-1]), float(joules[-1])
        for start, run_end, spent in in_flight:
            # The device may begin it later than predicted; the first run that this limit
            # can choose begins when the last of them ends.
            self._old_until_seconds = (start + run_end) / 2
            end, total = run_end, total + spent
        self._old_until_seconds = max(self._old_until_seconds, float(times[-1]))
        within = total - float(np.interp(end - self.window_seconds, times, joules))
        if within > 0.0:
            self._old_ratio = min(1.0, self.watts * self.window_seconds / within)
        self._fill(times, joules * self._old_ratio)

    def _fill(self, times: Array, joules: Array) -> None:
        hot = np.flatnonzero(np.diff(joules) > _COOL_RATIO * self.watts * np.diff(times))
        self.hot_seconds = float(times[hot[-1] + 1]) if len(hot) else -math.inf
        self.curve.begin(times, joules)

    def enter(self, start_seconds: float, end_seconds: float, joules: float) -> None:
        """Append a run that begins where the curve ends."""
        joules = self.counted(start_seconds, joules)
        self.curve.append(end_seconds, joules)
        if joules > _COOL_RATIO * self.watts * (end_seconds - start_seconds):
            self.hot_seconds = end_seconds

    def counted(self, start_seconds: float, joules: float) -> float:
        """What a run counts: one that was there before the limit, no more than the limit."""
        return joules * self._old_ratio if start_seconds < self._old_until_seconds else joules

    def allowed_watts(self, times: Array, joules: Array) -> float:
        """The limit over the curve with these corners."""
        return self.watts


class Ramp(Window):
    """The ramp limit: its watts follow the power of a second ago."""

    def __init__(self, ramp_watts_per_second: float) -> None:
        super().__init__(0.0, RAMP_WINDOW_SECONDS)
        self.keep_seconds = RAMP_SECONDS + 2 * RAMP_WINDOW_SECONDS
        self.curve = EnergyCurve(0.0, self.keep_seconds, self.spacing_seconds)
        self._rise_watts = ramp_watts_per_second * RAMP_SECONDS

    def begin(self, times: Array, joules: Array, in_flight: Sequence[Run]) -> None:
        """Take over a curve's corners, as they were."""
        self._fill(times, joules)

    def enter(self, start_seconds: float, end_seconds: float, joules: float) -> None:
        """Append a run that begins where the curve ends."""
        self.curve.append(end_seconds, joules)
        self.hot_seconds = end_seconds

    def allowed_watts(self, times: Array, joules: Array) -> float:
        """The lowest mean of 100 ms around a second ago, and the rise."""
        window = RAMP_WINDOW_SECONDS
        begin = times[-1] - RAMP_SECONDS
        end = begin + window + _RAMP_HORIZON_SECONDS
        corners = np.concatenate((times, times + window, (begin, end)))
        corners = corners[(corners >= begin) & (corners <= end)]
        means = np.interp(corners, times, joules) - np.interp(corners - window, times, joules)
        return float(means.min()) / window + self._rise_watts
