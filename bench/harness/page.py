"""The HTML report of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bench.harness import latency
from bench.harness.live import Comparison, LiveRun
from bench.harness.tables import comparison_checks, comparison_table
from shaper.emulator.selfcheck import SelfCheck
from shaper.report.decisions import chunk_sizes, decision_counts, lines
from shaper.report.distributions import distribution
from shaper.report.html import Block, Plot, Section, checks, definitions, paragraph, render
from shaper.report.picture import power_picture
from shaper.report.power import LimitLine, PowerSeries, fine_power, window_power
from shaper.report.stacked import StackedPower, stacked_power
from shaper.report.table import to_html
from shaper.traffic.figures import GRID_SECONDS, window_means

FloatArray = NDArray[np.float64]


def comparison_page(comparison: Comparison, about: list[tuple[str, str]]) -> str:
    """The whole page.

    Args:
        comparison: what was run.
        about: settings, versions and the like, as name and value.
    """
    limit, settings, last = comparison.limit, comparison.settings, comparison.runs[-1]
    alone = settings.servers == 1
    sections = [
        Section(
            "What it shows",
            (
                checks(comparison_checks(comparison)),
                Block(to_html(comparison_table(comparison))),
                paragraph(
                    "Latencies are as the client saw them over HTTP. Watts and joules are the "
                    "emulated GPUs' true power, added up where there are several. The ratio is "
                    f"{last.name} to unshaped; where it is worse by over 1%, it is marked.",
                    "note",
                ),
            ),
        ),
        Section("Power", _power_plots(comparison) if alone else _stacked_plots(comparison)),
        Section("Latency", _latency_plots(comparison)),
        *([Section("What the shaper decided", _decision_parts(last))] if alone else []),
        Section("How it was run", (definitions([*about, *_machine_lines(comparison)]),)),
    ]
    served = (
        f"replayed at {settings.model} on an emulated {settings.gpu}: once unshaped, once with"
        if alone
        else f"dealt in turn to {settings.servers} servers of {settings.model}, each on an "
        f"emulated {settings.gpu}: unshaped, and as one power group with"
    )
    lead = (
        f"{settings.workload.name}, {served} {limit.watts:.1f} W over "
        f"{limit.window_seconds * 1e3:g} ms, {settings.limit_ratio:.0%} of the unshaped run's "
        "highest 100 ms mean power."
    )
    return render("Shaper: unshaped and shaped under the same traffic", lead, sections)


def _stacked_plots(comparison: Comparison) -> tuple[Plot, ...]:
    limit = comparison.limit
    window = f"{limit.window_seconds * 1e3:g} ms"
    names = [run.name for run in comparison.runs]
    totals = [window_means(run.total, limit.window_seconds) for run in comparison.runs]
    stacks = []
    for run in comparison.runs:
        watts = np.array([window_means(grid, limit.window_seconds) for grid in run.grids])
        first = round(limit.window_seconds / GRID_SECONDS)
        times = (np.arange(watts.shape[1]) + first) * GRID_SECONDS
        servers = tuple(f"server {index}" for index in range(len(watts)))
        stacks.append(StackedPower(run.name, servers, times, watts))
    return (
        Plot(
            f"Mean power over {window}, one server on top of the other",
            stacked_power(stacks, [LimitLine(f"limit {limit.watts:.1f} W", limit.watts)]),
            "The upper edge is the sum, which the group's limit bounds. Of each short "
            "span the window with the highest sum is drawn.",
            300 * len(names),
        ),
        Plot(
            f"How often which power: {window} windows of the sum",
            distribution(names, totals, "power of all GPUs (W)", logarithmic=False),
        ),
    )


def comparison_picture(comparison: Comparison) -> str:
    """Power over time of both runs, as an SVG."""
    limit = comparison.limit
    series = [_power_series(run, limit.window_seconds) for run in comparison.runs]
    window = f"{limit.window_seconds * 1e3:g} ms"
    return power_picture(series, LimitLine(f"limit {limit.watts:.0f} W, {window}", limit.watts))


def _power_series(run: LiveRun, window_seconds: float) -> PowerSeries:
    means = window_means(run.total, window_seconds)
    first = round(window_seconds / GRID_SECONDS)
    times = np.asarray((np.arange(len(means)) + first) * GRID_SECONDS, dtype=np.float64)
    return PowerSeries(run.name, times, means, run.total.watts, *_meter_readings(run))


def _meter_readings(run: LiveRun) -> tuple[FloatArray, FloatArray]:
    """What the shaper read of the GPU's power meter, by seconds since the run's start."""
    log = run.decisions
    if log is None:
        return np.empty(0), np.empty(0)
    keep = np.isfinite(log.meter_watts)
    times, watts = log.times[keep] - run.total.start_seconds, log.meter_watts[keep]
    # The meter holds a value until it refreshes: one point per new value.
    new = np.concatenate((np.ones(min(1, len(watts)), dtype=bool), np.diff(watts) != 0.0))
    return times[new], watts[new]


def _power_plots(comparison: Comparison) -> tuple[Plot, ...]:
    limit = comparison.limit
    series = [_power_series(run, limit.window_seconds) for run in comparison.runs]
    window = f"{limit.window_seconds * 1e3:g} ms"
    line = LimitLine(f"limit {limit.watts:.1f} W", limit.watts)
    return (
        Plot(
            f"Mean power over {window}",
            window_power(series, [line]),
            f"Each point is the mean of the {window} before it. The limit is on this curve.",
            420,
        ),
        Plot(
            "Power by the millisecond, and the meter",
            fine_power(series, [line]),
            "Single milliseconds may lie above the limit: it holds for the mean over "
            f"{window}. Dots are the GPU's instant power reading, as the shaper read it.",
            560,
        ),
        Plot(
            f"How often which power: {window} windows",
            distribution(
                [run.name for run in series],
                [run.window_watts for run in series],
                f"mean power over {window} (W)",
                logarithmic=False,
            ),
            f"Share of the run's {window} windows at or below a power.",
        ),
    )


def tail_plots(
    names: Sequence[str], itl: Sequence[FloatArray], ttft: Sequence[FloatArray]
) -> tuple[Plot, Plot]:
    """What a budget costs: the tail of the inter-token latency, and TTFT; milliseconds, by run."""
    return (
        Plot(
            "Inter-token latency, the tail",
            distribution(names, itl, "inter-token latency (ms)", tail=True),
            wide=False,
        ),
        Plot(
            "Time to first token",
            distribution(names, ttft, "time to first token (ms)"),
            wide=False,
        ),
    )


def _latency_plots(comparison: Comparison) -> tuple[Plot, ...]:
    names = [run.name for run in comparison.runs]
    finished = [latency.finished(run.replay) for run in comparison.runs]

    def milliseconds(values: list[FloatArray]) -> list[FloatArray]:
        return [1e3 * each for each in values]

    itl = milliseconds([latency.itl_seconds(records) for records in finished])
    ttft = milliseconds([latency.ttft_seconds(records) for records in finished])
    e2el = [latency.e2el_seconds(records) for records in finished]
    return (
        Plot(
            "Inter-token latency",
            distribution(names, itl, "inter-token latency (ms)"),
            wide=False,
        ),
        *tail_plots(names, itl, ttft),
        Plot(
            "End-to-end latency",
            distribution(names, e2el, "end-to-end latency (s)"),
            wide=False,
        ),
    )


def _decision_parts(run: LiveRun) -> tuple[Plot | Block, ...]:
    log = run.decisions
    if log is None or not len(log.times):
        return (paragraph("The server wrote no decision log.", "note"),)
    times = log.times - run.total.start_seconds
    return (
        Plot(
            "Decisions by reason",
            decision_counts(times, log.reasons, 1.0),
            "One decision per engine step; successive polls of a held engine count once.",
        ),
        Plot(
            "Prefill chunks",
            chunk_sizes(times, log.prefill_tokens, log.limit_prefill_tokens),
            "Prefill tokens that a step computed, and the limit that it was given.",
            wide=False,
        ),
        Plot(
            "Running decodes",
            lines(times, [("decodes in the step", log.decodes)], "requests"),
            "Decoding requests of each step.",
            wide=False,
        ),
    )


def self_check_lines(check: SelfCheck | None) -> list[tuple[str, str]]:
    """What the emulator's self-check measured, as name and value."""
    if check is None:
        return [("emulator's self-check", "left out")]
    rate, timing = check.step_rate, check.timing_error
    return [
        (
            "emulated engine without delay",
            f"{rate.steps_per_second:,.0f} steps/s, {rate.concurrency} stream, this machine "
            f"{rate.busy_ratio:.0%} busy",
        ),
        (
            "emulated engine with delay",
            f"timing error {timing.error_ratio:+.2%} at steps of "
            f"{timing.step_seconds * 1e3:.2f} ms; steps returned late by "
            f"{timing.late_p50_seconds * 1e3:.2f} ms (p50) and "
            f"{timing.late_p99_seconds * 1e3:.2f} ms (p99), {timing.stalls} stalls over 2 ms in "
            f"{timing.steps} steps, this machine {timing.busy_ratio:.0%} busy",
        ),
    ]


def _machine_lines(comparison: Comparison) -> list[tuple[str, str]]:
    lines = self_check_lines(comparison.self_check)
    for run in comparison.runs:
        use = run.machine
        cost = run.replay
        text = (
            f"client {cost.client_cpu_seconds:.1f} CPU s, event loop late by at most "
            f"{cost.max_loop_lag_seconds * 1e3:.0f} ms, {run.latency.late_sends} late sends, "
            f"{run.latency.chunks_with_several_tokens} tokens shared a chunk with another"
        )
        if use is not None:
            text = (
                f"CPUs {use.busy_share:.0%} busy (server {use.server_share:.0%}, client "
                f"{use.client_share:.0%} of {use.cpus} CPUs), load average "
                f"{use.load_average:.2f}; {text}"
            )
        lines.append((f"machine during the {run.name} run", text))
    return lines
