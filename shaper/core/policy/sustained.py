"""Decode cadence and concurrency at the sustained limit, by inverting the model.

Laws. With `extra(n)` the joules of a decode step of `n` requests above idle power, `s(n)`
its seconds, and `L` the sustained limit:

    cadence  = extra(n) / (P - idle)
    P        = the least of  L - prefill watts of the last seconds
               and, for every window, its limit - joules of a burst of prompts / window
    cap      = the greatest n with  s(n) <= ITL target  and
               idle + extra(n) / (slack of the target) <= most of L

The cadence spends the ITL target's slack first: fewer, larger steps read the weights less
often for the same tokens, and leave each window the headroom for prompts as they come: those
that find it run at once. The cap comes behind it: where even the slowest cadence that
the target allows draws more than the budget, fewer requests may run, and the others wait.
Without an ITL target there is no cap. An engine alone then has no cadence, and one in a group
waits at most `DEFAULT_DECODE_INTERVAL` times a decode step's time. In a group the cadence is
the slower one of this and of what all of it can hold.
"""

from __future__ import annotations

import math

from shaper.core.policy import PlanInput
from shaper.core.types import LatencyTargets, StepBatch, StepPrediction

# How much of the ITL target decodes wait for joules alone. The rest is headroom for a chunk under
# the same deadline: waiting for all of it saves little more energy and costs TTFT.
SLACK_SHARE = 0.28
# And where a budget asks for it: under a tight one more of it goes to the prompts' TTFT.
BUDGET_SHARE = 0.40
# Without a target: in decode steps. Half the pace of the unshaped engine while it is calm is
# still far from its slowest percent, the steps that carry a prompt.
DEFAULT_DECODE_INTERVAL = 2.0
# A cadence that is this near to the step itself is none.
_LEAST_STRETCH = 1.05
# What a decode step may take of its target; the rest is what it may come late.
_ITL_SHARE = 0.9
# What decodes may take of the sustained limit where requests wait to enter: the rest is
# for the prompts.
_DECODE_SHARE = 0.9
# The mean context and the learned gains move slowly.
_CAP_EVERY_SECONDS = 0.1


def slowest_seconds(targets: LatencyTargets, decodes: StepPrediction) -> float:
    """The slowest cadence of decode steps."""
    if targets.itl_seconds is not None:
        return targets.itl_seconds * (SLACK_SHARE if targets.spend_slack else BUDGET_SHARE)
    return DEFAULT_DECODE_INTERVAL * decodes.seconds


def cadence_seconds(view: PlanInput) -> float | None:
    """Time between decode steps that the budget asks for; None: as fast as they go."""
    decodes = view.decodes
    headroom, group = view.headroom, view.group
    if decodes is None or not headroom.bounded:
        return None
    if view.targets.itl_seconds is None and group is None:
        # Without a target decodes slow down only while prompts wait.
        return None
    extra = decodes.joules_above(view.idle_watts)
    available = min(
        headroom.sustained_watts - view.prefill_watts, headroom.paced_watts(view.burst_joules)
    )
    available -= view.idle_watts
    slowest = slowest_seconds(view.targets, decodes)
    cadence = extra / available if available > 0 else slowest
    if group is not None:
        cadence = max(cadence, group.cadence_seconds)
    cadence = min(cadence, slowest)
    return cadence if cadence > decodes.seconds * _LEAST_STRETCH else None


class RunningCap:
    """The cap above. Stateful fields: the cap and when it was found."""

    def __init__(self) -> None:
        self._found_seconds = -math.inf
        self._cap: int | None = None

    def find(self, view: PlanInput) -> int | None:
        """Requests that may run at once; None where no one waits or all may."""
        load = view.load
        if view.targets.itl_seconds is None or not load.waiting_requests:
            return None
        if not 0.0 <= view.now_seconds - self._found_seconds < _CAP_EVERY_SECONDS:
            self._found_seconds = view.now_seconds
            self._cap = _largest(view, load.running_requests + load.waiting_requests)
        cap = self._cap
        if cap is None or cap >= load.running_requests + load.waiting_requests:
            return None
        return cap


def _largest(view: PlanInput, most: int) -> int | None:
    load = view.load
    decodes = load.decode_requests
    # Before there are decodes nothing is known of their contexts.
    if not decodes:
        return None
    context = load.decode_context_tokens // decodes
    target = view.targets.itl_seconds or math.inf
    # A target that not even one request keeps is no reason to run only one.
    longest = target * _ITL_SHARE
    kept = view.predict(StepBatch(1, 1, context)).seconds <= longest

    def fits(count: int) -> bool:
        step = view.predict(StepBatch(count, count, count * context))
        if kept and step.seconds > longest:
            return False
        if not view.headroom.bounded:
            return True
        extra = step.joules_above(view.idle_watts)
        pace = max(step.seconds, slowest_seconds(view.targets, step))
        return view.idle_watts + extra / pace <= _DECODE_SHARE * view.headroom.sustained_watts

    if fits(most):
        return None
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
