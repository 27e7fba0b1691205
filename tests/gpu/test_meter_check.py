"""A counter and a power reading that differ are told apart from a meter that merely lags."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest

from shaper.core.model.power_model import StepModel
from shaper.core.model.work import WorkCoefficients
from shaper.core.types import GpuSample, StepBatch
from shaper.emulator.shapes import load_shape
from shaper.emulator.silicon import EmulatedGpus
from shaper.gpu.energy import EnergyMeter
from shaper.gpu.profiles import known_profiles, load_profile
from shaper.gpu.validation import SampleValidator

DECODES = StepBatch(decode_requests=64, decode_tokens=64, decode_context_tokens=64_000)
PROMPT = StepBatch(0, 0, 0, 1, 1024, 1024, 1024 * 1024, 1024 * 1024)
TICK_SECONDS = 0.02

Bend = Callable[[GpuSample], GpuSample]
Seen = tuple[float, float, bool]


def load(name: str, seed: int, seconds: float, busy_ratio: float, bend: Bend) -> list[Seen]:
    """Busy and idle times of some hundred milliseconds; time, ratio and verdict of each tick."""
    profile = load_profile(name)
    model = StepModel(profile, WorkCoefficients.from_shape(load_shape("llama-3.1-8b")))
    gpus = EmulatedGpus(profile, model, start_seconds=0.0, seed=seed)
    rng, screen, meter = random.Random(seed), SampleValidator(), EnergyMeter()
    now, turn_ends, busy, seen = 0.0, 0.0, False, []
    while now < seconds:
        if now >= turn_ends:
            busy = rng.random() < busy_ratio
            turn_ends = now + rng.choice((0.05, 0.1, 0.3, 1.0, 2.0))
        while busy and gpus.free_at_seconds < now + TICK_SECONDS:
            gpus.launch(rng.choice((DECODES, PROMPT)), max(now, gpus.free_at_seconds))
        now += TICK_SECONDS * rng.uniform(0.9, 1.3)
        samples = tuple(bend(sample) for sample in gpus.sample(now))
        meter.fill(screen.pass_on(samples))
        seen.append((now, meter.read_over_counted_ratio, meter.apart))
    return seen


@pytest.mark.parametrize("busy_ratio", [0.3, 0.7])
@pytest.mark.parametrize("name", known_profiles())
def test_a_meter_that_lags_is_not_blamed(name: str, busy_ratio: float) -> None:
    """Gain error, refreshes and a mean of a second, under load that comes and goes."""
    for seed in range(2):
        seen = load(name, seed, 40.0, busy_ratio, lambda sample: sample)
        assert not any(apart for _, _, apart in seen)
        assert max(ratio for _, ratio, _ in seen) < 1.03


@pytest.mark.parametrize("counts", [0.57, 0.8, 1.25, 1.5])
@pytest.mark.parametrize("busy_ratio", [0.5, 1.0])
def test_a_counter_that_is_wrong_is_found(counts: float, busy_ratio: float) -> None:
    """Within ten seconds at steady power; for half a minute the load swings, and it is found."""

    def bend(sample: GpuSample) -> GpuSample:
        return dataclasses.replace(sample, energy_joules=(sample.energy_joules or 0.0) * counts)

    seen = load("h200-sxm", 1, 60.0, busy_ratio, bend)
    found = next(now for now, _, apart in seen if apart)
    assert found < (10.0 if busy_ratio == 1.0 else 45.0)
    assert seen[-1][1] == pytest.approx(1.0 / counts, rel=0.1)


def test_a_counter_that_drifts_and_a_reading_that_is_wrong() -> None:
    """Right for twenty seconds and then less by a percent a second; a reading of two thirds."""
    last = total = 0.0

    def drift(sample: GpuSample) -> GpuSample:
        nonlocal last, total
        joules, after = sample.energy_joules or 0.0, max(0.0, sample.read_seconds - 20.0)
        total += (joules - last) * max(0.6, 1.0 - 0.01 * after)
        last = joules
        return dataclasses.replace(sample, energy_joules=total)

    seen = load("h200-sxm", 2, 60.0, 1.0, drift)
    assert not any(apart for now, _, apart in seen if now < 20.0)
    assert seen[-1][2]

    def low(sample: GpuSample) -> GpuSample:
        return dataclasses.replace(sample, average_watts=(sample.average_watts or 0.0) / 1.5)

    seen = load("h200-sxm", 2, 20.0, 1.0, low)
    assert seen[-1][1] < 0.7


def test_without_one_of_the_two_nothing_is_said() -> None:
    """No average reading, or no counter: there is nothing to compare."""
    for missing in ("average_watts", "energy_joules"):
        bend = lambda sample, name=missing: dataclasses.replace(sample, **{name: None})  # noqa: E731
        assert not any(apart for _, _, apart in load("h200-sxm", 3, 10.0, 0.7, bend))
