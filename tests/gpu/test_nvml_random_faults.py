"""Any script of faults: the sampler never raises, never shows nonsense, and recovers."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shaper.core.types import PowerState
from shaper.gpu.meter_properties import MeterWatch
from shaper.gpu.nvml import LAST_RETRY_SECONDS, NvmlReader
from shaper.gpu.sampler import Sampler
from tests.gpu.clocks import HandClock
from tests.gpu.fake_faults import Fault
from tests.gpu.fake_nvml import FakeGpu, FakeNvml
from tests.strategies import driver_faults

TICK_SECONDS = 0.02
FAULTY_SECONDS = 6.0
LIMIT_WATTS = 700.0


def check_the_rest(state: PowerState) -> None:
    """What is no power: of all GPUs together, and of each."""
    assert state.temperature_celsius is None or -40.0 <= state.temperature_celsius <= 150.0
    assert state.sm_clock_hertz is None or 0.0 <= state.sm_clock_hertz <= 10e9
    assert state.slowdown_margin_celsius is None or abs(state.slowdown_margin_celsius) <= 150.0
    for gpu in state.gpus:
        held = (gpu.thermal_throttle_seconds, gpu.power_cap_throttle_seconds)
        assert all(seconds is None or 0.0 <= seconds < 4e9 for seconds in held)
        memory = gpu.memory_temperature_celsius
        assert memory is None or -40.0 <= memory <= 150.0


@settings(max_examples=30, deadline=None)
@given(st.lists(driver_faults(FAULTY_SECONDS), max_size=5))
def test_whatever_the_driver_does_states_stay_plausible_and_come_back(
    script: list[Fault],
) -> None:
    """Two GPUs of a recording; six seconds of faults, then a driver that is well."""
    clock = HandClock(50.0)
    gpus = [
        FakeGpu(
            uuid,
            recording="tests/gpu/data/h200_load.csv",
            margin_celsius=30,
            memory_celsius=60,
            sw_thermal_nanoseconds=5,
            hw_thermal_nanoseconds=5,
            power_cap_nanoseconds=5,
        )
        for uuid in ("GPU-a", "GPU-b")
    ]
    fake = FakeNvml(gpus, clock=clock, sleep=clock.advance)
    watch = MeterWatch()
    sampler = Sampler(
        NvmlReader([0, 1], clock, fake), clock, on_state=lambda s: watch.observe(s.gpus, 0.01)
    )
    fake.faults = script
    energy, at = 0.0, -math.inf
    # Faults, the longest pause before a new try, and a while to be believed again.
    while fake.seconds < FAULTY_SECONDS + LAST_RETRY_SECONDS + 5.0:
        clock.advance(TICK_SECONDS if fake.seconds < FAULTY_SECONDS else 0.1)
        sampler.tick()
        state = sampler.latest
        if state is None or state.sampled_seconds == at:
            continue
        at = state.sampled_seconds
        assert state.gpu_count == 2
        for watts in (state.instant_watts, state.average_watts):
            # A limit that a fault raised is still no GPU's beyond 4 times it (10 kW at most).
            assert watts is None or 2.0 <= watts <= 2 * 4.0 * 11_200.0
        if state.energy_joules is not None:
            assert math.isfinite(state.energy_joules)
            assert state.energy_joules >= energy - 1e-6
            energy = state.energy_joules
        check_the_rest(state)
    assert sampler.callback_errors == 0, "nothing but a GpuError leaves the reader"
    assert sampler.latest is not None
    assert sampler.latest.age_seconds(clock()) == 0.0
    assert sampler.latest.enforced_limit_watts == 2 * LIMIT_WATTS
    for facts in watch.facts():
        known = [value for value in astuple(facts) if value is not None]
        assert all(math.isfinite(value) and value >= 0 for value in known)


@pytest.mark.parametrize(
    ("call", "quantity"),
    [
        ("nvmlDeviceGetEnforcedPowerLimit", "enforced_limit_watts"),
        ("nvmlDeviceGetClockInfo", "sm_clock_hertz"),
    ],
)
def test_a_reading_that_was_there_comes_back(call: str, quantity: str) -> None:
    """A driver that says for two seconds that it has no such reading, and then has it again."""
    clock = HandClock(50.0)
    gpu = FakeGpu("GPU-a", recording="tests/gpu/data/h200_load.csv")
    fake = FakeNvml([gpu], clock=clock, sleep=clock.advance)
    sampler = Sampler(NvmlReader([0], clock, fake), clock)
    fake.faults = [
        Fault(
            "code",
            call=call,
            code="NOT_SUPPORTED",
            from_seconds=1.0,
            until_seconds=3.0,
        )
    ]
    seen = []
    for _ in range(150):
        clock.advance(0.1)
        sampler.tick()
        assert sampler.latest is not None
        seen.append(getattr(sampler.latest, quantity))
    assert None in seen
    assert seen[0] is not None
    assert seen[-1] is not None
    if quantity == "enforced_limit_watts":
        assert set(seen) == {None, LIMIT_WATTS}
