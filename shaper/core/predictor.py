"""What predicts steps."""

from __future__ import annotations

from typing import Protocol

from shaper.core.types import StepBatch, StepPrediction


class StepPredictor(Protocol):
    """The part of `power_model.StepModel` that the controller needs."""

    @property
    def gap_watts(self) -> float:
        """Power between steps, all GPUs of the engine."""
        ...

    def predict(
        self,
        batch: StepBatch,
        *,
        sm_clock_hertz: float | None = None,
        temperature_celsius: float | None = None,
    ) -> StepPrediction:
        """Seconds and joules of a step, all GPUs of the engine."""
        ...
