"""The joules that each power parameter has a share in, window by window, and their error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from shaper.core.model.power_model import StepModel
from shaper.core.model.profile import GpuProfile
from shaper.core.model.work import WorkCoefficients
from shaper.core.types import GpuSample
from shaper.fitting.common import FloatArray, replaced
from shaper.recording.format import RecordedStep

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

_WHOLE_DEGREE_CELSIUS = 12.0**-0.5  # standard deviation of what rounding to a degree hides
_STEP = 0.01  # of a standard deviation: small, so that no ratio is moved past 1


def sways(
    steps: Sequence[RecordedStep],
    clocks: Sequence[float | None],
    celsius: Sequence[float | None],
    windows: Sequence[tuple[float, float, float]],
    shift: float,
    profile: GpuProfile,
    coefficients: WorkCoefficients,
    latency: Mapping[str, float],
    covariance: FloatArray,
    features: FloatArray,
) -> list[FloatArray]:
    """How the features change with what the power fit takes as known, per standard deviation.

    One matrix for each independent direction in which the latency parameters may be
    wrong, and two for the temperature, which is read in whole degrees: all readings off
    by one error, and the error going from one sign to the other over their range. Each
    acts alike in every window, so the residuals of the power fit do not show it.
    """
    starts = np.array([window[0] for window in windows])
    ends = np.array([window[1] for window in windows])
    span = (float(starts[0]), float(ends[-1]))

    def changed(profile: GpuProfile, celsius: Sequence[float | None]) -> FloatArray:
        pieces = _pieces(steps, clocks, celsius, span, profile, coefficients)
        change: FloatArray = _integrate(pieces, starts + shift, ends + shift) - features
        return change / _STEP

    result: list[FloatArray] = []
    for column in np.linalg.cholesky(covariance).T:
        moves = zip(latency.items(), column, strict=True)
        moved = {name: value * float(np.exp(_STEP * by)) for (name, value), by in moves}
        result.append(changed(replaced(profile, moved), celsius))
    known = [one for one in celsius if one is not None]
    if known:
        middle, reach = (max(known) + min(known)) / 2.0, max((max(known) - min(known)) / 2.0, 1.0)
        by = _STEP * _WHOLE_DEGREE_CELSIUS
        result.append(changed(profile, [None if c is None else c + by for c in celsius]))
        tilted = [None if c is None else c + by * (c - middle) / reach for c in celsius]
        result.append(changed(profile, tilted))
    return result


def best_features(
    steps: Sequence[RecordedStep],
    clocks: Sequence[float | None],
    celsius: Sequence[float | None],
    windows: Sequence[tuple[float, float, float]],
    samples: Sequence[GpuSample],
    profile: GpuProfile,
    coefficients: WorkCoefficients,
) -> tuple[FloatArray, float]:
    """Joules in each window per unit of each power parameter, shape (windows, parameters);
    and the shift of the windows, seconds.

    Where between two readings the counter was refreshed is the same every time when the
    sampler's period and the refresh keep step: the shift that fits best is searched for.
    """
    starts = np.array([window[0] for window in windows])
    ends = np.array([window[1] for window in windows])
    joules = np.array([window[2] for window in windows])
    span = (float(starts[0]), float(ends[-1]))
    pieces = _pieces(steps, clocks, celsius, span, profile, coefficients)
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
    return best, closest


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
