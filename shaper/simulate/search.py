"""The lowest power limit of a group at which latency is still near that of the unshaped group.

Law. A limit is good when, in a run of the same traffic and seed,

    p99 TTFT  <=  `ttft_factor` times unshaped
    p99 ITL   <=  `itl_factor` times unshaped, or the ITL target where that is higher
    tokens/s  >=  0.99 times unshaped
    the highest metered window  <=  1.005 times the limit

and the search halves the span between the highest limit known to be bad (at first the
floor, what the group draws between steps) and the lowest known to be good (at first the
unshaped peak, which is not tried). It takes goodness to be monotonous; every probe is shown,
so that a reader sees where it was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from shaper.core.types import PowerLimit
from shaper.errors import ConfigError
from shaper.simulate.figures import RackFigures, rack_figures
from shaper.simulate.setup import RackResult, RackSetup

# What a good limit may cost in tokens, and by how much a metered window may pass it.
THROUGHPUT_RATIO = 0.99
OVER_LIMIT_RATIO = 1.005
# Of the unshaped peak: what the traffic of another minute moves a limit by.
RESOLUTION_RATIO = 0.01

Run = Callable[[RackSetup], RackResult]


@dataclass(frozen=True, slots=True)
class Factors:
    """How much latency may grow over the unshaped group's."""

    ttft: float = 1.25
    itl: float = 1.25


@dataclass(frozen=True, slots=True)
class Probe:
    """One limit that was tried, and what it did against the unshaped group."""

    limit: PowerLimit
    peak_ratio: float
    """The limit over the unshaped peak."""
    ttft_ratio: float
    """Of the p99."""
    itl_ratio: float
    itl_seconds: float
    """The p99 itself."""
    throughput_ratio: float
    metered_window_ratio: float
    failed: tuple[str, ...]
    """What was not kept: `ttft`, `itl`, `throughput`, `limit`. Empty: the limit is good."""


@dataclass(frozen=True, slots=True)
class Search:
    """What was found."""

    unshaped: RackFigures
    probes: tuple[Probe, ...]
    """In the order in which they were tried."""
    lowest: PowerLimit | None
    """None: not even a limit just below the unshaped peak is good."""
    result: RackResult
    """Of the run at `lowest`, else of the unshaped one."""


def search_limit(
    setup: RackSetup,
    run: Run,
    floor_watts: float,
    factors: Factors,
    window_seconds: float = 0.1,
    on_probe: Callable[[Probe], None] = lambda probe: None,
) -> Search:
    """Look for the lowest good limit.

    Args:
        setup: the rack; its group limits are replaced.
        run: runs it.
        floor_watts: what the group draws between steps.
        factors: what latency may grow by.
        window_seconds: of the limit.
        on_probe: is told each probe.

    Raises:
        ConfigError: the factors ask for latency below the unshaped one's.
    """
    if factors.ttft < 1.0 or factors.itl < 1.0:
        raise ConfigError("a factor below 1 asks for less latency than without any limit")
    unlimited = replace(setup, shaped=False, limits=(), group_limits=(), policy="predictive")
    best = run(unlimited)
    unshaped = rack_figures(best)
    peak_watts = unshaped.group.peak_watts
    bad, good, lowest = floor_watts, peak_watts, None
    probes: list[Probe] = []
    while good - bad > RESOLUTION_RATIO * peak_watts:
        limit = PowerLimit(round((good + bad) / 2.0, 1), window_seconds)
        result = run(replace(setup, shaped=True, group_limits=(limit,)))
        probe = _judge(setup, limit, rack_figures(result), unshaped, factors)
        probes.append(probe)
        on_probe(probe)
        if probe.failed:
            bad = limit.watts
        else:
            good, lowest, best = limit.watts, limit, result
    return Search(unshaped, tuple(probes), lowest, best)


def _judge(
    setup: RackSetup,
    limit: PowerLimit,
    figures: RackFigures,
    unshaped: RackFigures,
    factors: Factors,
) -> Probe:
    found, before = figures.group, unshaped.group
    itl_bound = max(factors.itl * before.itl_seconds.p99, setup.itl_target_seconds or 0.0)
    throughput_ratio = _ratio(found.output_tokens_per_second, before.output_tokens_per_second)
    metered = found.limits[0].metered.worst_ratio
    # Written so that NaN, where nothing was measured, is not kept.
    kept = {
        "ttft": found.ttft_seconds.p99 <= factors.ttft * before.ttft_seconds.p99,
        "itl": found.itl_seconds.p99 <= itl_bound,
        "throughput": throughput_ratio >= THROUGHPUT_RATIO,
        "limit": metered <= OVER_LIMIT_RATIO,
    }
    return Probe(
        limit=limit,
        peak_ratio=limit.watts / before.peak_watts,
        ttft_ratio=_ratio(found.ttft_seconds.p99, before.ttft_seconds.p99),
        itl_ratio=_ratio(found.itl_seconds.p99, before.itl_seconds.p99),
        itl_seconds=found.itl_seconds.p99,
        throughput_ratio=throughput_ratio,
        metered_window_ratio=metered,
        failed=tuple(name for name, holds in kept.items() if not holds),
    )


def _ratio(value: float, base: float) -> float:
    return value / base if base > 0.0 else math.nan
