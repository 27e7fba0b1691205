"""Heat: a hot inlet, and a load that brings the GPU to its slowdown temperature."""

from __future__ import annotations

import math
from typing import Any

from bench.acceptance.traffic import even_lengths
from bench.harness.aims import Column, Job, Results, Section, cases
from bench.harness.virtual import RunFigures, Setup, VirtualRun
from shaper.core.types import ClockEventReasons
from shaper.traffic.workload import TimedRequest, Workload

# Hot enough that each of these loads brings the unshaped GPU to its slowdown temperature.
AMBIENT_CELSIUS = 48.0
PROMPT_TOKENS, OUTPUT_TOKENS = 3000, 200
RATES_HERTZ = (3.0, 4.0, 6.0)
SECONDS, QUICK_SECONDS = 90.0, 45.0
SLOWDOWNS = (ClockEventReasons.SW_THERMAL_SLOWDOWN, ClockEventReasons.HW_THERMAL_SLOWDOWN)


def jobs(quick: bool) -> list[Job]:
    """One for each rate."""
    rates = RATES_HERTZ[:1] if quick else RATES_HERTZ
    return [Job(heat, (rate, QUICK_SECONDS if quick else SECONDS)) for rate in rates]


def _serve(setup: Setup, rate: float, seconds: float) -> tuple[RunFigures, float]:
    """The figures, and for how long the GPU slowed itself down."""
    source = even_lengths(PROMPT_TOKENS, OUTPUT_TOKENS, 1)
    requests = tuple(
        TimedRequest(index / rate, PROMPT_TOKENS, next(source).output_tokens)
        for index in range(math.ceil(rate * seconds))
    )
    run = VirtualRun(setup, 1)
    run.replay(Workload("even", requests), seconds)
    spent = run.engine.gpus.reason_seconds()
    return run.figures(), max(spent.get(reason, 0.0) for reason in SLOWDOWNS)


def heat(rate: float, seconds: float) -> dict[str, Any]:
    """The same requests with nobody watching, and with the supervisor."""
    plain, plain_slow = _serve(Setup(ambient_celsius=AMBIENT_CELSIUS), rate, seconds)
    watched = Setup((), supervise=True, ambient_celsius=AMBIENT_CELSIUS)
    shaped, shaped_slow = _serve(watched, rate, seconds)
    return {
        "name": f"{rate:g}/s for {seconds:g} s",
        "plain_slow_seconds": plain_slow,
        "slow_seconds": shaped_slow,
        "plain_tokens_per_second": plain.tokens_per_second,
        "tokens_per_second": shaped.tokens_per_second,
        "plain_watts": plain.mean_watts,
        "watts": shaped.mean_watts,
        "plain_itl_p99_seconds": plain.itl_seconds.p99,
        "itl_p99_seconds": shaped.itl_seconds.p99,
        "plain_ttft_p99_seconds": plain.ttft_seconds.p99,
        "ttft_p99_seconds": shaped.ttft_seconds.p99,
        "joules_ratio": shaped.joules_per_token / plain.joules_per_token,
    }


def sections(results: Results, quick: bool) -> list[Section]:
    """One table."""
    return [
        Section(
            f"Heat: an inlet of {AMBIENT_CELSIUS:g} degrees",
            (
                Column("plain_slow_seconds", "s in slowdown unshaped", 0),
                Column("slow_seconds", "s in slowdown", 0, aim=0.0),
                Column("plain_tokens_per_second", "tokens/s unshaped", 0),
                Column("tokens_per_second", "tokens/s", 0),
                Column("plain_watts", "W unshaped", 0),
                Column("watts", "W", 0),
                Column("joules_ratio", "J/token ratio", 3),
                Column("plain_ttft_p99_seconds", "p99 TTFT ms unshaped", 0, 1e3),
                Column("ttft_p99_seconds", "p99 TTFT ms", 0, 1e3),
                Column("plain_itl_p99_seconds", "p99 ITL ms unshaped", 1, 1e3),
                Column("itl_p99_seconds", "p99 ITL ms", 1, 1e3),
            ),
            cases(results),
            f"No budget; prompts of {PROMPT_TOKENS:,} tokens, outputs of about {OUTPUT_TOKENS}, at "
            "even times. The shaper limits power before the slowdown temperature is reached; "
            "unshaped, the driver lowers the clocks. Waiting prompts count in TTFT.",
        )
    ]
