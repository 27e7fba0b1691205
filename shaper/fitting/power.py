"""The power half of a fit: joules are linear in the power parameters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shaper.core.model.profile import GpuProfile
from shaper.core.model.work import WorkCoefficients
from shaper.core.types import GpuSample
from shaper.fitting.common import (
    AT_BOUND,
    RANGE_RATIO,
    WIDEST_RATIO,
    FittedParameter,
    FloatArray,
    half_widths,
    inverse,
    kept,
    replaced,
    sampled,
    value_of,
)
from shaper.fitting.features import POWER_PARAMETERS, best_features, sways
from shaper.recording.format import RecordedStep

# Several refreshes of a meter: the counter's grain is then a small part of a window's joules.
SHORTEST_WINDOW_SECONDS = 0.5
SOFT_WATTS = 10.0
"""A window further off than this pulls less than its square."""


def energy_windows(samples: Sequence[GpuSample]) -> list[tuple[float, float, float]]:
    """(from, to, joules) between changes of the energy counter, all GPUs together.

    The counter is refreshed between two readings: the change is put half way between
    the reading that still had the old value and the one with the new.
    """
    readings: dict[float, float] = {}
    count = len({sample.gpu_index for sample in samples})
    seen: dict[float, int] = {}
    for sample in samples:
        if sample.energy_joules is not None:
            at = sample.read_seconds
            readings[at] = readings.get(at, 0.0) + sample.energy_joules
            seen[at] = seen.get(at, 0) + 1
    complete = sorted(at for at, number in seen.items() if number == count)
    changes: list[tuple[float, float]] = []
    for before, at in itertools.pairwise(complete):
        if readings[at] > readings[before]:
            changes.append(((before + at) / 2.0, readings[at]))
    windows: list[tuple[float, float, float]] = []
    if not changes:
        return windows
    start, joules = changes[0]
    for at, value in changes[1:]:
        if at - start >= SHORTEST_WINDOW_SECONDS - 1e-6:
            windows.append((start, at, value - joules))
            start, joules = at, value
    return windows


def fit_power(
    samples: Sequence[GpuSample],
    steps: Sequence[RecordedStep],
    clocks: Sequence[float | None],
    windows: Sequence[tuple[float, float, float]],
    profile: GpuProfile,
    coefficients: WorkCoefficients,
    latency: Mapping[str, float],
    covariance: FloatArray,
) -> tuple[GpuProfile, list[FittedParameter], float]:
    """Fits the power parameters that the windows identify.

    The latency parameters that the profile took from the same recording, and the
    covariance of their logarithms, widen the intervals: their error is in every window.

    Returns:
        The profile with them, the outcome of each parameter, and the median relative
        error of the windows' joules.
    """
    celsius = sampled(steps, samples, "temperature_celsius", smooth=True)
    features, shift = best_features(steps, clocks, celsius, windows, samples, profile, coefficients)
    changes = sways(
        steps, clocks, celsius, windows, shift, profile, coefficients, latency, covariance, features
    )
    joules = np.array([window[2] for window in windows])
    spans = np.array([window[1] - window[0] for window in windows])
    names = list(POWER_PARAMETERS)
    base = np.array([value_of(profile, name) for name in names])
    free = [index for index in range(len(names)) if np.abs(features[:, index]).max() > 0.0]
    reasons = {
        name: "nothing in the recording depends on it"
        for index, name in enumerate(names)
        if index not in free
    }
    found: dict[str, FittedParameter] = {}
    value = base.copy()
    while free:
        scale = np.maximum(base[free], 1e-15)
        fit, matrix = _solved(features, joules, spans, base, free, scale)
        value = base.copy()
        value[free] = fit.x * scale
        shifts = [(change @ value) / spans for change in changes]
        widths = _widened(np.asarray(fit.jac), fit.fun, matrix / spans[:, None], shifts)
        relative = widths / np.maximum(np.abs(fit.x), 1e-9)
        lows, highs = np.maximum(0.0, (fit.x - widths) * scale), (fit.x + widths) * scale
        found = {
            names[index]: FittedParameter(names[index], float(a), float(b), float(c), float(d))
            for index, a, b, c, d in zip(free, base[free], value[free], lows, highs, strict=True)
        }
        bound = (fit.x < 1e-3) | (fit.x > RANGE_RATIO - 1e-3)
        worst = int(np.argmax(np.where(bound, relative + 1e6, relative)))
        if not bound[worst] and relative[worst] <= WIDEST_RATIO:
            break
        reasons[names[free[worst]]] = AT_BOUND if bound[worst] else _too_wide(relative[worst])
        free = [index for place, index in enumerate(free) if place != worst]
        found = {}
        value = base.copy()
    predicted = features @ value
    error = float(np.median(np.abs(predicted / np.maximum(joules, 1e-9) - 1.0)))
    parameters = [
        found[name] if name in found else kept(profile, name, reasons[name]) for name in names
    ]
    decided = {one.name: one.value for one in found.values()}
    return replaced(profile, _in_order(profile, decided)), parameters, error


def _solved(
    features: FloatArray,
    joules: FloatArray,
    spans: FloatArray,
    base: FloatArray,
    free: Sequence[int],
    scale: FloatArray,
) -> tuple[Any, FloatArray]:
    """scipy's fit of the free parameters over their scale, and its matrix [windows, free]."""
    from scipy.optimize import least_squares

    fixed = [index for index in range(len(base)) if index not in free]
    rest = joules - features[:, fixed] @ base[fixed]
    matrix = features[:, free] * scale

    def residuals(point: FloatArray) -> FloatArray:
        errors: FloatArray = (matrix @ point - rest) / spans
        return errors

    fit = least_squares(
        residuals,
        np.ones(len(free)),
        bounds=(np.zeros(len(free)), np.full(len(free), RANGE_RATIO)),
        loss="soft_l1",
        f_scale=SOFT_WATTS,
    )
    return fit, matrix


def _widened(
    jacobian: FloatArray, residuals: FloatArray, matrix: FloatArray, shifts: Sequence[FloatArray]
) -> FloatArray:
    """Half widths of 95% intervals, with shifts of all residuals, each a standard deviation.

    The solution moves by one Gauss-Newton step: the Jacobian has the weights of the loss.
    """
    weights = 1.0 / np.sqrt(1.0 + (residuals / SOFT_WATTS) ** 2)
    variances = np.zeros(matrix.shape[1])
    for shift in shifts:
        variances += (inverse(jacobian) @ (matrix.T @ (weights * shift))) ** 2
    result: FloatArray = np.hypot(half_widths(jacobian, residuals), 1.96 * np.sqrt(variances))
    return result


def _too_wide(relative: float) -> str:
    if relative > 20.0:
        return "the recording says nothing of it"
    return f"the 95% interval is {relative:.0%} of the value to either side"


def _in_order(profile: GpuProfile, values: Mapping[str, float]) -> dict[str, float]:
    """The values, and the idle power lowered where the fitted context is below it."""
    result = dict(values)
    context = result.get("power.context_watts", profile.power.context_watts)
    gap = result.get("power.gap_watts", profile.power.gap_watts)
    if "power.context_watts" in result and context > gap:
        result["power.context_watts"] = context = gap
    if gap < context:
        result["power.context_watts"] = context = gap
    if profile.power.idle_watts > context:
        result["power.idle_watts"] = context
    return result
