"""The figures of a rack's run, for the group and for each engine.

| figure | is |
|---|---|
| peak, p99.9 | of the means of all windows of 100 ms; windows end at every millisecond |
| over limit | share of a limit's windows above it, and watt-seconds above it |
| metered | the same of what the engines' meters would show: true watts times their gain |
| TTFT | first token's time less the arrival; a request that still waits when the run ends counts with what it has waited |
| ITL | time between two tokens of one request, over all of them |
| end to end | last token's time less the arrival, of finished requests |
| goodput | finished requests a second with TTFT, and mean ITL, within their targets |
| tokens per joule | output tokens over all true joules of the run, idle ones too |

Power is the emulated GPUs' alone. After a warm-up, which peaks, limits, counts of requests, KV
cache and preemptions take in: latencies are of requests that came, and of tokens made, since
then; rates are over the time since then. A run begins empty, so that slower decodes make less
in its first seconds and nothing less later. NaN stands where nothing was measured.
"""  # noqa: E501 - a table's row is one line

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shaper.core.types import PowerLimit, Reason
from shaper.simulate.setup import EngineResult, FloatArray, RackResult, RackSetup
from shaper.traffic.figures import (
    GRID_SECONDS,
    LimitFigures,
    PowerGrid,
    limit_figures,
    power_figures,
)
from shaper.traffic.quantiles import Quantiles, quantiles


@dataclass(frozen=True, slots=True)
class LimitOutcome:
    """How one limit was kept, in true and in metered watts."""

    limit: PowerLimit
    true: LimitFigures
    metered: LimitFigures


@dataclass(frozen=True, slots=True)
class Figures:
    """Of the group, or of one engine; see the module's table."""

    peak_watts: float
    p999_watts: float
    mean_watts: float
    metered_peak_watts: float
    limits: tuple[LimitOutcome, ...]
    ttft_seconds: Quantiles
    itl_seconds: Quantiles
    e2el_seconds: Quantiles
    output_tokens_per_second: float
    prompt_tokens_per_second: float
    """Of requests that got a first token."""
    requests_arrived: int
    requests_finished: int
    goodput_requests_per_second: float
    tokens_per_joule: float
    kv_mean_ratio: float
    kv_peak_ratio: float
    preemptions: int
    forced_steps: int
    """Steps that ran over the budget, because work had been held back for the longest time."""
    shaper_errors: int


@dataclass(frozen=True, slots=True)
class RackFigures:
    """The group's figures and those of each engine."""

    group: Figures
    engines: tuple[Figures, ...]


def ttft_seconds(
    engine: EngineResult, duration_seconds: float, from_seconds: float = 0.0
) -> FloatArray:
    """[requests] time to first token of those that came since `from_seconds`; what still waits
    counts with what it has waited."""
    first = engine.first_token_seconds
    ends = np.where(np.isnan(first), duration_seconds, first)
    waited = ends - engine.arrival_seconds
    return np.asarray(waited[engine.arrival_seconds >= from_seconds], dtype=np.float64)


def _good(engine: EngineResult, setup: RackSetup) -> int:
    """Requests that finished after the warm-up, and within their targets."""
    good = engine.last_token_seconds >= setup.warm_up_seconds
    if setup.ttft_target_seconds is not None:
        good &= engine.first_token_seconds - engine.arrival_seconds <= setup.ttft_target_seconds
    if setup.itl_target_seconds is not None:
        spans = engine.last_token_seconds - engine.first_token_seconds
        good &= spans / np.maximum(1, engine.output_tokens - 1) <= setup.itl_target_seconds
    return int(good.sum())


def figures_of(
    engines: Sequence[EngineResult], limits: Sequence[PowerLimit], setup: RackSetup
) -> Figures:
    """The figures of these engines taken together.

    Args:
        engines: at least one.
        limits: of their sum.
        setup: for the targets, the duration and the warm-up.
    """
    warm = setup.warm_up_seconds
    seconds = setup.duration_seconds - warm
    true = PowerGrid(0.0, np.asarray(sum(x.watts for x in engines), dtype=np.float64))
    shown = sum(x.watts * x.metered_ratio for x in engines)
    metered = PowerGrid(0.0, np.asarray(shown, dtype=np.float64))
    power = power_figures(true)
    mean_watts = float(true.watts[round(warm / GRID_SECONDS) :].mean())
    tokens = sum(int((x.token_seconds >= warm).sum()) for x in engines)
    served = sum(int(x.prompt_tokens[x.first_token_seconds >= warm].sum()) for x in engines)
    ttft = [ttft_seconds(x, setup.duration_seconds, warm) for x in engines]
    e2el = [(x.last_token_seconds - x.arrival_seconds)[x.arrival_seconds >= warm] for x in engines]
    ended = np.concatenate(e2el)
    return Figures(
        peak_watts=power.peak_watts,
        p999_watts=power.p999_watts,
        mean_watts=mean_watts,
        metered_peak_watts=power_figures(metered).peak_watts,
        limits=tuple(
            LimitOutcome(limit, limit_figures(true, limit), limit_figures(metered, limit))
            for limit in limits
        ),
        ttft_seconds=quantiles(np.concatenate(ttft)),
        itl_seconds=quantiles(np.concatenate([x.gaps(warm) for x in engines])),
        e2el_seconds=quantiles(ended[~np.isnan(ended)]),
        output_tokens_per_second=tokens / seconds,
        prompt_tokens_per_second=served / seconds,
        requests_arrived=sum(len(x.arrival_seconds) for x in engines),
        requests_finished=sum(int((~np.isnan(x.last_token_seconds)).sum()) for x in engines),
        goodput_requests_per_second=sum(_good(x, setup) for x in engines) / seconds,
        tokens_per_joule=tokens / (mean_watts * seconds),
        kv_mean_ratio=sum(x.kv_mean_ratio for x in engines) / len(engines),
        kv_peak_ratio=max(x.kv_peak_ratio for x in engines),
        preemptions=sum(x.preemptions for x in engines),
        forced_steps=sum(dict(x.reasons).get(Reason.FORCED_OVER_BUDGET, 0) for x in engines),
        shaper_errors=sum(x.shaper_errors for x in engines),
    )


def rack_figures(result: RackResult) -> RackFigures:
    """All figures of a run: the group's by its limits, each engine's by its own."""
    setup = result.setup
    return RackFigures(
        figures_of(result.engines, setup.group_limits, setup),
        tuple(figures_of([engine], setup.limits, setup) for engine in result.engines),
    )
