"""Joules: gains by a step's power, by recursive least squares over spans of the counter.

Law. Between two moves of the energy counter

    metered = sum over power bins of gain * joules predicted of steps
              + idle gain * joules predicted between steps

A step lies between two power bins, as a part of the enforced limit: what a
profile has wrong (bytes, FLOPs, a ceiling, a slope) shows in a step's power, whether it is
a decode or a prompt. The gains walk slowly around what they were: a Kalman filter. Most of
the prior's variance is shared (the meter's own error, the profile's scale), so collinear work
moves the gains together, and only spans that differ tell them apart. What a span is off by
after it was learned says how well spans are dated; errors of one sign that stay say that the
GPU has changed, and restore variance.

What the filter knows is shrunk to what is certain (`_shrunk`): first the gain of the recent mix of
work, then by how much each power bin differs from it. Neither counts within what noise explains.
Above, it counts with its deviation on top; below, only as far as it is sure.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Power bins at 0.6, 0.8 and 1.0 of the enforced limit: decodes of a small batch draw about 0.6
# of it on every profile, prompts 0.9 and more. Then what is drawn between steps.
POWER_BINS, GAINS = 3, 4
IDLE = POWER_BINS
_LOWEST_RATIO, _SPACING_RATIO = 0.6, 0.2
# A profile that is further off than this describes another GPU, or the sensor is wrong.
MIN_GAIN, MAX_GAIN = 0.7, 1.4
# Idle power is an estimate in every profile. A bound nearer to 1 would push what lies
# beyond it into the gains of steps.
_MIN_IDLE_GAIN, _MAX_IDLE_GAIN = 0.3, 1.5
# Prior errors of a profile, as standard deviations: of all steps together (a meter's gain is
# within 5%), of low power against high, of one power bin, and of idle power.
_SHARED, _SLOPE, _OWN, _IDLE_OWN = 0.1, 0.08, 0.04, 0.15
# How much of the prior's variance comes back each second: half a percent of walk a second.
_WALK_PER_SECOND = 1.0 / 600.0
# A span's work is known to half a percent at best.
_SPAN_RATIO = 0.005
# A span further off than this many deviations moves the gains as one that is just this far.
_FARTHEST = 4.0
# Over about ten spans: what is left of them. One adds no more than three deviations of
# those before, or two milliseconds. Left on one side by three deviations of a mean of ten
# (the variance of an exponential mean is half its weight), a tenth of the variance comes back.
_LEFT_WEIGHT, _LEFT_DEVIATIONS, _LEFT_SECONDS = 0.1, 3.0, 0.002
_FIRST_LEFT_SECONDS, _MOST_LEFT_SECONDS = 0.003, 0.05
_ONE_SIDED_DEVIATIONS, _VARIANCE_BACK = 3.0, 0.1
# The mix of work that the gains are judged by is that of a few seconds.
_MIX_SECONDS = 3.0
# Deviations by which a gain below is shortened, and by which one above must stand out: the
# mix and idle power, which the counter shows well, and what power bins differ by, where dating
# errors add up.
_MIX_CONFIDENCE, _BIN_CONFIDENCE = (1.5, 0.75), (3.0, 1.5)
# A counter that has begun to count too little is found out in half of this (`gpu/meter_check.py`),
# and what it has done to the gains is undone in the rest:
# until then their fall is not believed.
_HOLD_SECONDS = 8.0
# A gain this near to 1 is the meter's grain.
_BAND = 0.004


def _prior() -> Array:
    covariance = np.zeros((GAINS, GAINS))
    slope = np.linspace(-1.0, 1.0, POWER_BINS)
    covariance[:POWER_BINS, :POWER_BINS] = _SHARED**2 + _SLOPE**2 * np.outer(slope, slope)
    covariance += np.diag([_OWN**2] * POWER_BINS + [_IDLE_OWN**2])
    return covariance


_PRIOR = _prior()


def place(power_ratio: float) -> tuple[int, float]:
    """The power bin below a power over the enforced limit, and how far on the way to the next."""
    x = (power_ratio - _LOWEST_RATIO) / _SPACING_RATIO
    if x <= 0.0:
        return 0, 0.0
    if x >= POWER_BINS - 1:
        return POWER_BINS - 2, 1.0
    index = int(x)
    return index, x - index


def _shrunk(
    off: float, deviation: float, seen_ratio: float, confidence: tuple[float, float]
) -> float:
    """What is used of a gain's distance from where it is expected.

    Args:
        off: the distance as the filter has it.
        deviation: of it.
        seen_ratio: how much of the prior's variance the meter has removed.
        confidence: deviations that are taken off below, and must be exceeded above.
    """
    sure, clear = confidence
    if off < 0.0:
        return min(0.0, off + max(sure * deviation, _BAND))
    off *= seen_ratio
    band = max(_BAND, clear * deviation * math.sqrt(seen_ratio))
    return min(off + deviation, max(0.0, 2.0 * (off - band)))


class JouleGains:
    """The filter. Stateful fields: gains, covariance, the recent mix, what was left of spans, the
    gains of late.

    Args:
        held: what steps were planned with before; nothing is planned with less at first.
    """

    def __init__(self, held: Sequence[float] = (1.0,) * GAINS) -> None:
        self._gains = np.ones(GAINS)
        self._covariance = _PRIOR.copy()
        self._mix = np.zeros(GAINS)
        self._left_seconds = 0.0
        self._left_seconds2 = _FIRST_LEFT_SECONDS**2
        self.applied: list[float] = [1.0] * GAINS
        """What the meter says by now, of each power bin and then of idle power."""
        self._first = [max(1.0, gain) for gain in held]
        self.held: list[float] = list(self._first)
        """The highest of the last seconds: what steps are planned with."""
        self.refutable = False
        """Whether a power reading could say that the counter is wrong: else nothing is held."""
        self._late: deque[tuple[float, list[float]]] = deque()
        self._seconds = 0.0

    @property
    def noise_seconds(self) -> float:
        """By how much spans turn out to be wrongly dated, as a standard deviation."""
        return math.sqrt(self._left_seconds2)

    def predicted(self, joules: Sequence[float]) -> float:
        """Joules as corrected, of joules as predicted by the model: [GAINS]."""
        return math.fsum(g * j for g, j in zip(self.applied, joules, strict=True))

    def observe(
        self, joules: Sequence[float], seconds: float, metered_joules: float, edge_joules2: float
    ) -> None:
        """Learn from a span.

        Args:
            joules: what the model predicted of it, by gain: [GAINS].
            seconds: its length.
            metered_joules: by how much the counter moved.
            edge_joules2: variance of that, since its ends are not dated exactly.
        """
        gains, covariance = self._gains, self._covariance
        row = np.array(joules)
        covariance += _PRIOR * (_WALK_PER_SECOND * seconds)
        expected = float(row @ gains)
        watts = expected / seconds
        spread = covariance @ row
        noise = edge_joules2 + (_SPAN_RATIO * expected) ** 2
        noise = max(noise, self._left_seconds2 * watts * watts)
        variance = float(row @ spread) + noise
        farthest = _FARTHEST * math.sqrt(variance)
        surprise = min(max(metered_joules - expected, -farthest), farthest)
        gains += spread * (surprise / variance)
        covariance -= np.outer(spread, spread) / variance
        np.clip(gains[:POWER_BINS], MIN_GAIN, MAX_GAIN, out=gains[:POWER_BINS])
        gains[IDLE] = min(max(float(gains[IDLE]), _MIN_IDLE_GAIN), _MAX_IDLE_GAIN)
        self._judge((metered_joules - float(row @ gains)) / watts, noise / (watts * watts))
        # Work that is not seen for hours leaves its variance at the prior's.
        shrink = np.sqrt(np.minimum(1.0, _PRIOR.diagonal() / covariance.diagonal()))
        covariance *= shrink[:, None] * shrink
        self._mix = self._mix * math.exp(-seconds / _MIX_SECONDS) + row
        self._apply()
        self._seconds += seconds
        self._late.append((self._seconds, list(self.applied)))
        while self._late[0][0] < self._seconds - _HOLD_SECONDS:
            self._late.popleft()
        if not self.refutable:
            self.held = self.applied
            return
        late = [gains for _, gains in self._late]
        if self._seconds <= _HOLD_SECONDS:
            late.append(self._first)
        self.held = [max(each) for each in zip(*late, strict=True)]

    def _judge(self, left_seconds: float, noise_seconds2: float) -> None:
        """What is left of a span after it was learned, in seconds of its power."""
        most = max(_LEFT_DEVIATIONS * self.noise_seconds, _LEFT_SECONDS)
        most = min(most, _MOST_LEFT_SECONDS)
        beside = min(abs(left_seconds - self._left_seconds), most)
        self._left_seconds2 += _LEFT_WEIGHT * (beside * beside - self._left_seconds2)
        left = min(max(left_seconds, -most), most)
        self._left_seconds += _LEFT_WEIGHT * (left - self._left_seconds)
        bound2 = _ONE_SIDED_DEVIATIONS**2 * _LEFT_WEIGHT / 2.0 * noise_seconds2
        if self._left_seconds**2 > bound2:
            self._covariance += _VARIANCE_BACK * _PRIOR
            self._left_seconds = 0.0

    def _apply(self) -> None:
        share = self._mix.copy()
        share[IDLE] = 0.0
        steps = float(share.sum())
        if steps > 0.0:
            share /= steps
            mix = float(share @ self._gains)
            base = 1.0 + _shrunk(mix - 1.0, *self._known(share), _MIX_CONFIDENCE)
            for index in range(POWER_BINS):
                row = -share
                row[index] += 1.0
                off = float(self._gains[index]) - mix
                gain = base + _shrunk(off, *self._known(row), _BIN_CONFIDENCE)
                self.applied[index] = min(gain, MAX_GAIN)
        idle = np.zeros(GAINS)
        idle[IDLE] = 1.0
        off = float(self._gains[IDLE]) - 1.0
        self.applied[IDLE] = 1.0 + _shrunk(off, *self._known(idle), _MIX_CONFIDENCE)

    def _known(self, row: Array) -> tuple[float, float]:
        """The deviation of a combination of gains; how much of its prior variance was removed."""
        variance, prior = float(row @ self._covariance @ row), float(row @ _PRIOR @ row)
        if prior <= 0.0:
            return 0.0, 0.0
        return math.sqrt(max(variance, 0.0)), max(0.0, 1.0 - variance / prior)
