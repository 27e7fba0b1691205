"""The report of a rack's run: power stacked by engine, latencies, and the figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from shaper.core.types import PowerLimit
from shaper.report.distributions import distribution
from shaper.report.html import Block, Plot, Section, definitions, paragraph, render
from shaper.report.power import LimitLine
from shaper.report.stacked import StackedPower, stacked_power
from shaper.report.table import Heading, Row, Table, to_html
from shaper.simulate.figures import Figures, RackFigures, ttft_seconds
from shaper.simulate.setup import RackResult, RackSetup
from shaper.simulate.show import limit_text
from shaper.traffic.figures import GRID_SECONDS, PowerGrid, window_means

_WINDOW_SECONDS = 0.1


def _stacked(result: RackResult) -> go.Figure:
    """Means of 100 ms by the window's end, stacked by engine, with the group's limits."""
    means = [window_means(PowerGrid(0.0, x.watts), _WINDOW_SECONDS) for x in result.engines]
    watts = np.array(means)
    times = np.arange(watts.shape[1]) * GRID_SECONDS + _WINDOW_SECONDS
    names = tuple(f"engine {index}" for index in range(len(means)))
    lines = [LimitLine(limit_text(limit), limit.watts) for limit in result.setup.group_limits]
    return stacked_power([StackedPower("", names, times, watts)], lines)


def rack_page(result: RackResult, figures: RackFigures) -> str:
    """One self-contained HTML page."""
    setup = result.setup
    warm = setup.warm_up_seconds
    ttft = np.concatenate([ttft_seconds(x, setup.duration_seconds, warm) for x in result.engines])
    itl = np.concatenate([engine.gaps(warm) for engine in result.engines])
    latencies = (
        ("Time to first token", ttft, "time to first token (s)", False),
        ("Time between tokens", itl, "time between two tokens (s)", True),
    )
    return render(
        f"A rack of {setup.engines} engines",
        f"{setup.model} on {setup.gpu}, {result.workload}: {setup.duration_seconds:g} s of "
        "virtual time; vLLM's own scheduler with the shaper over emulated GPUs.",
        [
            Section("Setup", (definitions(_setup(result)),)),
            Section(
                "Power",
                (
                    Plot(
                        "Power by engine, stacked",
                        _stacked(result),
                        "Means of 100 ms of the emulated GPUs' true power. Of each stretch of "
                        "time the moment with the highest sum is drawn; dashed: the group's "
                        "limits.",
                        440,
                    ),
                ),
            ),
            Section(
                "Latency",
                tuple(
                    Plot(
                        title,
                        distribution(["all engines"], [values[values > 0.0]], axis, tail=tail),
                        wide=False,
                    )
                    for title, values, axis, tail in latencies
                ),
            ),
            Section("Figures", (_table(setup, figures), *_notes(result))),
        ],
    )


def _setup(result: RackResult) -> list[tuple[str, str]]:
    setup, errors = result.setup, result.setup.errors
    found = [
        ("policy", setup.policy if setup.shaped else "vLLM alone"),
        ("router", setup.router),
        ("group's limits", ", ".join(map(limit_text, setup.group_limits)) or "none"),
        ("each engine's limits", ", ".join(map(limit_text, setup.limits)) or "none"),
        ("ITL target", _seconds(setup.itl_target_seconds)),
        ("TTFT target", _seconds(setup.ttft_target_seconds)),
        ("batched tokens, sequences", f"{setup.max_num_batched_tokens}, {setup.max_num_seqs}"),
        ("warm-up", _seconds(setup.warm_up_seconds)),
        ("rate scale, seed", f"{setup.rate_scale:g}, {setup.seed}"),
        (
            "unknown to the shaper",
            f"model within {errors.model_ratio:.0%}, each GPU {errors.own_ratio:.0%}, steps "
            f"{errors.step_noise_ratio:.1%}, host {1e3 * errors.host_late_seconds:g} ms late, "
            f"meters {'exact' if errors.exact_meter else 'with their gain error'}",
        ),
    ]
    if setup.gpu_power_cap_watts is not None:
        found.append(("each GPU's power cap", f"{setup.gpu_power_cap_watts:g} W"))
    if setup.gpu_clock_hertz is not None:
        found.append(("each GPU's highest clock", f"{setup.gpu_clock_hertz / 1e6:g} MHz"))
    return found


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{1e3 * value:g} ms"


def _table(setup: RackSetup, figures: RackFigures) -> Block:
    group_limits = {limit_text(limit): limit for limit in setup.group_limits}
    columns = (figures.group, *figures.engines)
    rows: list[Row | Heading] = [
        Heading("Power"),
        *(
            Row(label, "W", tuple(getattr(each, name) for each in columns), 0)
            for label, name in (
                ("highest mean of 100 ms", "peak_watts"),
                ("the same, metered", "metered_peak_watts"),
                ("p99.9 of means of 100 ms", "p999_watts"),
                ("mean", "mean_watts"),
            )
        ),
        *(_limit_row(columns, name, limit) for name, limit in group_limits.items()),
        Heading("Latency"),
        *(
            Row(f"{label} {name}", "ms", tuple(_milliseconds(x, key, name) for x in columns), 1)
            for label, key in (
                ("TTFT", "ttft_seconds"),
                ("ITL", "itl_seconds"),
                ("end to end", "e2el_seconds"),
            )
            for name in ("p50", "p90", "p99", "max")
        ),
        Heading("Work"),
        *(
            Row(label, unit, tuple(float(getattr(each, name)) for each in columns), digits)
            for label, unit, name, digits in (
                ("output tokens", "1/s", "output_tokens_per_second", 0),
                ("output tokens per joule", "1/J", "tokens_per_joule", 3),
                ("requests finished", "", "requests_finished", 0),
                ("goodput", "1/s", "goodput_requests_per_second", 2),
                ("KV cache used, most", "", "kv_peak_ratio", 3),
                ("preemptions", "", "preemptions", 0),
                ("steps over the budget, forced", "", "forced_steps", 0),
            )
        ),
    ]
    names = ("group", *(f"engine {index}" for index in range(len(figures.engines))))
    return Block(to_html(Table("figures", names, tuple(rows), compare=False)))


def _limit_row(columns: Sequence[Figures], name: str, limit: PowerLimit) -> Row:
    values = tuple(
        next((100.0 * x.true.over_share for x in each.limits if x.limit == limit), None)
        for each in columns
    )
    return Row(f"windows over {name}", "%", values, 3)


def _milliseconds(figures: Figures, key: str, quantile: str) -> float:
    return 1e3 * float(getattr(getattr(figures, key), quantile))


def _notes(result: RackResult) -> tuple[Block, ...]:
    if not result.too_long_requests:
        return ()
    text = f"{result.too_long_requests} requests were longer than the model's context: left out."
    return (paragraph(text, "note"),)
