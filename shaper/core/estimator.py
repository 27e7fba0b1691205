"""What measurement adds to the model: a gain on step seconds and one on joules.

Law: a gain is the ratio of two exponential means, of what was measured and of what
was predicted, clamped. Seconds come with every step's output; a mean of the seconds,
not of the ratios, so that a return seen late and the next one, which then seems short,
cancel. Joules come from the energy counter, whose
value is some 100 ms old and refreshed about every 100 ms, so they are compared
over spans of seconds, in which a stale edge is a small part.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from shaper.core.types import PowerState, StepPrediction

# A profile that is further off than this describes another GPU, or the sensor is wrong.
MIN_GAIN, MAX_GAIN = 0.7, 1.4
# Per step: about a hundred steps, or a second, to follow a change of clocks.
_SECONDS_WEIGHT = 0.01
# Per span of two seconds: half a minute to follow. Edges that are 20 ms off make 1% a
# span; averaged at this weight it stays below the deadband.
_JOULES_WEIGHT = 0.15
# A GPU that rests for long draws less than between steps, which the ledger does not
# know: a span with more rest than this would say something about rest, not about steps.
_BUSY_RATIO = 0.9
# A move is dated by the reading that shows it, if the one before is this recent.
_EDGE_SECONDS = 0.05
_SPAN_SECONDS = 2.0
# A gain this near to 1 is the meter's grain, not a fault of the model.
_DEADBAND = 0.01


def _clamp(value: float) -> float:
    return min(max(value, MIN_GAIN), MAX_GAIN)


def _outside_deadband(gain: float) -> float:
    return gain if abs(gain - 1.0) > _DEADBAND else 1.0


class Estimator:
    """Corrects predictions of one engine. Stateful fields: two means, a gain, a span's start."""

    def __init__(self) -> None:
        self._measured_seconds = self._predicted_seconds = 0.0
        self._joules_gain = 1.0
        self._span_start: tuple[float, float, float] | None = None
        self._seen: tuple[float, float] | None = None

    @property
    def seconds_gain_ratio(self) -> float:
        """Measured over predicted step seconds; 1 within the deadband."""
        if self._predicted_seconds <= 0:
            return 1.0
        return _outside_deadband(_clamp(self._measured_seconds / self._predicted_seconds))

    @property
    def joules_gain_ratio(self) -> float:
        """Metered over predicted joules; 1 within the deadband."""
        return _outside_deadband(self._joules_gain)

    def correct(self, prediction: StepPrediction) -> StepPrediction:
        """A prediction with both gains applied."""
        seconds, joules = self.seconds_gain_ratio, self.joules_gain_ratio
        if seconds == 1.0 and joules == 1.0:
            return prediction
        return StepPrediction(prediction.seconds * seconds, prediction.joules * joules)

    def observe_step(self, predicted_seconds: float, measured_seconds: float) -> None:
        """Learn from a step's time.

        Args:
            predicted_seconds: what the model said, before correction.
            measured_seconds: from its start to its output.
        """
        if not 0 < measured_seconds < math.inf or predicted_seconds <= 0:
            return
        if not self._predicted_seconds:
            # Begin as if the model had been right for a while.
            self._measured_seconds = self._predicted_seconds = predicted_seconds
        # One step can't be further off than a model can be: the host was away.
        measured = min(measured_seconds, 2 * MAX_GAIN * predicted_seconds)
        self._measured_seconds += _SECONDS_WEIGHT * (measured - self._measured_seconds)
        self._predicted_seconds += _SECONDS_WEIGHT * (predicted_seconds - self._predicted_seconds)

    def observe_power(
        self,
        state: PowerState,
        ledger_joules: Callable[[float, float], float],
        busy_seconds: float,
    ) -> None:
        """Learn from the energy counter.

        Args:
            state: what the sampler last saw; one without a counter teaches nothing.
            ledger_joules: corrected predicted joules between two times.
            busy_seconds: time in steps since the start, counted up to now.
        """
        energy, now = state.energy_joules, state.sampled_seconds
        if energy is None:
            return
        seen, self._seen = self._seen, (now, energy)
        if seen is None or energy < seen[1]:
            self._span_start = None  # the counter was reset
            return
        # Between two moves the counter is up to a refresh old; just after one it is not.
        if energy == seen[1] or now - seen[0] > _EDGE_SECONDS:
            return
        if self._span_start is None:
            self._span_start = (now, energy, busy_seconds)
            return
        start, before, busy_before = self._span_start
        if now - start < _SPAN_SECONDS:
            return
        self._span_start = (now, energy, busy_seconds)
        if now - start > 2 * _SPAN_SECONDS:
            return  # the sampler was away; the ledger may not reach back so far
        if busy_seconds - busy_before < _BUSY_RATIO * (now - start):
            return
        predicted = ledger_joules(start, now) / self.joules_gain_ratio
        if predicted > 0:
            ratio = _clamp((energy - before) / predicted)
            self._joules_gain += _JOULES_WEIGHT * (ratio - self._joules_gain)
