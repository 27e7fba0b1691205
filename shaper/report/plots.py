"""Plots of runs: power over time, distributions, and what the shaper decided.

Every function takes plain arrays and returns a plotly figure with labelled axes
and transparent background; `shaper.report.html` gives it the page's colours.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

FloatArray = NDArray[np.float64]

# Blue, orange, green, purple, grey, pink, brown: told apart by readers with
# red-green blindness, and legible on white and on near-black.
COLOURS = ("#e8871e", "#2f81d6", "#2a9d6f", "#9467d8", "#8a929b", "#d6609a", "#a8763e")
PLAIN_COLOUR = "#b3bac2"
LIMIT_COLOUR = "#e5484d"


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


def extremes(times: FloatArray, values: FloatArray, buckets: int) -> tuple[FloatArray, FloatArray]:
    """Thin out a curve, keeping the lowest and the highest point of each bucket.

    Args:
        times: [n], ascending.
        values: [n].
        buckets: of equal numbers of points; two points of each are kept.

    Returns:
        The kept times and values, in order of time. A curve of at most two
        points a bucket comes back as it is.
    """
    count = len(values)
    if buckets < 1 or count <= 2 * buckets:
        return times, values
    edges = np.linspace(0, count, buckets + 1).astype(int)
    kept: list[int] = []
    for begin, end in itertools.pairwise(edges):
        part = values[begin:end]
        kept += sorted({begin + int(part.argmin()), begin + int(part.argmax())})
    return times[kept], values[kept]


def _base(figure: go.Figure, x_title: str, y_title: str) -> go.Figure:
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 62, "r": 14, "t": 34, "b": 48},
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "xanchor": "left"},
        hovermode="closest",
        font={"family": "system-ui, sans-serif"},
    )
    figure.update_xaxes(title_text=x_title, automargin=True, zeroline=False)
    figure.update_yaxes(title_text=y_title, automargin=True, zeroline=False)
    return figure


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
    return _base(figure, "time since the replay's start (s)", "mean power over the window (W)")


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
    _base(figure, "", "power (W)")
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


def distribution(
    names: Sequence[str],
    samples: Sequence[FloatArray],
    x_title: str,
    tail: bool = False,
    logarithmic: bool = True,
) -> go.Figure:
    """Empirical distribution of samples per run.

    Args:
        names: of the runs.
        samples: one array per run.
        x_title: what they are, with unit.
        tail: show the share above x on a logarithmic axis in place of the
            share below it: what is rare becomes visible.
        logarithmic: the axis of the samples, which are then above 0.
    """
    figure = go.Figure()
    for index, (name, values) in enumerate(zip(names, samples, strict=True)):
        if not len(values):
            continue
        levels = _levels(len(values))
        x = np.quantile(values, levels)
        y = 100.0 * (1.0 - levels if tail else levels)
        keep = y > 0 if tail else np.ones(len(y), dtype=bool)
        figure.add_trace(
            go.Scatter(
                x=np.round(x[keep], 4),
                y=y[keep],
                mode="lines",
                name=name,
                line={"color": COLOURS[index], "width": 2},
                hovertemplate="%{x:.4g}: %{y:.3g}%",
            )
        )
    _base(figure, x_title, "share above (%)" if tail else "share at or below (%)")
    if logarithmic:
        figure.update_xaxes(type="log", dtick="D2", minorloglabels="complete")
    if tail:
        figure.update_yaxes(type="log", dtick=1)
    return figure


def _levels(count: int) -> FloatArray:
    """Quantile levels: even in the middle, dense towards the upper end."""
    rare = 1.0 - np.logspace(-1, -np.log10(max(count, 11)), 120)
    last = [1.0 - 0.5 / count, 1.0]
    return np.unique(np.concatenate((np.linspace(0.0, 0.9, 181), rare, last)))


def decision_counts(
    times: FloatArray,
    reasons: Sequence[str],
    bin_seconds: float,
    plain: Collection[str] = ("unconstrained", "idle"),
) -> go.Figure:
    """Decisions by reason over time, stacked.

    Args:
        times: [n] seconds since the replay's start.
        reasons: [n].
        bin_seconds: width of a bar.
        plain: reasons that are drawn in grey.
    """
    figure = go.Figure()
    labels = np.asarray(reasons)
    edges = np.arange(0.0, (float(times.max()) if len(times) else 0.0) + bin_seconds, bin_seconds)
    names, counts = np.unique(labels, return_counts=True)
    coloured = itertools.cycle(COLOURS[:4] + COLOURS[5:])
    for name in names[np.argsort(-counts)]:
        # Grey for steps that nothing held back, so that the others stand out.
        colour = PLAIN_COLOUR if name in plain else next(coloured)
        heights = np.histogram(times[labels == name], edges)[0] / bin_seconds
        figure.add_trace(
            go.Bar(
                x=edges[:-1] + bin_seconds / 2,
                y=np.round(heights, 2),
                name=str(name),
                marker={"color": colour, "line": {"width": 0}},
                hovertemplate="%{x:.0f} s: %{y:.1f}/s",
            )
        )
    figure.update_layout(barmode="stack", bargap=0)
    return _base(figure, "time since the replay's start (s)", "decisions per second")


def chunk_sizes(
    times: FloatArray, prefill_tokens: FloatArray, limit_tokens: FloatArray
) -> go.Figure:
    """Prefill tokens of each step that had any, and the limit that was applied to it.

    Args:
        times: [n] seconds since the replay's start.
        prefill_tokens: [n] scheduled.
        limit_tokens: [n], NaN where there was no limit.
    """
    figure = go.Figure()
    for values, name, colour, size in (
        (limit_tokens, "limit", "#8a929b", 3),
        (prefill_tokens, "scheduled", COLOURS[1], 5),
    ):
        keep = values > 0
        figure.add_trace(
            go.Scatter(
                x=np.round(times[keep], 3),
                y=values[keep],
                mode="markers",
                name=name,
                marker={"color": colour, "size": size, "opacity": 0.75},
                hovertemplate="%{x:.2f} s: %{y:.0f} tokens",
            )
        )
    return _base(figure, "time since the replay's start (s)", "prefill tokens of a step")


def lines(times: FloatArray, series: Sequence[tuple[str, FloatArray]], y_title: str) -> go.Figure:
    """Several series over the same times.

    Args:
        times: [n] seconds since the replay's start.
        series: names and [n] values; NaN is left out.
        y_title: what they are, with unit.
    """
    figure = go.Figure()
    for index, (name, values) in enumerate(series):
        keep = np.isfinite(values)
        x, y = extremes(times[keep], values[keep], 1000)
        figure.add_trace(
            go.Scatter(
                x=np.round(x, 3),
                y=np.round(y, 1),
                mode="lines",
                name=name,
                line={"color": COLOURS[(index + 1) % len(COLOURS)], "width": 1.2},
            )
        )
    return _base(figure, "time since the replay's start (s)", y_title)
