"""What ITL slack saves: `objective = efficiency`, an ITL target of 50 ms and no budget."""

from __future__ import annotations

from typing import Any

from bench.acceptance.traffic import TRACE, conversation
from bench.harness.aims import Column, Job, Results, Section, cases
from bench.harness.virtual import RunFigures, Setup, VirtualRun

RATE_HERTZ = 4.0
ITL_SECONDS = 0.05
SEGMENT_SECONDS, QUICK_SECONDS = 240.0, 120.0
WARM_SECONDS = 30.0
# Spread over the trace's 81 minutes at this rate.
SEGMENTS = (0.0, 1200.0, 2400.0, 3600.0)
SEEDS = (1,)
EFFICIENT = Setup((), itl_seconds=ITL_SECONDS, spend_slack=True)


def jobs(quick: bool) -> list[Job]:
    """One for each segment of the trace, where it is there, and each synthetic seed."""
    seconds = QUICK_SECONDS if quick else SEGMENT_SECONDS
    found = [Job(compare, (seconds, seed, None)) for seed in SEEDS]
    if TRACE.is_file():
        segments = SEGMENTS[:1] if quick else SEGMENTS
        found += [Job(compare, (seconds, 0, begin)) for begin in segments]
    return found


def compare(seconds: float, seed: int, begin_seconds: float | None) -> dict[str, Any]:
    """The same traffic unshaped and with slack spent, each to its end."""
    traffic = conversation(seconds, RATE_HERTZ, seed, begin_seconds)
    both, tokens = [], []
    for setup in (Setup(), EFFICIENT):
        run = VirtualRun(setup, seed)
        run.replay(traffic)
        both.append(run.figures())
        # Slack keeps more requests in flight; from the first half minute on that cancels out.
        tokens.append(run.tokens_until(seconds) - run.tokens_until(WARM_SECONDS))
    plain, slack = both
    name = f"synthetic, seed {seed}" if begin_seconds is None else f"trace from {begin_seconds:g} s"
    return {"name": name, "throughput_ratio": tokens[1] / tokens[0], **_figures(plain, slack)}


def _figures(plain: RunFigures, slack: RunFigures) -> dict[str, float]:
    return {
        "joules_ratio": slack.joules_per_token / plain.joules_per_token,
        "ttft_ratio": slack.ttft_seconds.p99 / plain.ttft_seconds.p99,
        "itl_p99_seconds": slack.itl_seconds.p99,
        "itl_max_seconds": slack.itl_seconds.max,
        "plain_joules_per_token": plain.joules_per_token,
        "plain_watts": plain.mean_watts,
        "slack_watts": slack.mean_watts,
        "plain_ttft_p99_seconds": plain.ttft_seconds.p99,
        "ttft_p99_seconds": slack.ttft_seconds.p99,
        "plain_e2el_p50_seconds": plain.e2el_seconds.p50,
        "e2el_p50_seconds": slack.e2el_seconds.p50,
        "plain_e2el_p99_seconds": plain.e2el_seconds.p99,
        "e2el_p99_seconds": slack.e2el_seconds.p99,
        "plain_kv_ratio": plain.kv_mean_ratio,
        "kv_ratio": slack.kv_mean_ratio,
        "plain_kv_peak_ratio": plain.kv_peak_ratio,
        "kv_peak_ratio": slack.kv_peak_ratio,
        "preemptions": slack.preemptions,
        "forced": slack.forced,
    }


def sections(results: Results, quick: bool) -> list[Section]:
    """The promise, and what it costs."""
    missing = "" if TRACE.is_file() else " The recorded trace is missing: `../shared/data`."
    return [
        Section(
            "Slack: efficiency, 50 ms ITL, no budget, conversation at 4/s",
            (
                Column("joules_ratio", "J/token ratio", 3, aim=0.82),
                Column("ttft_ratio", "p99 TTFT ratio", 3, aim=1.10),
                Column("itl_p99_seconds", "p99 ITL ms", 1, 1e3, aim=ITL_SECONDS),
                Column("itl_max_seconds", "max ITL ms", 1, 1e3),
                Column("throughput_ratio", "tokens/s ratio", 3, aim=0.99, higher=True),
                Column("plain_joules_per_token", "J/token unshaped", 3),
                Column("plain_watts", "W unshaped", 0),
                Column("slack_watts", "W", 0),
                Column("forced", "forced", 0),
            ),
            cases(results),
            "Ratios are to vLLM unshaped on the same traffic, served to its end; tokens/s: "
            "sent from 30 s on until the arrivals end." + missing,
        ),
        Section(
            "What slack costs",
            (
                Column("plain_ttft_p99_seconds", "p99 TTFT ms unshaped", 0, 1e3),
                Column("ttft_p99_seconds", "p99 TTFT ms", 0, 1e3),
                Column("plain_e2el_p50_seconds", "p50 e2e s unshaped", 2),
                Column("e2el_p50_seconds", "p50 e2e s", 2),
                Column("plain_e2el_p99_seconds", "p99 e2e s unshaped", 1),
                Column("e2el_p99_seconds", "p99 e2e s", 1),
                Column("plain_kv_ratio", "mean KV % unshaped", 2, 1e2),
                Column("kv_ratio", "mean KV %", 2, 1e2),
                Column("plain_kv_peak_ratio", "peak KV % unshaped", 2, 1e2),
                Column("kv_peak_ratio", "peak KV %", 2, 1e2),
                Column("preemptions", "preemptions", 0),
            ),
            cases(results),
            "KV: share of the cache in use, over the steps.",
        ),
    ]
