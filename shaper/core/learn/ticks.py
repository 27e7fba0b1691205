"""When an energy counter moves, from the readings that bracket its moves.

Law. A driver refreshes the counter at a steady period (about 100 ms). Two readings, some
20 ms apart, bracket a move, whose middle is wrong by a third of its width. A Kalman filter
of phase and period over many brackets dates moves to about two milliseconds. A bracket
that misses what the filter expects starts it again, and a counter that moves at about
every reading shows no period: then the middles are all there is.
"""

from __future__ import annotations

from typing import NamedTuple

# A reading is not dated better than this.
_GRAIN_SECONDS = 0.001
# By how much the period changes from one move to the next, and by how much the first is wrong.
_DRIFT_SECONDS, _PERIOD_SECONDS = 2e-5, 0.015
# A period is seen only where moves are further apart than readings by this factor.
_CLEAR_RATIO = 1.5
# Beyond so many moves that nobody saw, the phase is not known any more.
_MOST_MISSED = 20


class Tick(NamedTuple):
    """When a counter moved."""

    at_seconds: float
    deviation_seconds: float
    """By how much that may be wrong, one standard deviation."""
    kept_ratio: float
    """How much of its error is that of the tick before."""


class CounterTicks:
    """Stateful fields: the last move's time, the period, their covariance."""

    def __init__(self) -> None:
        self._at_seconds: float | None = None
        self._period_seconds = 0.0
        # Of time, of time with period, of period.
        self._covariance = (0.0, 0.0, 0.0)

    def forget(self) -> None:
        """The counter or its readings broke off."""
        self._at_seconds = None

    def move(self, low_seconds: float, high_seconds: float) -> Tick:
        """Take a move that happened after `low` and by `high`."""
        middle = (low_seconds + high_seconds) / 2.0
        width = high_seconds - low_seconds
        noise = width * width / 12.0 + _GRAIN_SECONDS**2
        before = self._at_seconds
        if before is None or middle - before < _CLEAR_RATIO * width:
            return self._begin(middle, noise)
        if not self._period_seconds:
            self._period_seconds = middle - before
            self._at_seconds = middle
            self._covariance = (noise, 0.0, _PERIOD_SECONDS**2)
            return Tick(middle, noise**0.5, 0.0)
        count = max(1, round((middle - before) / self._period_seconds))
        time, both, period = self._covariance
        drift = _DRIFT_SECONDS**2 * count
        time += 2.0 * count * both + count * count * period + drift
        both += count * period
        period += drift
        expected = before + count * self._period_seconds
        off = middle - expected
        if count > _MOST_MISSED or abs(off) > width / 2.0 + 3.0 * time**0.5 + _GRAIN_SECONDS:
            return self._begin(middle, noise)
        share, period_share = time / (time + noise), both / (time + noise)
        self._period_seconds += period_share * off
        self._covariance = (
            time * (1.0 - share),
            both * (1.0 - share),
            period - period_share * both,
        )
        self._at_seconds = min(max(expected + share * off, low_seconds), high_seconds)
        return Tick(self._at_seconds, self._covariance[0] ** 0.5, 1.0 - share)

    def _begin(self, middle_seconds: float, noise: float) -> Tick:
        self._at_seconds, self._period_seconds = middle_seconds, 0.0
        return Tick(middle_seconds, noise**0.5, 0.0)
