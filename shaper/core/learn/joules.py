"""Joules: recursive least squares of a few gains over spans between counter moves.

Law. Between two moves of the energy counter

    metered = idle_gain * idle_watts * seconds
              + sum over kinds of gain * predicted joules above idle + edges

and the gains follow a random walk around what they were: a Kalman filter. Their prior is
1 with most of the doubt shared (the meter's own error, the profile's scale), and little
of it each one's own; so collinear work moves them together, and only spans that differ
enough tell them apart. An edge is wrong by what was drawn in the time that it can't be
dated to; the next span has the same error with the other sign, so it is a state of the
filter too. The counter's lag is another: it shows where power changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shaper.core.learn.seconds import MAX_GAIN, MIN_GAIN
from shaper.core.learn.spans import KINDS

Array = npt.NDArray[np.float64]

# States: gains of the kinds and of idle; the lag; the last edge's error; the next one's.
IDLE = KINDS
GAINS = KINDS + 1
_LAG, _EDGE, _NEW_EDGE = GAINS, GAINS + 1, GAINS + 2
_STATES = GAINS + 3

# Doubts about a profile, as standard deviations: of everything together (the meter's gain:
# within 5%), of all work, of decodes or prompts together, of one kind, and of idle power.
_ALL, _WORK, _PAIR, _OWN = 0.06, 0.08, 0.05, 0.04
_IDLE_OWN = 0.15
# A bound on idle power nearer to 1 would push what lies beyond it into the gains of work.
_MIN_IDLE_GAIN = 0.3
# How much of the prior's variance comes back each second: half a percent a second of walk.
_WALK_PER_SECOND = 1.0 / 600.0
# A driver shows a counter some tens of milliseconds late at most.
_LAG_SECONDS = 0.02
_MIN_LAG_SECONDS, _MAX_LAG_SECONDS = -0.01, 0.15
# A span's work is known to half a percent at best.
_SPAN_RATIO = 0.005
# A span further off than this many deviations moves the gains as one that is just this far.
_FARTHEST = 4.0
# Spans that are off by more than the filter explains: the mean square of their deviations
# over about ten of them, above which part of the prior's doubt comes back.
_SURPRISE_WEIGHT, _SURPRISE, _DOUBT_BACK = 0.1, 3.0, 0.1


def _prior() -> Array:
    work = np.zeros(GAINS)
    work[:KINDS] = 1.0
    everything = np.ones(GAINS)
    covariance = _ALL**2 * np.outer(everything, everything) + _WORK**2 * np.outer(
        work, work
    )
    for first, last in ((0, 2), (2, 5)):
        pair = np.zeros(GAINS)
        pair[first:last] = 1.0
        covariance += _PAIR**2 * np.outer(pair, pair)
    covariance += np.diag([_OWN**2] * KINDS + [_IDLE_OWN**2])
    return covariance


_PRIOR = _prior()
_PRIOR_VARIANCES = _PRIOR.diagonal()


class JouleGains:
    """The filter. Stateful fields: the states, their covariance, the mean surprise."""

    def __init__(self) -> None:
        self._state = np.ones(_STATES)
        self._state[_LAG:] = 0.0
        self._covariance = np.zeros((_STATES, _STATES))
        self._covariance[:GAINS, :GAINS] = _PRIOR
        self._covariance[_LAG, _LAG] = _LAG_SECONDS**2
        self._surprise = 1.0
        self.gains: list[float] = [float(g) for g in self._state[:GAINS]]

    @property
    def lag_seconds(self) -> float:
        """How late the counter shows what was spent."""
        return float(self._state[_LAG])

    def begin(self, edge_joules2: float) -> None:
        """A first edge, whose error has this variance: nothing is known of what was before."""
        self._state[_EDGE] = 0.0
        self._covariance[_EDGE, :] = self._covariance[:, _EDGE] = 0.0
        self._covariance[_EDGE, _EDGE] = edge_joules2

    def predicted(self, work: Sequence[float]) -> float:
        """Joules of `work`: its predicted joules by gain."""
        return math.fsum(g * w for g, w in zip(self.gains, work, strict=True))

    def error_ratio(self, work: Sequence[float]) -> float:
        """Standard deviation of the joules of `work`, over these joules."""
        row = np.asarray(work)
        joules = float(row @ self._state[:GAINS])
        if joules <= 0:
            return 0.0
        return (
            math.sqrt(max(0.0, float(row @ self._covariance[:GAINS, :GAINS] @ row)))
            / joules
        )

    def observe(
        self,
        work: Sequence[float],
        seconds: float,
        metered_joules: float,
        lag_watts: float,
        edge_joules2: float,
    ) -> tuple[float, float]:
        """Learn from a span.

        Args:
            work: predicted joules by gain.
            seconds: its length.
            metered_joules: by how much the counter moved.
            lag_watts: power at its end less that at its start: what a second of lag moves.
            edge_joules2: variance of the joules until its end, for want of a date.

        Returns:
            Metered less expected joules, and the standard deviation that this should have.
        """
        state, covariance = self._state, self._covariance
        covariance[:GAINS, :GAINS] += _PRIOR * (_WALK_PER_SECOND * seconds)
        covariance[_LAG, _LAG] += _LAG_SECONDS**2 * _WALK_PER_SECOND * seconds
        covariance[_NEW_EDGE, _NEW_EDGE] = edge_joules2
        row = np.zeros(_STATES)
        row[:GAINS] = work
        row[_LAG], row[_EDGE], row[_NEW_EDGE] = -lag_watts, -1.0, 1.0
        # The lag's own part is in `work` already, which was taken at the present lag.
        expected = float(row[:GAINS] @ state[:GAINS]) - float(state[_EDGE])
        spread = covariance @ row
        variance = float(row @ spread) + (_SPAN_RATIO * expected) ** 2
        surprise = metered_joules - expected
        deviation = math.sqrt(variance)
        farthest = _FARTHEST * deviation
        taken = min(max(surprise, -farthest), farthest)
        state += spread * (taken / variance)
        covariance -= np.outer(spread, spread) / variance
        self._bound()
        state[_EDGE] = state[_NEW_EDGE]
        covariance[_EDGE, :] = covariance[_NEW_EDGE, :]
        covariance[:, _EDGE] = covariance[:, _NEW_EDGE]
        covariance[_EDGE, _EDGE] = covariance[_NEW_EDGE, _NEW_EDGE]
        state[_NEW_EDGE] = 0.0
        covariance[_NEW_EDGE, :] = covariance[:, _NEW_EDGE] = 0.0
        self._surprise += _SURPRISE_WEIGHT * (taken * taken / variance - self._surprise)
        if self._surprise > _SURPRISE:
            self.doubt(_DOUBT_BACK)
            self._surprise = 1.0
        return surprise, deviation

    def doubt(self, prior_ratio: float) -> None:
        """Bring this much of the prior's variance back: what comes next may be different."""
        self._covariance[:GAINS, :GAINS] += prior_ratio * _PRIOR

    def _bound(self) -> None:
        state = self._state
        np.clip(state[:KINDS], MIN_GAIN, MAX_GAIN, out=state[:KINDS])
        state[IDLE] = min(max(float(state[IDLE]), _MIN_IDLE_GAIN), MAX_GAIN)
        state[_LAG] = min(max(float(state[_LAG]), _MIN_LAG_SECONDS), _MAX_LAG_SECONDS)
        # Work that is not seen for hours leaves its doubt at the prior's.
        shrink = np.sqrt(
            np.minimum(1.0, _PRIOR_VARIANCES / self._covariance.diagonal()[:GAINS])
        )
        self._covariance[:GAINS, :] *= shrink[:, None]
        self._covariance[:, :GAINS] *= shrink
        self.gains = state[:GAINS].tolist()
