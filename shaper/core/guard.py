"""The last word on a step's limits: liveness and sane values. Nothing runs after it.

Promises. Whatever a policy says and whatever the budget is, decodes that are
ready wait at most `max_pause_seconds`, prompts at most twice that; then they
run, over the budget if need be, and the step is marked `FORCED`. A prompt that
a forced chunk can't advance (a model that only takes whole blocks or images)
gets twice the tokens next time.
"""

from __future__ import annotations

from shaper.core.policy import Plan
from shaper.core.types import EngineLoad, Reason, StepBatch, StepLimits

# Just above the least efficient chunk of a dense model with no decodes beside it.
_FORCED_TOKENS = 512


class Guard:
    """Clamps plans of one engine. Stateful fields: two waits and the forced count."""

    def __init__(self, max_pause_seconds: float) -> None:
        self._max_pause_seconds = max_pause_seconds
        self._decode_since: float | None = None
        self._prefill_since: float | None = None
        self._forced = 0

    def turn(self, now_seconds: float) -> bool:
        """Whether prompts have waited long enough for decodes to make way."""
        since = self._prefill_since
        return since is not None and now_seconds - since >= self._max_pause_seconds

    def check(self, plan: Plan, load: EngineLoad, now_seconds: float) -> Plan:
        """The plan itself, or one that keeps the promises."""
        limits = _clamped(plan.limits, load)
        if not load.decode_requests:
            self._decode_since = None
        if not load.prefills:
            self._prefill_since, self._forced = None, 0
        holds_decodes = not limits.run or limits.decode_requests == 0
        if load.decode_requests and holds_decodes:
            if self._decode_since is None:
                self._decode_since = now_seconds
            elif now_seconds - self._decode_since >= self._max_pause_seconds:
                return Plan(StepLimits(prefill_tokens=0), Reason.FORCED)
        holds_prefills = not limits.run or limits.prefill_tokens == 0
        if load.prefills and holds_prefills:
            if self._prefill_since is None:
                self._prefill_since = now_seconds
            elif now_seconds - self._prefill_since >= 2 * self._max_pause_seconds:
                return Plan(self._forced_prefill(load), Reason.FORCED)
        return Plan(limits, plan.reason)

    def _forced_prefill(self, load: EngineLoad) -> StepLimits:
        tokens = _FORCED_TOKENS << min(self._forced, 16)
        self._forced += 1
        if not load.splittable or tokens >= load.token_budget:
            return StepLimits()
        return StepLimits(prefill_tokens=tokens)

    def launched(self, batch: StepBatch) -> None:
        """What ran ends its wait."""
        if batch.decode_tokens:
            self._decode_since = None
        if batch.prefill_tokens:
            self._prefill_since, self._forced = None, 0


def _clamped(limits: StepLimits, load: EngineLoad) -> StepLimits:
    prefill, decodes = limits.prefill_tokens, limits.decode_requests
    if prefill is not None:
        prefill = min(max(int(prefill), 0), load.token_budget)
    if decodes is not None:
        decodes = max(int(decodes), 0)
        decodes = None if decodes >= load.decode_requests else decodes
    return StepLimits(limits.run, prefill, decodes)
