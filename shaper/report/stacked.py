"""Power over time of engines that share a limit, one on top of the other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from shaper.report.power import LimitLine
from shaper.report.style import COLOURS, LIMIT_COLOUR, FloatArray, base

# Few enough for a page with several runs of many engines, many enough for a wide screen.
_BUCKETS = 700


@dataclass(frozen=True, slots=True)
class StackedPower:
    """One run: `watts` [engines, n] at [n] `times`, in seconds since its start."""

    name: str
    engines: tuple[str, ...]
    times: FloatArray
    watts: FloatArray


def highest_of_buckets(
    watts: FloatArray, buckets: int
) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Places to draw: of each of `buckets` equal spans that with the highest sum.

    Args:
        watts: [engines, n].
        buckets: at least 1.

    Returns:
        [at most buckets] places in ascending order; all where there are no more.
    """
    total = watts.sum(axis=0)
    if len(total) <= buckets:
        return np.arange(len(total))
    edges = np.linspace(0, len(total), buckets + 1).astype(int)
    return np.array([a + int(total[a:b].argmax()) for a, b in itertools.pairwise(edges)])


def stacked_power(runs: Sequence[StackedPower], limits: Sequence[LimitLine] = ()) -> go.Figure:
    """A row for each run; the upper edge is the sum, thinned out so that its peaks stay."""
    figure = make_subplots(
        rows=len(runs),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.3 / max(2, len(runs) + 1),
        subplot_titles=[run.name for run in runs],
    )
    for row, run in enumerate(runs, start=1):
        places = highest_of_buckets(run.watts, _BUCKETS)
        for index, (engine, watts) in enumerate(zip(run.engines, run.watts, strict=True)):
            figure.add_trace(
                go.Scatter(
                    x=np.round(run.times[places], 3),
                    y=np.round(watts[places], 1),
                    mode="lines",
                    line={"color": COLOURS[index % len(COLOURS)], "width": 0.6},
                    stackgroup=f"run {row}",
                    name=engine,
                    legendgroup=engine,
                    showlegend=row == 1,
                    hovertemplate="%{x:.2f} s: %{y:.0f} W",
                ),
                row=row,
                col=1,
            )
        for limit in limits:
            figure.add_hline(
                y=limit.watts,
                row=row,
                col=1,
                line={"color": LIMIT_COLOUR, "width": 1.5, "dash": "dash"},
            )
    base(figure, "", "power (W)")
    figure.update_xaxes(title_text="time since the start (s)", row=len(runs), col=1)
    figure.update_layout(margin_t=56, legend_y=1.04)
    longest = max((float(run.times[-1]) for run in runs if len(run.times)), default=1.0)
    highest = max(
        (float(run.watts.sum(axis=0).max()) for run in runs if len(run.times)), default=1.0
    )
    figure.update_xaxes(range=[0.0, longest])
    # One scale for all rows: they are there to be compared.
    figure.update_yaxes(range=[0.0, 1.05 * highest])
    return figure
