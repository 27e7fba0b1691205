"""The heat path that is learned, and the limit that keeps a GPU from slowing itself down."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from shaper.core.model.profile import GpuProfile
from shaper.core.supervise.status import ThermalOutlook
from shaper.core.supervise.thermal import Thermal
from shaper.core.types import ClockEventReasons, GpuIdentity, GpuSample
from shaper.emulator.heat import HeatModel
from shaper.gpu.profiles import load_profile

TICK_SECONDS = 0.1
PROFILES = ("a100-sxm-80gb", "h200-sxm", "l40s", "b200-sxm")
# What is believed of the heat path, beside what is true of it: resistances, then capacity.
ROOMS = (
    *(("a100-sxm-80gb", (0.5, 1.5)), ("h200-sxm", (1.5, 0.5)), ("l40s", (0.5, 1.5))),
    *(("b200-sxm", (1.5, 0.5)), ("h200-sxm", (1.0, 1.0))),
)


def believed(profile: GpuProfile, resistances: float, capacity: float) -> GpuProfile:
    heat = profile.heat
    return replace(
        profile,
        heat=replace(
            heat,
            die_kelvin_per_watt=heat.die_kelvin_per_watt * resistances,
            sink_kelvin_per_watt=heat.sink_kelvin_per_watt * resistances,
            sink_joules_per_kelvin=heat.sink_joules_per_kelvin * capacity,
        ),
    )


@dataclass
class Room:
    """One emulated GPU in a room, its driver, and what watches it."""

    profile: GpuProfile
    thermal: Thermal
    inlet_celsius: float = 30.0
    shapes: bool = True
    now_seconds: float = 0.0
    joules: float = 0.0
    celsius: list[float] = field(default_factory=list)
    limits: list[float | None] = field(default_factory=list)
    watts: list[float] = field(default_factory=list)
    outlook: ThermalOutlook = field(default_factory=ThermalOutlook)

    def __post_init__(self) -> None:
        context = self.profile.power.context_watts
        self.heat = HeatModel(self.profile.heat, context, self.inlet_celsius)
        self._said = self._read()

    def _read(self) -> float:
        return float(round(self.heat.die_celsius))

    def run(
        self,
        seconds: float,
        wanted: Callable[[float], float] | float,
        *,
        bursty: bool = False,
        obeys: bool = True,
        tick_seconds: float = TICK_SECONDS,
    ) -> None:
        """Let the engine draw what it wants, as far as a limit allows. The driver reads the
        temperature once a second, to a degree.

        Args:
            seconds: how long.
            wanted: mean watts, or what gives them at a time.
            bursty: all of it at full power, then idle: in cycles of 0.8 s, or of the limit's
                window, which is the worst that the limit lets through.
            obeys: whether a limit is heeded.
            tick_seconds: between two readings.
        """
        power = self.profile.power
        for tick in range(round(seconds / tick_seconds)):
            self.now_seconds += tick_seconds
            mean = wanted(self.now_seconds) if callable(wanted) else wanted
            limit = self.outlook.limit if obeys else None
            if limit is not None:
                mean = min(mean, limit.watts)
            watts = mean
            if bursty:
                cycle = limit.window_seconds if limit is not None else 0.8
                share = (mean - power.gap_watts) / (power.limit_watts - power.gap_watts)
                at_work = tick * tick_seconds % cycle < share * cycle
                watts = power.limit_watts if at_work else power.gap_watts
            self.heat.step(tick_seconds, watts)
            self.joules += watts * tick_seconds
            # Not a whole second: the cycles of a load do not keep step with the driver.
            if tick % round(0.94 / tick_seconds) == 0:
                self._said = self._read()
            self.watts.append(mean)
            self.celsius.append(self.heat.die_celsius)
            samples = (self.sample(watts),)
            self.outlook = self.thermal.observe(self.now_seconds, samples, self.shapes)
            self.limits.append(self.outlook.limit.watts if self.outlook.limit else None)

    def sample(self, watts: float) -> GpuSample:
        return GpuSample(
            self.now_seconds,
            0,
            instant_watts=watts,
            energy_joules=self.joules,
            temperature_celsius=self._said,
        )

    @property
    def true_sustained_watts(self) -> float:
        heat = self.profile.heat
        room = heat.slowdown_celsius - self.heat.ambient_celsius
        return room / (heat.die_kelvin_per_watt + heat.sink_kelvin_per_watt)


def new_room(
    name: str, inlet: float = 30.0, wrong: tuple[float, float] = (1.0, 1.0), *, shapes: bool = True
) -> Room:
    profile = load_profile(name)
    return Room(profile, Thermal(believed(profile, *wrong)), inlet, shapes)


@pytest.mark.parametrize(("name", "wrong"), ROOMS, ids=str)
def test_a_hot_inlet_is_shaped_and_never_slows_the_gpu_down(name, wrong) -> None:
    """Full load in a room of 45 degrees, with a profile that is half or half as much again:
    below the slowdown throughout, and at most 8% below what could be borne."""
    room = new_room(name, 45.0, wrong)
    limit = room.profile.power.limit_watts
    room.run(60.0, 0.3 * limit)
    room.run(340.0, 0.95 * limit)
    assert max(room.celsius) < room.profile.heat.slowdown_celsius
    settled = room.watts[-1000:]
    assert sum(settled) / len(settled) > 0.92 * room.true_sustained_watts
    unshaped = new_room(name, 45.0, wrong, shapes=False)
    unshaped.run(60.0, 0.3 * limit)
    unshaped.run(140.0, 0.95 * limit)
    assert max(unshaped.celsius) > room.profile.heat.slowdown_celsius
    assert unshaped.outlook.limit is None


@pytest.mark.parametrize("name", PROFILES)
def test_a_cold_start_in_a_hot_room_and_an_inlet_that_jumps_are_caught(name: str) -> None:
    """There are some ten seconds from idle to the slowdown, and nothing is known of the room;
    15 degrees more in the middle of a load that was fine are followed."""
    room = new_room(name, 45.0)
    room.run(100.0, 0.95 * room.profile.power.limit_watts)
    assert max(room.celsius) < room.profile.heat.slowdown_celsius
    room = new_room(name, 28.0)
    watts = 0.8 * room.profile.power.limit_watts
    room.run(200.0, watts)
    assert set(room.limits) == {None}
    room.heat.ambient_celsius = 45.0
    room.run(300.0, watts)
    assert max(room.celsius) < room.profile.heat.slowdown_celsius


@pytest.mark.parametrize("name", PROFILES)
def test_bursts_count_with_the_temperature_that_they_reach(name: str) -> None:
    """A die follows a burst of 0.4 s almost to its end; the mean would not show it. The worst
    that the limit lets through stays below the slowdown, and the limit does not starve the
    engine for it."""
    room = new_room(name, 42.0)
    watts = 0.7 * room.profile.power.limit_watts
    room.run(100.0, watts, bursty=True, tick_seconds=0.02)
    assert max(room.celsius) < room.profile.heat.slowdown_celsius
    assert any(room.limits)
    settled = room.watts[-1000:]
    assert sum(settled) / len(settled) > 0.8 * min(watts, room.true_sustained_watts)


@pytest.mark.parametrize(("name", "wrong"), ROOMS, ids=str)
def test_a_load_that_can_be_borne_is_left_alone(name, wrong) -> None:
    """A cool room, a load that comes and goes: no limit at any time."""
    room = new_room(name, 25.0, wrong)
    limit = room.profile.power.limit_watts
    room.run(300.0, lambda now: (0.75 if int(now / 7) % 3 else 0.3) * limit)
    assert set(room.limits) == {None}


def test_the_limit_settles_and_does_not_cycle() -> None:
    """Once there, it moves by less than 3%, and the temperature by less than two degrees."""
    room = new_room("h200-sxm", 45.0)
    room.run(700.0, 660.0)
    limits, celsius = room.limits[-3000:], room.celsius[-3000:]
    known = [watts for watts in limits if watts is not None]
    assert len(known) == len(limits)
    assert max(known) - min(known) < 0.03 * max(known)
    assert max(celsius) - min(celsius) < 2.0


def test_the_limit_comes_back_only_with_the_load_that_needs_it() -> None:
    """It is let go when the load falls, and a load that returns is caught again in time."""
    room = new_room("h200-sxm", 42.0, (0.5, 1.0))
    room.run(800.0, lambda now: 660.0 if int(now / 200) % 2 else 140.0)
    assert max(room.celsius) < room.profile.heat.slowdown_celsius
    changes = [free for free, _ in itertools.groupby(room.limits, lambda x: x is None)]
    assert changes == [True, False, True, False]


def test_the_limit_goes_when_the_room_cools() -> None:
    """What was needed at 45 degrees is not at 20."""
    room = new_room("a100-sxm-80gb", 45.0)
    room.run(300.0, 360.0)
    assert room.limits[-1] is not None
    room.heat.ambient_celsius = 20.0
    room.run(400.0, 360.0)
    assert room.limits[-1] is None
    assert room.watts[-1] == 360.0


def test_the_prediction_is_what_comes() -> None:
    """Time to slowdown within a third, the steady temperature within three degrees, what can
    be borne within 8% and not above."""
    room = new_room("a100-sxm-80gb", 45.0, shapes=False)
    room.run(200.0, 220.0)
    start = room.now_seconds
    room.run(15.0, 340.0)
    told, now = room.outlook, room.now_seconds
    room.run(200.0, 340.0)
    first = next(i for i, c in enumerate(room.celsius) if c > room.profile.heat.slowdown_celsius)
    reached = (first + 1) * TICK_SECONDS
    assert start < reached
    assert told.slowdown_seconds is not None
    assert told.slowdown_seconds == pytest.approx(reached - now, rel=0.35)
    assert told.steady_celsius == pytest.approx(room.heat.steady_celsius(340.0), abs=3.0)
    after = room.outlook
    assert after.sustained_watts == pytest.approx(room.true_sustained_watts, rel=0.08)
    assert after.sustained_watts < room.true_sustained_watts  # type: ignore[operator]


def test_a_load_that_no_limit_can_help_is_left_to_the_driver() -> None:
    """An inlet of 80 degrees: below a third of its power the driver's slowdown costs less."""
    room = new_room("h200-sxm", 80.0)
    room.run(120.0, 400.0)
    known = [watts for watts in room.limits if watts is not None]
    assert known
    assert min(known) >= 0.34 * 700.0


def test_a_slowdown_that_starts_earlier_is_learned() -> None:
    """The driver says so with a reason; the next one is avoided. A profile may be wrong by
    some degrees, and hot memory slows a GPU down as well."""
    room = new_room("h200-sxm", 40.0)
    room.run(100.0, 400.0)
    margin = room.outlook.margin_celsius
    slowed = replace(room.sample(400.0), clock_event_reasons=ClockEventReasons.SW_THERMAL_SLOWDOWN)
    room.thermal.observe(room.now_seconds, (replace(slowed, read_seconds=room.now_seconds),))
    room.run(5.0, 400.0)
    assert margin is not None
    assert room.outlook.margin_celsius is not None
    assert room.outlook.margin_celsius < 1.5 < margin
    assert room.limits[-1] is not None


def test_the_drivers_own_threshold_goes_before_the_profiles() -> None:
    """A board's slowdown temperature is its own; a load that it bears has no time to slowdown."""
    profile = load_profile("h200-sxm")
    gpus = (GpuIdentity(0, "x", "u", slowdown_celsius=70.0),)
    room = Room(profile, Thermal(profile, gpus), 35.0)
    room.run(60.0, 300.0)
    assert room.outlook.slowdown_seconds is None
    assert room.outlook.margin_celsius == pytest.approx(70.0 - room.heat.die_celsius, abs=1.5)
    room.run(300.0, 650.0)
    assert 67.0 < max(room.celsius) < 70.0


def test_the_hottest_of_four_sets_the_limit_for_all() -> None:
    """One GPU behind a blocked fan: all four do the same work, so four times what it bears."""
    profile = load_profile("h200-sxm")
    rooms = [Room(profile, Thermal(profile), inlet) for inlet in (25.0, 25.0, 48.0, 25.0)]
    thermal, outlook = Thermal(profile), ThermalOutlook()
    for _ in range(3000):
        share = math.inf if outlook.limit is None else outlook.limit.watts / 4
        samples = []
        for index, room in enumerate(rooms):
            room.run(TICK_SECONDS, min(600.0, share), obeys=False)
            samples.append(replace(room.sample(room.watts[-1]), gpu_index=index))
        outlook = thermal.observe(rooms[0].now_seconds, samples)
    assert outlook.limit is not None
    assert outlook.limit.watts == pytest.approx(4 * rooms[2].true_sustained_watts, rel=0.08)
    assert max(rooms[2].celsius) < profile.heat.slowdown_celsius


def test_without_temperature_nothing_is_said_and_a_limit_stays() -> None:
    """A sensor that is lost in the heat does not lift the limit that it asked for."""
    profile = load_profile("h200-sxm")
    blind = Thermal(profile)
    for tick in range(100):
        assert blind.observe(tick, (GpuSample(tick, 0, instant_watts=600.0),)) == ThermalOutlook()
    room = new_room("h200-sxm", 45.0)
    room.run(100.0, 650.0)
    before = room.outlook.limit
    assert before is not None
    for tick in range(600):
        said = room.thermal.observe(room.now_seconds + tick, ())
    assert said.limit == before


@pytest.mark.parametrize("celsius", [0.0, 150.0])
def test_an_absurd_temperature_gives_no_absurd_figure(celsius: float) -> None:
    """A sensor stuck at either end: what is said stays finite, the limit at least 0."""
    thermal, joules = Thermal(load_profile("h200-sxm")), 0.0
    for tick in range(2000):
        joules += 50.0
        sample = GpuSample(
            0.1 * tick, 0, instant_watts=500.0, energy_joules=joules, temperature_celsius=celsius
        )
        outlook = thermal.observe(0.1 * tick, (sample,))
        said = (outlook.die_celsius, outlook.steady_celsius, outlook.sustained_watts)
        assert all(value is None or math.isfinite(value) for value in said)
        assert outlook.limit is None or outlook.limit.watts >= 0.0


def test_the_hint_says_when_a_lower_load_has_cooled_the_sink() -> None:
    """After the load has fallen, the limit is let go at about the time that was told."""
    room = new_room("h200-sxm", 42.0)
    room.run(300.0, 650.0)
    room.run(12.0, 380.0)
    told, now = room.outlook.recovery_seconds, room.now_seconds
    if room.outlook.limit is None:
        pytest.fail("the limit was let go at once; the load is too low for this test")
    room.run(200.0, 380.0)
    assert room.limits[-1] is None
    let_go = next(
        i for i in range(round(now / TICK_SECONDS), len(room.limits)) if room.limits[i] is None
    )
    assert told is not None
    assert told == pytest.approx(let_go * TICK_SECONDS - now, rel=0.5, abs=8.0)
