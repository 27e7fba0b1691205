"""The samples of one engine's GPUs as one state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shaper.core.types import ClockEventReasons, GpuSample, PowerState


def summarise(
    samples: Sequence[GpuSample], energy_integrated: bool = False, energy_ratio: float = 1.0
) -> PowerState:
    """The GPUs of one engine as one state.

    A sum is None when one of its GPUs is missing, since a part of it would be too
    low. The state is as old as its oldest sample.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("no samples to summarise")
    reasons = ClockEventReasons.NONE
    for sample in samples:
        reasons |= sample.clock_event_reasons
    return PowerState(
        sampled_seconds=min(sample.read_seconds for sample in samples),
        gpu_count=len(samples),
        instant_watts=_sum(sample.instant_watts for sample in samples),
        average_watts=_sum(sample.average_watts for sample in samples),
        energy_joules=_sum(sample.energy_joules for sample in samples),
        enforced_limit_watts=_sum(sample.enforced_limit_watts for sample in samples),
        sm_clock_hertz=min(_known(sample.sm_clock_hertz for sample in samples), default=None),
        temperature_celsius=max(
            _known(sample.temperature_celsius for sample in samples), default=None
        ),
        clock_event_reasons=reasons,
        gpus=tuple(samples),
        slowdown_margin_celsius=min(
            _known(sample.slowdown_margin_celsius for sample in samples), default=None
        ),
        energy_integrated=energy_integrated,
        energy_ratio=energy_ratio,
    )


def _sum(values: Iterable[float | None]) -> float | None:
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
