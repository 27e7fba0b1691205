"""What measurement adds to the model: a gain on step seconds, one on joules, and a margin.

Laws. A step's seconds are the model's times the ratio of two exponential means, of what was
measured and of what was predicted: a mean of the seconds, not of the ratios, so that a
return seen late and the next one, which then seems short, cancel.

Its joules are the model's times a gain, by recursive least squares with forgetting over
spans of the energy counter:

    ratio = (counted joules - gap power * time between steps) / predicted joules of the steps
    gain += weight * (ratio - gain)         weight 0.15, or 0.9 where ratio is far from gain

A span lies between two moves of the counter and lasts a second: a reading dates a move to
20 ms. One gain is all that such spans identify: the terms of a step's joules are collinear.
The meter is the truth, so its own error is learned as gain. Gains are 1 within a deadband.

The margin leans on the meter: what the last span counted above the corrected prediction
is kept free at once, and given back as the gain follows.
"""

from __future__ import annotations

import math
from collections import deque

from shaper.core.types import PowerState, StepBatch, StepPrediction

# A profile that is further off than this describes another GPU, or the sensor is wrong.
MIN_GAIN, MAX_GAIN = 0.7, 1.4
# Per step: about a hundred steps, or a second, to follow a change of clocks.
_SECONDS_WEIGHT = 0.01
_WEIGHT, _FAR_WEIGHT = 0.15, 0.9
# Three deviations of a span's ratio: both edges off by 6 ms in a second.
_FAR_RATIO = 0.05
_SPAN_SECONDS = 1.0
# A GPU that rests for long draws less than between steps: a span with more rest than this
# would say something about rest, not about steps.
_BUSY_RATIO = 0.25
# A move is dated by the reading that shows it, if the one before is this recent.
_EDGE_SECONDS = 0.05
# A gain this near to 1 is the meter's grain, not a fault of the model.
_DEADBAND = 0.01
# A difference beyond the grain is kept free, up to what bounds on gains leave credible.
_LEAN_FREE_RATIO, MAX_MARGIN_RATIO = 0.02, 0.15
_LEAN_KEPT_RATIO = 0.7
# So many spans in a row that differ by so much, and by half of it to end.
_DISAGREE_RATIO, _DISAGREE_SPANS = 0.05, 3
# Spans that wait for the steps behind them, and the steps of a few spans.
_EDGES_KEPT, _RUNS_KEPT = 64, 4096


def _clamp(value: float) -> float:
    return min(max(value, MIN_GAIN), MAX_GAIN)


def _outside_deadband(gain: float) -> float:
    return gain if abs(gain - 1.0) > _DEADBAND else 1.0


class Estimator:
    """Corrects predictions of one engine.

    Args:
        idle_watts: power between steps.

    Stateful fields: two means, a gain, a margin, the runs and counter moves of late.
    """

    def __init__(self, idle_watts: float = 0.0) -> None:
        self._idle_watts = idle_watts
        self._measured_seconds = self._predicted_seconds = 0.0
        self._joules_gain = 1.0
        self.seconds_gain_ratio = 1.0
        """Measured over predicted step seconds; 1 within the deadband."""
        self.joules_gain_ratio = 1.0
        """Metered over predicted joules; 1 within the deadband."""
        self.margin_ratio = 0.0
        """Part of each limit to keep free for what the meter shows beyond the prediction."""
        self.disagreement_ratio = 0.0
        """Metered over corrected watts of the last span, minus 1."""
        self.disagrees = False
        """They have differed for spans by more than the meter's grain explains."""
        self._apart = 0
        self._runs: deque[tuple[float, float, float]] = deque(maxlen=_RUNS_KEPT)
        self._seen: tuple[float, float] | None = None
        self._start: tuple[float, float] | None = None
        self._edges: deque[tuple[float, float]] = deque(maxlen=_EDGES_KEPT)

    def correct(self, batch: StepBatch, raw: StepPrediction) -> StepPrediction:
        """A prediction of `batch` with both gains applied."""
        seconds, joules = self.seconds_gain_ratio, self.joules_gain_ratio
        if seconds == 1.0 and joules == 1.0:
            return raw
        return StepPrediction(raw.seconds * seconds, raw.joules * joules)

    def observe_run(
        self,
        batch: StepBatch,
        raw: StepPrediction,
        start_seconds: float,
        end_seconds: float,
        measured_seconds: float | None,
    ) -> None:
        """A step is back.

        Args:
            batch: what it computed.
            raw: what the model said, before correction.
            start_seconds, end_seconds: when it ran.
            measured_seconds: its length; None where that is not the device's own.
        """
        self._runs.append((start_seconds, end_seconds, raw.joules))
        if measured_seconds is None or raw.seconds <= 0:
            return
        if not 0 < measured_seconds < math.inf:
            return
        if not self._predicted_seconds:
            # Begin as if the model had been right for a while.
            self._measured_seconds = self._predicted_seconds = raw.seconds
        # One step can't be further off than a model can be: the host was away.
        measured = min(measured_seconds, 2 * MAX_GAIN * raw.seconds)
        self._measured_seconds += _SECONDS_WEIGHT * (measured - self._measured_seconds)
        self._predicted_seconds += _SECONDS_WEIGHT * (raw.seconds - self._predicted_seconds)
        gain = _clamp(self._measured_seconds / self._predicted_seconds)
        self.seconds_gain_ratio = _outside_deadband(gain)

    def observe_power(self, state: PowerState) -> None:
        """Learn from the energy counter; a state without one teaches nothing."""
        energy, now = state.energy_joules, state.sampled_seconds
        if energy is None or not math.isfinite(energy):
            return
        seen, self._seen = self._seen, (now, energy)
        if seen is None or energy < seen[1]:
            self._start = None  # the counter was reset
            self._edges.clear()
            return
        # Between two moves the counter is up to a refresh old; just after one it is not.
        if energy > seen[1] and now - seen[0] <= _EDGE_SECONDS:
            self._edges.append((now, energy))
        # A move is of use once the steps up to it are back.
        while self._edges and self._runs and self._edges[0][0] <= self._runs[-1][1]:
            self._edge(*self._edges.popleft())

    def _edge(self, now_seconds: float, energy_joules: float) -> None:
        if self._start is None:
            self._start = (now_seconds, energy_joules)
            return
        begin, before = self._start
        span = now_seconds - begin
        if span < _SPAN_SECONDS:
            return
        self._start = (now_seconds, energy_joules)
        if span > 2 * _SPAN_SECONDS:
            return  # the sampler was away
        busy, predicted = self._between(begin, now_seconds)
        if busy < _BUSY_RATIO * span or predicted <= 0:
            return
        counted = energy_joules - before - self._idle_watts * (span - busy)
        self._learn(counted / predicted)

    def _between(self, begin_seconds: float, end_seconds: float) -> tuple[float, float]:
        """Seconds in steps, and their raw joules, between two times; drops what is older."""
        while self._runs[0][1] <= begin_seconds:
            self._runs.popleft()
        busy = joules = 0.0
        for start, end, spent in self._runs:
            inside = min(end, end_seconds) - max(start, begin_seconds)
            if inside > 0:
                busy += inside
                joules += spent * inside / (end - start)
        return busy, joules

    def _learn(self, ratio: float) -> None:
        excess = ratio / self.joules_gain_ratio - 1.0
        self.disagreement_ratio = excess
        lean = min(MAX_MARGIN_RATIO, max(0.0, excess - _LEAN_FREE_RATIO))
        self.margin_ratio = max(lean, self.margin_ratio * _LEAN_KEPT_RATIO)
        if self.margin_ratio < 0.001:
            self.margin_ratio = 0.0
        bound = _DISAGREE_RATIO / 2 if self.disagrees else _DISAGREE_RATIO
        self._apart = self._apart + 1 if abs(excess) > bound else 0
        self.disagrees = self._apart >= (1 if self.disagrees else _DISAGREE_SPANS)
        off = _clamp(ratio) - self._joules_gain
        self._joules_gain += (_FAR_WEIGHT if abs(off) > _FAR_RATIO else _WEIGHT) * off
        self.joules_gain_ratio = _outside_deadband(self._joules_gain)
