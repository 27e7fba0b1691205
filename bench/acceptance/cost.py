"""What a budget costs in throughput: below it nothing, and at saturation what it must."""

from __future__ import annotations

from functools import cache
from typing import Any

from bench.acceptance.signals import limits_text, over_budget
from bench.acceptance.traffic import conversation, lengths
from bench.harness.aims import Column, Job, Results, Section, cases
from bench.harness.virtual import RunFigures, Setup, VirtualRun
from shaper.core.types import PowerLimit

# The demand's mean is this part of the sustained limit.
DEMAND_RATIO = 0.90
RATES_HERTZ = (2.0, 5.0, 10.0)
DEMAND_SECONDS, QUICK_SECONDS = 80.0, 60.0
WINDOWS_SECONDS = (1.0, 10.0)
CLIENTS = 96
BUDGET_RATIOS = (0.85, 0.70, 0.60)
SATURATED_SECONDS = 40.0
WINDOW_SECONDS = 0.1


def _demand_jobs(quick: bool) -> list[Job]:
    """One for each rate, window and seed."""
    seconds = QUICK_SECONDS if quick else DEMAND_SECONDS
    rates = RATES_HERTZ[1:2] if quick else RATES_HERTZ
    seeds = (1,) if quick else (1, 2)
    return [
        Job(demand, (rate, window, seed, seconds))
        for rate in rates
        for seed in seeds
        for window in WINDOWS_SECONDS
    ]


def _served(setup: Setup, rate: float, seed: int, seconds: float) -> VirtualRun:
    run = VirtualRun(setup, seed)
    run.replay(conversation(seconds, rate, seed), seconds)
    return run


@cache
def _plain(rate: float, seed: int, seconds: float) -> RunFigures:
    return _served(Setup(), rate, seed, seconds).figures()


def demand(rate: float, window: float, seed: int, seconds: float) -> dict[str, Any]:
    """Traffic whose unshaped mean power is 90% of the limit."""
    plain = _plain(rate, seed, seconds)
    limits = (PowerLimit(plain.mean_watts / DEMAND_RATIO, window),)
    run = _served(Setup(limits), rate, seed, seconds)
    shaped = run.figures()
    return {
        "name": f"{rate:g}/s, {limits_text(limits)}, seed {seed}",
        "throughput_ratio": shaped.tokens / plain.tokens,
        "ttft_p50_ratio": shaped.ttft_seconds.p50 / plain.ttft_seconds.p50,
        "plain_ttft_p99_seconds": plain.ttft_seconds.p99,
        "ttft_p99_seconds": shaped.ttft_seconds.p99,
        "itl_p99_seconds": shaped.itl_seconds.p99,
        "plain_itl_p99_seconds": plain.itl_seconds.p99,
        "worst_ratio": over_budget(run.grid(), limits)[0],
        "unfinished": shaped.unfinished - plain.unfinished,
    }


def _saturated_jobs(quick: bool) -> list[Job]:
    """One for each budget, with clients that wait and with arrivals that don't."""
    ratios = BUDGET_RATIOS[1:2] if quick else BUDGET_RATIOS
    return [Job(saturated, (kind, ratio)) for kind in ("clients", "arrivals") for ratio in ratios]


def _saturate(kind: str, limits: tuple[PowerLimit, ...] | None) -> RunFigures:
    run = VirtualRun(Setup(limits), 1)
    if kind == "clients":
        run.crowd(lengths(1), CLIENTS, SATURATED_SECONDS)
    else:
        run.replay(conversation(SATURATED_SECONDS, 24.0, 1), SATURATED_SECONDS)
    return run.figures()


@cache
def _plain_saturated(kind: str) -> RunFigures:
    return _saturate(kind, None)


def saturated(kind: str, ratio: float) -> dict[str, Any]:
    """Demand above what the budget carries, for a minute; unfinished requests count."""
    plain = _plain_saturated(kind)
    limits = (PowerLimit(plain.peak_watts * ratio, WINDOW_SECONDS),)
    shaped = _saturate(kind, limits)
    load = f"{CLIENTS} clients" if kind == "clients" else "24/s"
    return {
        "name": f"{load}, {ratio:.0%} of peak: {limits_text(limits)}",
        "throughput_ratio": shaped.tokens / plain.tokens,
        "plain_tokens_per_second": plain.tokens_per_second,
        "tokens_per_second": shaped.tokens_per_second,
        "finished_ratio": (shaped.requests - shaped.unfinished)
        / max(1, plain.requests - plain.unfinished),
        "plain_unfinished": plain.unfinished,
        "unfinished": shaped.unfinished,
        "watts_ratio": shaped.mean_watts / plain.mean_watts,
        "used_ratio": shaped.mean_watts / limits[0].watts,
        "joules_ratio": shaped.joules_per_token / plain.joules_per_token,
        "ttft_p99_seconds": shaped.ttft_seconds.p99,
        "plain_ttft_p99_seconds": plain.ttft_seconds.p99,
        "itl_p99_seconds": shaped.itl_seconds.p99,
        "plain_itl_p99_seconds": plain.itl_seconds.p99,
        "forced": shaped.forced,
    }


def jobs(quick: bool) -> list[Job]:
    """Below the limit, and above what it carries."""
    return _demand_jobs(quick) + _saturated_jobs(quick)


def sections(results: Results, quick: bool) -> list[Section]:
    """Both tables."""
    count = len(_demand_jobs(quick))
    light, heavy = results[:count], results[count:]
    tails = (
        Column("plain_ttft_p99_seconds", "p99 TTFT ms unshaped", 0, 1e3),
        Column("ttft_p99_seconds", "p99 TTFT ms", 0, 1e3),
        Column("plain_itl_p99_seconds", "p99 ITL ms unshaped", 1, 1e3),
        Column("itl_p99_seconds", "p99 ITL ms", 1, 1e3),
    )
    return [
        Section(
            "Demand at 90% of the sustained limit",
            (
                Column("throughput_ratio", "tokens ratio", 4, aim=0.99, higher=True),
                Column("ttft_p50_ratio", "p50 TTFT ratio", 2),
                *tails,
                Column("worst_ratio", "worst window", 4),
                Column("unfinished", "more unfinished", 0),
            ),
            cases(light),
            "Tokens sent by the end of the arrivals, over vLLM's own by then. The limit is the "
            "unshaped run's mean power over 0.9.",
        ),
        Section(
            "Saturation: demand above what the budget carries",
            (
                Column("throughput_ratio", "tokens ratio", 3),
                Column("plain_tokens_per_second", "tokens/s unshaped", 0),
                Column("tokens_per_second", "tokens/s", 0),
                Column("finished_ratio", "finished ratio", 3),
                Column("plain_unfinished", "unfinished unshaped", 0),
                Column("unfinished", "unfinished", 0),
                Column("watts_ratio", "W ratio", 3),
                Column("used_ratio", "budget used", 3),
                Column("joules_ratio", "J/token ratio", 3),
                *tails,
                Column("forced", "forced", 0),
            ),
            cases(heavy),
            f"{SATURATED_SECONDS:g} s; the limit is a share of the unshaped run's highest 100 ms "
            "mean. Tokens of unfinished requests count, and a prompt that waits counts in TTFT "
            "with its wait. "
            "At 24 arrivals a second the unshaped engine is above its own capacity, too.",
        ),
    ]
