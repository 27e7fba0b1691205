"""The figures of a comparison as a table, as checks, and as plain data for JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from bench.harness.client import LATE_SECONDS
from bench.harness.latency import LatencyFigures, bench_serve_keys, finished
from bench.harness.live import SHARED, Comparison, LiveRun
from shaper.report.table import Heading, Row, Table
from shaper.traffic.quantiles import Quantiles

# What a limit of one server is held to, and what the ledger of a group promises.
OWN_RATIO, SHARED_RATIO = 1.01, 1.005
ITL_TOLERANCE_RATIO = 1.05
# Of unshaped. A group's answers take longer, so more of them are in flight when the arrivals
# end: their later tokens are not lost, and don't count here.
THROUGHPUT_RATIO = 0.97
# Before it, the answers in flight still grow; shorter traffic has no other part.
_STEADY_SHARE, _STEADY_SECONDS = 0.25, 30.0
# A stall in every twentieth window of 100 ms is one in about a hundred steps: a p99 of them.
LATE_WINDOW_SHARE = 0.05

_LATENCIES: tuple[tuple[str, str, int], ...] = (
    ("TTFT", "ttft_seconds", 1),
    ("ITL", "itl_seconds", 2),
    ("end-to-end", "e2el_seconds", 0),
)
_LEVELS = ("p50", "p90", "p99", "max")


def tokens_per_joule(run: LiveRun) -> float:
    """Output tokens per joule of all GPUs, over the whole replay."""
    return run.latency.output_tokens / run.power.joules if run.power.joules else math.nan


def steady_tokens_per_second(comparison: Comparison, run: LiveRun) -> float:
    """Tokens that came each second while requests arrived, the first quarter left out; NaN
    where they arrived for less than 30 s, most of which is the first answers and the last."""
    span = comparison.settings.workload.span_seconds
    if span < _STEADY_SECONDS:
        return math.nan
    end = run.replay.started_seconds + span
    begin = end - (1 - _STEADY_SHARE) * span
    tokens = sum(
        np.count_nonzero((begin <= each.token_seconds) & (each.token_seconds < end))
        * (each.output_tokens / len(each.token_seconds))
        for each in finished(run.replay)
        if len(each.token_seconds)
    )
    return float(tokens) / (end - begin)


def host_late(run: LiveRun) -> str:
    """How this machine delayed the run so much that it says nothing of the shaper.

    Measured by the emulated GPU, which notes each step that it returned over 2 ms late, and by
    the client, whose event loop was late. Empty where neither was.
    """
    share, lag = run.power.stalled_window_share, run.replay.max_loop_lag_seconds
    if share > LATE_WINDOW_SHARE:
        return f"this machine was over 2 ms late in {share:.0%} of the {run.name} run's windows"
    if lag > LATE_SECONDS:
        return f"this machine held the client up for {lag * 1e3:.0f} ms in the {run.name} run"
    return ""


def latency_rows(figures: Sequence[LatencyFigures]) -> list[Row | Heading]:
    """Rows of TTFT, ITL and end-to-end latency in milliseconds."""
    rows: list[Row | Heading] = []
    for label, field, digits in _LATENCIES:
        spread: list[Quantiles] = [getattr(each, field) for each in figures]
        for level in _LEVELS:
            values = tuple(1e3 * float(getattr(each, level)) for each in spread)
            rows.append(Row(f"{label} {level}", "ms", values, digits, "lower"))
    return rows


Figure = tuple[str, str, int, Callable[[LiveRun], float]]
"""Label, unit, digits, and the value of a run."""
_POWER: tuple[Figure, ...] = (
    ("peak 100 ms power", "W", 1, lambda r: r.power.peak_watts),
    ("p99.9 of 100 ms power", "W", 1, lambda r: r.power.p999_watts),
    ("mean power", "W", 1, lambda r: r.power.mean_watts),
    ("steepest 100 ms ramp", "W/s", 0, lambda r: r.power.ramp_watts_per_second),
)
_LIMIT: tuple[Figure, ...] = (
    ("windows above", "%", 3, lambda r: 100 * r.power.limits[0].over_share),
    ("windows above by over 1%", "%", 3, lambda r: 100 * r.power.limits[0].over_tolerated_share),
    ("above the limit", "W s", 3, lambda r: r.power.limits[0].over_watt_seconds),
    ("worst window / limit", "", 4, lambda r: r.power.limits[0].worst_ratio),
)
_UNSTALLED: tuple[Figure, ...] = (
    ("windows above", "%", 3, lambda r: 100 * r.power.limits[0].unstalled_over_share),
    (
        *("windows above by over 1%", "%", 3),
        lambda r: 100 * r.power.limits[0].unstalled_over_tolerated_share,
    ),
    ("worst window / limit", "", 4, lambda r: r.power.limits[0].unstalled_worst_ratio),
)
_MACHINE: tuple[Figure, ...] = (
    ("stalls over 2 ms", "", 0, lambda r: r.power.stalls),
    ("windows with a stall", "%", 2, lambda r: 100 * r.power.stalled_window_share),
    ("requests sent over 20 ms late", "", 0, lambda r: r.latency.late_sends),
    (
        *("CPUs busy", "%", 0),
        lambda r: math.nan if r.machine is None else 100 * r.machine.busy_share,
    ),
)


def comparison_table(comparison: Comparison) -> Table:
    """All runs, and the ratio of the last one to the unshaped one."""
    runs, limit = comparison.runs, comparison.limit

    def rows(*figures: Figure, **settings: Any) -> list[Row]:
        return [
            Row(label, unit, tuple(float(value(run)) for run in runs), digits, **settings)
            for label, unit, digits, value in figures
        ]

    whose, of_all = ("group limit", " of all GPUs together") if len(runs[0].grids) > 1 else (
        "limit", ""
    )  # fmt: skip
    return Table(
        f"unshaped and {runs[-1].name}, the same traffic",
        tuple(run.name for run in runs),
        (
            Heading(f"power{of_all} (true, 1 ms grid)"),
            *rows(*_POWER, better="lower"),
            Heading(
                f"{whose} {limit.watts:.1f} W over {limit.window_seconds * 1e3:g} ms, every window "
                "of the run"
            ),
            *rows(*_LIMIT, better="lower"),
            Heading("the same, without windows in which this machine stalled over 2 ms"),
            *rows(*_UNSTALLED, better="lower"),
            Heading("latency, as the client saw it"),
            *latency_rows([run.latency for run in runs]),
            Heading("throughput and cost"),
            *rows(
                (
                    "output tokens per second",
                    "1/s",
                    1,
                    lambda r: r.latency.output_tokens_per_second,
                ),
                (
                    *("output tokens per second while requests arrive", "1/s", 1),
                    lambda r: steady_tokens_per_second(comparison, r),
                ),
                ("output tokens per joule", "1/J", 4, tokens_per_joule),
                better="higher",
            ),
            *rows(("requests finished", "", 0, lambda r: r.latency.requests_finished)),
            *rows(("requests failed", "", 0, lambda r: r.latency.requests_failed), ratio=False),
            Heading("this machine"),
            *rows(*_MACHINE, ratio=False),
        ),
    )


def comparison_checks(comparison: Comparison) -> list[tuple[bool | None, str]]:
    """What the comparison is asked to show, and whether it does.

    None where nothing could be judged: no window without a stall, traffic too short, or a
    machine too busy (`host_late`), which is then said.
    """
    limit, unshaped, shaped = comparison.limit, comparison.runs[0], comparison.runs[-1]
    kept, shared = shaped.power.limits[0], shaped.name == SHARED
    tolerated = SHARED_RATIO if shared else OWN_RATIO
    late = host_late(shaped)
    unstalled = _bounded(kept.unstalled_worst_ratio, tolerated)
    of_all = " of all GPUs together" if shared else ""

    def judged(held: bool | None, text: str, excuse: str = "") -> tuple[bool | None, str]:
        reason = late or excuse
        return (None, f"{text} - {reason}") if held is False and reason else (held, text)

    found = [
        judged(
            _bounded(kept.worst_ratio, tolerated),
            f"{shaped.name}: no window{of_all} is above {limit.watts:.1f} W over "
            f"{limit.window_seconds * 1e3:g} ms by more than {tolerated - 1:.1%} "
            f"(worst {kept.worst_ratio:.4f} of the limit, {kept.windows:,} windows)",
            # A step that ends late for want of a CPU is no step of the shaper's.
            "this machine stalled in those that are" if unstalled else "",
        ),
        judged(
            unstalled,
            "the same without the windows in which this machine stalled over 2 ms "
            f"(worst {kept.unstalled_worst_ratio:.4f}, {kept.unstalled_windows:,} windows)",
        ),
    ]
    if shared:
        offered = steady_tokens_per_second(comparison, unshaped) or math.nan
        ratio = steady_tokens_per_second(comparison, shaped) / offered
        text = (
            f"shared: at least {THROUGHPUT_RATIO:g} times the tokens a second while requests "
            f"arrive ({ratio:.3f}; the first quarter of the time left out, and what came after "
            "the last arrival)"
        )
        found.append(judged(_bounded(THROUGHPUT_RATIO, ratio), text))
    else:
        ratio = shaped.latency.itl_seconds.p99 / unshaped.latency.itl_seconds.p99
        text = f"shaped: p99 ITL is at most {ITL_TOLERANCE_RATIO:g} times unshaped ({ratio:.3f})"
        found.append(judged(_bounded(ratio, ITL_TOLERANCE_RATIO), text))
    failed = sum(run.latency.requests_failed for run in comparison.runs)
    return [*found, (failed == 0, f"all: every request finished ({failed} did not)")]


def _bounded(value: float, bound: float) -> bool | None:
    return None if math.isnan(value) or math.isnan(bound) else value <= bound


def run_data(run: LiveRun) -> dict[str, Any]:
    """A run's figures as plain data."""
    return {
        "name": run.name,
        "flags": list(run.flags),
        "command": list(run.command),
        "start_up_seconds": run.start_up_seconds,
        "power": asdict(run.power),
        "latency": asdict(run.latency),
        "bench_serve": bench_serve_keys(run.latency),
        "output_tokens_per_joule": tokens_per_joule(run),
        "machine": None if run.machine is None else asdict(run.machine),
        "client": {
            "cpu_seconds": run.replay.client_cpu_seconds,
            "max_loop_lag_seconds": run.replay.max_loop_lag_seconds,
        },
        "decisions": None if run.decisions is None else Counter(run.decisions.reasons),
    }


def without_nan(value: Any) -> Any:
    """The same data with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return value
