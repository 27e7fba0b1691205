"""Step seconds: measured over predicted, by the size of the step.

Law. Two tables of gains, one for steps of decodes alone by their number, one for steps
with prompts by their tokens, each with a knot per power of two and straight lines
between. A knot holds exponential means of measured and of predicted seconds: a mean of
sums, not of ratios, so that an end seen late and the next step, which then seems short,
cancel. The gains of a table are the most likely ones of a Gaussian chain:

    own       measured / predicted at the knot, the surer the more steps were seen there
    neighbour the same gain as the knot beside it, within `_NEIGHBOUR_RATIO`
    shared    that of all steps, within `_OWN_RATIO`

so a size that was never seen takes its neighbours' gain, and far from all the shared one.
"""

from __future__ import annotations

import math

from shaper.core.types import StepBatch

# A profile that is further off than this describes another GPU.
MIN_GAIN, MAX_GAIN = 0.7, 1.4
# Knots at 1, 2, ... 1024 decodes, and at 16, 32, ... 8192 tokens: what engines run.
_DECODE_KNOTS, _DECODE_FIRST = 21, 0
_PROMPT_KNOTS, _PROMPT_FIRST = 19, 4
# About a hundred steps, or a second, to follow a GPU that has become slower.
_STEPS_KEPT = 100.0
# A kernel's efficiency changes by this much from one size to the next, and in all.
_NEIGHBOUR_RATIO, _OWN_RATIO = 0.05, 0.15
# The error of one step's time that is not the model's: at least this much of it.
_LEAST_NOISE_RATIO = 0.003
_NOISE_WEIGHT = 0.02
# The gains are solved again every so many steps: it costs as much as ten predictions.
_SOLVE_STEPS = 8
# Steps whose time is off by this much over some thirty of them are another plant's.
_CHANGED_RATIO, _CHANGED_WEIGHT, _CHANGED_KEPT = 0.05, 1 / 30, 0.1
# A step with twice the tokens takes longer by more than these from 512 tokens on, and
# below, where reading the weights is most of it: a gain that falls faster is noise.
_LEAST_FALL_RATIO, _LEAST_SMALL_FALL_RATIO, _SMALL_KNOTS = 0.92, 0.98, 10
# A gain this near to 1 is drawn towards it: it is the clock's grain, not the model's fault.
GRAIN_RATIO = 0.005


def bounded(gain: float) -> float:
    """A gain that a profile can have."""
    return min(max(gain, MIN_GAIN), MAX_GAIN)


def without_grain(gain: float, grain_ratio: float = GRAIN_RATIO) -> float:
    """A gain whose distance from 1 is halved at `grain_ratio`, kept far above, and gone far
    below: a right model stays untouched, and there is no jump."""
    square = (gain - 1.0) * (gain - 1.0)
    return (
        1.0 + (gain - 1.0) * square / (square + grain_ratio * grain_ratio)
        if square
        else 1.0
    )


def place(size: int, first: int, knots: int) -> tuple[int, float]:
    """The knot at or below `size`, and how far on the way to the next one it is."""
    power = size.bit_length() - 1
    index = 2 * (power - first)
    if index < 0:
        return 0, 0.0
    if index >= knots - 1:
        return knots - 2, 1.0
    part = 2.0 * (size / (1 << power) - 1.0)
    return (index, part) if part < 1.0 else (index + 1, part - 1.0)


class _Table:
    """Evidence and gains at the knots of one kind of steps."""

    def __init__(self, knots: int) -> None:
        self.measured = [0.0] * knots
        self.predicted = [0.0] * knots
        self.steps = [0.0] * knots
        self.gains = [1.0] * knots

    def gain(self, index: int, part: float) -> float:
        low = self.gains[index]
        return low + part * (self.gains[index + 1] - low)

    def add(self, index: int, share: float, measured: float, predicted: float) -> None:
        keep = 1.0 - share / _STEPS_KEPT
        self.measured[index] = self.measured[index] * keep + share * measured
        self.predicted[index] = self.predicted[index] * keep + share * predicted
        self.steps[index] = self.steps[index] * keep + share

    def keep(self, ratio: float) -> None:
        for values in (self.measured, self.predicted, self.steps):
            values[:] = [value * ratio for value in values]

    def solve(self, shared: float, noise_seconds2: float) -> None:
        """The most likely gains: messages along the chain, forth and back."""
        count = len(self.gains)
        tie = 1.0 / (_OWN_RATIO * _OWN_RATIO)
        step_variance = _NEIGHBOUR_RATIO * _NEIGHBOUR_RATIO
        surety, drawn = [], []
        for index in range(count):
            predicted, steps = self.predicted[index], self.steps[index]
            own = 0.0
            if steps > 1e-6:
                mean = predicted / steps
                own = steps / (noise_seconds2 / (mean * mean) + _LEAST_NOISE_RATIO**2)
            surety.append(tie + own)
            drawn.append(
                tie * shared + own * (self.measured[index] / predicted if own else 0.0)
            )
        ahead = [(0.0, 0.0)] * count
        for index in range(1, count):
            ahead[index] = _passed(surety, drawn, ahead, index - 1, step_variance)
        behind = [(0.0, 0.0)] * count
        for index in range(count - 2, -1, -1):
            behind[index] = _passed(surety, drawn, behind, index + 1, step_variance)
        for index in range(count):
            weight = surety[index] + ahead[index][0] + behind[index][0]
            total = drawn[index] + ahead[index][1] + behind[index][1]
            self.gains[index] = without_grain(bounded(total / weight))


def _passed(
    surety: list[float],
    drawn: list[float],
    messages: list[tuple[float, float]],
    index: int,
    step_variance: float,
) -> tuple[float, float]:
    """What a knot knows without the receiver, blurred by a step: (surety, surety * gain)."""
    known = surety[index] + messages[index][0]
    gain = (drawn[index] + messages[index][1]) / known
    blurred = 1.0 / (1.0 / known + step_variance)
    return blurred, blurred * gain


class StepSeconds:
    """Gains on step seconds. Stateful fields: two tables, two pairs of means, a noise."""

    def __init__(self) -> None:
        self._decodes = _Table(_DECODE_KNOTS)
        self._prompts = _Table(_PROMPT_KNOTS)
        self._measured = self._predicted = 0.0
        self._recent_measured = self._recent_predicted = 0.0
        self._noise_seconds2 = 0.0
        self._since_solved = 0
        self._solves = 0
        self._quiet_steps = 0
        self.untouched = True
        """Whether every gain is exactly 1."""

    @property
    def gain_ratio(self) -> float:
        """Measured over predicted seconds of the last steps of all sizes."""
        if self._predicted <= 0:
            return 1.0
        return without_grain(bounded(self._measured / self._predicted))

    def gain(self, batch: StepBatch) -> float:
        """Of one step."""
        prompt_tokens = batch.prefill_tokens
        if prompt_tokens:
            tokens = prompt_tokens + batch.decode_tokens
            return self._prompts.gain(*place(tokens, _PROMPT_FIRST, _PROMPT_KNOTS))
        return self._decodes.gain(
            *place(batch.decode_tokens, _DECODE_FIRST, _DECODE_KNOTS)
        )

    def observe(
        self, batch: StepBatch, predicted_seconds: float, measured_seconds: float
    ) -> None:
        """Learn from a step's time.

        Args:
            batch: what it computed.
            predicted_seconds: what the model said, before correction.
            measured_seconds: from its start to its end on the device.
        """
        if not 0 < measured_seconds < math.inf or not 0 < predicted_seconds < math.inf:
            return
        # One step can't be further off than a model can be: the host was away.
        measured = min(measured_seconds, 2 * MAX_GAIN * predicted_seconds)
        if not self._predicted:
            # Begin as if the model had been right for a while.
            self._measured = self._predicted = predicted_seconds
            self._recent_measured = self._recent_predicted = predicted_seconds
        corrected = predicted_seconds * self.gain(batch)
        error = measured - corrected
        self._noise_seconds2 += _NOISE_WEIGHT * (error * error - self._noise_seconds2)
        weight = 1.0 / _STEPS_KEPT
        self._measured += weight * (measured - self._measured)
        self._predicted += weight * (predicted_seconds - self._predicted)
        if batch.prefill_tokens:
            table, size = self._prompts, batch.prefill_tokens + batch.decode_tokens
            index, part = place(size, _PROMPT_FIRST, _PROMPT_KNOTS)
        else:
            table = self._decodes
            index, part = place(batch.decode_tokens, _DECODE_FIRST, _DECODE_KNOTS)
        table.add(index, 1.0 - part, measured, predicted_seconds)
        table.add(index + 1, part, measured, predicted_seconds)
        self._watch(measured, corrected)
        self._since_solved += 1
        if self._since_solved >= _SOLVE_STEPS or self._solves < _SOLVE_STEPS:
            self._solve()

    def forget(self, kept_ratio: float) -> None:
        """Keep this much of the evidence: what comes next may be another plant's."""
        self._decodes.keep(kept_ratio)
        self._prompts.keep(kept_ratio)
        self._quiet_steps = 0

    def _watch(self, measured: float, corrected: float) -> None:
        """Forget when the steps of the last moment are off together."""
        self._recent_measured += _CHANGED_WEIGHT * (measured - self._recent_measured)
        self._recent_predicted += _CHANGED_WEIGHT * (corrected - self._recent_predicted)
        self._quiet_steps += 1
        if self._quiet_steps < 1 / _CHANGED_WEIGHT:
            return
        if abs(self._recent_measured / self._recent_predicted - 1.0) > _CHANGED_RATIO:
            self.forget(_CHANGED_KEPT)

    def _solve(self) -> None:
        self._since_solved = 0
        self._solves += 1
        shared = bounded(self._measured / self._predicted)
        for table in (self._decodes, self._prompts):
            table.solve(shared, self._noise_seconds2)
        gains = self._prompts.gains
        for index in range(1, len(gains)):
            fall = (
                _LEAST_SMALL_FALL_RATIO if index <= _SMALL_KNOTS else _LEAST_FALL_RATIO
            )
            gains[index] = max(gains[index], gains[index - 1] * fall)
        self.untouched = all(gain == 1.0 for gain in (*gains, *self._decodes.gains))
