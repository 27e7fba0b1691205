"""The last word on a step's limits: liveness and sane values. Nothing runs after it.

Promises. Whatever a policy says and whatever the budget is:

- decodes that are ready wait at most their ITL target, or `max_pause_seconds` without
  one; then they run, over the budget if need be, with reason `FORCED_OVER_BUDGET`;
- prompts that could run wait at most twice `max_pause_seconds`; then a chunk is forced
  likewise. A prompt that a forced chunk can't advance (a model that only takes whole
  blocks or images) gets twice the tokens next time. A chunk that was allowed and of which
  no token ran is no turn, and the wait goes on, unless no bound on tokens was to blame;
- a cap on running requests that leaves nothing to run for `max_pause_seconds` is lifted;
- a pause with an end time ends when the first of these waits is over, if that is earlier.
"""

from __future__ import annotations

import math

from shaper.core.policy import Plan
from shaper.core.types import (
    NO_TARGETS,
    NOTHING,
    UNLIMITED,
    EngineLoad,
    LatencyTargets,
    Reason,
    StepBatch,
    StepLimits,
)

# Just above the least efficient chunk of a dense model with no decodes beside it.
_FORCED_TOKENS = 512
# Prompts get their turn when this part of their TTFT target is over: the rest is for running.
_TURN_SHARE = 0.5


class Guard:
    """Clamps plans of one engine. Stateful fields: three waits, a turn, the forced count.

    Args:
        max_pause_seconds: longest time that work is held back.
        targets: an ITL target bounds the decodes' wait, a TTFT target brings the
            prompts' turn forward.
    """

    def __init__(self, max_pause_seconds: float, targets: LatencyTargets = NO_TARGETS) -> None:
        self._max_pause_seconds = max_pause_seconds
        self._decode_seconds = min(max_pause_seconds, targets.itl_seconds or max_pause_seconds)
        ttft = targets.ttft_seconds
        self._debt_seconds = None if ttft is None else ttft * _TURN_SHARE
        self._decode_since: float | None = None
        self._prefill_since: float | None = None
        self._capped_since: float | None = None
        self._granted = self._cut = self._unused = False
        self._stuck_requests: int | None = None
        self._running_requests = 0
        self._forced = 0

    def prefill_overdue(self, load: EngineLoad, now_seconds: float) -> bool:
        """Whether prompts have waited long enough for decodes to make way."""
        since = self._prefill_since
        if since is None:
            return False
        if now_seconds - since >= self._max_pause_seconds:
            return True
        debt = self._debt_seconds
        return debt is not None and now_seconds - self._oldest_seconds(load, since) >= debt

    def _oldest_seconds(self, load: EngineLoad, since_seconds: float) -> float:
        arrival = load.oldest_arrival_seconds
        return since_seconds if arrival is None else min(since_seconds, arrival)

    def check(self, plan: Plan, load: EngineLoad, now_seconds: float) -> Plan:
        """The plan itself, or one that keeps the promises."""
        limits = plan.limits
        if limits is UNLIMITED or limits is NOTHING:
            self._capped_since = None
        else:
            limits = self._uncapped(_clamped(limits, load), load, now_seconds)
        if not load.decode_requests:
            self._decode_since = None
        if not load.prefills:
            self._prefill_since, self._forced = None, 0
            self._unused = False
        if self._stuck_requests is not None and load.running_requests < self._stuck_requests:
            self._stuck_requests = None  # a request that ended may have freed KV cache
        holds_decodes = not limits.run or limits.decode_requests == 0
        if load.decode_requests and holds_decodes:
            if self._decode_since is None:
                self._decode_since = now_seconds
            elif now_seconds - self._decode_since >= self._decode_seconds:
                return Plan(StepLimits(prefill_tokens=0), Reason.FORCED_OVER_BUDGET)
        holds_prefills = not limits.run or limits.prefill_tokens == 0
        self._granted = bool(load.prefills) and not holds_prefills
        self._cut = limits.prefill_tokens is not None
        self._running_requests = load.running_requests
        if load.prefills and (holds_prefills or self._unused):
            if self._prefill_since is None:
                self._prefill_since = now_seconds
            elif now_seconds - self._prefill_since >= 2 * self._max_pause_seconds:
                forced = self._forced_prefill(load)
                self._granted, self._cut = True, forced.prefill_tokens is not None
                return Plan(forced, Reason.FORCED_OVER_BUDGET)
        if plan.until_seconds is not None:
            due = self._due_seconds(load, now_seconds)
            if due < plan.until_seconds:
                plan = plan._replace(until_seconds=due)
        if limits is plan.limits or limits == plan.limits:
            return plan
        return plan._replace(limits=limits)

    def _due_seconds(self, load: EngineLoad, now_seconds: float) -> float:
        """When a wait will next have lasted so long that something changes."""
        dues = []
        if self._decode_since is not None:
            dues.append(self._decode_since + self._decode_seconds)
        since = self._prefill_since
        if since is not None:
            dues += since + self._max_pause_seconds, since + 2 * self._max_pause_seconds
            if self._debt_seconds is not None:
                dues.append(self._oldest_seconds(load, since) + self._debt_seconds)
        return min([due for due in dues if due > now_seconds], default=math.inf)

    def _uncapped(self, limits: StepLimits, load: EngineLoad, now_seconds: float) -> StepLimits:
        """The limits without a cap on running requests that has left nothing to run for long."""
        cap = limits.running_requests
        stuck = (
            cap is not None
            and bool(load.prefills)
            and not load.decode_requests
            and not load.capped(cap).prefills
        )
        if not stuck:
            self._capped_since = None
            return limits
        if self._capped_since is None:
            self._capped_since = now_seconds
        if now_seconds - self._capped_since < self._max_pause_seconds:
            return limits
        return limits._replace(running_requests=None)

    def _forced_prefill(self, load: EngineLoad) -> StepLimits:
        tokens = _FORCED_TOKENS << min(self._forced, 16)
        self._forced += 1
        if not load.splittable or tokens >= load.token_budget:
            return StepLimits()
        return StepLimits(prefill_tokens=tokens)

    def launched(self, batch: StepBatch) -> None:
        """What ran ends its wait; so does a turn that the engine itself did not use."""
        if batch.decode_tokens:
            self._decode_since = None
        if batch.prefill_tokens:
            self._forced, self._unused, self._stuck_requests = 0, False, None
            self._prefill_since = None
        elif self._granted and self._cut and self._stuck_requests is None:
            self._unused = True  # too few tokens, it may be: this was no turn
        elif self._granted:
            # No headroom in its KV cache, say: the next turn comes when it has waited again.
            self._prefill_since, self._unused = None, False
            if not self._cut:
                self._forced, self._stuck_requests = 0, self._running_requests


def _clamped(limits: StepLimits, load: EngineLoad) -> StepLimits:
    prefill, decodes, running = (
        limits.prefill_tokens,
        limits.decode_requests,
        limits.running_requests,
    )
    if prefill is not None:
        prefill = min(max(int(prefill), 0), load.token_budget)
    if decodes is not None:
        decodes = max(int(decodes), 0)
        decodes = None if decodes >= load.decode_requests else decodes
    if running is not None:
        running = max(int(running), 1)
    return StepLimits(limits.run, prefill, decodes, running)
