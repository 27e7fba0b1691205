"""Mean metered power over each limit's window, for those who look at the budget."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from shaper.core.types import PowerLimit, PowerState

# The counter moves about every 100 ms and is read every 20: over a shorter span the
# reading's time is too coarse, and the meter's own short window says more.
_COUNTER_SECONDS = 0.5
# Dropping the oldest readings one by one would move the rest each time.
_TRIM_READINGS = 512
NAN = math.nan


class Usage(NamedTuple):
    """How much of some limits is in use; NaN: not known, or there is no limit."""

    headroom_watts: float = NAN
    """Least of limit minus mean power over its window."""
    use_ratio: float = NAN
    """Greatest share of a limit's room above idle, 0 to 1."""

    def together(self, other: Usage) -> Usage:
        """Of these limits and the others; what is not known counts for nothing."""
        if math.isnan(other.use_ratio):
            return self
        if math.isnan(self.use_ratio):
            return other
        return Usage(
            min(self.headroom_watts, other.headroom_watts), max(self.use_ratio, other.use_ratio)
        )


def usage(limit_watts: float, watts: float, idle_watts: float) -> Usage:
    """Of one limit, at a mean power over its window."""
    # A limit at the idle level has no room: anything above idle is all of it.
    room = max(limit_watts - idle_watts, 1.0)
    return Usage(limit_watts - watts, min(1.0, max(0.0, (watts - idle_watts) / room)))


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
