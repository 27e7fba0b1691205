"""A step's prediction taken apart: what its seconds and joules are made of."""

from __future__ import annotations

from dataclasses import dataclass

from shaper.core.types import StepBatch, StepPrediction


@dataclass(frozen=True, slots=True)
class StepTerm:
    """One part of a step: seconds on the critical path, joules of all GPUs."""

    name: str
    seconds: float
    joules: float


@dataclass(frozen=True, slots=True)
class StepBreakdown:
    """A prediction taken apart. The terms' seconds and joules add up to its own."""

    prediction: StepPrediction
    terms: tuple[StepTerm, ...]
    bound_by: str
    """`compute`, `memory` or `host`: what more of would help most."""


def bound_by(batch: StepBatch, terms: tuple[StepTerm, ...]) -> str:
    """What holds the step: the largest of memory, compute and host seconds.

    Attention counts as memory for its decodes and as compute for its prefills, by
    the keys that each of them reads. Launch overheads count as host.
    """
    seconds = {term.name: term.seconds for term in terms}
    keys = batch.decode_context_tokens + batch.prefill_token_context_product // 2
    decode_share = batch.decode_context_tokens / keys if keys else 0.0
    attention = seconds.get("attention", 0.0)
    shares = {
        "memory": seconds.get("gemm memory", 0.0) + attention * decode_share,
        "compute": seconds.get("gemm compute", 0.0)
        + attention * (1.0 - decode_share)
        + seconds.get("sampler", 0.0),
        "host": seconds.get("host", 0.0)
        + seconds.get("kernel overhead", 0.0)
        + seconds.get("all-reduce", 0.0),
    }
    return max(shares, key=lambda name: shares[name])
