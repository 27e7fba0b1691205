"""What all plots share: colours, axes, and thinning out of long curves.

Figures have a transparent background; `shaper.report.html` gives them the
page's colours.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]

# Blue, orange, green, purple, grey, pink, brown: told apart by readers with
# red-green blindness, and legible on white and on near-black.
COLOURS = ("#e8871e", "#2f81d6", "#2a9d6f", "#9467d8", "#8a929b", "#d6609a", "#a8763e")
PLAIN_COLOUR = "#b3bac2"
LIMIT_COLOUR = "#e5484d"


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


def base(figure: go.Figure, x_title: str, y_title: str) -> go.Figure:
    """Give a figure its axis titles, legend and transparent background."""
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
