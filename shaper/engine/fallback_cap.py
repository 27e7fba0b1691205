"""Fixed caps for when the controller fails. Shares no code with it, nor with its levers.

Law. Steps of at most `decode_requests + prefill_tokens` tokens, started at least
`spacing_seconds` apart, keep every `(watts, window)` if

    idle * window + steps_in_window * (joules - idle * seconds) <= watts * window

with `steps_in_window = floor(window / spacing)`, and `joules` and `seconds`
those of the worst step of that size: all decodes and the prompt tokens, or prompt tokens
alone. They are computed when the budget is set. After a failure nothing runs for the
longest window, or a second: what ran before is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shaper.core.types import (
    NOTHING,
    PowerBudget,
    PowerLimit,
    StepBatch,
    StepLimits,
    StepPrediction,
)

# About the mean error of the H100 and B200 profiles on published serving power.
_ERROR_RATIO = 0.05
# Caps tried, largest first. (decodes, prompt tokens)
_SIZES = ((256, 1024), (128, 512), (64, 512), (64, 256), (32, 128), (16, 128), (8, 64))
# A decode's context for the worst case: longer than conversation traffic has on average.
_CONTEXT_TOKENS = 4096
# Requests must move: a budget that needs longer is below the floor.
MAX_SPACING_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class FallbackCap:
    """What holds while the controller is out. `None` fields: no limit is configured."""

    decode_requests: int | None = None
    prefill_tokens: int | None = None
    spacing_seconds: float = 0.0
    wait_seconds: float = 0.0
    """After a failure nothing runs for so long: what ran before has left most windows."""

    def limits(self, seconds_since_launch: float) -> StepLimits:
        """The next step's limits, for the record."""
        if seconds_since_launch < self.spacing_seconds:
            return NOTHING
        return StepLimits(True, self.prefill_tokens, self.decode_requests)

    @contextmanager
    def apply(
        self, scheduler: Any, seconds_since_launch: float, seconds_since_failure: float
    ) -> Iterator[None]:
        """Hold one `schedule()` to the caps, by the tokens of its step alone."""
        if self.decode_requests is None or self.prefill_tokens is None:
            yield
            return
        tokens = self.decode_requests + self.prefill_tokens
        waits = seconds_since_failure < self.wait_seconds
        if waits or seconds_since_launch < self.spacing_seconds:
            tokens = 0
        elif len(scheduler.running) > 1:
            # vLLM serves `running` in order: what a step leaves out comes first in the next.
            shift = min(tokens, len(scheduler.running) - 1)
            scheduler.running[:] = scheduler.running[shift:] + scheduler.running[:shift]
        before = scheduler.max_num_scheduled_tokens
        scheduler.max_num_scheduled_tokens = min(before, tokens)
        try:
            yield
        finally:
            scheduler.max_num_scheduled_tokens = before


def fallback_cap(
    predict: Callable[[StepBatch], StepPrediction],
    idle_watts: float,
    budget: PowerBudget,
) -> FallbackCap:
    """The largest caps whose spacing stays under 100 ms, else the smallest caps.

    Args:
        predict: worst-case seconds and joules of a step.
        idle_watts: power between steps.
        budget: what is to be kept. A ramp is kept as 100 ms at what may be added to idle
            power within a second.
    """
    limits = list(budget.limits)
    if budget.ramp_watts_per_second is not None:
        limits.append(PowerLimit(idle_watts + budget.ramp_watts_per_second, 0.1))
    if not limits:
        return FallbackCap()
    cap = FallbackCap()
    wait = min(max(limit.window_seconds for limit in limits), MAX_SPACING_SECONDS)
    for decodes, prefill_tokens in _SIZES:
        steps = [
            predict(_worst_batch(decodes, prefill_tokens)),
            predict(_worst_batch(0, decodes + prefill_tokens)),
        ]
        spacing = max(_spacing(step, idle_watts, limit) for step in steps for limit in limits)
        cap = FallbackCap(decodes, prefill_tokens, min(spacing, MAX_SPACING_SECONDS), wait)
        # 100 ms between tokens still reads as fluent text.
        if spacing <= 0.1:
            break
    return cap


def _worst_batch(decodes: int, prefill_tokens: int) -> StepBatch:
    return StepBatch(
        decode_requests=decodes,
        decode_tokens=decodes,
        decode_context_tokens=decodes * _CONTEXT_TOKENS,
        prefill_requests=1,
        prefill_tokens=prefill_tokens,
        prefill_context_tokens=_CONTEXT_TOKENS,
        prefill_token_context_product=prefill_tokens * _CONTEXT_TOKENS,
        prefill_squared_tokens=prefill_tokens**2,
        returned_requests=decodes,
    )


def _spacing(step: StepPrediction, idle_watts: float, limit: PowerLimit) -> float:
    extra = step.joules * (1 + _ERROR_RATIO) - idle_watts * step.seconds
    room = (limit.watts - idle_watts) * limit.window_seconds
    if extra <= 0:
        return step.seconds
    steps = math.floor(room / extra)
    if steps < 1:
        return MAX_SPACING_SECONDS
    return max(step.seconds, limit.window_seconds / steps)
