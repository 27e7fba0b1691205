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
    AT_BOUND,
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
) -> tuple[GpuProfile, list[FittedParameter], float]:
    """Fits the power parameters that the windows identify.

    Returns:
        The profile with them, the outcome of each parameter, and the median relative
        error of the windows' joules.
    """
    from scipy.optimize import least_squares

    celsius = sampled(steps, samples, "temperature_celsius", smooth=True)
    features = _best_features(steps, clocks, celsius, windows, samples, profile, coefficients)
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
        widths = half_widths(np.asarray(fit.jac), fit.fun)
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


def _best_features(
    steps: Sequence[RecordedStep],
    clocks: Sequence[float | None],
    celsius: Sequence[float | None],
    windows: Sequence[tuple[float, float, float]],
    samples: Sequence[GpuSample],
    profile: GpuProfile,
    coefficients: WorkCoefficients,
) -> FloatArray:
    """Joules in each window per unit of each power parameter; shape (windows, parameters).

    Where between two readings the counter was refreshed is the same every time when the
    sampler's period and the refresh keep step: the shift that fits best is searched for.
    """
    starts = np.array([window[0] for window in windows])
    ends = np.array([window[1] for window in windows])
    joules = np.array([window[2] for window in windows])
    pieces = _pieces(
        steps, clocks, celsius, (float(starts[0]), float(ends[-1])), profile, coefficients
    )
    times = np.unique([sample.read_seconds for sample in samples])
    reach = float(np.median(np.diff(times))) / 2.0
    centre = closest = 0.0
    best_cost = float("inf")
    best = _integrate(pieces, starts, ends)
    for width in (reach, reach / 6.0, reach / 36.0):
        for shift in centre + np.linspace(-width, width, 9):
            features = _integrate(pieces, starts + shift, ends + shift)
            scale = np.maximum(np.abs(features).max(axis=0), 1e-30)
            found = np.linalg.lstsq(features / scale, joules, rcond=1e-9)[0]
            cost = float(np.abs(features / scale @ found - joules).sum())
            if cost < best_cost:
                best_cost, best, closest = cost, features, float(shift)
        centre = closest
    return best


def _pieces(
    steps: Sequence[RecordedStep],
    clocks: Sequence[float | None],
    celsius: Sequence[float | None],
    span: tuple[float, float],
    profile: GpuProfile,
    coefficients: WorkCoefficients,
) -> list[tuple[float, float, FloatArray]]:
    """(from, to, watts per unit of each parameter): steps, gaps and idle time."""
    unit_models = [_unit_model(profile, coefficients, name) for name in POWER_PARAMETERS]
    gap = POWER_PARAMETERS.index("power.gap_watts")
    context = POWER_PARAMETERS.index("power.context_watts")
    hold = profile.power.gap_hold_seconds
    gpus = float(unit_models[0].gpu_count)
    first, last = steps[0].start_seconds, steps[0].start_seconds
    pieces: list[tuple[float, float, FloatArray]] = []
    if span[0] - 1.0 < first:
        pieces.append((span[0] - 1.0, first, _one_hot(context, gpus)))
    for step, clock, warm in zip(steps, clocks, celsius, strict=True):
        if step.start_seconds > last:
            pieces += _idle_pieces(last, step.start_seconds, hold, gpus, gap, context)
        found = [
            model.predict(step.batch, sm_clock_hertz=clock, temperature_celsius=warm)
            for model in unit_models
        ]
        rate = np.array([one.joules for one in found]) / found[0].seconds
        pieces.append((step.start_seconds, step.end_seconds, rate))
        last = step.end_seconds
    if span[1] + 1.0 > last:
        pieces += _idle_pieces(last, span[1] + 1.0, hold, gpus, gap, context)
    return pieces


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


def _integrate(
    pieces: Sequence[tuple[float, float, FloatArray]], starts: FloatArray, ends: FloatArray
) -> FloatArray:
    """Integrals of piecewise-constant rates from each start to its end."""
    begin = np.array([piece[0] for piece in pieces])
    finish = np.array([piece[1] for piece in pieces])
    rates = np.array([piece[2] for piece in pieces])
    running = np.cumsum((finish - begin)[:, None] * rates, axis=0)
    at = np.empty(2 * len(pieces))
    at[0::2], at[1::2] = begin, finish
    at = np.maximum.accumulate(at)
    totals = np.empty((2 * len(pieces), rates.shape[1]))
    totals[1::2] = running
    totals[0::2] = np.vstack([np.zeros(rates.shape[1]), running[:-1]])
    columns = range(rates.shape[1])
    result: FloatArray = np.column_stack(
        [np.interp(ends, at, totals[:, k]) - np.interp(starts, at, totals[:, k]) for k in columns]
    )
    return result


def _unit_model(profile: GpuProfile, coefficients: WorkCoefficients, name: str) -> StepModel:
    """A model whose joules are those of one unit of one power parameter."""
    zero = dict.fromkeys(POWER_PARAMETERS, 0.0)
    zero["power.idle_watts"] = 0.0
    if name != "power.context_watts":
        zero[name] = 1.0
    return StepModel(replaced(profile, zero), coefficients)
