"""GPUs that the predictor can't represent, to prove what is learned and what is promised.

A plant takes the model's place under `shaper.emulator.silicon.EmulatedGpus`, with a
profile of its own, since idle and gap power come from there. Its errors:

    scaled      all seconds, all joules, or both, are off by one ratio
    terms       each term of the model is off by a ratio of its own
    cliff       steps with more than some tokens take longer
    ceiling     a step's power saturates: it never exceeds a level
    steeper     power above a level rises more than the model says
    drifting    all joules swing slowly around the model's
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from shaper.core.model.power_model import StepModel
from shaper.core.model.profile import GpuProfile
from shaper.core.types import StepBatch, StepPrediction
from shaper.emulator.meter import Meter

Bend = Callable[[StepBatch, StepPrediction], StepPrediction]

# What `terms` can set wrong, and the profile's numbers behind each.
TERMS: dict[str, tuple[tuple[str, str], ...]] = {
    "base": (("power", "context_watts"), ("power", "gap_watts"), ("power", "idle_watts")),
    "active": (("power", "active_watts"), ("power", "sampler_watts")),
    "byte": (("power", "joules_per_byte"), ("power", "joules_per_kv_byte")),
    "flop": (("power", "joules_per_flop"),),
    "bandwidth": (("memory", "bandwidth_bytes_per_second"),),
    "compute": (("compute", "flops_per_second"),),
    "overhead": (
        ("kernel", "gemm_seconds"),
        ("kernel", "attention_seconds"),
        ("kernel", "layer_seconds"),
        ("kernel", "step_seconds"),
    ),
}


def with_terms(profile: GpuProfile, ratios: Mapping[str, float]) -> GpuProfile:
    """A profile whose terms (see `TERMS`) are multiplied by these ratios."""
    for term, ratio in ratios.items():
        for group, name in TERMS[term]:
            numbers = getattr(profile, group)
            numbers = replace(numbers, **{name: getattr(numbers, name) * ratio})
            profile = replace(profile, **{group: numbers})
    return profile


class TrueGpu:
    """A step model with a bend in it.

    Args:
        model: what it starts from; its profile is the emulated GPU's.
        bend: makes a step's true seconds and joules from the model's, all GPUs together.
    """

    def __init__(self, model: StepModel, bend: Bend | None = None) -> None:
        self.profile = model.profile
        self.gpu_count = model.gpu_count
        self.gap_watts = model.gap_watts
        self._model = model
        self._bend = bend

    def predict(
        self,
        batch: StepBatch,
        *,
        sm_clock_hertz: float | None = None,
        temperature_celsius: float | None = None,
    ) -> StepPrediction:
        """What a step truly takes, all GPUs together."""
        prediction = self._model.predict(
            batch, sm_clock_hertz=sm_clock_hertz, temperature_celsius=temperature_celsius
        )
        return prediction if self._bend is None else self._bend(batch, prediction)


def terms(model: StepModel, ratios: Mapping[str, float]) -> TrueGpu:
    """Each term off by its own ratio."""
    return TrueGpu(StepModel(with_terms(model.profile, ratios), model.coefficients))


def scaled(model: StepModel, *, seconds_ratio: float = 1.0, joules_ratio: float = 1.0) -> TrueGpu:
    """Everything off by one ratio; with `joules_ratio`, what is drawn between steps as well."""
    base = with_terms(model.profile, {"base": joules_ratio})

    def bend(batch: StepBatch, step: StepPrediction) -> StepPrediction:
        # The step's joules without its base are the model's; the base scales with it.
        joules = step.joules + (model.gap_watts - changed.gap_watts) * step.seconds
        return StepPrediction(step.seconds * seconds_ratio, joules * joules_ratio)

    changed = StepModel(base, model.coefficients)
    return TrueGpu(changed, bend)


def cliff(model: StepModel, above_tokens: int, seconds_ratio: float = 1.2) -> TrueGpu:
    """Steps of more than `above_tokens` take longer, at the same power."""

    def bend(batch: StepBatch, step: StepPrediction) -> StepPrediction:
        if batch.tokens <= above_tokens:
            return step
        return StepPrediction(step.seconds * seconds_ratio, step.joules * seconds_ratio)

    return TrueGpu(model, bend)


def ceiling(model: StepModel, watts: float) -> TrueGpu:
    """A step's mean power never exceeds `watts`, all GPUs together; its seconds are right."""

    def bend(batch: StepBatch, step: StepPrediction) -> StepPrediction:
        return StepPrediction(step.seconds, min(step.joules, watts * step.seconds))

    return TrueGpu(model, bend)


def steeper(model: StepModel, above_watts: float, slope_ratio: float = 1.5) -> TrueGpu:
    """What a step draws above `above_watts` counts `slope_ratio` times."""

    def bend(batch: StepBatch, step: StepPrediction) -> StepPrediction:
        excess = max(0.0, step.joules - above_watts * step.seconds)
        return StepPrediction(step.seconds, step.joules + (slope_ratio - 1.0) * excess)

    return TrueGpu(model, bend)


class Drifting(TrueGpu):
    """A plant whose step joules swing by `swing_ratio` within each `period_seconds`.

    Set `clock` to what tells the engine's time; until then it stands still.
    """

    def __init__(
        self, model: StepModel, *, swing_ratio: float = 0.15, period_seconds: float = 120.0
    ) -> None:
        super().__init__(model, self._swing)
        self.clock: Callable[[], float] = lambda: 0.0
        self._swing_ratio, self._period_seconds = swing_ratio, period_seconds

    def _swing(self, batch: StepBatch, step: StepPrediction) -> StepPrediction:
        turn = 2.0 * math.pi * self.clock() / self._period_seconds
        ratio = 1.0 + self._swing_ratio * math.sin(turn)
        return StepPrediction(step.seconds, step.joules * ratio)


def metered_ratio(profile: GpuProfile, gpu_count: int, meter_seed: int) -> float:
    """What the meters of `EmulatedGpus(..., seed=meter_seed)` show over the true watts.

    All GPUs of an engine draw the same, so the mean of their gains is that of the sum.
    The offsets are left out: every profile's are 0.
    """
    gains = [Meter(profile.meter, meter_seed * 1009 + index).gain for index in range(gpu_count)]
    return sum(gains) / gpu_count
