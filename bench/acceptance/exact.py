"""Exactness: with a predictor that knows the GPU, is any window ever over its limit?"""

from __future__ import annotations

from typing import Any

from bench.acceptance.signals import EXACT_RATIO, limits_text, over_budget
from bench.acceptance.traffic import conversation
from bench.harness.aims import Column, Job, Results, Section, cases
from bench.harness.virtual import Setup, VirtualRun
from shaper.core.types import PowerLimit

SECONDS, QUICK_SECONDS = 30.0, 20.0
RATE_HERTZ = 6.0
BUDGETS: tuple[tuple[PowerLimit, ...], ...] = (
    (PowerLimit(650.0, 0.01),),
    (PowerLimit(560.0, 0.05),),
    (PowerLimit(560.0, 0.1),),
    (PowerLimit(420.0, 0.1),),
    (PowerLimit(480.0, 1.0),),
    (PowerLimit(640.0, 0.1), PowerLimit(500.0, 1.0)),
    (PowerLimit(600.0, 0.05), PowerLimit(450.0, 3.0)),
    (PowerLimit(480.0, 10.0),),
    (PowerLimit(620.0, 0.1), PowerLimit(470.0, 30.0)),
)


def jobs(quick: bool) -> list[Job]:
    """One for each budget; all seeds in it."""
    if quick:
        return [Job(exact, (budget, (1,), QUICK_SECONDS)) for budget in BUDGETS[2:6]]
    return [Job(exact, (budget, (1, 2), SECONDS)) for budget in BUDGETS]


def _serve(limits: tuple[PowerLimit, ...] | None, seed: int, seconds: float) -> VirtualRun:
    run = VirtualRun(Setup(limits), seed)
    run.replay(conversation(seconds, RATE_HERTZ, seed), seconds)
    return run


def exact(budget: tuple[PowerLimit, ...], seeds: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """The worst of the seeds."""
    worst = share = free = 0.0
    forced = 0
    for seed in seeds:
        free = max(free, over_budget(_serve(None, seed, seconds).grid(), budget)[0])
        run = _serve(budget, seed, seconds)
        ratio, over = over_budget(run.grid(), budget)
        worst, share = max(worst, ratio), max(share, over)
        forced += run.figures().forced
    return {
        "name": limits_text(budget),
        "worst_ratio": worst,
        "over_share": share,
        "free_ratio": free,
        "forced": forced,
    }


def sections(results: Results, quick: bool) -> list[Section]:
    """One table."""
    return [
        Section(
            "Exactness, perfect prediction",
            (
                Column("worst_ratio", "worst window", 4, aim=1.0 + EXACT_RATIO),
                Column("over_share", "over budget %", 3, 1e2, aim=0.0),
                Column("free_ratio", "worst window unshaped", 3),
                Column("forced", "forced", 0),
            ),
            cases(results),
            f"Worst of all windows, each as a ratio of its limit, on conversation traffic at "
            f"{RATE_HERTZ:g}/s, worst of the seeds. Over budget: share of windows above "
            f"{1 + EXACT_RATIO:g} times the limit (the grid of 1 ms rounds).",
        )
    ]
