"""Plots of distributions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from shaper.report.style import COLOURS, FloatArray, base


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
    base(figure, x_title, "share above (%)" if tail else "share at or below (%)")
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
