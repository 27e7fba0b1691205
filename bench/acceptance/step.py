"""A step of the budget in mid-load, 650 W to 500 W and back, and limit cycles in steady traffic."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from bench.acceptance.signals import (
    EXACT_RATIO,
    cycle_watts,
    limits_text,
    over_budget,
    peak_to_peak_watts,
    window_ends,
)
from bench.acceptance.traffic import conversation, even_lengths, lengths
from bench.harness.aims import Column, Job, Results, Section, cases
from bench.harness.virtual import Setup, VirtualRun
from shaper.core.types import PowerLimit
from shaper.traffic.figures import GRID_SECONDS, PowerGrid

HIGH_WATTS, LOW_WATTS = 650.0, 500.0
DOWN_SECONDS, UP_SECONDS, END_SECONDS = 6.0, 14.0, 30.0
# What the proof allows: this long, or the longest window if that is longer.
SETTLING_SECONDS = 0.3
SETTLED_RATIO = 1.02
WINDOW_SETS: dict[str, tuple[float, ...]] = {
    "50 ms": (0.05,),
    "100 ms": (0.1,),
    "1 s": (1.0,),
    "100 ms and 1 s": (0.1, 1.0),
}
CLIENTS = 64
DEMAND_DRIVEN = ("low_use_ratio", "high_use_ratio", "rise_seconds", "cycle_ratio")
LOADS = ("saturated", "conversation 8/s")
SEED = 1


def _step_jobs(quick: bool) -> list[Job]:
    """One for each load and set of windows."""
    names = ("100 ms", "1 s") if quick else tuple(WINDOW_SETS)
    return [Job(step, (load, name, SEED)) for load in LOADS for name in names]


def _limits(watts: float, windows: tuple[float, ...]) -> tuple[PowerLimit, ...]:
    # The longer window of a pair is the tighter one, or it would never bind.
    return tuple(PowerLimit(watts * (0.96 if w > windows[0] else 1.0), w) for w in windows)


def step(load: str, name: str, seed: int) -> dict[str, Any]:
    """One run with both steps."""
    windows = WINDOW_SETS[name]
    high, low = _limits(HIGH_WATTS, windows), _limits(LOW_WATTS, windows)
    run = VirtualRun(Setup(high), seed)
    saturated = load == "saturated"
    source, traffic = lengths(seed), conversation(END_SECONDS, 8.0, seed)
    for limits, until in ((high, DOWN_SECONDS), (low, UP_SECONDS), (high, END_SECONDS)):
        run.set_limits(limits)
        if saturated:
            run.crowd(source, CLIENTS, until)
        else:
            run.replay(traffic, until)
    grid = run.grid()
    longest = max(windows)
    settled = DOWN_SECONDS + max(SETTLING_SECONDS, longest)
    settling = max(_settling(grid, limit) for limit in low)
    lasting = (DOWN_SECONDS + 2.0, UP_SECONDS)
    after = (UP_SECONDS + 2.0, END_SECONDS)
    figures = {
        "settling_seconds": settling,
        "settling_ratio": settling / max(SETTLING_SECONDS, longest),
        "overshoot_ratio": over_budget(grid, low, (settled, UP_SECONDS))[0] - 1.0,
        "low_use_ratio": _mean(grid, lasting) / min(x.watts for x in low),
        "high_use_ratio": _mean(grid, after) / min(x.watts for x in high),
        "rise_seconds": _rise(grid, min(x.watts for x in high), longest),
        "ripple_ratio": peak_to_peak_watts(grid, 0.1, after) / HIGH_WATTS,
        "cycle_ratio": cycle_watts(grid, longest, after) / HIGH_WATTS,
    }
    if not saturated:
        # Demand, not the budget, sets the power then.
        figures |= dict.fromkeys(DEMAND_DRIVEN, math.nan)
    return {"name": f"{load}, {name}, seed {seed}", **figures}


def _settling(grid: PowerGrid, limit: PowerLimit) -> float:
    """Seconds after the step down until no window is above 1.02 times the new limit."""
    ends, means = window_ends(grid, limit)
    judged = (ends >= DOWN_SECONDS) & (ends < UP_SECONDS)
    late = ends[judged & (means > SETTLED_RATIO * limit.watts)]
    return float(late[-1] - DOWN_SECONDS) if len(late) else 0.0


def _rise(grid: PowerGrid, watts: float, window_seconds: float) -> float:
    """Seconds after the step up until a window's mean first reaches 98% of the limit."""
    ends, means = window_ends(grid, PowerLimit(watts, window_seconds))
    there = ends[(ends >= UP_SECONDS) & (means >= watts * (2.0 - SETTLED_RATIO))]
    return float(there[0] - UP_SECONDS) if len(there) else math.inf


def _mean(grid: PowerGrid, span: tuple[float, float]) -> float:
    first, last = (round(seconds / GRID_SECONDS) for seconds in span)
    return float(grid.watts[first:last].mean())


# --- steady traffic


STEADY_SECONDS = 24.0
CYCLE_RATIO = 0.03
# Demand that is this much above a limit keeps the controller at work all the time.
BINDING_RATIO = 1.1
STEADY_LIMITS = (
    (PowerLimit(450.0, 0.1),),
    (PowerLimit(550.0, 0.1),),
    (PowerLimit(550.0, 1.0),),
    (PowerLimit(560.0, 0.1), PowerLimit(520.0, 1.0)),
)


def _steady_jobs(quick: bool) -> list[Job]:
    """One for each number of clients and budget."""
    limits = STEADY_LIMITS[1:3] if quick else STEADY_LIMITS
    return [Job(steady, (clients, each)) for clients in (16, 64) for each in limits]


@cache
def _unshaped(clients: int) -> PowerGrid:
    run = VirtualRun(Setup())
    run.crowd(even_lengths(1000, 250, clients), clients, STEADY_SECONDS)
    return run.grid()


def steady(clients: int, limits: tuple[PowerLimit, ...]) -> dict[str, Any]:
    """A number of clients that never change, and requests of one size."""
    run = VirtualRun(Setup(limits))
    run.crowd(even_lengths(1000, 250, clients), clients, STEADY_SECONDS)
    grid, span = run.grid(), (4.0, STEADY_SECONDS)
    free = _unshaped(clients)
    longest = max(limit.window_seconds for limit in limits)
    lowest = min(limit.watts for limit in limits)
    demand_ratio = _mean(free, span) / lowest
    worst, share = over_budget(grid, limits)
    cycle_ratio = cycle_watts(grid, longest, span) / lowest
    return {
        "name": f"{clients} clients, {limits_text(limits)}",
        "demand_ratio": demand_ratio,
        "use_ratio": _mean(grid, span) / lowest,
        "worst_ratio": worst,
        "over_share": share,
        "ripple_ratio": peak_to_peak_watts(grid, 0.1, span) / lowest,
        "slow_ripple_ratio": peak_to_peak_watts(grid, 1.0, span) / lowest,
        "free_cycle_ratio": cycle_watts(free, longest, span) / lowest,
        "any_cycle_ratio": cycle_ratio,
        # Below that the clients' own waves set the power, not the controller.
        "cycle_ratio": cycle_ratio if demand_ratio >= BINDING_RATIO else math.nan,
    }


def stepped_section(results: Results) -> Section:
    """The steps of the budget."""
    return Section(
        f"Step of the budget, {HIGH_WATTS:g} W to {LOW_WATTS:g} W and back",
        (
            Column("settling_ratio", "settling / allowed", 2, aim=1.0),
            Column("settling_seconds", "settling ms", 0, 1e3),
            Column("overshoot_ratio", "overshoot %", 2, 1e2, aim=SETTLED_RATIO - 1.0),
            Column("rise_seconds", "rise ms", 0, 1e3),
            Column("low_use_ratio", "of 500 W used %", 1, 1e2),
            Column("high_use_ratio", "of 650 W used %", 1, 1e2),
            Column("ripple_ratio", "p-p of 100 ms %", 1, 1e2),
            Column("cycle_ratio", "limit cycle %", 2, 1e2, aim=CYCLE_RATIO),
        ),
        cases(results),
        "Settling: from the step down until no window of any limit is above 1.02 times the new "
        "one; 300 ms are allowed, or the longest window. Overshoot: the highest window after "
        "that. Rise: from the step up until a window reaches 98% of the limit. Used: mean power "
        "over the lowest limit, 2 s after each step, where demand is above it. p-p: highest "
        "less lowest 100 ms mean from 2 s after the step up; under conversation traffic that is "
        "the traffic. Limit cycle: peak to peak of the strongest sine in it, over the longest "
        "window.",
    )


def steady_section(results: Results) -> Section:
    """Steady traffic."""
    return Section(
        "Steady traffic",
        (
            Column("cycle_ratio", "limit cycle %", 2, 1e2, aim=CYCLE_RATIO),
            Column("any_cycle_ratio", "strongest sine %", 2, 1e2),
            Column("free_cycle_ratio", "the same unshaped %", 2, 1e2),
            Column("worst_ratio", "worst window", 4, aim=1.0 + EXACT_RATIO),
            Column("over_share", "over budget %", 3, 1e2, aim=0.0),
            Column("demand_ratio", "demand / limit", 2),
            Column("use_ratio", "budget used %", 1, 1e2),
            Column("ripple_ratio", "p-p of 100 ms %", 1, 1e2),
            Column("slow_ripple_ratio", "p-p of 1 s %", 1, 1e2),
        ),
        cases(results),
        "Clients that each send the next request when one is answered: prompts of 1,000 "
        "tokens, outputs of 200 to 300. Demand: the unshaped run's mean power. A sine counts as "
        f"a limit cycle where demand is at least {BINDING_RATIO:g} times the lowest limit: below "
        "that the clients' own waves are what is left, and the unshaped run has them too.",
    )


def jobs(quick: bool) -> list[Job]:
    """The steps, then steady traffic."""
    return _step_jobs(quick) + _steady_jobs(quick)


def sections(results: Results, quick: bool) -> list[Section]:
    """The two tables."""
    count = len(_step_jobs(quick))
    return [stepped_section(results[:count]), steady_section(results[count:])]
