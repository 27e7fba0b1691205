"""Mean metered power over each limit's window, for those who look at the budget."""

from __future__ import annotations

from collections.abc import Sequence

from shaper.core.supervise.status import Usage, usage
from shaper.core.types import PowerLimit, PowerState
from shaper.gpu.energy_history import EnergyHistory

# The counter moves about every 100 ms and is read every 20: over a shorter span the
# reading's time is too coarse, and the meter's own short window says more.
_COUNTER_SECONDS = 0.5
# Dropping the oldest readings one by one would move the rest each time.
_TRIM_READINGS = 512


class MeterWindows:
    """How much of each limit is in use, by the energy counter. The limits may change at any time.

    Args:
        idle_watts: what the engine's GPUs draw with nothing to do; pressure counts from here.

    Stateful field: the counter's moves.
    """

    def __init__(self, idle_watts: float) -> None:
        self._idle_watts = idle_watts
        self._history = EnergyHistory()

    def observe(self, state: PowerState, limits: Sequence[PowerLimit]) -> Usage:
        """What is in use after this reading."""
        energy = state.energy_joules
        if not limits or energy is None:
            return Usage()
        self._history.move(state.sampled_seconds, energy)
        longest = max(limit.window_seconds for limit in limits)
        self._history.trim(state.sampled_seconds - longest - 1.0, _TRIM_READINGS)
        found = Usage()
        for limit in limits:
            watts = self._mean_watts(limit.window_seconds, state)
            found = found.together(usage(limit.watts, watts, self._idle_watts))
        return found

    def _mean_watts(self, window_seconds: float, state: PowerState) -> float:
        if window_seconds >= _COUNTER_SECONDS:
            watts = self._history.mean_watts(window_seconds)
            if watts is not None:
                return watts
        return state.instant_watts or state.average_watts or 0.0
