"""The heat path of one GPU, learned from its watts and its temperature.

Law, two stages, as `P` watts warm the die, the die the sink, the sink the air:

    die = sink + die_resistance * P
    d sink / dt = (inlet + sink_resistance * P - sink) / sink_time

(The die follows within a fraction of a second, so over half a second it stands in
balance.) With `sink_time` given this is linear in (sink, inlet, sink resistance, die
resistance), and a Kalman filter learns those four from the driver's temperature, which is
rounded to 1 degree and often a second old. Resistances are bounded and move slowly; the
inlet moves faster, since rooms do. Several sink times run side by side, and the one that
has erred least lately is believed.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from shaper.core.model.profile import HeatSpec

_Vector = npt.NDArray[np.float64]

# Shares of the profile's sink time: fans, dust and liquid cooling are not in a profile.
_TIME_RATIOS = (0.5, 1.0, 2.0)
# How far a resistance may be from the profile's.
_RESISTANCE_RANGE = (0.6, 2.5)
# Machine rooms, with a reserve for a fault.
_INLET_RANGE = (0.0, 65.0)
# Prior deviations: the start says nothing of the sink, and profiles are for one inlet.
_SINK_DEVIATION, _INLET_DEVIATION, _RESISTANCE_DEVIATION = 5.0, 10.0, 0.3
# Rounding is 0.3 of a degree; a reading that is a second old under a changing load adds more.
_READING_VARIANCE, _MAX_READING_VARIANCE = 1.0, 16.0
# What a second adds: an inlet that moves by 2 degrees a minute, a resistance by a
# twentieth in ten minutes, and what two stages do not describe.
_INLET_VARIANCE_PER_SECOND = 4.0 / 60.0
_RESISTANCE_VARIANCE_PER_SECOND = 0.05**2 / 600.0
_SINK_VARIANCE_PER_SECOND = 0.01
# Errors are weighed over some sink times.
_SCORE_SECONDS = 120.0
# Another sink time has to be better by this, or the choice would flicker.
_SWITCH_RATIO = 0.8


class _Filter:
    """The filter for one sink time. State: (sink, inlet, sink and die resistance)."""

    def __init__(self, spec: HeatSpec, sink_seconds: float, watts: float, celsius: float) -> None:
        self.sink_seconds: Final = sink_seconds
        resistances = (spec.sink_kelvin_per_watt, spec.die_kelvin_per_watt)
        sink = celsius - spec.die_kelvin_per_watt * watts
        self.state: _Vector = np.array([sink, spec.ambient_celsius, *resistances])
        deviations = [_RESISTANCE_DEVIATION * each for each in resistances]
        self._covariance: _Vector = np.diag(
            np.square([_SINK_DEVIATION, _INLET_DEVIATION, *deviations])
        )
        self._drift: _Vector = np.diag(
            [_SINK_VARIANCE_PER_SECOND, _INLET_VARIANCE_PER_SECOND]
            + [_RESISTANCE_VARIANCE_PER_SECOND * each**2 for each in resistances]
        )
        lowest, highest = _RESISTANCE_RANGE
        self._lowest = np.array([-math.inf, _INLET_RANGE[0], *(lowest * r for r in resistances)])
        self._highest = np.array([math.inf, _INLET_RANGE[1], *(highest * r for r in resistances)])
        self.score = _READING_VARIANCE

    def step(self, seconds: float, watts: float) -> None:
        """Let `watts` act for `seconds`."""
        left = math.exp(-seconds / self.sink_seconds)
        move = np.eye(4)
        move[0, :3] = left, 1.0 - left, (1.0 - left) * watts
        self.state = move @ self.state
        self._covariance = move @ self._covariance @ move.T + seconds * self._drift

    def learn(self, watts: float, celsius: float, seconds: float) -> None:
        """Take a reading of the die's temperature while it draws `watts`."""
        row = np.array([1.0, 0.0, 0.0, watts])
        error = celsius - float(row @ self.state)
        spread = self._covariance @ row
        # Bursts between two readings move the die; readings that scatter weigh less.
        variance = min(max(self.score, _READING_VARIANCE), _MAX_READING_VARIANCE)
        expected = float(row @ spread) + variance
        self.state = np.clip(self.state + spread * (error / expected), self._lowest, self._highest)
        self._covariance -= np.outer(spread, spread) / expected
        weight = 1.0 - math.exp(-seconds / _SCORE_SECONDS)
        self.score += weight * (error * error - self.score)

    def row(self, seconds: float, watts: float) -> _Vector:
        """The die's temperature after `seconds` at `watts`, as weights of the state."""
        left = math.exp(-seconds / self.sink_seconds)
        return np.array([left, 1.0 - left, (1.0 - left) * watts, watts])

    def deviation(self, row: _Vector) -> float:
        """Standard deviation of what a row of weights predicts."""
        return math.sqrt(max(0.0, float(row @ self._covariance @ row)))


class HeatFilter:
    """The heat path of one GPU.

    Args:
        spec: the profile's; where learning starts.
        watts, celsius: now.
    """

    def __init__(self, spec: HeatSpec, watts: float, celsius: float) -> None:
        self._die_kelvin_per_watt = spec.die_kelvin_per_watt
        sink_seconds = spec.sink_kelvin_per_watt * spec.sink_joules_per_kelvin
        self._filters = [
            _Filter(spec, max(1.0, ratio * sink_seconds), watts, celsius) for ratio in _TIME_RATIOS
        ]
        self._best = self._filters[_TIME_RATIOS.index(1.0)]

    def step(self, seconds: float, watts: float, celsius: float | None) -> None:
        """`watts` acted for `seconds`, at whose end the driver said `celsius`."""
        for each in self._filters:
            each.step(seconds, watts)
            if celsius is not None:
                each.learn(watts, celsius, seconds)
        best = min(self._filters, key=lambda each: each.score)
        if best.score < _SWITCH_RATIO * self._best.score:
            self._best = best

    def die_celsius(self, watts: float) -> float:
        """The die now, at `watts`."""
        return float(self._best.row(0.0, watts) @ self._best.state)

    def steady_celsius(self, watts: float) -> float:
        """Where the die ends up if `watts` lasts."""
        return float(self._best.row(math.inf, watts) @ self._best.state)

    def seconds_until(self, celsius: float, watts: float) -> float | None:
        """Until the die reaches `celsius` at `watts`; None if it never does."""
        now, end = self.die_celsius(watts), self.steady_celsius(watts)
        if now >= celsius:
            return 0.0
        if end <= celsius:
            return None
        return self._best.sink_seconds * math.log((end - now) / (end - celsius))

    def peak_celsius(self, seconds: float, watts: float, peak_watts: float) -> float:
        """The die at its hottest, `seconds` from now, under a load of mean `watts` whose power,
        averaged over the die's own time, reaches `peak_watts`.

        The die's resistance counts with no less than the profile's for what is above the
        mean: bursts blur what is learned of it.
        """
        mean = float(self._best.row(seconds, watts) @ self._best.state)
        resistance = max(float(self._best.state[3]), self._die_kelvin_per_watt)
        return mean + resistance * max(0.0, peak_watts - watts)

    def seconds_to_cool(self, celsius: float, watts: float) -> float | None:
        """Until the sink has cooled by `celsius` at a mean load of `watts`; None: it never does."""
        sink, inlet, resistance, _ = self._best.state
        end = float(inlet + resistance * watts)
        if celsius <= 0.0:
            return 0.0
        if sink - celsius <= end:
            return None
        return self._best.sink_seconds * math.log(float((sink - end) / (sink - celsius - end)))

    def left_ratio(self, seconds: float) -> float:
        """How much of the sink's present temperature is left in it after `seconds`."""
        return math.exp(-seconds / self._best.sink_seconds)

    def deviation_celsius(self, seconds: float, watts: float) -> float:
        """Standard deviation of the die's predicted temperature after `seconds` at `watts`."""
        return self._best.deviation(self._best.row(seconds, watts))
