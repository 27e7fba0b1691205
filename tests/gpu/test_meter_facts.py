"""What is found out about a meter from its readings."""

from __future__ import annotations

import math
import random

import pytest

from shaper.core.types import GpuSample
from shaper.gpu.meter_properties import MeterFacts, MeterWatch, measure_meter
from shaper.gpu.nvml import NvmlReader
from tests.gpu.clocks import HandClock
from tests.gpu.fake_faults import Fault
from tests.gpu.fake_nvml import FakeGpu, FakeNvml

READ_SECONDS = 0.02


def watched(
    seconds: float,
    *,
    refresh: float = 0.1,
    window: float = 1.0,
    counter: bool = True,
    steady: bool = False,
    misses: int = 0,
) -> MeterFacts:
    """Power that changes every 300 ms, a meter of that refresh, an average of that window."""
    chance, watch = random.Random(5), MeterWatch()
    levels = [400.0 if steady else chance.uniform(100.0, 700.0) for _ in range(2000)]

    def joules(at: float) -> float:
        whole = int(at / 0.3)
        return 0.3 * sum(levels[:whole]) + (at - 0.3 * whole) * levels[whole]

    for tick in range(round(seconds / READ_SECONDS)):
        now = 10.0 + tick * READ_SECONDS
        shown = int(now / refresh + 1e-9) * refresh
        watch.observe(
            [
                GpuSample(
                    now,
                    0,
                    instant_watts=(joules(shown) - joules(shown - 0.025)) / 0.025,
                    average_watts=(joules(shown) - joules(shown - window)) / window,
                    energy_joules=joules(shown)
                    if counter and not (misses and tick % misses == 0)
                    else None,
                )
            ],
            0.0005,
        )
    (facts,) = watch.facts()
    return facts


@pytest.mark.parametrize("refresh", [0.04, 0.1, 0.2])
def test_refreshes_are_the_time_between_changes(refresh: float) -> None:
    """Seen at reads of 20 ms, from refreshes that often show the value before."""
    facts = watched(20.0, refresh=refresh)
    assert facts.energy_refresh_seconds == pytest.approx(refresh, rel=0.1)
    assert facts.average_refresh_seconds == pytest.approx(refresh, rel=0.1)
    assert facts.read_interval_seconds == pytest.approx(READ_SECONDS)
    assert facts.read_p50_seconds == facts.read_p99_seconds == 0.0005


@pytest.mark.parametrize("counter", [True, False])
@pytest.mark.parametrize("window", [0.5, 1.0, 2.0])
def test_the_window_of_the_average_shows_under_a_load_that_moves(
    window: float, counter: bool
) -> None:
    """By the counter; without one by the instant reading."""
    facts = watched(25.0, window=window, counter=counter)
    assert facts.average_window_seconds == pytest.approx(window, rel=0.2)


def test_a_counter_that_is_missing_now_and_then_is_still_the_measure() -> None:
    """One read in nine fails: two sums must not be mixed."""
    assert watched(25.0, misses=9).average_window_seconds == pytest.approx(1.0, rel=0.2)


def test_what_does_not_show_is_not_guessed() -> None:
    """Steady power has the same mean over any window, and two seconds hold too few refreshes."""
    assert watched(25.0, steady=True).average_window_seconds is None
    short = watched(0.3)
    assert (short.energy_refresh_seconds, short.average_window_seconds) == (None, None)


def test_a_hole_in_the_reads_is_no_refresh() -> None:
    """The sampler was away every second: the meter has not slowed down."""
    watch = MeterWatch()
    for tick in range(1000):
        now = tick * READ_SECONDS + (tick // 50) * 3.0
        watch.observe([GpuSample(now, 0, energy_joules=float(tick // 5))], 0.001)
    (facts,) = watch.facts()
    assert facts.energy_refresh_seconds == pytest.approx(0.1, rel=0.1)


def test_it_remembers_no_more_after_an_hour_than_after_a_minute() -> None:
    """An engine runs for months."""
    watch, chance = MeterWatch(), random.Random(1)

    def kept() -> int:
        gpu = watch._gpus[0]
        fields = sum(len(changes._intervals) for changes in gpu.fields.values())
        return fields + len(gpu.reads) + len(gpu.window._history._times) + len(watch._costs)

    sizes = []
    for tick in range(30_000):
        watts = chance.uniform(100.0, 700.0)
        sample = GpuSample(0.02 * tick, 0, watts, watts if tick % 5 else None, 8.0 * tick)
        watch.observe([sample], 1e-3)
        if tick in (3_000, 29_999):
            sizes.append(kept())
    assert sizes[1] <= sizes[0] * 1.1


@pytest.mark.parametrize("value", [1e15, math.nan, -5.0])
def test_a_reading_of_nonsense_does_not_spoil_what_follows(value: float) -> None:
    """One read in the first seconds, and the same is found out as without it."""
    clock = HandClock(0.0)
    fault = Fault("garbage", value=value, from_seconds=1.0, until_seconds=1.02)
    recording = "tests/gpu/data/h200_load.csv"
    fake = FakeNvml([FakeGpu("GPU-a", recording=recording)], clock=clock, faults=[fault])
    (facts,) = measure_meter(NvmlReader([0], clock, fake), 12.0, clock, clock.advance)
    assert facts.energy_refresh_seconds == pytest.approx(0.1, rel=0.05)
    assert facts.average_window_seconds == pytest.approx(1.0, rel=0.2)


def test_measuring_reads_for_as_long_as_asked() -> None:
    """Over a recording of an emulated H200: 100 ms refreshes and a mean of a second."""
    clock = HandClock(0.0)
    fake = FakeNvml([FakeGpu("GPU-a", recording="tests/gpu/data/h200_load.csv")], clock=clock)
    (facts,) = measure_meter(NvmlReader([0], clock, fake), 12.0, clock, clock.advance)
    assert clock() == pytest.approx(12.0, abs=0.01)
    assert facts.instant_refresh_seconds == pytest.approx(0.1, rel=0.05)
    assert facts.average_window_seconds == pytest.approx(1.0, rel=0.2)


@pytest.mark.parametrize("far", [0.2, 0.5, 5.0])
@pytest.mark.parametrize("count", [8, 10, 64])
def test_intervals_of_two_kinds_have_a_refresh_too(far: float, count: int) -> None:
    """Half of them are 20 ms and half are far longer: no interval is near the middle of the
    two, and the short ones are the refresh."""
    watch, now = MeterWatch(), 0.0
    # The first value is no change, and the first change ends no interval.
    intervals = [0.02, *random.Random(count).sample([0.02, far] * (count // 2), count), 0.02]
    for change, seconds in enumerate(intervals):
        end = now + seconds
        while now < end - 0.001:
            watch.observe([GpuSample(now, 0, instant_watts=400.0 + change)], 0.001)
            now += 0.02
    (facts,) = watch.facts()
    assert facts.instant_refresh_seconds == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_times_and_values_facts_are_told(seed: int) -> None:
    """Any mix of intervals, of values that are missing, and of readings that don't change."""
    chance, watch, now = random.Random(seed), MeterWatch(), 0.0
    for _ in range(400):
        now += chance.choice([0.0, 0.001, 0.02, 0.02, 0.1, 0.24, 0.3, 3.0])
        watts = chance.choice([None, 100.0, 400.0, chance.uniform(0.0, 700.0), math.nan])
        joules = chance.choice([None, now, 400.0 * now, 1e9])
        watch.observe([GpuSample(now, 0, watts, watts, joules)], chance.random())
        watch.facts()


def test_rounding_in_the_last_digits_is_no_refresh() -> None:
    """The meter refreshes each 100 ms; between, its readings differ in the 11th digit."""
    watch, chance = MeterWatch(), random.Random(3)
    for tick in range(1000):
        shown = tick // 5
        noise = 1.0 + 1e-10 * chance.uniform(-1.0, 1.0)
        watts, joules = (400.0 + shown % 7) * noise, (1e6 + 40.0 * shown) * noise
        watch.observe([GpuSample(READ_SECONDS * tick, 0, watts, watts, joules)], 0.001)
    (facts,) = watch.facts()
    assert facts.instant_refresh_seconds == pytest.approx(0.1, rel=0.01)
    assert facts.average_refresh_seconds == pytest.approx(0.1, rel=0.01)
    assert facts.energy_refresh_seconds == pytest.approx(0.1, rel=0.01)
