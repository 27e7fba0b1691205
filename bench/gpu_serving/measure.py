"""What a run drew, as far as its meter can tell, and what the step model says of it.

A meter that refreshes ten times a second sees no step of 10 ms. What it does see is the
energy counter: its change over half a second is measured joules of known steps and gaps.
So measured and predicted are compared there:

    window joules       the energy counter between two of its refreshes, 0.5 s or more apart
    predicted joules    over the same time, each recorded step at the model's watts for its work,
                        clock and temperature, and what a GPU draws between steps

and by kind of step, with one ratio each by least squares over all windows. A 100 ms mean is
rebuilt from the same steps, all of them times the one ratio that makes the run's joules
those of the counter. It is not measured: no reading resolves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shaper.core.model.power_model import StepModel
from shaper.core.model.shape import ModelShape
from shaper.core.model.work import WorkCoefficients
from shaper.errors import TraceError
from shaper.fitting.common import sampled
from shaper.fitting.power import energy_windows
from shaper.gpu.profiles import load_profile
from shaper.recording.format import Recording
from shaper.traffic.figures import GRID_SECONDS, PowerGrid, window_means

FloatArray = NDArray[np.float64]

KINDS = ("steps of decodes alone", "steps with prompts", "between steps")


@dataclass(frozen=True, slots=True)
class StepErrors:
    """Predicted over measured seconds of steps, less 1."""

    steps: int
    median_ratio: float
    """OperatorRequest: above 0 the model says longer."""
    median_absolute_ratio: float
    p90_absolute_ratio: float


@dataclass(frozen=True, slots=True)
class KindPower:
    """Measured over predicted joules of one kind of step, with its standard error."""

    name: str
    ratio: float
    error: float
    share: float
    """Of the predicted joules of all windows."""


@dataclass(frozen=True, slots=True)
class PowerView:
    """Power of a run. Arrays are by step [s] or by window of the energy counter [w].

    Without an energy counter there is no window and `counter_ratio` is 1.
    """

    grid: PowerGrid
    """Rebuilt from the steps, to the millisecond, in the counter's watts."""
    counter_ratio: float
    """Joules of the counter over predicted joules."""
    window_seconds: FloatArray
    """[w] the windows' ends."""
    measured_watts: FloatArray
    predicted_watts: FloatArray
    prompt_shares: FloatArray
    """[w] share of each window in which a step with prompts ran."""
    kinds: tuple[KindPower, ...]
    step_measured_seconds: FloatArray
    step_predicted_seconds: FloatArray
    step_has_prompts: NDArray[np.bool_]
    instant_times: FloatArray
    """When the instant reading changed."""
    instant_watts: FloatArray

    @property
    def peak_watts(self) -> float:
        """Highest rebuilt 100 ms mean."""
        means = window_means(self.grid, 0.1)
        return float(means.max()) if len(means) else float("nan")

    @property
    def window_errors(self) -> FloatArray:
        """[w] predicted over measured watts, less 1."""
        return np.asarray(self.predicted_watts / self.measured_watts - 1.0, dtype=np.float64)

    def step_errors(self, with_prompts: bool | None = None) -> StepErrors:
        """Of all steps, or of those with or without prompts."""
        keep = np.ones(len(self.step_has_prompts), dtype=bool)
        if with_prompts is not None:
            keep = self.step_has_prompts == with_prompts
        error = self.step_predicted_seconds[keep] / self.step_measured_seconds[keep] - 1.0
        if not len(error):
            nan = float("nan")
            return StepErrors(0, nan, nan, nan)
        return StepErrors(
            len(error),
            float(np.median(error)),
            float(np.median(np.abs(error))),
            float(np.quantile(np.abs(error), 0.9)),
        )


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
    watts = np.array([one.watts for one in found])
    prompts = np.array([step.batch.prefill_tokens > 0 for step in steps])
    edges = _Edges(starts, ends, watts, prompts, model, to_seconds)
    windows = [
        window
        for window in energy_windows(recording.samples)
        if window[0] >= from_seconds and window[1] <= to_seconds
    ]
    lows, highs, joules = (
        np.array([window[i] for window in windows], dtype=np.float64) for i in range(3)
    )
    parts = edges.joules_between(lows, highs)
    spans = highs - lows
    ratio = float(joules.sum() / parts.sum()) if len(joules) else 1.0
    inside = (starts >= from_seconds) & (ends <= to_seconds)
    readings = _changes(recording, from_seconds, to_seconds)
    return PowerView(
        grid=edges.grid(from_seconds, to_seconds, ratio),
        counter_ratio=ratio,
        window_seconds=highs,
        measured_watts=joules / spans,
        predicted_watts=np.asarray(parts.sum(axis=1) / spans, dtype=np.float64),
        prompt_shares=edges.prompt_shares(lows, highs),
        kinds=_by_kind(parts, joules, spans),
        step_measured_seconds=(ends - starts)[inside],
        step_predicted_seconds=np.array([one.seconds for one in found])[inside],
        step_has_prompts=prompts[inside],
        instant_times=readings[0],
        instant_watts=readings[1],
    )


class _Edges:
    """Predicted joules as a function of time, in three parts (see `KINDS`)."""

    def __init__(
        self,
        starts: FloatArray,
        ends: FloatArray,
        watts: FloatArray,
        prompts: NDArray[np.bool_],
        model: StepModel,
        to_seconds: float,
    ) -> None:
        power, gpus = model.profile.power, model.gpu_count
        gaps = np.maximum(np.concatenate((starts[1:], [to_seconds + 1.0])) - ends, 0.0)
        held = np.minimum(gaps, power.gap_hold_seconds)
        # Each step is followed by gap power for a while, then by that of a mere context.
        self._times = np.column_stack((starts, ends, ends + held)).ravel()
        zero = np.zeros_like(watts)
        context = np.full_like(watts, power.context_watts * gpus)
        gap = np.full_like(watts, power.gap_watts * gpus)
        rates = np.zeros((len(self._times), len(KINDS)))
        rates[0::3, 0], rates[0::3, 1] = np.where(prompts, zero, watts), watts * prompts
        rates[1::3, 2], rates[2::3, 2] = gap, context
        self._joules = _integral(self._times, rates)
        self._prompt_seconds = _integral(self._times, (rates[:, 1] > 0)[:, None].astype(np.float64))
        self._before_watts = power.context_watts * gpus

    def _until(self, times: FloatArray) -> FloatArray:
        parts = [np.interp(times, self._times, column) for column in self._joules.T]
        # Before the first step there is a context and nothing else.
        parts[2] = parts[2] - np.maximum(self._times[0] - times, 0.0) * self._before_watts
        return np.column_stack(parts)

    def joules_between(self, lows: FloatArray, highs: FloatArray) -> FloatArray:
        """[w, kinds] predicted joules."""
        return np.asarray(self._until(highs) - self._until(lows), dtype=np.float64)

    def prompt_shares(self, lows: FloatArray, highs: FloatArray) -> FloatArray:
        """[w] share of the time in steps with prompts."""
        column = self._prompt_seconds[:, 0]
        seconds = np.interp(highs, self._times, column) - np.interp(lows, self._times, column)
        return np.asarray(seconds / (highs - lows), dtype=np.float64)

    def grid(self, from_seconds: float, to_seconds: float, ratio: float) -> PowerGrid:
        """Mean watts of each millisecond."""
        count = max(0, int((to_seconds - from_seconds) / GRID_SECONDS))
        edges = np.asarray(from_seconds + np.arange(count + 1) * GRID_SECONDS, dtype=np.float64)
        joules = self._until(edges).sum(axis=1)
        return PowerGrid(from_seconds, np.asarray(np.diff(joules) / GRID_SECONDS * ratio))


def _integral(times: FloatArray, rates: FloatArray) -> FloatArray:
    """Cumulative integral of rates that hold from each time to the next."""
    pieces = np.maximum(np.diff(times), 0.0)[:, None] * rates[:-1]
    return np.vstack((np.zeros(rates.shape[1]), np.cumsum(pieces, axis=0)))


def _by_kind(parts: FloatArray, joules: FloatArray, spans: FloatArray) -> tuple[KindPower, ...]:
    """One ratio of measured to predicted joules for each kind of step."""
    used = [k for k in range(len(KINDS)) if len(joules) and parts[:, k].sum() > 0.01 * joules.sum()]
    if len(joules) < 4 * len(used) or not used:
        return ()
    matrix = parts[:, used] / spans[:, None]
    watts = joules / spans
    ratios, _, rank, _ = np.linalg.lstsq(matrix, watts, rcond=1e-6)
    if rank < len(used):
        return ()
    spread = float(np.sum((matrix @ ratios - watts) ** 2)) / (len(joules) - len(used))
    errors = np.sqrt(np.diag(np.linalg.inv(matrix.T @ matrix)) * spread)
    total = parts.sum()
    return tuple(
        KindPower(KINDS[k], float(ratio), float(error), float(parts[:, k].sum() / total))
        for k, ratio, error in zip(used, ratios, errors, strict=True)
    )


def _changes(
    recording: Recording, from_seconds: float, to_seconds: float
) -> tuple[FloatArray, FloatArray]:
    """The instant reading of all GPUs, at the times at which it changed."""
    totals: dict[float, float] = {}
    for sample in recording.samples:
        if sample.instant_watts is not None and from_seconds <= sample.read_seconds <= to_seconds:
            at = sample.read_seconds
            totals[at] = totals.get(at, 0.0) + sample.instant_watts
    times = np.array(sorted(totals), dtype=np.float64)
    watts = np.array([totals[at] for at in times.tolist()], dtype=np.float64)
    new = np.concatenate(([True], np.diff(watts) != 0.0))[: len(watts)]
    return times[new], watts[new]


def largest(values: Sequence[float] | FloatArray) -> float:
    """The largest value, NaN of none."""
    return float(max(values)) if len(values) else float("nan")
