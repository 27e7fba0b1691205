"""Fits a GPU profile to a recording of steps and meter samples.

Latency first: log step seconds against the step model, at the SM clock that was
sampled. Then power: joules are linear in the power parameters, so each window between
two changes of the energy counter gives one linear equation. Both by SciPy's bounded
least squares with a soft L1 loss; a parameter's interval comes from the Jacobian at the
optimum, and a power parameter's also from what the latency fit and the thermometer
leave open. A parameter whose 95% interval is wider than `WIDEST_RATIO` of its value is
not identified: it goes back to the profile's value and the rest is fitted again.

Steps and windows while something held the clocks down (a cap, heat, a brake) are left
out: the voltage there is not known, and the clock changes faster than it is sampled.
What a meter can't tell of itself is its gain: power parameters are in its watts.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from shaper.core.model.power_model import StepModel
from shaper.core.model.profile import GpuProfile
from shaper.core.model.work import WorkCoefficients
from shaper.errors import TraceError
from shaper.fitting.common import FittedParameter, kept, overlaps, sampled, throttled_seconds
from shaper.fitting.features import POWER_PARAMETERS
from shaper.fitting.latency import fit_latency
from shaper.fitting.power import SHORTEST_WINDOW_SECONDS, energy_windows, fit_power
from shaper.recording.format import Recording

# With fewer, intervals are wider than what a profile is good for.
_FEWEST_STEPS = 50
_FEWEST_WINDOWS = 12


@dataclasses.dataclass(frozen=True, slots=True)
class FitResult:
    """The fitted profile and what is known of the fit."""

    profile: GpuProfile
    parameters: tuple[FittedParameter, ...]
    steps: int
    """Steps that the latency fit saw."""
    windows: int
    """Energy windows that the power fit saw."""
    seconds_error: float
    """Median relative error of step seconds."""
    joules_error: float | None
    """Median relative error of the energy windows; None without any."""


def fit_recording(
    recording: Recording, profile: GpuProfile, coefficients: WorkCoefficients
) -> FitResult:
    """Fits latency, then power.

    Raises:
        TraceError: the recording has too few steps.
    """
    steps = [step for step in recording.steps if step.batch.tokens > 0]
    if len(steps) < _FEWEST_STEPS:
        raise TraceError(
            f"the recording has {len(steps)} steps with tokens; a fit needs at least "
            f"{_FEWEST_STEPS}"
        )
    held = throttled_seconds(recording.samples)
    clocks = sampled(steps, recording.samples, "sm_clock_hertz")
    free = [i for i, s in enumerate(steps) if not overlaps(held, s.start_seconds, s.end_seconds)]
    if len(free) < _FEWEST_STEPS:
        free = list(range(len(steps)))
    seen = [steps[i] for i in free]
    seen_clocks = [clocks[i] for i in free]
    fitted, latency, covariance = fit_latency(seen, seen_clocks, profile, coefficients)
    model = StepModel(fitted, coefficients)
    errors = [
        model.predict(s.batch, sm_clock_hertz=c).seconds / (s.end_seconds - s.start_seconds) - 1
        for s, c in zip(seen, seen_clocks, strict=True)
    ]
    windows = [
        window
        for window in energy_windows(recording.samples)
        if not overlaps(held, window[0], window[1])
    ]
    joules_error: float | None = None
    if len(windows) < _FEWEST_WINDOWS:
        reason = (
            f"only {len(windows)} windows of {SHORTEST_WINDOW_SECONDS} s between changes of the "
            "energy counter with the clocks free"
        )
        power = [kept(profile, name, reason) for name in POWER_PARAMETERS]
    else:
        fitted, power, joules_error = fit_power(
            recording.samples,
            steps,
            clocks,
            windows,
            fitted,
            coefficients,
            {one.name: one.value for one in latency if one.identified},
            covariance,
        )
    return FitResult(
        profile=fitted,
        parameters=(*latency, *power),
        steps=len(seen),
        windows=len(windows),
        seconds_error=float(np.median(np.abs(errors))),
        joules_error=joules_error,
    )
