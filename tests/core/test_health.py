"""What is called degraded, with which cause and by how much, and what is not."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.supervise.health import Health
from shaper.core.supervise.status import Cause, Degradation
from shaper.core.types import ClockEventReasons, GpuIdentity, GpuSample
from shaper.gpu.profiles import load_profile

TICK_SECONDS = 0.02
R = ClockEventReasons
PROFILE = load_profile("h200-sxm")
TOP = PROFILE.clocks.sm_max_hertz


@dataclass
class Watch:
    """A health that is told the same thing for a while; keeps the lines and their times."""

    health: Health = field(default_factory=lambda: Health(PROFILE))
    gpu_count: int = 1
    now_seconds: float = 0.0
    lines: list[tuple[float, str]] = field(default_factory=list)

    def run(
        self,
        seconds: float,
        *,
        busy: bool = True,
        gain: float = 1.0,
        gpu: int = 0,
        counter_rate: float = 0.0,
        **values: object,
    ) -> tuple[Degradation, ...]:
        """All GPUs well, but for `values` of GPU number `gpu`."""
        start, ticks = self.now_seconds, round(seconds / TICK_SECONDS)
        for tick in range(1, ticks + 1):
            self.now_seconds = now = start + tick * TICK_SECONDS
            well = GpuSample(
                now,
                0,
                instant_watts=450.0,
                average_watts=450.0,
                enforced_limit_watts=700.0,
                sm_clock_hertz=TOP,
                temperature_celsius=62.0,
                thermal_throttle_seconds=math.floor(now) * counter_rate,
            )
            samples = [
                replace(well, gpu_index=i, **(values if i == gpu else {}))  # type: ignore[arg-type]
                for i in range(self.gpu_count)
            ]
            said = self.health.observe(now, samples, busy, gain)
            self.lines += [(now - start, line) for line in said]
        return self.health.degradations

    @property
    def causes(self) -> list[Cause]:
        return [each.cause for each in self.health.degradations]


@pytest.fixture
def warm() -> Watch:
    """A minute of work in which all is well."""
    watch = Watch()
    assert watch.run(60.0) == ()
    assert watch.lines == []
    return watch


def test_a_clock_that_nothing_explains_is_degraded_and_by_how_much(warm: Watch) -> None:
    """The gray failure itself: 30% less clock, no reason given, found within five seconds."""
    (found,) = warm.run(5.0, sm_clock_hertz=0.7 * TOP)
    assert (found.cause, found.gpu_index) == (Cause.CLOCK, 0)
    warm.run(10.0, sm_clock_hertz=0.7 * TOP)
    assert warm.health.degradations[0].missing_ratio == pytest.approx(0.3, abs=0.01)
    assert len(warm.lines) == 1
    assert "GPU 0's clock is" in warm.lines[0][1]
    assert "(1.39 of 1.98 GHz)" in warm.lines[0][1]


def test_recovery_is_seen_and_announced_once(warm: Watch) -> None:
    """Within 15 seconds of the clock's return."""
    warm.run(20.0, sm_clock_hertz=0.7 * TOP)
    warm.lines.clear()
    assert warm.run(15.0) == ()
    warm.run(60.0)
    assert [line for _, line in warm.lines] == [
        "recovered: GPU 0's clock is what its state explains again (1.98 of 1.98 GHz)"
    ]


@pytest.mark.parametrize(
    ("reasons", "watts"),
    [
        (R.SW_POWER_CAP, 690.0),
        (R.SW_POWER_CAP, 540.0),
        (R.NONE, 660.0),
        (R.APPLICATIONS_CLOCKS_SETTING, 450.0),
        (R.SYNC_BOOST, 450.0),
        (R.SW_POWER_CAP, None),
    ],
)
def test_a_clock_that_power_or_a_setting_explains_is_not_degraded(
    warm: Watch, reasons: R, watts: float | None
) -> None:
    """The load is at the cap, or somebody has locked the clocks, or the meter can't refute it."""
    values = {"instant_watts": watts, "average_watts": watts, "clock_event_reasons": reasons}
    assert warm.run(120.0, sm_clock_hertz=0.6 * TOP, **values) == ()  # type: ignore[arg-type]


def test_a_power_cap_far_below_the_limit_is_not_believed(warm: Watch) -> None:
    """The driver says power cap at 40% of the limit: a bad sensor or a cap that nobody sees."""
    values = {"instant_watts": 280.0, "average_watts": 280.0}
    warm.run(10.0, sm_clock_hertz=0.6 * TOP, clock_event_reasons=R.SW_POWER_CAP, **values)  # type: ignore[arg-type]
    assert warm.causes == [Cause.CLOCK]


def test_bursts_that_cap_the_clock_are_the_loads(warm: Watch) -> None:
    """Half a second at the limit in every two: the mean is far below it, the clock never rises."""
    for _ in range(30):
        capped = {"sm_clock_hertz": 0.8 * TOP, "clock_event_reasons": R.SW_POWER_CAP}
        warm.run(0.5, instant_watts=690.0, **capped)  # type: ignore[arg-type]
        warm.run(1.4, instant_watts=300.0, average_watts=400.0, **capped)  # type: ignore[arg-type]
    assert warm.causes == []


@pytest.mark.parametrize("bit", [R.SW_THERMAL_SLOWDOWN, R.HW_THERMAL_SLOWDOWN | R.HW_SLOWDOWN])
def test_a_thermal_slowdown_is_named_and_not_called_a_clock(warm: Watch, bit: R) -> None:
    """Heat explains the clock; that it is hot is the fault."""
    warm.run(10.0, sm_clock_hertz=0.7 * TOP, temperature_celsius=87.0, clock_event_reasons=bit)
    assert warm.causes == [Cause.THERMAL]
    assert "at 87 °C" in warm.lines[0][1]


@pytest.mark.parametrize("bit", [R.HW_POWER_BRAKE_SLOWDOWN | R.HW_SLOWDOWN, R.HW_SLOWDOWN])
def test_a_power_brake_is_named_within_a_second(warm: Watch, bit: R) -> None:
    """It more than halves the clock, and a rack pulls it in an emergency."""
    warm.run(1.0, sm_clock_hertz=0.4 * TOP, clock_event_reasons=bit)
    assert warm.causes == [Cause.BRAKE]


def test_a_counter_shows_slowdowns_that_no_reading_met(warm: Watch) -> None:
    """The driver's counter rises by 0.3 s a second, each time between two readings; the
    counter itself is read once a second."""
    warm.run(20.0, counter_rate=0.0)
    assert warm.causes == []
    warm.run(20.0, counter_rate=0.3)
    assert warm.causes == [Cause.THERMAL]
    assert warm.health.degradations[0].missing_ratio == pytest.approx(0.3, abs=0.2)
    warm.run(20.0, counter_rate=0.3, thermal_throttle_seconds=1e4)
    assert warm.causes == []


def test_bit_and_counter_are_not_counted_twice(warm: Watch) -> None:
    """A slowdown of 5% of the time, seen by both, stays under a tenth."""
    for _ in range(30):
        second = math.floor(warm.now_seconds) * 0.05
        hot = {"clock_event_reasons": R.SW_THERMAL_SLOWDOWN}
        warm.run(0.06, thermal_throttle_seconds=second, **hot)  # type: ignore[arg-type]
        warm.run(0.94, thermal_throttle_seconds=second)
    assert warm.causes == []


def test_one_sick_gpu_of_four_is_found_and_named() -> None:
    """Its clock alone sags; the others are not accused."""
    watch = Watch(gpu_count=4)
    watch.run(60.0)
    watch.run(10.0, gpu=2, sm_clock_hertz=0.8 * TOP)
    assert [(d.cause, d.gpu_index) for d in watch.health.degradations] == [(Cause.CLOCK, 2)]


def test_steps_slower_than_the_model_at_a_good_clock_are_the_throughputs(warm: Watch) -> None:
    """Memory errors, a slow link, a busy host: the clock is fine and tokens are fewer."""
    assert warm.run(30.0, gain=1.12) == ()
    warm.run(8.0, gain=1.35)
    (found,) = warm.health.degradations
    assert (found.cause, found.gpu_index) == (Cause.THROUGHPUT, None)
    warm.run(20.0, gain=1.35)
    assert warm.health.degradations[0].missing_ratio == pytest.approx(1 - 1 / 1.35, abs=0.02)
    assert "gives 26% less" in warm.lines[0][1]
    assert warm.run(20.0, gain=1.02) == ()
    assert "recovered" in warm.lines[-1][1]


@pytest.mark.parametrize("gain", [0.8, 1.2])
def test_a_profile_that_is_off_from_the_start_is_no_fault_of_the_gpu(gain: float) -> None:
    """A new model, or a GPU that the profile describes badly: the reference follows, so far."""
    watch = Watch()
    assert watch.run(200.0, gain=gain) == ()
    slow = Watch()
    slow.run(60.0, gain=1.4)
    assert slow.causes == [Cause.THROUGHPUT]


def test_a_fault_that_grows_is_not_learned_as_normal(warm: Watch) -> None:
    """One percent more each ten seconds, up to 40%."""
    for step in range(40):
        warm.run(10.0, gain=1.0 + 0.01 * step)
    assert Cause.THROUGHPUT in warm.causes


def test_idle_clocks_and_the_first_seconds_are_not_judged() -> None:
    """An idle GPU parks its clock; one that wakes, and one that just started, is let be."""
    watch = Watch()
    parked = {"sm_clock_hertz": 345e6, "clock_event_reasons": R.GPU_IDLE}
    assert watch.run(120.0, busy=False, gain=1.4, **parked) == ()  # type: ignore[arg-type]
    assert watch.run(8.0, gain=1.4, sm_clock_hertz=0.5 * TOP) == ()
    watch.run(60.0)
    for _ in range(20):
        watch.run(10.0, busy=False, sm_clock_hertz=345e6)
        watch.run(0.8, sm_clock_hertz=345e6)
        watch.run(3.0)
    assert watch.lines == []


def test_a_fault_that_can_no_longer_be_seen_is_let_go_after_a_minute(warm: Watch) -> None:
    """A router that avoids a degraded engine would else never learn that it is well."""
    warm.run(20.0, sm_clock_hertz=0.7 * TOP)
    idle = {"sm_clock_hertz": 345e6, "clock_event_reasons": R.GPU_IDLE}
    assert len(warm.run(55.0, busy=False, **idle)) == 1  # type: ignore[arg-type]
    assert warm.run(10.0, busy=False, **idle) == ()  # type: ignore[arg-type]
    assert "no longer degraded for clock" in warm.lines[-1][1]


def test_a_limit_that_somebody_changed_is_said_once(warm: Watch) -> None:
    """`nvidia-smi -pl 500` by another operator is not a fault, but it is news."""
    capped = {"clock_event_reasons": R.SW_POWER_CAP, "sm_clock_hertz": 0.8 * TOP}
    assert warm.run(30.0, enforced_limit_watts=500.0, instant_watts=495.0, **capped) == ()  # type: ignore[arg-type]
    assert warm.run(30.0, enforced_limit_watts=None) == ()
    warm.run(30.0, enforced_limit_watts=700.0)
    assert [line for _, line in warm.lines] == [
        "GPU 0: its enforced power limit fell from 700 to 500 W; the driver or an operator "
        "changed it",
        "GPU 0: its enforced power limit rose from 500 to 700 W; the driver or an operator "
        "changed it",
    ]


def test_a_clock_at_the_edge_does_not_flap(warm: Watch) -> None:
    """Swinging around the threshold every half second: at most one change."""
    for _ in range(200):
        warm.run(0.5, sm_clock_hertz=0.95 * TOP)
        warm.run(0.5, sm_clock_hertz=0.88 * TOP)
    assert len(warm.lines) <= 1


def test_the_board_s_own_highest_clock_goes_before_the_profile_s() -> None:
    """A board that is made for 1.7 GHz gives all it has there."""
    watch = Watch(Health(PROFILE, (GpuIdentity(0, "x", "u", max_sm_clock_hertz=1.7e9),)))
    assert watch.run(60.0, sm_clock_hertz=1.7e9) == ()


def test_a_stalled_sampler_is_not_a_minute_of_evidence(warm: Watch) -> None:
    """One bad reading after 30 s without any does not make a fault."""
    warm.now_seconds += 30.0
    assert warm.run(0.04, sm_clock_hertz=0.5 * TOP) == ()
    assert warm.run(10.0) == ()


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.one_of(st.none(), st.floats(0.0, 5e9)),
            st.integers(0, 0x1FF),
            st.one_of(st.none(), st.floats(1.0, 2000.0)),
            st.floats(allow_nan=True, allow_infinity=True),
            st.floats(0.0, 40.0),
        ),
        max_size=60,
    )
)
def test_whatever_comes_in_ratios_stay_ratios_and_lines_alternate(
    ticks: list[tuple[bool, float | None, int, float | None, float, float]],
) -> None:
    """Any order of readings: what is missing lies in 0 to 1, and nothing raises."""
    health, now = Health(PROFILE), 0.0
    for busy, clock, reasons, watts, gain, elapsed in ticks:
        now += elapsed
        sample = GpuSample(
            now,
            0,
            instant_watts=watts,
            sm_clock_hertz=clock,
            clock_event_reasons=R(reasons),
        )
        health.observe(now, (sample,), busy, gain)
        assert all(0.0 <= each.missing_ratio <= 1.0 for each in health.degradations)
