"""Fixed caps for when the controller fails. Shares no code with it.

Law. Steps of at most `decode_requests` and `prefill_tokens`, started at least
`spacing_seconds` apart, keep every `(watts, window)` if

    idle * window + steps_in_window * (joules - idle * seconds) <= watts * window

with `steps_in_window = floor(window / spacing) + 1`, and `joules` and `seconds`
those of the worst step of that size. They are computed once, at start-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shaper.core.types import NOTHING, PowerLimit, StepBatch, StepLimits, StepPrediction

# About the mean error of the H100 and B200 profiles on published serving power.
_ERROR_RATIO = 0.05
# Caps tried, largest first. (decodes, prompt tokens)
_SIZES = ((256, 1024), (128, 512), (64, 512), (64, 256), (32, 128), (16, 128), (8, 64))
# A decode's context for the worst case: longer than conversation traffic has on average.
_CONTEXT_TOKENS = 4096
# Requests must move: a budget that needs longer is below the floor.
MAX_SPACING_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class SafeCap:
    """What holds while the controller is out. `None` fields: no limit is configured."""

    decode_requests: int | None = None
    prefill_tokens: int | None = None
    spacing_seconds: float = 0.0

    def limits(self, seconds_since_launch: float) -> StepLimits:
        """The next step's limits."""
        if seconds_since_launch < self.spacing_seconds:
            return NOTHING
        return StepLimits(True, self.prefill_tokens, self.decode_requests)


def safe_cap(
    predict: Callable[[StepBatch], StepPrediction],
    idle_watts: float,
    limits: Sequence[PowerLimit],
) -> SafeCap:
    """The largest caps whose spacing stays under 100 ms, else the smallest caps.

    Args:
        predict: worst-case seconds and joules of a step.
        idle_watts: power between steps.
        limits: the budget.
    """
    if not limits:
        return SafeCap()
    cap = SafeCap()
    for decodes, prefill_tokens in _SIZES:
        step = predict(_worst_batch(decodes, prefill_tokens))
        spacing = max(_spacing(step, idle_watts, limit) for limit in limits)
        cap = SafeCap(decodes, prefill_tokens, min(spacing, MAX_SPACING_SECONDS))
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
