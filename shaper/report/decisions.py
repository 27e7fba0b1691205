"""Plots of what the shaper decided."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import numpy as np
import plotly.graph_objects as go

from shaper.report.style import COLOURS, LIMIT_COLOUR, PLAIN_COLOUR, FloatArray, base, extremes


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
    return base(figure, "time since the replay's start (s)", "decisions per second")


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
    for values, name, colour, symbol in (
        (prefill_tokens, "scheduled", COLOURS[1], "circle"),
        (limit_tokens, "limit", LIMIT_COLOUR, "line-ew-open"),
    ):
        keep = values > 0
        figure.add_trace(
            go.Scatter(
                x=np.round(times[keep], 3),
                y=values[keep],
                mode="markers",
                name=name,
                marker={"color": colour, "size": 6, "opacity": 0.75, "symbol": symbol},
                hovertemplate="%{x:.2f} s: %{y:.0f} tokens",
            )
        )
    return base(figure, "time since the replay's start (s)", "prefill tokens of a step")


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
    return base(figure, "time since the replay's start (s)", y_title)
