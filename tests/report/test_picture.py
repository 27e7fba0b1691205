"""The picture of power over time: a file that stands alone, and shows what was measured."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from shaper.report.picture import power_picture
from shaper.report.power import LimitLine, PowerSeries

NOTHING = np.empty(0)
SVG = "{http://www.w3.org/2000/svg}"
LIMIT = LimitLine("limit 500 W & less", 500.0)


def series(name: str, watts: np.ndarray) -> PowerSeries:
    times = 0.1 + 0.001 * np.arange(len(watts))
    return PowerSeries(name, times, watts, NOTHING, NOTHING, NOTHING)


def test_a_run_over_the_limit_is_drawn_over_it():
    """Each run has its own row on one scale; a single window at 700 W is not thinned out."""
    burst = np.full(20_000, 400.0)
    burst[7_000] = 700.0
    root = ET.fromstring(
        power_picture([series("unshaped", burst), series("shaped", np.full(20_000, 400.0))], LIMIT)
    )
    limits = [
        float(line.get("y1", ""))
        for line in root.iter(f"{SVG}line")
        if line.get("class") == "limit"
    ]
    tops = []
    for curve in root.iter(f"{SVG}polyline"):
        points = curve.get("points", "").split()
        assert len(points) <= 800
        tops.append(min(float(point.split(",")[1]) for point in points))
    assert tops[0] < limits[0]
    assert tops[1] > limits[1]
    text = " ".join(each.text or "" for each in root.iter(f"{SVG}text"))
    assert "unshaped: 0.0% of the windows above the limit, highest 700 W" in text
    assert "limit 500 W & less" in text


def test_it_asks_for_nothing_from_elsewhere():
    """It is shown by pages that load no scripts, fonts or styles."""
    drawn = power_picture([series("one", np.full(500, 300.0))], LIMIT)
    assert drawn.count("http") == drawn.count("http://www.w3.org/2000/svg") == 1
    assert "prefers-color-scheme:dark" in drawn


def test_nothing_to_draw_is_refused():
    """An empty picture would look like no power."""
    with pytest.raises(ValueError, match="no run has power"):
        power_picture([series("one", NOTHING)], LIMIT)
