"""The report of a comparison: one HTML file, and its tables as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from bench.gpu_serving.figures import (
    RunFigures,
    measured_table,
    prediction_table,
    virtual_table,
)
from bench.gpu_serving.measure import FloatArray
from bench.gpu_serving.plan import WINDOW_SECONDS
from bench.harness import latency
from bench.harness.page import tail_plots
from shaper.report.distributions import distribution
from shaper.report.html import Block, Plot, Section, definitions, paragraph, render
from shaper.report.power import LimitLine, PowerSeries, fine_power, window_power
from shaper.report.style import COLOURS, PLAIN_COLOUR, base
from shaper.report.table import to_html, to_text
from shaper.traffic.figures import window_means

# More dots than this show no more.
_MOST_DOTS = 4000

COMPARED = (
    "A 100 ms mean is not measured: no reading resolves it. It is rebuilt from the recorded steps, "
    "each at the model's watts, times one ratio that makes the run's joules those of the energy "
    "counter. Measured are the counter (windows of 0.5 s and more) and the instant reading (the "
    "mean of a short time before each refresh, so peaks between refreshes are missed)."
)


@dataclass(frozen=True, slots=True)
class Found:
    """All that a report shows."""

    source: str
    traffic: str
    gpu: Mapping[str, Any]
    """The GPU at rest; empty for an emulated one."""
    profile: str
    runs: tuple[RunFigures, ...]
    pairs: tuple[tuple[RunFigures, RunFigures], ...]
    """Measured and virtual runs of the same name."""


def title(found: Found) -> str:
    """Says first of all what was measured."""
    return f"Shaper under real traffic on {found.source}"


def markdown(found: Found) -> str:
    """The tables."""
    parts = [f"# {title(found)}", found.traffic, to_text(measured_table(found.runs))]
    parts += [
        f"## Predicted by {found.profile} and measured",
        COMPARED,
        to_text(prediction_table(found.runs)),
    ]
    if found.pairs:
        parts += [f"## In virtual time on {found.profile}", to_text(virtual_table(found.pairs))]
    about = "\n".join(f"- {name}: {text}" for name, text in _about(found))
    return "\n\n".join([*parts, "## How it was run", about]) + "\n"


def page(found: Found) -> str:
    """The HTML page."""
    sections = [
        Section(
            "Measured",
            (Block(to_html(measured_table(found.runs))), paragraph(COMPARED, "note")),
        ),
        Section("Power", _power(found.runs)),
        Section("Latency", _latency(found.runs)),
        Section(
            "Predicted and measured",
            (
                Block(to_html(prediction_table(found.runs))),
                Plot(
                    "Power, window by window of the energy counter",
                    _windows(found.runs),
                    "Each dot is a window of 0.5 s; on the line, the step model is right.",
                    460,
                    wide=False,
                ),
                Plot(
                    "Seconds, step by step",
                    _steps(found.runs),
                    "Each dot is a step, from its launch (or its predecessor's end) to its output.",
                    460,
                    wide=False,
                ),
            ),
        ),
    ]
    if found.pairs:
        table = Block(to_html(virtual_table(found.pairs)))
        sections.append(Section("The same in virtual time", (table, *_virtual(found))))
    sections.append(Section("How it was run", (definitions(_about(found)),)))
    return render(title(found), f"{found.traffic}; predicted with {found.profile}.", sections)


def _series(run: RunFigures) -> PowerSeries:
    means = window_means(run.view.grid, WINDOW_SECONDS)
    times = np.arange(len(means)) * 0.001 + WINDOW_SECONDS
    start = run.view.grid.start_seconds
    return PowerSeries(
        run.name,
        np.asarray(times, dtype=np.float64),
        means,
        run.view.grid.watts,
        run.view.instant_times - start,
        run.view.instant_watts,
    )


def _limits(runs: Sequence[RunFigures]) -> list[LimitLine]:
    watts = sorted({run.meta.limit.watts for run in runs if run.meta.limit is not None})
    return [LimitLine(f"limit {each:.0f} W", each) for each in watts]


def _power(runs: Sequence[RunFigures]) -> tuple[Plot, ...]:
    series = [_series(run) for run in runs]
    ends = go.Figure()
    for run, colour in zip(runs, COLOURS, strict=False):
        view = run.view
        ends.add_trace(
            go.Scatter(
                x=np.round(view.window_seconds - view.grid.start_seconds, 3),
                y=np.round(view.measured_watts, 1),
                mode="lines+markers",
                name=run.name,
                line={"color": colour, "width": 1.2},
                marker={"size": 4},
            )
        )
    return (
        Plot(
            "Measured: mean power between refreshes of the energy counter, 0.5 s apart",
            base(ends, "time since the replay's start (s)", "mean power (W)"),
            "Each point stands at its window's end.",
        ),
        Plot(
            "Rebuilt: mean power over 100 ms",
            window_power(series, _limits(runs)),
            "From the recorded steps, in the energy counter's watts. The limits are on this curve.",
            420,
        ),
        Plot(
            "Rebuilt by the millisecond, and the instant reading",
            fine_power(series, ()),
            "Dots are what the meter said.",
            max(320, 190 * len(series)),
        ),
    )


def _latency(runs: Sequence[RunFigures]) -> tuple[Plot, ...]:
    names = [run.name for run in runs]
    done = [latency.finished(run.stored.replay) for run in runs]
    itl = [1e3 * latency.itl_seconds(records) for records in done]
    ttft = [1e3 * latency.ttft_seconds(records) for records in done]
    return tail_plots(names, itl, ttft)


def _virtual(found: Found) -> tuple[Plot, ...]:
    plots = []
    for pair in found.pairs:
        names = ["measured", "virtual time"]
        done = [latency.finished(run.stored.replay) for run in pair]
        itl = [1e3 * latency.itl_seconds(records) for records in done]
        plots.append(
            Plot(
                f"{pair[0].name}: inter-token latency, the tail",
                distribution(names, itl, "inter-token latency (ms)", tail=True),
                wide=False,
            )
        )
    return tuple(plots)


def _windows(runs: Sequence[RunFigures]) -> go.Figure:
    figure = go.Figure()
    for run, colour in zip(runs, COLOURS, strict=False):
        view = run.view
        figure.add_trace(
            go.Scatter(
                x=np.round(view.measured_watts, 1),
                y=np.round(view.predicted_watts, 1),
                mode="markers",
                name=run.name,
                marker={"color": colour, "size": 5, "opacity": 0.8},
                customdata=np.round(100 * view.prompt_shares),
                hovertemplate="measured %{x:.0f} W, predicted %{y:.0f} W, "
                "%{customdata}% of the time with prompts",
            )
        )
    values = [run.view.measured_watts for run in runs] + [run.view.predicted_watts for run in runs]
    return _with_diagonal(figure, values, "measured (W)", "predicted (W)")


def _steps(runs: Sequence[RunFigures]) -> go.Figure:
    figure = go.Figure()
    everything: list[FloatArray] = []
    kinds = (("decodes alone", False, COLOURS[1]), ("with prompts", True, COLOURS[0]))
    for name, prompts, colour in kinds:
        parts = [run.view.step_has_prompts == prompts for run in runs]
        pairs = list(zip(runs, parts, strict=True))
        measured = np.concatenate([run.view.step_measured_seconds[keep] for run, keep in pairs])
        predicted = np.concatenate([run.view.step_predicted_seconds[keep] for run, keep in pairs])
        every = max(1, len(measured) // _MOST_DOTS)
        everything += [1e3 * measured[::every], 1e3 * predicted[::every]]
        figure.add_trace(
            go.Scattergl(
                x=np.round(1e3 * measured[::every], 3),
                y=np.round(1e3 * predicted[::every], 3),
                mode="markers",
                name=name,
                marker={"color": colour, "size": 3, "opacity": 0.5},
                hovertemplate="measured %{x:.2f} ms, predicted %{y:.2f} ms",
            )
        )
    figure = _with_diagonal(figure, everything, "measured (ms)", "predicted (ms)")
    figure.update_xaxes(type="log", dtick="D2")
    figure.update_yaxes(type="log", dtick="D2")
    return figure


def _with_diagonal(
    figure: go.Figure, values: Sequence[FloatArray], x_title: str, y_title: str
) -> go.Figure:
    known = np.concatenate([*values, np.empty(0)])
    if len(known):
        ends = [float(known.min()), float(known.max())]
        line = {"color": PLAIN_COLOUR, "width": 1.5, "dash": "dash"}
        figure.add_trace(
            go.Scatter(x=ends, y=ends, mode="lines", name="the same", line=line, hoverinfo="skip")
        )
    return base(figure, x_title, y_title)


def _about(found: Found) -> list[tuple[str, str]]:
    lines = [("source", found.source), ("traffic", found.traffic)]
    lines += [
        (name.replace("_", " "), str(value))
        for name, value in found.gpu.items()
        if value not in (None, (), [])
    ]
    for run in found.runs:
        about = run.meta.about
        lines.append((f"{run.name} server", " ".join(run.meta.arguments)))
        busy = about.get("cpus_busy_ratio")
        text = f"{about.get('at')}; {about.get('versions')}; {about.get('machine')}"
        if busy is not None:
            text += f", CPUs {busy:.0%} busy, load average {about.get('load_average'):.1f}"
        lines.append((f"{run.name} ran", text))
        if run.reasons:
            words = ", ".join(f"{reason} {count}" for reason, count in run.reasons)
            lines.append((f"{run.name} decisions", words))
    return lines
