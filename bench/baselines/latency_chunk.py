"""Adaptive chunks for latency alone: what a chunked-prefill scheduler does with an ITL target.

Law: while decodes run, a step gets the most prompt tokens with which its predicted
seconds stay within the inter-token latency (ITL) target, and at least the smallest
chunk, so that prompts move on whatever the target is. Without a target or without
decodes nothing is limited. Power is never looked at. (Sarathi-Serve, OSDI'24, sets
this token budget once from a profile; here it follows each step's predicted time.)
"""

from __future__ import annotations

from shaper.core.policy import Plan, PlanInput
from shaper.core.types import UNLIMITED, Reason, StepLimits

# The tile of a GEMM: a chunk that is no multiple of it pays for the next one.
_GRAIN_TOKENS = 64
# A step may take a little longer than predicted; the windowed planner keeps as much.
_LATE_RATIO = 1.02


class LatencyChunk:
    """The policy above. Remembers nothing."""

    def plan(self, view: PlanInput) -> Plan:
        """The largest chunk that keeps the ITL target."""
        load, target = view.load, view.itl_target_seconds
        wanted = load.batch()
        if not wanted.requests:
            return Plan(UNLIMITED, Reason.IDLE)
        if target is None or not (load.decode_requests and wanted.prefill_tokens):
            return Plan(UNLIMITED, Reason.UNCONSTRAINED)
        if _fits(view, wanted.prefill_tokens, target):
            return Plan(UNLIMITED, Reason.UNCONSTRAINED)
        largest = _largest_chunk if load.splittable else _largest_whole
        return Plan(StepLimits(prefill_tokens=largest(view, target)), Reason.CHUNK_ITL)


def _fits(view: PlanInput, tokens: int, target_seconds: float) -> bool:
    return view.predict(view.load.batch(tokens)).seconds * _LATE_RATIO <= target_seconds


def _largest_chunk(view: PlanInput, target_seconds: float) -> int:
    """By halving: a step's seconds grow with its tokens."""
    low, high = 1, -(-view.load.batch().prefill_tokens // _GRAIN_TOKENS)
    while high - low > 1:
        middle = (low + high) // 2
        fits = _fits(view, middle * _GRAIN_TOKENS, target_seconds)
        low, high = (middle, high) if fits else (low, middle)
    return low * _GRAIN_TOKENS


def _largest_whole(view: PlanInput, target_seconds: float) -> int:
    """For an engine that can't split a prompt: as many whole ones as fit, and one at least."""
    tokens = 0
    for demand in view.load.prefills:
        if tokens and not _fits(view, tokens + demand.remaining_tokens, target_seconds):
            break
        tokens += demand.remaining_tokens
    return tokens
