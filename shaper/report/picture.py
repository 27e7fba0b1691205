"""One picture of power over time as an SVG of its own, for pages that run no scripts.

It brings its colours along for light and dark pages, and asks the reader's browser which to take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from shaper.report.power import LimitLine, PowerSeries
from shaper.report.style import COLOURS, LIMIT_COLOUR, FloatArray, extremes

_WIDTH, _ROW_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 880, 150, 56, 22, 2, 26
# Two points each: what a line of this width can show.
_BUCKETS = 400
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#24292f}.axis{stroke:#8a929b;stroke-width:1}"
    f".limit{{stroke:{LIMIT_COLOUR};stroke-width:1.5;stroke-dasharray:6 4}}"
    f"text.label{{fill:{LIMIT_COLOUR}}}"
    ".power{fill:none;stroke-width:1.1;stroke-linejoin:round}"
    "@media(prefers-color-scheme:dark){text:not(.label){fill:#d7dde4}}"
)


def power_picture(runs: Sequence[PowerSeries], limit: LimitLine) -> str:
    """Sliding mean power of each run in a row of its own, on one scale, with the limit.

    Returns:
        The SVG.

    Raises:
        ValueError: no run has a point.
    """
    drawn = [run for run in runs if len(run.window_times)]
    if not drawn:
        raise ValueError("no run has power to draw")
    seconds = max(float(run.window_times[-1]) for run in drawn)
    highest = max(limit.watts, *(float(run.window_watts.max()) for run in drawn))
    most = 200 * math.ceil(highest / 200)
    height = _TOP + _ROW_HEIGHT * len(drawn) + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(_label(drawn, limit), quote=True)}"><style>{_STYLE}</style>'
    ]
    for index, run in enumerate(drawn):
        parts += _row(run, index, limit, seconds, most)
    base = height - _BOTTOM
    step = max(1, round(seconds / 6 / 5)) * 5
    for second in range(0, int(seconds) + 1, step):
        x = _x(second, seconds)
        parts.append(f'<text x="{x:.0f}" y="{base + 16}" text-anchor="middle">{second} s</text>')
    return "".join(parts) + "</svg>\n"


def _label(runs: Sequence[PowerSeries], limit: LimitLine) -> str:
    highest = ", ".join(f"{run.name} up to {run.window_watts.max():.0f} W" for run in runs)
    return f"Power over time: {highest}; {limit.label}"


def _x(second: float, seconds: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * second / seconds


def _row(run: PowerSeries, index: int, limit: LimitLine, seconds: float, most: int) -> list[str]:
    top = _TOP + _ROW_HEIGHT * index
    bottom, room = top + _ROW_HEIGHT, _ROW_HEIGHT - 30

    def y(watts: float) -> float:
        return bottom - room * watts / most

    times, watts = extremes(run.window_times, run.window_watts, _BUCKETS)
    points = " ".join(
        f"{_x(float(time), seconds):.1f},{y(float(value)):.1f}"
        for time, value in zip(times, watts, strict=True)
    )
    right = _WIDTH - _RIGHT
    at = y(limit.watts)
    over = _over_share(run.window_watts, limit.watts)
    parts = [
        f'<text x="{_LEFT}" y="{bottom - room - 8}" font-weight="600">{escape(run.name)}: '
        f"{over:.1%} of the windows above the limit, highest {run.window_watts.max():.0f} W</text>",
        f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>',
        f'<polyline class="power" stroke="{COLOURS[index % len(COLOURS)]}" points="{points}"/>',
        f'<line class="limit" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>',
        f'<text class="label" x="{right}" y="{bottom - room - 8}" text-anchor="end">'
        f"{escape(limit.label)}</text>",
    ]
    for value in range(0, most + 1, 200 if most <= 1000 else 400):
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y(value) + 4:.0f}" text-anchor="end">{value} W</text>'
        )
    return parts


def _over_share(watts: FloatArray, limit_watts: float) -> float:
    return float(np.mean(watts > limit_watts))
