"""Step seconds: measured over predicted, by the size of the step.

Law. Steps of decodes alone and steps with prompts have a table each, with a bin per
quarter of a power of two of their tokens. A bin holds exponential sums of measured and of
predicted seconds: sums, not ratios, so that an end seen late and the next step, which then
seems short, cancel. With `noise` the error of one step's time,

    gain   = (measured + prior * beside) / (predicted + prior)
    prior  = predicted seconds of (noise / (5% of a step))^2 steps
    beside = the gain of the bin below, or that of all steps

and what then differs from the gain of all steps by less than the host's share (1.5 times
the noise) is taken for the host's. A bin that was not seen has the higher one of the gains
of the nearest two that were: a step taken for too short breaks a budget.
"""

from __future__ import annotations

import math

from shaper.core.types import StepBatch

# A profile that is further off than this describes another GPU, or the clock is wrong.
MIN_GAIN, MAX_GAIN = 0.7, 1.4
# Up to 16,384 tokens.
_BINS = 4 * 15
# About so many of a bin's steps to follow a GPU that has become slower.
_BIN_STEPS = 50.0
# Of all steps together: a hundred, or about a second.
_ALL_WEIGHT = 0.01
# By how much a kernel's efficiency changes from one bin to the next.
_BIN_RATIO = 0.05
# One step's error that is not the model's: found over fifty steps, from a half millisecond.
_NOISE_WEIGHT, _FIRST_NOISE_SECONDS = 0.02, 0.0005
# An end that is seen late by up to some milliseconds makes what it covers look long.
_HOST_DEVIATIONS = 1.5
# Steps that are off together by so much over some thirty of them run on what has become
# another GPU: little of what was seen before is kept.
_CHANGED_RATIO, _CHANGED_WEIGHT, _CHANGED_KEPT = 0.05, 1 / 30, 0.1
# All bins take as long to solve as several predictions.
_SOLVE_STEPS = 16
# A gain this near to 1 is the clock's grain, not a fault of the model.
_DEADBAND = 0.01


def bounded(gain: float) -> float:
    """A gain that a profile can have."""
    return min(max(gain, MIN_GAIN), MAX_GAIN)


def outside_deadband(gain: float) -> float:
    """The gain, or 1."""
    return gain if abs(gain - 1.0) > _DEADBAND else 1.0


def bin_of(tokens: int) -> int:
    """Quarters of powers of two; 0 is one token or none."""
    power = tokens.bit_length() - 1
    if power < 2:
        return 4 * max(power, 0)
    return min(4 * power + (tokens >> (power - 2)) - 4, _BINS - 1)


class _Table:
    """Evidence and gains by bin, for one kind of step."""

    def __init__(self) -> None:
        self.measured = [0.0] * _BINS
        self.predicted = [0.0] * _BINS
        self.steps = [0.0] * _BINS
        self.gains = [1.0] * _BINS

    def add(self, index: int, measured_seconds: float, predicted_seconds: float) -> None:
        keep = 1.0 - 1.0 / _BIN_STEPS
        self.measured[index] = self.measured[index] * keep + measured_seconds
        self.predicted[index] = self.predicted[index] * keep + predicted_seconds
        self.steps[index] = self.steps[index] * keep + 1.0

    def found(self, index: int) -> float:
        """What a bin's own steps say; its gain where there were none."""
        if not self.steps[index]:
            return self.gains[index]
        return self.measured[index] / self.predicted[index]

    def forget(self) -> None:
        for values in (self.measured, self.predicted, self.steps):
            values[:] = [_CHANGED_KEPT * value for value in values]

    def solve(self, shared: float, noise_seconds: float) -> None:
        """All gains again; `shared` is that of all steps."""
        gains, below, seen_below = self.gains, shared, False
        unseen: list[int] = []
        for index in range(_BINS):
            if not self.steps[index]:
                gains[index] = below
                unseen.append(index)
                continue
            gain = self._own(index, below, shared, noise_seconds)
            for gap in unseen:
                gains[gap] = max(below, gain) if seen_below else gain
            unseen.clear()
            gains[index] = below = gain
            seen_below = True

    def solve_one(self, index: int, shared: float, noise_seconds: float) -> None:
        """The gain of one bin that was seen."""
        beside = self.gains[index - 1] if index else shared
        self.gains[index] = self._own(index, beside, shared, noise_seconds)

    def _own(self, index: int, beside: float, shared: float, noise_seconds: float) -> float:
        predicted = self.predicted[index]
        step = predicted / self.steps[index]
        prior = step * (noise_seconds / (_BIN_RATIO * step)) ** 2
        off = (self.measured[index] + prior * beside) / (predicted + prior) - shared
        own = max(0.0, abs(off) - _HOST_DEVIATIONS * noise_seconds / step)
        return bounded(shared + math.copysign(own, off))


class StepSeconds:
    """Gains on step seconds. Stateful fields: two tables, means of all and of late, a noise,
    the steps since the tables were solved."""

    def __init__(self) -> None:
        self._decodes, self._prompts = _Table(), _Table()
        self._measured = self._predicted = 0.0
        self._late_measured = self._late_corrected = self._late_predicted = 0.0
        self._noise_seconds2 = _FIRST_NOISE_SECONDS**2
        self._since_solved = 0
        self.gain_ratio = 1.0
        """Measured over predicted seconds of the last steps of all sizes; 1 in the deadband."""

    @property
    def noise_seconds(self) -> float:
        """By how much one step's time is off that of its kind."""
        return math.sqrt(self._noise_seconds2)

    def gain(self, batch: StepBatch) -> float:
        """Of one step; 1 within the deadband."""
        if batch.prefill_tokens:
            gain = self._prompts.gains[bin_of(batch.prefill_tokens + batch.decode_tokens)]
        else:
            gain = self._decodes.gains[bin_of(batch.decode_tokens)]
        return gain if abs(gain - 1.0) > _DEADBAND else 1.0

    def observe(self, batch: StepBatch, predicted_seconds: float, measured_seconds: float) -> None:
        """Learn from a step's time; what is no duration teaches nothing.

        Args:
            batch: what it computed.
            predicted_seconds: what the model said, before correction.
            measured_seconds: its length on the device.
        """
        if not 0 < measured_seconds < math.inf or not 0 < predicted_seconds < math.inf:
            return
        # One step can't be further off than a model can be: the host was away.
        measured = min(measured_seconds, 2 * MAX_GAIN * predicted_seconds)
        if not self._predicted:
            # Begin as if the model had been right for a while.
            self._measured = self._predicted = predicted_seconds
            self._late_measured = self._late_corrected = predicted_seconds
            self._late_predicted = predicted_seconds
        table = self._prompts if batch.prefill_tokens else self._decodes
        index = bin_of(batch.prefill_tokens + batch.decode_tokens)
        corrected = predicted_seconds * table.gains[index]
        error = measured - predicted_seconds * table.found(index)
        self._noise_seconds2 += _NOISE_WEIGHT * (error * error - self._noise_seconds2)
        self._measured += _ALL_WEIGHT * (measured - self._measured)
        self._predicted += _ALL_WEIGHT * (predicted_seconds - self._predicted)
        self._late_measured += _CHANGED_WEIGHT * (measured - self._late_measured)
        self._late_corrected += _CHANGED_WEIGHT * (corrected - self._late_corrected)
        self._late_predicted += _CHANGED_WEIGHT * (predicted_seconds - self._late_predicted)
        if abs(self._late_measured / self._late_corrected - 1.0) > _CHANGED_RATIO:
            self._change()
        shared = bounded(self._measured / self._predicted)
        self.gain_ratio = outside_deadband(shared)
        self._since_solved += 1
        first = not table.steps[index]
        table.add(index, measured, predicted_seconds)
        if first or self._since_solved >= _SOLVE_STEPS:
            self._since_solved = 0
            for each in (self._decodes, self._prompts):
                each.solve(shared, self.noise_seconds)
        else:
            table.solve_one(index, shared, self.noise_seconds)

    def _change(self) -> None:
        """The steps of late are all that counts."""
        self._decodes.forget()
        self._prompts.forget()
        self._measured, self._predicted = self._late_measured, self._late_predicted
        self._late_corrected = self._late_measured
        self._noise_seconds2 = _FIRST_NOISE_SECONDS**2
