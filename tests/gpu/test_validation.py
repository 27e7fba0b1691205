"""Which readings are believed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.types import ClockEventReasons, GpuSample
from shaper.gpu.validation import SampleValidator


def sample(at_seconds: float = 0.0, **values: float | None) -> GpuSample:
    fields: dict[str, float | None] = {"instant_watts": 400.0, "enforced_limit_watts": 700.0}
    fields.update(values)
    return GpuSample(read_seconds=at_seconds, gpu_index=0, **fields)  # type: ignore[arg-type]


def energies(*readings: tuple[float, float | None]) -> list[float | None]:
    """What a screen makes of counter readings, given as (seconds, joules)."""
    screen = SampleValidator()
    return [
        screen.pass_on([sample(at_seconds, energy_joules=joules)])[0].energy_joules
        for at_seconds, joules in readings
    ]


@pytest.mark.parametrize("field", ["instant_watts", "average_watts"])
@pytest.mark.parametrize("watts", [math.nan, math.inf, -math.inf, -5.0, 0.0, 0.4, 2801.0, 4e5])
def test_watts_that_no_gpu_draws_are_missing(field: str, watts: float) -> None:
    """NaN, negative, a thousandth, a thousandfold, above four times the limit."""
    screen = SampleValidator()
    (passed,) = screen.pass_on([sample(**{field: watts})])
    assert getattr(passed, field) is None
    assert screen.rejected_readings == 1


@pytest.mark.parametrize("watts", [1.0, 60.0, 700.0, 900.0, 2800.0])
def test_watts_that_a_gpu_may_draw_pass(watts: float) -> None:
    """A step may pass the enforced limit for some milliseconds."""
    screen = SampleValidator()
    (passed,) = screen.pass_on([sample(instant_watts=watts)])
    assert passed.instant_watts == watts
    assert screen.rejected_readings == 0


@pytest.mark.parametrize("limit", [math.nan, 0.7, 7e5])
def test_an_absurd_limit_neither_passes_nor_widens_the_range(limit: float) -> None:
    """Watts are then held against what boards exist."""
    screen = SampleValidator()
    (passed,) = screen.pass_on([sample(enforced_limit_watts=limit, instant_watts=3000.0)])
    assert (passed.enforced_limit_watts, passed.instant_watts) == (None, None)
    assert screen.rejected_readings == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sm_clock_hertz", 1.98e12),
        ("sm_clock_hertz", -1.0),
        ("memory_clock_hertz", math.nan),
        ("temperature_celsius", 61_000.0),
        ("temperature_celsius", -300.0),
        ("memory_temperature_celsius", 255.0),
        ("slowdown_margin_celsius", -1e9),
        ("slowdown_margin_celsius", math.inf),
        ("thermal_throttle_seconds", math.nan),
        ("brake_throttle_seconds", -1.0),
        ("power_cap_throttle_seconds", 1.8e10),
    ],
)
def test_other_fields_have_their_range(field: str, value: float) -> None:
    """A field that is wrong does not take the others with it."""
    (passed,) = SampleValidator().pass_on([sample(**{field: value})])
    assert getattr(passed, field) is None
    assert passed.instant_watts == 400.0


def test_energy_counts_from_the_first_reading() -> None:
    """The counter's own zero is arbitrary."""
    assert energies((0.0, 9000.0), (1.0, 9400.0), (2.0, 9900.0)) == [0.0, 400.0, 900.0]


def test_a_missing_reading_is_made_up_for_by_the_next() -> None:
    """The counter holds what was spent meanwhile."""
    assert energies((0.0, 10.0), (1.0, None), (2.0, 810.0)) == [0.0, None, 800.0]


@pytest.mark.parametrize("wrong", [0.0, 9.4, 9_400_000.0, math.nan, -9400.0])
def test_one_bad_counter_reading_is_skipped(wrong: float) -> None:
    """It is not believed, and what follows counts on as if it had not been."""
    seen = energies((0.0, 9000.0), (0.1, wrong), (0.2, 9080.0), (0.3, 9120.0))
    assert seen == [0.0, None, 80.0, 120.0]


def test_a_reset_counter_counts_on_from_the_second_reading() -> None:
    """A driver that was reloaded starts at zero; published energy never goes backwards."""
    seen = energies((0.0, 9000.0), (0.1, 9040.0), (0.2, 3.0), (0.3, 43.0), (0.4, 83.0))
    assert seen == [0.0, 40.0, None, 80.0, 120.0]


def test_a_counter_that_stands_still_is_stuck_until_it_moves() -> None:
    """Refreshes of 100 ms are no fault, a second without one is."""
    seen = energies((0.0, 40.0), (0.1, 50.0), (0.2, 50.0), (1.0, 50.0), (1.2, 50.0), (1.3, 60.0))
    assert seen == [0.0, 10.0, 10.0, 10.0, None, 20.0]


def test_a_stuck_counter_takes_the_watts_with_it() -> None:
    """They come from the same meter, and a frozen one looks like a steady load."""
    screen = SampleValidator()
    for at_seconds, joules in ((0.0, 10.0), (0.1, 20.0)):
        screen.pass_on([sample(at_seconds, energy_joules=joules)])
    (passed,) = screen.pass_on([sample(3.0, energy_joules=20.0, average_watts=390.0)])
    assert (passed.instant_watts, passed.average_watts) == (None, None)
    assert screen.rejected_readings == 1


def test_a_counter_that_never_moved_does_not_cost_the_watts() -> None:
    """Some drivers answer with a constant where the counter is not supported."""
    screen = SampleValidator()
    for at_seconds in (0.0, 1.0, 3.0, 9.0):
        (passed,) = screen.pass_on([sample(at_seconds, energy_joules=0.0)])
    assert passed.instant_watts == 400.0
    assert screen.rejected_readings == 0


def frozen(
    seconds: float, joules_per_second: float | None, **values: object
) -> tuple[GpuSample, SampleValidator]:
    """The last of the samples of a while in which the watts don't change at all."""
    screen, passed = SampleValidator(), sample()
    for tick in range(round(seconds / 0.02) + 1):
        now = 0.02 * tick
        # The counter moves every 100 ms.
        joules = None if joules_per_second is None else (tick // 5) * 0.1 * joules_per_second
        (passed,) = screen.pass_on([sample(now, energy_joules=joules, **values)])  # type: ignore[arg-type]
    return passed, screen


@pytest.mark.parametrize(("rate", "believed"), [(400.0, True), (430.0, True), (500.0, False)])
def test_frozen_watts_are_believed_only_if_the_counter_agrees(rate: float, believed: bool) -> None:
    """400 W without a change for 1.2 s, and a counter that rises by so many joules a second."""
    passed, screen = frozen(1.2, rate)
    assert (passed.instant_watts == 400.0) is believed
    assert passed.energy_joules is not None
    assert (screen.rejected_readings == 0) is believed


def test_frozen_watts_are_believed_again_when_they_move() -> None:
    """At the first reading that differs."""
    _, screen = frozen(1.2, 600.0)
    (passed,) = screen.pass_on([sample(1.22, energy_joules=720.0, instant_watts=401.0)])
    assert passed.instant_watts == 401.0


@pytest.mark.parametrize("counter", [None, 0.0])
def test_without_a_counter_watts_that_never_change_are_frozen_while_the_gpu_works(
    counter: float | None,
) -> None:
    """Two seconds; a GPU that rests may well draw the same to the milliwatt."""
    assert frozen(1.9, counter)[0].instant_watts == 400.0
    assert frozen(2.2, counter)[0].instant_watts is None
    idle = frozen(9.0, counter, clock_event_reasons=ClockEventReasons.GPU_IDLE)
    assert idle[0].instant_watts == 400.0


def test_a_fall_to_idle_is_not_taken_for_frozen_watts() -> None:
    """600 W, then exactly 115: the counter, 100 ms behind, still holds some of the 600."""
    screen, passed = SampleValidator(), sample()
    for tick in range(200):
        now = 0.02 * tick
        moved = (tick // 5) * 0.1
        joules = 600.0 * moved if moved < 1.0 else 600.0 + 115.0 * (moved - 1.0)
        watts = 600.0 + tick if now < 0.9 else 115.0
        (passed,) = screen.pass_on([sample(now, energy_joules=joules, instant_watts=watts)])
        assert passed.instant_watts == watts
    assert screen.rejected_readings == 0


def test_two_equal_readings_around_a_stall_are_not_frozen() -> None:
    """The sampler was away for 30 s; one reading says nothing of the time between."""
    screen = SampleValidator()
    for at_seconds, joules in ((0.0, 0.0), (0.1, 40.0), (30.1, 18_040.0)):
        (passed,) = screen.pass_on([sample(at_seconds, energy_joules=joules)])
    assert passed.instant_watts == 400.0


def test_each_gpu_has_its_own_counter() -> None:
    """Samples of one reading do not mix."""
    screen = SampleValidator()
    for at_seconds, (first, second) in enumerate([(10.0, 5000.0), (110.0, 5200.0)]):
        passed = screen.pass_on(
            [
                GpuSample(read_seconds=float(at_seconds), gpu_index=0, energy_joules=first),
                GpuSample(read_seconds=float(at_seconds), gpu_index=1, energy_joules=second),
            ]
        )
    assert [one.energy_joules for one in passed] == [100.0, 200.0]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=30))
def test_whatever_the_counter_says_published_energy_is_finite_and_never_falls(
    readings: list[float],
) -> None:
    """No order of broken readings makes energy go backwards."""
    seen = [e for e in energies(*((0.02 * i, r) for i, r in enumerate(readings))) if e is not None]
    assert all(math.isfinite(joules) for joules in seen)
    assert seen == sorted(seen)


def test_rounding_in_a_counter_is_no_move_and_no_fall() -> None:
    """A counter that is recomputed in between differs in its last digits, up or down; one that
    does nothing else is stuck."""
    screen, passed = SampleValidator(), []
    for tick in range(150):
        raw = 1e6 + 40.0 * min(tick // 5, 10) + (-1) ** tick * 1e-5
        (one,) = screen.pass_on([sample(0.02 * tick, energy_joules=raw)])
        passed.append(one.energy_joules)
    told = [joules for joules in passed if joules is not None]
    assert len(set(told)) == 11
    assert told == sorted(told)
    assert passed[100] is not None
    assert passed[149] is None, "stuck for two seconds"


def test_watts_that_dither_in_their_last_digits_are_frozen() -> None:
    """No counter tells; a GPU at work that draws the same to the milliwatt is not believed."""
    screen = SampleValidator()
    for tick in range(200):
        watts = 400.0 * (1.0 + (-1) ** tick * 1e-11)
        (one,) = screen.pass_on([sample(0.02 * tick, instant_watts=watts)])
    assert one.instant_watts is None


def test_a_slow_drift_is_not_lost_in_the_grain() -> None:
    """Each reading is held against the one that was believed, not against the one before."""
    screen = SampleValidator()
    for tick in range(1000):
        (one,) = screen.pass_on([sample(0.02 * tick, instant_watts=400.0 + 1e-4 * tick)])
    assert one.instant_watts == pytest.approx(400.1, abs=1e-3)
