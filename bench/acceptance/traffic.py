"""The loads of the proofs, each from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from shaper.traffic.synthetic import synthesise
from shaper.traffic.traces import load_trace
from shaper.traffic.workload import TimedRequest, Workload

TRACE = (
    Path(__file__).resolve().parents[3] / "shared" / "data" / "traces" / "azure2023_llm_conv.csv"
)
# Enough lengths for any closed loop here; they are used in turn.
_LENGTHS_SECONDS = 400.0


@cache
def _trace(rate_hertz: float) -> Workload:
    return load_trace(TRACE, "azure").at_rate(rate_hertz)


def conversation(
    seconds: float, rate_hertz: float, seed: int, begin_seconds: float | None = None
) -> Workload:
    """Conversation traffic: `seconds` of the recorded trace from `begin_seconds` on, at a
    mean rate over the whole of it, or drawn from its statistics (None)."""
    if begin_seconds is None:
        return synthesise(seconds, rate_hertz, seed=seed)
    whole = _trace(rate_hertz)
    part = tuple(
        replace(r, arrival_seconds=r.arrival_seconds - begin_seconds)
        for r in whole.requests
        if begin_seconds <= r.arrival_seconds < begin_seconds + seconds
    )
    return Workload(f"{whole.name} from {begin_seconds:g} s", part, seed)


def lengths(seed: int) -> Iterator[TimedRequest]:
    """Requests of conversation lengths without end, for clients that take turns."""
    requests = synthesise(_LENGTHS_SECONDS, 5.0, seed=seed).requests
    while True:
        yield from requests


def even_lengths(prompt_tokens: int, output_tokens: int, seed: int) -> Iterator[TimedRequest]:
    """Requests of one size, outputs spread by a fifth so that they don't end together."""
    rng = np.random.default_rng(seed)
    while True:
        spread = int(output_tokens * rng.uniform(0.8, 1.2))
        yield TimedRequest(0.0, prompt_tokens, spread)
