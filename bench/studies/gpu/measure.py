"""What a run drew, as far as its meter can tell, and what the step model says of it.

A meter that refreshes ten times a second sees no step of 10 ms. What it does see is the
energy counter: its change over half a second is measured joules of known steps and gaps.
So measured and predicted are compared there:

    window joules       the energy counter between two of its refreshes, 0.5 s or more apart
    predicted joules    over the same time, each recorded step at the model's watts for its work,
                        clock and temperature, and what a GPU draws between steps

A 100 ms mean is rebuilt from the same steps, all of them times the one ratio that makes the
run's joules those of the counter. It is not measured: no reading resolves it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.studies.gpu.points import changes, series
from shaper.core.model.power_model import StepModel
from shaper.core.model.shape import ModelShape
from shaper.core.model.work import WorkCoefficients
from shaper.errors import TraceError
from shaper.fitting.common import sampled
from shaper.fitting.power import energy_windows
from shaper.gpu.profiles import load_profile
from shaper.recording.format import Recording
from shaper.traffic.figures import GRID_SECONDS, PowerGrid

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Errors:
    """Predicted over measured, less 1; above 0 the model says more. NaN where there is none."""

    count: int
    median_ratio: float
    median_absolute_ratio: float
    p90_absolute_ratio: float


def errors_of(predicted: FloatArray, measured: FloatArray) -> Errors:
    """Of two arrays, element by element."""
    if not len(measured):
        return Errors(0, np.nan, np.nan, np.nan)
    error = predicted / measured - 1.0
    middle, tail = np.quantile(np.abs(error), (0.5, 0.9))
    return Errors(len(error), float(np.median(error)), float(middle), float(tail))


@dataclass(frozen=True, slots=True)
class PowerView:
    """Power of a run. Arrays are by window of the energy counter [w] or by reading [r].

    Without an energy counter there is no window and `counter_ratio` is 1.
    """

    grid: PowerGrid
    """Rebuilt from the steps, to the millisecond, in the counter's watts."""
    counter_ratio: float
    """Joules of the counter over predicted joules."""
    measured_watts: FloatArray
    """[w] of the energy counter."""
    windows: Errors
    """Of the watts of these windows."""
    decodes: Errors
    """Of the seconds of steps without prompts."""
    prompts: Errors
    """Of the seconds of steps with prompts."""
    instant_times: FloatArray
    """[r] when the instant reading changed."""
    instant_watts: FloatArray


def recording_model(recording: Recording, profile: str | None = None) -> StepModel:
    """The step model of a recording's model, on its own GPU's profile or on another.

    Raises:
        TraceError: the recording names no model or no GPU.
        ConfigError: there is no such profile.
    """
    name = profile or recording.meta.get("gpu")
    config = recording.meta.get("model_config")
    if not name or not isinstance(config, dict):
        raise TraceError("the recording does not say which GPU and model it is of")
    shape = ModelShape.from_hf_config(config)
    return StepModel(
        load_profile(str(name)),
        WorkCoefficients.from_shape(shape, int(recording.meta.get("tensor_parallel", 1))),
    )


def power_view(
    recording: Recording, model: StepModel, from_seconds: float, to_seconds: float
) -> PowerView:
    """What a run drew between two times.

    Raises:
        TraceError: no step was recorded then.
    """
    steps = [
        step
        for step in recording.steps
        if step.batch.tokens > 0
        and step.end_seconds >= from_seconds - 1.0
        and step.start_seconds <= to_seconds
    ]
    if not steps:
        raise TraceError("the recording has no step in the time of the traffic")
    clocks = sampled(steps, recording.samples, "sm_clock_hertz")
    celsius = sampled(steps, recording.samples, "temperature_celsius", smooth=True)
    found = [
        model.predict(step.batch, sm_clock_hertz=clock, temperature_celsius=warm)
        for step, clock, warm in zip(steps, clocks, celsius, strict=True)
    ]
    starts = np.array([step.start_seconds for step in steps])
    ends = np.array([step.end_seconds for step in steps])
    predicted = _Predicted(starts, ends, np.array([one.watts for one in found]), model, to_seconds)
    windows = np.array(
        [
            w
            for w in energy_windows(recording.samples)
            if from_seconds <= w[0] and w[1] <= to_seconds
        ]
    ).reshape(-1, 3)
    lows, highs, joules = windows.T
    parts = predicted.joules_until(highs) - predicted.joules_until(lows)
    ratio = float(joules.sum() / parts.sum()) if len(joules) else 1.0
    inside = (starts >= from_seconds) & (ends <= to_seconds)
    samples = [s for s in recording.samples if from_seconds <= s.read_seconds <= to_seconds]
    readings = np.array(changes(series(samples, "instant_watts"))).reshape(-1, 2)
    edges = np.arange(from_seconds, to_seconds, GRID_SECONDS, dtype=np.float64)
    fine = np.diff(predicted.joules_until(edges)) / GRID_SECONDS * ratio
    measured = np.asarray(joules / (highs - lows), dtype=np.float64)
    lengths = (ends - starts)[inside]
    seconds = np.array([one.seconds for one in found])[inside]
    prompts = np.array([step.batch.prefill_tokens > 0 for step in steps])[inside]
    return PowerView(
        grid=PowerGrid(from_seconds, np.asarray(fine, dtype=np.float64)),
        counter_ratio=ratio,
        measured_watts=measured,
        windows=errors_of(parts / (highs - lows), measured),
        decodes=errors_of(seconds[~prompts], lengths[~prompts]),
        prompts=errors_of(seconds[prompts], lengths[prompts]),
        instant_times=readings[:, 0],
        instant_watts=readings[:, 1],
    )


class _Predicted:
    """Predicted joules as a function of time: steps [s], and what a GPU draws between them."""

    def __init__(
        self,
        starts: FloatArray,
        ends: FloatArray,
        watts: FloatArray,
        model: StepModel,
        to_seconds: float,
    ) -> None:
        power, gpus = model.profile.power, model.gpu_count
        self._context_watts = power.context_watts * gpus
        gaps = np.maximum(np.concatenate((starts[1:], [to_seconds + 1.0])) - ends, 0.0)
        held = np.minimum(gaps, power.gap_hold_seconds)
        # Each step is followed by gap power for a while, then by that of a mere context.
        self._times = np.column_stack((starts, ends, ends + held)).ravel()
        between = (
            np.full_like(watts, power.gap_watts * gpus),
            np.full_like(watts, self._context_watts),
        )
        rates = np.column_stack((watts, *between)).ravel()
        pieces = np.maximum(np.diff(self._times), 0.0) * rates[:-1]
        self._joules = np.concatenate(([0.0], np.cumsum(pieces)))

    def joules_until(self, times: FloatArray) -> FloatArray:
        """[t] before the first step there is a context and nothing else."""
        before = np.maximum(self._times[0] - times, 0.0) * self._context_watts
        return np.asarray(np.interp(times, self._times, self._joules) - before, dtype=np.float64)
