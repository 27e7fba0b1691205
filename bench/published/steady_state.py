"""A serving engine in steady state: closed loop, a constant number of requests.

With B requests in the batch, outputs of N tokens and prompts of P tokens on average,
every step decodes and some steps also prefill: requests finish, and are replaced, at a
rate of B / N per step. So the prompts that enter a step are Poisson with that mean,
their lengths log-normal. Steps are taken at `POINTS` quantiles of the new prompt
tokens; the median inter-token latency is the median step, the mean power is
all joules over all seconds, at the clock at which it stays under the GPU's limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from shaper.core.model.power_model import StepModel
from shaper.core.types import StepBatch

POINTS = 48
_DRAWS = 20_000


@dataclass(frozen=True, slots=True)
class ServingLoad:
    """What the engine is kept busy with."""

    requests: float
    """Mean requests in the batch."""
    output_tokens: float
    prompt_tokens: float
    prompt_sigma: float = 2.0
    """Standard deviation of the logarithm of the prompt length: chat prompts have a
    long tail."""
    computed_ratio: float = 1.0
    """Share of the prompt tokens that prefix caching does not save."""
    length_spread: float = 0.0
    """Squared coefficient of variation of the output length: long outputs are seen
    longer, so the mean context is prompt + output / 2 * (1 + spread)."""
    step_token_budget: int = 2048
    context_limit_tokens: float | None = None
    """Mean context that the KV cache has room for."""


@dataclass(frozen=True, slots=True)
class ServingPoint:
    """What comes out."""

    median_itl_seconds: float
    mean_itl_seconds: float
    p90_itl_seconds: float
    watts_per_gpu: float
    sm_clock_hertz: float


@cache
def _prefill_quantiles(rate: float, prompt: float, sigma: float) -> tuple[tuple[int, int], ...]:
    """(new requests, their tokens) at POINTS even quantiles of the tokens per step."""
    draw = np.random.default_rng(0)
    counts = draw.poisson(rate, _DRAWS)
    mu = np.log(prompt) - sigma * sigma / 2.0
    lengths = np.exp(draw.normal(mu, sigma, int(counts.sum())))
    owner = np.repeat(np.arange(_DRAWS), counts)
    tokens = np.bincount(owner, weights=np.minimum(lengths, 32768), minlength=_DRAWS)
    order = np.argsort(tokens, kind="stable")
    groups = np.array_split(order, POINTS)
    return tuple(
        (
            max(round(float(counts[group].mean())), int(tokens[group].mean() >= 1)),
            round(float(tokens[group].mean())),
        )
        for group in groups
    )


def batches(load: ServingLoad) -> tuple[StepBatch, ...]:
    """The steps, each as likely as the others."""
    context = load.prompt_tokens + load.output_tokens * 0.5 * (1.0 + load.length_spread)
    if load.context_limit_tokens is not None:
        context = min(context, load.context_limit_tokens)
    prompt = load.prompt_tokens * load.computed_ratio
    cached = load.prompt_tokens - prompt
    # When decodes and new prompts want more than a step holds, the steps are full and
    # only this many requests decode in each.
    full = load.step_token_budget / (1.0 + prompt / load.output_tokens)
    decodes = max(1, round(min(load.requests, full)))
    rate = decodes / load.output_tokens
    room = max(0, load.step_token_budget - decodes)
    found = []
    for requests, tokens in _prefill_quantiles(rate, prompt, load.prompt_sigma):
        tokens = min(tokens, room)
        each = tokens / requests if requests else 0.0
        found.append(
            StepBatch(
                decode_requests=decodes,
                decode_tokens=decodes,
                decode_context_tokens=int(decodes * context),
                prefill_requests=requests if tokens else 0,
                prefill_tokens=tokens,
                prefill_context_tokens=int(tokens + requests * cached),
                prefill_token_context_product=int(tokens * (each + cached)),
                prefill_squared_tokens=int(tokens * each),
            )
        )
    return tuple(found)


def steady_state(model: StepModel, load: ServingLoad) -> ServingPoint:
    """Latency and power of `load`, under the profile's power limit."""
    steps = batches(load)
    profile = model.profile
    limit = profile.power.limit_watts * (1.0 - profile.cap.margin_ratio) * model.gpu_count
    clock = model.clock_under_limit(steps, limit)
    predictions = [model.predict(step, sm_clock_hertz=clock) for step in steps]
    seconds = [prediction.seconds for prediction in predictions]
    watts = sum(prediction.joules for prediction in predictions) / sum(seconds)
    return ServingPoint(
        median_itl_seconds=float(np.median(seconds)),
        mean_itl_seconds=float(np.mean(seconds)),
        p90_itl_seconds=float(np.quantile(seconds, 0.9)),
        watts_per_gpu=watts / model.gpu_count,
        sm_clock_hertz=clock,
    )
