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

Power is the emulated GPUs' alone. NaN stands where nothing was measured.
"""  # noqa: E501 - a table's row is one line

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shaper.core.types import PowerLimit
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


def ttft_seconds(engine: EngineResult, duration_seconds: float) -> FloatArray:
    """[requests] time to first token; what still waits counts with what it has waited."""
    first = engine.first_token_seconds
    ends = np.where(np.isnan(first), duration_seconds, first)
    return np.asarray(ends - engine.arrival_seconds, dtype=np.float64)


def _good(engine: EngineResult, setup: RackSetup) -> int:
    """Finished requests within their targets."""
    good = ~np.isnan(engine.last_token_seconds)
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
        setup: for the targets and the duration.
    """
    seconds = setup.duration_seconds
    true = PowerGrid(0.0, np.asarray(sum(x.watts for x in engines), dtype=np.float64))
    shown = sum(x.watts * x.metered_ratio for x in engines)
    metered = PowerGrid(0.0, np.asarray(shown, dtype=np.float64))
    power = power_figures(true)
    tokens = int(sum(x.output_tokens.sum() for x in engines))
    served = sum(x.prompt_tokens[~np.isnan(x.first_token_seconds)].sum() for x in engines)
    last = np.concatenate([x.last_token_seconds - x.arrival_seconds for x in engines])
    last = last[~np.isnan(last)]
    return Figures(
        peak_watts=power.peak_watts,
        p999_watts=power.p999_watts,
        mean_watts=power.mean_watts,
        metered_peak_watts=power_figures(metered).peak_watts,
        limits=tuple(
            LimitOutcome(limit, limit_figures(true, limit), limit_figures(metered, limit))
            for limit in limits
        ),
        ttft_seconds=quantiles(np.concatenate([ttft_seconds(x, seconds) for x in engines])),
        itl_seconds=quantiles(np.concatenate([x.itl_seconds for x in engines])),
        e2el_seconds=quantiles(last),
        output_tokens_per_second=tokens / seconds,
        prompt_tokens_per_second=float(served) / seconds,
        requests_arrived=sum(len(x.arrival_seconds) for x in engines),
        requests_finished=len(last),
        goodput_requests_per_second=sum(_good(x, setup) for x in engines) / seconds,
        tokens_per_joule=tokens / (float(true.watts.sum()) * GRID_SECONDS),
        kv_mean_ratio=sum(x.kv_mean_ratio for x in engines) / len(engines),
        kv_peak_ratio=max(x.kv_peak_ratio for x in engines),
        preemptions=sum(x.preemptions for x in engines),
        forced_steps=sum(dict(x.reasons).get("forced", 0) for x in engines),
        shaper_errors=sum(x.shaper_errors for x in engines),
    )


def rack_figures(result: RackResult) -> RackFigures:
    """All figures of a run: the group's by its limits, each engine's by its own."""
    setup = result.setup
    return RackFigures(
        figures_of(result.engines, setup.group_limits, setup),
        tuple(figures_of([engine], setup.limits, setup) for engine in result.engines),
    )
