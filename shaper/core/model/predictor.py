"""What predicts steps: the parts of `power_model.StepModel` that others need of one."""

from __future__ import annotations

from typing import Protocol

from shaper.core.types import StepBatch, StepPrediction


class Predictor(Protocol):
    """Predicts steps."""

    def predict(
        self,
        batch: StepBatch,
        *,
        sm_clock_hertz: float | None = None,
        temperature_celsius: float | None = None,
    ) -> StepPrediction:
        """Seconds and joules of a step, all GPUs of the engine."""
        ...


class StepPredictor(Predictor, Protocol):
    """What the controller needs."""

    @property
    def gap_watts(self) -> float:
        """Power between steps, all GPUs of the engine."""
        ...
