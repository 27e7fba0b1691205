"""The figures of a rack as JSON and as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from shaper.core.types import PowerLimit
from shaper.simulate.figures import Figures, RackFigures
from shaper.simulate.setup import RackResult, RackSetup
from shaper.traffic.quantiles import Quantiles


def limit_text(limit: PowerLimit) -> str:
    """As an operator writes it: `4000W@100ms`."""
    window = limit.window_seconds
    span = f"{window:g}s" if window >= 1.0 else f"{window * 1e3:g}ms"
    return f"{limit.watts:g}W@{span}"


def figures_dict(figures: Figures) -> dict[str, Any]:
    """One entry of the JSON; what was not measured is null."""
    found: dict[str, Any] = {
        "peak_watts_100ms": figures.peak_watts,
        "p999_watts_100ms": figures.p999_watts,
        "mean_watts": figures.mean_watts,
        "metered_peak_watts_100ms": figures.metered_peak_watts,
        "ttft_seconds": _spread(figures.ttft_seconds),
        "itl_seconds": _spread(figures.itl_seconds),
        "e2e_latency_seconds": _spread(figures.e2el_seconds),
        "output_tokens_per_second": figures.output_tokens_per_second,
        "prompt_tokens_per_second": figures.prompt_tokens_per_second,
        "requests_arrived": figures.requests_arrived,
        "requests_finished": figures.requests_finished,
        "goodput_requests_per_second": figures.goodput_requests_per_second,
        "tokens_per_joule": figures.tokens_per_joule,
        "kv_cache_mean_ratio": figures.kv_mean_ratio,
        "kv_cache_peak_ratio": figures.kv_peak_ratio,
        "preemptions": figures.preemptions,
        "forced_steps": figures.forced_steps,
        "shaper_errors": figures.shaper_errors,
    }
    for prefix, kind in (("", "true"), ("metered_", "metered")):
        each = [(limit_text(x.limit), getattr(x, kind)) for x in figures.limits]
        found[f"{prefix}over_limit_ratio"] = {name: x.over_share for name, x in each}
        found[f"{prefix}over_limit_watt_seconds"] = {name: x.over_watt_seconds for name, x in each}
        found[f"{prefix}highest_window_ratio"] = {name: x.worst_ratio for name, x in each}
    return {key: _finite(value) for key, value in found.items()}


def setup_dict(setup: RackSetup) -> dict[str, Any]:
    """What was asked for, with limits as text."""
    found = dataclasses.asdict(setup)
    found["limits"] = [limit_text(limit) for limit in setup.limits]
    found["group_limits"] = [limit_text(limit) for limit in setup.group_limits]
    found["plant"] = None if setup.plant is None else str(setup.plant)
    return found


def rack_dict(result: RackResult, figures: RackFigures) -> dict[str, Any]:
    """The whole JSON of a run."""
    return {
        "setup": setup_dict(result.setup),
        "workload": result.workload,
        "too_long_requests": result.too_long_requests,
        "wall_seconds": result.wall_seconds,
        "engine_seconds_per_second": result.engine_seconds_per_second,
        "group": figures_dict(figures.group),
        "engines": [
            {**figures_dict(each), "metered_ratio": engine.metered_ratio}
            for each, engine in zip(figures.engines, result.engines, strict=True)
        ],
    }


def _spread(spread: Quantiles) -> dict[str, float]:
    return dataclasses.asdict(spread)


def _finite(value: Any) -> Any:
    """The same with null for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


_COLUMNS = (
    *("", "peak W", "mean W", "TTFT p50", "p90", "p99", "max", "ITL p50", "p90", "p99", "max"),
    *("tok/s", "tok/J", "done", "left"),
)


def _row(name: str, figures: Figures) -> tuple[str, ...]:
    ttft, itl = figures.ttft_seconds, figures.itl_seconds
    return (
        name,
        f"{figures.peak_watts:.0f}",
        f"{figures.mean_watts:.0f}",
        *(_number(1e3 * x, 0) for x in (ttft.p50, ttft.p90, ttft.p99, ttft.max)),
        *(_number(1e3 * x, 1) for x in (itl.p50, itl.p90, itl.p99, itl.max)),
        f"{figures.output_tokens_per_second:.0f}",
        f"{figures.tokens_per_joule:.3f}",
        str(figures.requests_finished),
        str(figures.requests_arrived - figures.requests_finished),
    )


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def rack_text(result: RackResult, figures: RackFigures) -> str:
    """The figures as lines for a terminal."""
    setup, group = result.setup, figures.group
    gpus = f" x {setup.tensor_parallel}" if setup.tensor_parallel > 1 else ""
    lines = [
        f"{setup.engines} engines of {setup.model} on {setup.gpu}{gpus}, {result.workload}, "
        f"{setup.duration_seconds:g} s, seed {setup.seed}",
        "power: highest mean of 100 ms; latencies in ms",
        "",
        *_aligned(
            [
                _COLUMNS,
                _row("group", group),
                *(_row(f"engine {k}", each) for k, each in enumerate(figures.engines)),
            ]
        ),
        "",
        f"goodput {group.goodput_requests_per_second:.2f} requests/s; end to end p50 "
        f"{_number(group.e2el_seconds.p50, 2)} s, p99 {_number(group.e2el_seconds.p99, 2)} s; "
        f"KV cache {group.kv_mean_ratio:.1%} used, {group.kv_peak_ratio:.1%} at most; "
        f"{group.preemptions} preemptions",
    ]
    lines += [_limit_line("group", each.limit, group) for each in group.limits]
    for limit in setup.limits:
        worst = max(figures.engines, key=lambda each: _highest(each, limit))
        number = figures.engines.index(worst)
        lines.append(_limit_line(f"engine {number} (the worst)", limit, worst))
    if result.too_long_requests:
        lines.append(
            f"{result.too_long_requests} requests were left out: longer than the model's context"
        )
    if group.shaper_errors:
        lines.append(f"the shaper failed {group.shaper_errors} times: see the log")
    lines.append(
        f"{result.engine_seconds_per_second:.1f} engine-seconds a second "
        f"({result.wall_seconds:.1f} s)"
    )
    return "\n".join(lines)


def _highest(figures: Figures, limit: PowerLimit) -> float:
    return next(x.true.worst_ratio for x in figures.limits if x.limit == limit)


def _limit_line(name: str, limit: PowerLimit, figures: Figures) -> str:
    outcome = next(x for x in figures.limits if x.limit == limit)
    true, metered = outcome.true, outcome.metered
    if not true.windows:
        return f"{name}, {limit_text(limit)}: the run is shorter than the window"
    return (
        f"{name}, {limit_text(limit)}: {true.over_share:.3%} of windows over, "
        f"{true.over_watt_seconds:.2f} watt-seconds, highest {true.worst_ratio:.4f} of the limit; "
        f"metered {metered.over_share:.3%}, {metered.over_watt_seconds:.2f} watt-seconds, "
        f"{metered.worst_ratio:.4f}"
    )
