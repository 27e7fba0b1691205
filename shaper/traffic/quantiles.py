"""Quantiles of one figure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of one figure, in its unit; NaN where nothing was measured."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def quantiles(values: NDArray[np.float64]) -> Quantiles:
    """Mean, median, p90, p99 and maximum of a [n] array, NaN when it is empty."""
    if not len(values):
        nan = float("nan")
        return Quantiles(nan, nan, nan, nan, nan)
    p50, p90, p99 = (float(v) for v in np.percentile(values, (50, 90, 99)))
    return Quantiles(float(values.mean()), p50, p90, p99, float(values.max()))
