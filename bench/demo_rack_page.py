"""The figures of servers that share a limit: a table, checks and the HTML report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.harness import latency, machine
from bench.harness.tables import latency_rows, throughput_rows
from bench.live_rack import RackRun, RackSettings, together
from shaper.core.types import PowerLimit
from shaper.report.distributions import distribution
from shaper.report.html import Block, Plot, Section, checks, definitions, paragraph, render
from shaper.report.power import LimitLine
from shaper.report.stacked import StackedPower, stacked_power
from shaper.report.table import Heading, Row, Table, to_html
from shaper.traffic.figures import GRID_SECONDS, window_means

# What the ledger promises: within half a percent of the limit.
TOLERANCE_RATIO = 1.005
# Of unshaped. A group's answers take longer, so more of them are in flight when the arrivals
# end: their later tokens are not lost, and don't count here.
THROUGHPUT_RATIO = 0.97
# Before it, the answers in flight still grow; shorter traffic has no other part.
_STEADY_SHARE, _STEADY_SECONDS = 0.25, 30.0


@dataclass(frozen=True, slots=True)
class RackComparison:
    """All runs, judged by the same limit; the unshaped one first, the shared one last."""

    settings: RackSettings
    limit: PowerLimit
    runs: tuple[RackRun, ...]

    @property
    def shared(self) -> RackRun:
        """The servers as one power group."""
        return self.runs[-1]


def tokens_per_joule(run: RackRun) -> float:
    """Output tokens per joule of all GPUs, over the whole replay."""
    return run.latency.output_tokens / run.power.joules if run.power.joules else math.nan


def steady_tokens_per_second(comparison: RackComparison, run: RackRun) -> float:
    """Tokens that came each second while requests arrived, the first quarter left out; NaN
    where they arrived for less than 30 s, most of which is the first answers and the last."""
    span = comparison.settings.workload.span_seconds
    if span < _STEADY_SECONDS:
        return math.nan
    records = together(run.replays)
    end = records.started_seconds + span
    begin = end - (1 - _STEADY_SHARE) * span
    tokens = sum(
        np.count_nonzero((begin <= each.token_seconds) & (each.token_seconds < end))
        * (each.output_tokens / len(each.token_seconds))
        for each in latency.finished(records)
        if len(each.token_seconds)
    )
    return float(tokens) / (end - begin)


def rack_table(comparison: RackComparison) -> Table:
    """All runs, and the ratio of the shared one to the unshaped one."""
    runs, limit = comparison.runs, comparison.limit

    def row(
        label: str,
        unit: str,
        value: Callable[[RackRun], float],
        digits: int = 1,
        **settings: Any,
    ) -> Row:
        return Row(label, unit, tuple(value(run) for run in runs), digits, **settings)

    window = f"{limit.window_seconds * 1e3:g} ms"
    return Table(
        "servers unshaped and in one power group, the same traffic",
        tuple(run.name for run in runs),
        (
            Heading("power of all GPUs together (true, 1 ms grid)"),
            row("peak 100 ms power", "W", lambda r: r.power.peak_watts, better="lower"),
            row("p99.9 of 100 ms power", "W", lambda r: r.power.p999_watts, better="lower"),
            row("mean power", "W", lambda r: r.power.mean_watts, better="lower"),
            Heading(f"group limit {limit.watts:.1f} W over {window}, every window"),
            row("windows above", "%", lambda r: 100 * r.power.limits[0].over_share, 3),
            row("above the limit", "W s", lambda r: r.power.limits[0].over_watt_seconds, 3),
            row("worst window / limit", "", lambda r: r.power.limits[0].worst_ratio, 4),
            row(
                "worst without stalls over 2 ms",
                "",
                lambda r: r.power.limits[0].unstalled_worst_ratio,
                4,
            ),
            Heading("latency, as the client saw it"),
            *latency_rows([run.latency for run in runs]),
            Heading("throughput and cost"),
            *throughput_rows([run.latency for run in runs]),
            row(
                "output tokens per second while requests arrive",
                "1/s",
                lambda r: steady_tokens_per_second(comparison, r),
                better="higher",
            ),
            row("output tokens per joule", "1/J", tokens_per_joule, 4, better="higher"),
            Heading("this machine"),
            row("stalls over 2 ms", "", lambda r: float(r.power.stalls), 0, ratio=False),
            row(
                "windows with a stall",
                "%",
                lambda r: 100 * r.power.stalled_window_share,
                2,
                ratio=False,
            ),
            row("requests sent late", "", lambda r: float(r.latency.late_sends), 0, ratio=False),
            row("CPUs busy", "%", _busy, 0, ratio=False),
        ),
    )


def _busy(run: RackRun) -> float:
    return math.nan if run.machine is None else 100 * run.machine.busy_share


def rack_checks(comparison: RackComparison) -> list[tuple[bool | None, str]]:
    """What the comparison is asked to show, and whether it does."""
    unshaped, shared, limit = comparison.runs[0], comparison.shared, comparison.limit
    kept = shared.power.limits[0]
    worst = kept.unstalled_worst_ratio
    offered = steady_tokens_per_second(comparison, unshaped) or math.nan
    throughput = steady_tokens_per_second(comparison, shared) / offered
    failed = sum(run.latency.requests_failed for run in comparison.runs)
    return [
        (
            None if math.isnan(worst) else worst <= TOLERANCE_RATIO,
            f"shared: no window of all GPUs together is above {limit.watts:.1f} W by more than "
            f"0.5%, but for those in which this machine stalled over 2 ms (worst {worst:.4f} of "
            f"the limit, {kept.unstalled_windows:,} windows)",
        ),
        (
            None if math.isnan(throughput) else throughput >= THROUGHPUT_RATIO,
            f"shared: at least {THROUGHPUT_RATIO:g} times the tokens a second while requests "
            f"arrive ({throughput:.3f}; the first quarter of the time left out, and what came "
            "after the last arrival)",
        ),
        (failed == 0, f"all: every request finished ({failed} did not)"),
    ]


def about(comparison: RackComparison) -> list[tuple[str, str]]:
    """Settings and machine, as name and value."""
    settings, load = comparison.settings, comparison.settings.workload
    return [
        ("traffic", f"{load.name}; seed {load.seed}; {len(load.requests)} requests, in turn"),
        ("tokens", f"{load.prompt_tokens:,} of prompts, {load.output_tokens:,} of output"),
        ("servers", f"{settings.servers} of {settings.model} on an emulated {settings.gpu} each"),
        *((f"flags, {run.name}", " ".join(run.arguments)) for run in comparison.runs),
        ("machine", machine.describe()),
        ("finished", time.strftime("%Y-%m-%d %H:%M:%S %Z")),
    ]


def rack_page(comparison: RackComparison) -> str:
    """The HTML report."""
    limit, settings = comparison.limit, comparison.settings
    window = f"{limit.window_seconds * 1e3:g} ms"
    line = LimitLine(f"limit {limit.watts:.1f} W", limit.watts)
    names = [run.name for run in comparison.runs]
    totals = [window_means(run.total, limit.window_seconds) for run in comparison.runs]
    records = [latency.finished(together(run.replays)) for run in comparison.runs]
    sections = [
        Section(
            "What it shows",
            (
                checks(rack_checks(comparison)),
                Block(to_html(rack_table(comparison))),
                paragraph(
                    "Latencies are as the client saw them over HTTP. Watts and joules are the "
                    "emulated GPUs' true power, added up. The ratio is shared to unshaped.",
                    "note",
                ),
            ),
        ),
        Section(
            "Power",
            (
                Plot(
                    f"Mean power over {window}, one server on top of the other",
                    stacked_power([_stacked(run, limit) for run in comparison.runs], [line]),
                    "The upper edge is the sum, which the group's limit bounds. Of each short "
                    "span the window with the highest sum is drawn.",
                    300 * len(names),
                ),
                Plot(
                    f"How often which power: {window} windows of the sum",
                    distribution(names, totals, "power of all GPUs (W)", logarithmic=False),
                ),
            ),
        ),
        Section(
            "Latency",
            (
                Plot(
                    "Time to first token",
                    distribution(
                        names, [1e3 * latency.ttft_seconds(each) for each in records], "TTFT (ms)"
                    ),
                    wide=False,
                ),
                Plot(
                    "Inter-token latency, the tail",
                    distribution(
                        names,
                        [1e3 * latency.itl_seconds(each) for each in records],
                        "inter-token latency (ms)",
                        tail=True,
                    ),
                    wide=False,
                ),
            ),
        ),
        Section("How it was run", (definitions(about(comparison)),)),
    ]
    lead = (
        f"{settings.workload.name}, dealt in turn to {settings.servers} servers of "
        f"{settings.model}, each on an emulated {settings.gpu}: unshaped, and as one power group "
        f"with {limit.watts:.1f} W over {window}, {settings.limit_ratio:.0%} of the highest mean "
        "power that they drew unshaped."
    )
    return render("Shaper: servers that share a power limit", lead, sections)


def _stacked(run: RackRun, limit: PowerLimit) -> StackedPower:
    watts = np.array([window_means(grid, limit.window_seconds) for grid in run.grids])
    first = round(limit.window_seconds / GRID_SECONDS)
    times = (np.arange(watts.shape[1]) + first) * GRID_SECONDS
    return StackedPower(
        run.name, tuple(f"server {index}" for index in range(len(watts))), times, watts
    )
