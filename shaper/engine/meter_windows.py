"""Mean metered power over each limit's window, for those who look at the budget."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from shaper.core.supervise.status import Usage, usage
from shaper.core.types import PowerLimit, PowerState

# The counter moves about every 100 ms and is read every 20: over a shorter span the
# reading's time is too coarse, and the meter's own short window says more.
_COUNTER_SECONDS = 0.5
# Dropping the oldest readings one by one would move the rest each time.
_TRIM_READINGS = 512


class MeterWindows:
    """How much of each limit is in use, by the energy counter. The limits may change at any time.

    Args:
        idle_watts: what the engine's GPUs draw with nothing to do; pressure counts from here.

    Stateful fields: times and joules of the counter's moves.
    """

    def __init__(self, idle_watts: float) -> None:
        self._idle_watts = idle_watts
        self._times: list[float] = []
        self._joules: list[float] = []

    def observe(self, state: PowerState, limits: Sequence[PowerLimit]) -> Usage:
        """What is in use after this reading."""
        energy = state.energy_joules
        if not limits or energy is None:
            return Usage()
        if self._joules and energy < self._joules[-1]:
            self._times.clear()  # the counter was reset
            self._joules.clear()
        # Only where it moved: between two moves the time is known, not the energy.
        if not self._joules or energy > self._joules[-1]:
            self._times.append(state.sampled_seconds)
            self._joules.append(energy)
        self._trim(state.sampled_seconds - max(limit.window_seconds for limit in limits) - 1.0)
        found = Usage()
        for limit in limits:
            watts = self._mean_watts(limit.window_seconds, state)
            found = found.together(usage(limit.watts, watts, self._idle_watts))
        return found

    def _trim(self, oldest_seconds: float) -> None:
        # One before it stays: a window may start between two moves.
        first = bisect_right(self._times, oldest_seconds) - 1
        if first > _TRIM_READINGS:
            del self._times[:first], self._joules[:first]

    def _mean_watts(self, window_seconds: float, state: PowerState) -> float:
        if window_seconds >= _COUNTER_SECONDS:
            now, energy = self._times[-1], self._joules[-1]
            index = bisect_right(self._times, now - window_seconds) - 1
            if index >= 0:
                return (energy - self._joules[index]) / (now - self._times[index])
        return state.instant_watts or state.average_watts or 0.0
