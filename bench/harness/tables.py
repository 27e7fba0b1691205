"""The figures of a comparison as a table, as checks, and as plain data for JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from bench.harness.latency import LatencyFigures, bench_serve_keys
from bench.harness.live import Comparison, RunResult
from shaper.report.table import Better, Heading, Row, Table
from shaper.traffic.quantiles import Quantiles

# What `make demo` is asked to show: the limit kept to 1%, and an ITL tail within 5%.
OVER_TOLERANCE_RATIO = 1.01
ITL_TOLERANCE_RATIO = 1.05

_LATENCIES: tuple[tuple[str, str, int], ...] = (
    ("TTFT", "ttft_seconds", 1),
    ("ITL", "itl_seconds", 2),
    ("end-to-end", "e2el_seconds", 0),
)
_LEVELS = ("p50", "p90", "p99", "max")


def tokens_per_joule(run: RunResult) -> float:
    """Output tokens per joule of the GPU, over the whole replay."""
    return run.latency.output_tokens / run.power.joules if run.power.joules else math.nan


def latency_rows(figures: Sequence[LatencyFigures]) -> list[Row | Heading]:
    """Rows of TTFT, ITL and end-to-end latency in milliseconds."""
    rows: list[Row | Heading] = []
    for label, field, digits in _LATENCIES:
        spread: list[Quantiles] = [getattr(each, field) for each in figures]
        for level in _LEVELS:
            values = tuple(1e3 * float(getattr(each, level)) for each in spread)
            rows.append(Row(f"{label} {level}", "ms", values, digits, "lower"))
    return rows


def throughput_rows(figures: Sequence[LatencyFigures]) -> list[Row | Heading]:
    """Rows of tokens per second, and of requests finished and failed."""
    return [
        Row(
            "output tokens per second",
            "1/s",
            tuple(each.output_tokens_per_second for each in figures),
            1,
            "higher",
        ),
        Row("requests finished", "", tuple(float(f.requests_finished) for f in figures), 0),
        Row(
            "requests failed", "", tuple(float(f.requests_failed) for f in figures), 0, ratio=False
        ),
    ]


def comparison_table(comparison: Comparison) -> Table:
    """Both runs and their ratio."""
    runs = comparison.runs
    limit = comparison.limit

    def row(
        label: str,
        unit: str,
        value: Callable[[RunResult], float],
        digits: int = 1,
        better: Better | None = "lower",
        ratio: bool = True,
    ) -> Row:
        return Row(label, unit, tuple(value(run) for run in runs), digits, better, ratio)

    window = f"{limit.window_seconds * 1e3:g} ms"
    return Table(
        "unshaped and shaped, the same traffic",
        tuple(run.name for run in runs),
        (
            Heading("power (true, 1 ms grid)"),
            row("peak 100 ms power", "W", lambda r: r.power.peak_watts),
            row("p99.9 of 100 ms power", "W", lambda r: r.power.p999_watts),
            row("mean power", "W", lambda r: r.power.mean_watts),
            row("steepest 100 ms ramp", "W/s", lambda r: r.power.ramp_watts_per_second, 0),
            Heading(f"limit {limit.watts:.1f} W over {window}, every window of the run"),
            row("windows above", "%", lambda r: 100 * r.power.limits[0].over_share, 3),
            row(
                *("windows above by over 1%", "%"),
                lambda r: 100 * r.power.limits[0].over_tolerated_share,
                3,
            ),
            row("above the limit", "W s", lambda r: r.power.limits[0].over_watt_seconds, 3),
            row("worst window / limit", "", lambda r: r.power.limits[0].worst_ratio, 4),
            Heading("the same, without windows in which this machine stalled over 2 ms"),
            row("windows above", "%", lambda r: 100 * r.power.limits[0].unstalled_over_share, 3),
            row(
                *("windows above by over 1%", "%"),
                lambda r: 100 * r.power.limits[0].unstalled_over_tolerated_share,
                3,
            ),
            row("worst window / limit", "", lambda r: r.power.limits[0].unstalled_worst_ratio, 4),
            Heading("latency, as the client saw it"),
            *latency_rows([run.latency for run in runs]),
            Heading("throughput and cost"),
            *throughput_rows([run.latency for run in runs]),
            row("output tokens per joule", "1/J", tokens_per_joule, 4, "higher"),
            Heading("this machine"),
            row("stalls over 2 ms", "", lambda r: float(r.power.stalls), 0, None, ratio=False),
            row(
                *("windows with a stall", "%"),
                lambda r: 100 * r.power.stalled_window_share,
                2,
                None,
                ratio=False,
            ),
            row(
                *("requests sent over 20 ms late", ""),
                lambda r: float(r.latency.late_sends),
                0,
                None,
                ratio=False,
            ),
            row("CPUs busy", "%", _busy, 0, None, ratio=False),
        ),
    )


def _busy(run: RunResult) -> float:
    return math.nan if run.machine is None else 100 * run.machine.busy_share


def comparison_checks(comparison: Comparison) -> list[tuple[bool | None, str]]:
    """What the comparison is asked to show, and whether it does.

    None where nothing could be judged, such as no window without a stall.
    """
    limit, shaped = comparison.limit, comparison.shaped
    kept = shaped.power.limits[0]
    label = f"{limit.watts:.1f} W over {limit.window_seconds * 1e3:g} ms"
    p99 = [run.latency.itl_seconds.p99 for run in comparison.runs]
    itl_ratio = p99[1] / p99[0]
    failed = sum(run.latency.requests_failed for run in comparison.runs)
    return [
        (
            _at_most(kept.worst_ratio, OVER_TOLERANCE_RATIO),
            f"shaped: no window is above {label} by more than 1% "
            f"(worst {kept.worst_ratio:.4f} of the limit, {kept.windows:,} windows)",
        ),
        (
            _at_most(kept.unstalled_worst_ratio, OVER_TOLERANCE_RATIO),
            "the same without the windows in which this machine stalled over 2 ms "
            f"(worst {kept.unstalled_worst_ratio:.4f}, {kept.unstalled_windows:,} windows)",
        ),
        (
            _at_most(itl_ratio, ITL_TOLERANCE_RATIO),
            f"shaped: p99 ITL is at most 1.05 times unshaped ({itl_ratio:.3f})",
        ),
        (failed == 0, f"both: every request finished ({failed} did not)"),
    ]


def _at_most(value: float, bound: float) -> bool | None:
    return None if math.isnan(value) else value <= bound


def run_data(run: RunResult) -> dict[str, Any]:
    """A run's figures as plain data."""
    return {
        "name": run.name,
        "command": list(run.arguments),
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
        "log": run.log_path.name,
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
