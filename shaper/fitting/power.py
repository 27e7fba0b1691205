"""The power half of a fit: joules are linear in the power parameters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from shaper.core.power_model import StepModel
from shaper.core.profile import GpuProfile
from shaper.core.types import GpuSample
from shaper.core.work import WorkCoefficients
from shaper.fitting.common import (
    RANGE_RATIO,
    WIDEST_RATIO,
    FittedParameter,
    FloatArray,
    half_widths,
    kept,
    replaced,
    sampled,
    value_of,
)
from shaper.recording import RecordedStep

SHORTEST_WINDOW_SECONDS = 0.5

POWER_PARAMETERS = (
    "power.context_watts",
    "power.gap_watts",
    "power.active_watts",
    "power.joules_per_byte",
    "power.joules_per_kv_byte",
    "power.joules_per_flop",
    "power.sampler_watts",
    "power.leakage_watts_per_celsius",
)


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
        if at - start >= SHORTEST_WINDOW_SECONDS:
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
) -> tuple[GpuProfile, list[FittedParameter], float]:
    from scipy.optimize import least_squares

    celsius = sampled(steps, samples, "temperature_celsius")
    features = _window_features(steps, clocks, celsius, windows, profile, coefficients)
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
        fixed = [index for index in range(len(names)) if index not in free]
        rest = joules - features[:, fixed] @ base[fixed]
        matrix = features[:, free] * scale

        def residuals(
            point: FloatArray, matrix: FloatArray = matrix, rest: FloatArray = rest
        ) -> FloatArray:
            errors: FloatArray = (matrix @ point - rest) / spans
            return errors

        fit = least_squares(
            residuals,
            np.ones(len(free)),
            bounds=(np.zeros(len(free)), np.full(len(free), RANGE_RATIO)),
            loss="soft_l1",
            f_scale=10.0,
        )
        widths = half_widths(fit.jac, fit.fun)
        relative = widths / np.maximum(np.abs(fit.x), 1e-9)
        value = base.copy()
        value[free] = fit.x * scale
        found = {
            names[index]: FittedParameter(
                names[index],
                float(base[index]),
                float(value[index]),
                float(max(0.0, (fit.x[place] - widths[place]) * scale[place])),
                float((fit.x[place] + widths[place]) * scale[place]),
            )
            for place, index in enumerate(free)
        }
        worst = int(np.argmax(relative))
        if relative[worst] <= WIDEST_RATIO:
            break
        reasons[names[free[worst]]] = (
            "the recording says nothing of it"
            if relative[worst] > 20
            else f"the 95% interval is {relative[worst]:.0%} of the value to either side"
        )
        free = [index for place, index in enumerate(free) if place != worst]
        found = {}
        value = base.copy()
    predicted = features @ value
    error = float(np.median(np.abs(predicted / np.maximum(joules, 1e-9) - 1.0)))
    parameters = [
        found[name] if name in found else kept(profile, name, reasons[name]) for name in names
    ]
    kept = {one.name: one.value for one in found.values()}
    return replaced(profile, _in_order(profile, kept)), parameters, error


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


def _window_features(
    steps: Sequence[RecordedStep],
    clocks: Sequence[float | None],
    celsius: Sequence[float | None],
    windows: Sequence[tuple[float, float, float]],
    profile: GpuProfile,
    coefficients: WorkCoefficients,
) -> FloatArray:
    """Joules in each window per unit of each power parameter; shape (windows, parameters)."""
    unit_models = [_unit_model(profile, coefficients, name) for name in POWER_PARAMETERS]
    edges = np.array([windows[0][0], *(window[1] for window in windows)])
    totals = np.zeros((len(edges), len(POWER_PARAMETERS)))
    gap_column = POWER_PARAMETERS.index("power.gap_watts")
    context_column = POWER_PARAMETERS.index("power.context_watts")
    hold = profile.power.gap_hold_seconds
    gpus = float(unit_models[0].gpu_count)
    pieces: list[tuple[float, float, FloatArray]] = []
    last = None
    for step, clock, warm in zip(steps, clocks, celsius, strict=True):
        start, end = step.start_seconds, step.end_seconds
        if last is not None and start > last:
            pieces += _idle_pieces(last, start, hold, gpus, gap_column, context_column)
        joules = np.array(
            [
                model.predict(step.batch, sm_clock_hertz=clock, temperature_celsius=warm).joules
                for model in unit_models
            ]
        )
        seconds = unit_models[0].predict(step.batch, sm_clock_hertz=clock).seconds
        rate = joules / seconds
        pieces.append((start, end, rate))
        last = end
    if last is None:
        return totals[1:]
    first = steps[0].start_seconds
    if edges[0] < first:
        pieces.insert(0, (edges[0], first, _one_hot(context_column, gpus)))
    if edges[-1] > last:
        pieces += _idle_pieces(last, float(edges[-1]), hold, gpus, gap_column, context_column)
    return _integrate(pieces, edges)


def _idle_pieces(
    start: float, end: float, hold: float, gpus: float, gap: int, context: int
) -> list[tuple[float, float, FloatArray]]:
    middle = min(end, start + hold)
    pieces = [(start, middle, _one_hot(gap, gpus))]
    if end > middle:
        pieces.append((middle, end, _one_hot(context, gpus)))
    return pieces


def _one_hot(column: int, value: float) -> FloatArray:
    result = np.zeros(len(POWER_PARAMETERS))
    result[column] = value
    return result


def _integrate(pieces: Sequence[tuple[float, float, FloatArray]], edges: FloatArray) -> FloatArray:
    """Integrals of piecewise-constant rates between successive edges."""
    starts = np.array([piece[0] for piece in pieces])
    ends = np.array([piece[1] for piece in pieces])
    rates = np.array([piece[2] for piece in pieces])
    amounts = (ends - starts)[:, None] * rates
    at = np.empty(2 * len(pieces))
    at[0::2], at[1::2] = starts, ends
    at = np.maximum.accumulate(at)
    running = np.cumsum(amounts, axis=0)
    totals = np.empty((2 * len(pieces), rates.shape[1]))
    totals[1::2] = running
    totals[0::2] = np.vstack([np.zeros(rates.shape[1]), running[:-1]])
    cumulative = np.column_stack(
        [np.interp(edges, at, totals[:, column]) for column in range(rates.shape[1])]
    )
    result: FloatArray = np.diff(cumulative, axis=0)
    return result


def _unit_model(profile: GpuProfile, coefficients: WorkCoefficients, name: str) -> StepModel:
    """A model whose joules are those of one unit of one power parameter."""
    zero = dict.fromkeys(POWER_PARAMETERS, 0.0)
    zero["power.idle_watts"] = 0.0
    if name != "power.context_watts":
        zero[name] = 1.0
    return StepModel(replaced(profile, zero), coefficients)
