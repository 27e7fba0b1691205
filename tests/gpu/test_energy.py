"""Energy where the counter is missing: summed up from power, and never backwards."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.types import GpuSample
from shaper.gpu.energy import EnergyMeter
from shaper.gpu.nvml import NvmlReader
from shaper.gpu.sampler import Sampler
from tests.gpu.clocks import HandClock
from tests.gpu.fake_nvml import FakeGpu, FakeNvml

TICK_SECONDS = 0.02


def run(
    meter: EnergyMeter, begin: float, seconds: float, joules_at: float | None, watts: float | None
) -> list[float | None]:
    """So long at this power; the counter starts from `joules_at`, or is missing."""
    found = []
    for tick in range(round(seconds / TICK_SECONDS)):
        now = begin + tick * TICK_SECONDS
        counted = None if joules_at is None else joules_at + (watts or 0.0) * (now - begin)
        sample = GpuSample(now, 0, instant_watts=watts, energy_joules=counted)
        found.append(meter.fill([sample])[0].energy_joules)
    return found


def test_a_counter_that_works_is_passed_on_as_it_is() -> None:
    """Not a joule is touched."""
    meter = EnergyMeter()
    assert run(meter, 0.0, 5.0, 0.0, 400.0)[-1] == 400.0 * 4.98
    assert not meter.integrated


@pytest.mark.parametrize("counter", [None, 0.0])
def test_without_a_counter_the_power_is_summed_up(counter: float | None) -> None:
    """From the second second on, and it is said; a counter that never moves is none."""
    meter, found = EnergyMeter(), []
    for tick in range(500):
        sample = GpuSample(TICK_SECONDS * tick, 0, average_watts=300.0, energy_joules=counter)
        found.append(meter.fill([sample])[0].energy_joules)
    assert meter.integrated
    assert found[-1] == pytest.approx(300.0 * 9.0, rel=0.01)


def test_what_the_counter_says_on_its_return_counts_once() -> None:
    """Five seconds without it, and then all of them at once."""
    meter = EnergyMeter()
    run(meter, 0.0, 5.0, 0.0, 400.0)
    between = run(meter, 5.0, 5.0, None, 400.0)
    assert meter.integrated
    after = run(meter, 10.0, 5.0, 4000.0, 400.0)
    assert not meter.integrated
    assert between[-1] == pytest.approx(400.0 * 10.0, rel=0.15)
    assert after[-1] == pytest.approx(400.0 * 15.0, rel=0.02)


def test_a_counter_that_was_reset_meanwhile_does_not_hold_energy_up() -> None:
    """The screen lets it go on from where it was: what was integrated stays."""
    meter = EnergyMeter()
    run(meter, 0.0, 5.0, 0.0, 400.0)
    run(meter, 5.0, 5.0, None, 400.0)
    after = run(meter, 10.0, 5.0, 2000.0, 400.0)
    assert after[-1] == pytest.approx(400.0 * 15.0, rel=0.1)


def test_the_sampler_says_it_once_and_the_state_says_it_always(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A GPU without a counter: energy in the state, one line in the log."""
    clock = HandClock(0.0)
    gpu = FakeGpu("GPU-a", energy_millijoules=None)
    fake = FakeNvml([gpu], clock=clock)
    sampler = Sampler(NvmlReader([0], clock, fake), clock)
    for tick in range(200):
        gpu.instant_milliwatts = 400_000 + tick
        clock.advance(TICK_SECONDS)
        sampler.tick()
    assert sampler.latest is not None
    assert sampler.latest.energy_integrated
    assert sampler.report(clock()).energy_integrated
    assert sampler.latest.energy_joules == pytest.approx(400.0 * 3.0, rel=0.02)
    assert [r.message for r in caplog.records if "summed up from power" in r.message] == [
        caplog.records[0].message
    ]


def test_power_that_was_not_read_is_not_made_up() -> None:
    """Over a hole of half a minute nobody knows."""
    meter = EnergyMeter()
    first = run(meter, 0.0, 3.0, None, 400.0)[-1]
    second = run(meter, 33.0, 0.02, None, 400.0)[-1]
    assert first == second


@given(
    st.lists(
        st.tuples(
            st.floats(0.0, 3.0),
            st.one_of(st.none(), st.floats(0.0, 900.0)),
            st.one_of(st.none(), st.floats(1.0, 900.0)),
        ),
        max_size=40,
    )
)
def test_energy_never_falls(steps: list[tuple[float, float | None, float | None]]) -> None:
    """Whatever order counter and power come and go in."""
    meter, now, counted, found = EnergyMeter(), 0.0, 0.0, []
    for pause, rise, watts in steps:
        now += pause
        counted += rise or 0.0
        sample = GpuSample(now, 0, watts, energy_joules=None if rise is None else counted)
        energy = meter.fill([sample])[0].energy_joules
        if energy is not None:
            found.append(energy)
    assert all(after >= before - 1e-6 for before, after in itertools.pairwise(found))
