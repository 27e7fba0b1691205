"""Plots of power over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from shaper.report.style import COLOURS, LIMIT_COLOUR, FloatArray, base, extremes


@dataclass(frozen=True, slots=True)
class PowerSeries:
    """Power of one run; times in seconds since its start.

    `window_*` [n] is a sliding mean by window end, `fine_watts` [m] the 1 ms grid from
    0 on, `meter_*` [k] what the GPU's meter said. Empty arrays: not there.
    """

    name: str
    window_times: FloatArray
    window_watts: FloatArray
    fine_watts: FloatArray
    meter_times: FloatArray
    meter_watts: FloatArray
    fine_step_seconds: float = 0.001


@dataclass(frozen=True, slots=True)
class LimitLine:
    """A power limit as a line."""

    label: str
    watts: float


def _add_limits(figure: go.Figure, limits: Sequence[LimitLine], seconds: float) -> None:
    dashes = ("dash", "dot", "dashdot")
    for index, limit in enumerate(limits):
        figure.add_trace(
            go.Scatter(
                x=[0.0, seconds],
                y=[limit.watts, limit.watts],
                mode="lines",
                name=limit.label,
                line={"color": LIMIT_COLOUR, "width": 2, "dash": dashes[index % len(dashes)]},
            )
        )


def window_power(runs: Sequence[PowerSeries], limits: Sequence[LimitLine] = ()) -> go.Figure:
    """Sliding mean power of all runs over each other, with the limits."""
    figure = go.Figure()
    for index, run in enumerate(runs):
        times, watts = extremes(run.window_times, run.window_watts, 1500)
        figure.add_trace(
            go.Scatter(
                x=np.round(times, 3),
                y=np.round(watts, 1),
                mode="lines",
                name=run.name,
                line={"color": COLOURS[index], "width": 1.4},
                opacity=0.9,
                hovertemplate="%{x:.2f} s: %{y:.0f} W",
            )
        )
    longest = max((float(run.window_times[-1]) for run in runs if len(run.window_times)), default=0)
    _add_limits(figure, limits, longest)
    figure.update_xaxes(range=[0.0, longest])
    return base(figure, "time since the replay's start (s)", "mean power over the window (W)")


def fine_power(runs: Sequence[PowerSeries], limits: Sequence[LimitLine] = ()) -> go.Figure:
    """Range of the 1 ms power and the meter's readings, one row per run."""
    figure = make_subplots(
        rows=len(runs),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.09,
        subplot_titles=[run.name for run in runs],
    )
    for index, run in enumerate(runs):
        for trace in _fine_traces(run, COLOURS[index], index == 0):
            figure.add_trace(trace, row=index + 1, col=1)
        for limit in limits:
            figure.add_hline(
                y=limit.watts,
                row=index + 1,
                col=1,
                line={"color": LIMIT_COLOUR, "width": 1.5, "dash": "dash"},
            )
    base(figure, "", "power (W)")
    figure.update_xaxes(title_text="time since the replay's start (s)", row=len(runs), col=1)
    figure.update_layout(margin_t=56, legend_y=1.06)
    longest = max(len(run.fine_watts) * run.fine_step_seconds for run in runs)
    figure.update_xaxes(range=[0.0, longest])
    # One scale for all rows, given here: plotly draws nothing when it has to find
    # the range of matched axes whose other axis has a fixed one.
    highest = max((float(run.fine_watts.max()) for run in runs if len(run.fine_watts)), default=1.0)
    figure.update_yaxes(range=[0.0, 1.05 * highest])
    return figure


def _fine_traces(run: PowerSeries, colour: str, in_legend: bool) -> list[go.Scatter]:
    width = max(1, len(run.fine_watts) // 1200)
    usable = len(run.fine_watts) // width * width
    shaped = run.fine_watts[:usable].reshape(-1, width)
    times = np.round((np.arange(len(shaped)) + 0.5) * width * run.fine_step_seconds, 3)
    low, high = (np.round(shaped.min(1), 1), np.round(shaped.max(1), 1)) if usable else ([], [])
    line: dict[str, Any] = {"color": colour, "width": 0.8}
    label = f"lowest to highest millisecond of each {width * run.fine_step_seconds * 1e3:.0f} ms"
    hover = {"hovertemplate": "%{x:.2f} s: %{y:.0f} W"}
    traces = [
        go.Scatter(x=times, y=low, mode="lines", line=line, showlegend=False, name="low", **hover),
        go.Scatter(
            x=times,
            y=high,
            mode="lines",
            line=line,
            fill="tonexty",
            name=label,
            showlegend=in_legend,
            **hover,
        ),
    ]
    if len(run.meter_times):
        traces.append(
            go.Scatter(
                x=np.round(run.meter_times, 3),
                y=np.round(run.meter_watts, 1),
                mode="markers",
                marker={"color": "#8a929b", "size": 4, "line": {"width": 0}},
                name="what the meter said",
                showlegend=in_legend,
                hovertemplate="%{x:.2f} s: meter %{y:.0f} W",
            )
        )
    return traces
