"""The latency half of a fit: log step seconds against the step model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import exp

import numpy as np

from shaper.core.model.power_model import StepModel
from shaper.core.model.profile import GpuProfile
from shaper.core.model.work import WorkCoefficients
from shaper.fitting.common import (
    AT_BOUND,
    RANGE_RATIO,
    WIDEST_RATIO,
    FittedParameter,
    FloatArray,
    covariance_of,
    half_widths,
    kept,
    replaced,
    value_of,
)
from shaper.recording.format import RecordedStep

_MOST_STEPS = 20_000

# What of the latency law a recording of one model can tell apart. The time that does not
# depend on the batch is one sum: `kernel.layer_seconds` takes it; the time per sampled
# row is one too: `kernel.sampler_seconds_per_logit` takes that.
LATENCY_PARAMETERS = (
    "memory.gemm_ratio",
    "memory.attention_ratio",
    "compute.gemm_ratio",
    "compute.attention_ratio",
    "kernel.layer_seconds",
    "kernel.sampler_seconds_per_logit",
    "host.prefill_seconds",
    "host.returned_request_seconds",
    "link.allreduce_seconds",
)


def fit_latency(
    steps: Sequence[RecordedStep],
    clocks: Sequence[float | None],
    profile: GpuProfile,
    coefficients: WorkCoefficients,
) -> tuple[GpuProfile, list[FittedParameter], FloatArray]:
    """Fits the latency parameters that the steps identify.

    Returns:
        The profile with them, the outcome of each parameter, and the covariance of the
        logarithms of those that were identified, in their order.
    """
    from scipy.optimize import least_squares

    model = StepModel(profile, coefficients)
    chosen = np.arange(len(steps))
    if len(steps) > _MOST_STEPS:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, _MOST_STEPS, replace=False))
    part = [(steps[int(i)], clocks[int(i)]) for i in chosen]
    seconds = np.array([step.end_seconds - step.start_seconds for step, _ in part])
    reasons = {name: _used_in(name, steps, model) for name in LATENCY_PARAMETERS}
    names = [name for name in LATENCY_PARAMETERS if not reasons[name]]
    found: dict[str, FittedParameter] = {}
    covariance = np.zeros((0, 0))
    while names:
        start, low, high = _start_and_bounds(profile, names)

        def residuals(point: FloatArray, names: list[str] = names) -> FloatArray:
            candidate = StepModel(
                replaced(profile, dict(zip(names, np.exp(point), strict=True))), coefficients
            )
            predicted = [
                candidate.predict(step.batch, sm_clock_hertz=clock).seconds for step, clock in part
            ]
            errors: FloatArray = np.log(np.array(predicted) / seconds)
            return errors

        fit = least_squares(residuals, start, bounds=(low, high), loss="soft_l1", f_scale=0.05)
        widths = half_widths(np.asarray(fit.jac), fit.fun)
        ends = np.minimum(widths, 50.0)
        found = {
            name: FittedParameter(name, value_of(profile, name), exp(a), exp(b), exp(c))
            for name, a, b, c in zip(names, fit.x, fit.x - ends, fit.x + ends, strict=True)
        }
        bound = np.isclose(fit.x, low, atol=1e-3) | np.isclose(fit.x, high, atol=1e-3)
        worst = int(np.argmax(np.where(bound, widths + 1e3, widths)))
        if not bound[worst] and widths[worst] <= math.log1p(WIDEST_RATIO):
            covariance = covariance_of(np.asarray(fit.jac), fit.fun)
            break
        reasons[names[worst]] = AT_BOUND if bound[worst] else _too_wide(widths[worst])
        names = [name for index, name in enumerate(names) if index != worst]
        found = {}
    result = [
        found[name] if name in found else kept(profile, name, reasons[name])
        for name in LATENCY_PARAMETERS
    ]
    fitted = replaced(profile, {one.name: one.value for one in found.values()})
    return fitted, result, covariance


def _start_and_bounds(
    profile: GpuProfile, names: Sequence[str]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """[parameters] of the logarithms; a ratio is at most 1."""
    start = np.log([max(value_of(profile, name), 1e-12) for name in names])
    low, high = start - math.log(RANGE_RATIO), start + math.log(RANGE_RATIO)
    ratios = np.array([name.endswith("_ratio") for name in names])
    high = np.where(ratios, np.minimum(high, 0.0), high)
    return np.clip(start, low + 1e-9, high - 1e-9), low, high


def _used_in(name: str, steps: Sequence[RecordedStep], model: StepModel) -> str:
    """Why a latency parameter can't show in these steps; empty when it can."""
    if name == "link.allreduce_seconds" and model.gpu_count == 1:
        return "one GPU: no all-reduce"
    if name in ("host.prefill_seconds", "compute.attention_ratio") and not any(
        step.batch.prefill_tokens for step in steps
    ):
        return "no step has a prefill"
    if name == "host.returned_request_seconds" and not any(
        step.batch.returned_requests for step in steps
    ):
        return "no request came back after being held"
    return ""


def _too_wide(width: float) -> str:
    if width > 5.0:
        return "the recording says nothing of it"
    return f"the 95% interval is a factor of {math.exp(width):.1f} to either side"
