"""Metered power of the steps alone, from the energy counter."""

from __future__ import annotations

# The meter's energy moves every 100 ms: over half a second its grain is a fifth.
_SPAN_SECONDS = 0.5
# With less time in steps, the power between them decides.
_LEAST_BUSY_RATIO = 0.1


class StepMeter:
    """Stateful fields: the span's first reading, and the time in steps since then."""

    def __init__(self) -> None:
        self._start: tuple[float, float] | None = None
        self._busy_seconds = 0.0

    def ran(self, seconds: float) -> None:
        """A step of this length is back."""
        self._busy_seconds += seconds

    def read(self, sampled_seconds: float, joules: float, idle_watts: float) -> float | None:
        """Mean watts in steps at the end of a span, else None.

        Args:
            sampled_seconds: of the reading.
            joules: the energy counter.
            idle_watts: power between steps.
        """
        if self._start is None:
            self._start, self._busy_seconds = (sampled_seconds, joules), 0.0
            return None
        span = sampled_seconds - self._start[0]
        if span < _SPAN_SECONDS:
            return None
        busy = min(self._busy_seconds, span)
        spent = joules - self._start[1] - (span - busy) * idle_watts
        self._start, self._busy_seconds = (sampled_seconds, joules), 0.0
        return spent / busy if busy > _LEAST_BUSY_RATIO * span else None
