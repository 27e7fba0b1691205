"""The SM clock of emulated GPUs: the power-cap controller, heat and the brakes.

Law, every `period` of the cap: with the power average of time constant `window`
above `limit * (1 - margin)`, the clock falls by half the relative excess, at least one
step and at most `slew_down`; 1% below it, the clock rises likewise by at most
`slew_up`, up to the ceiling. The average lags, so a burst overshoots for about a
window. Above the slowdown temperature the ceiling falls one step a period. A power
brake or the hardware slowdown temperature drops the clock at once. Where a profile says so,
the clock falls at rest, and with the next work the ceiling rises evenly from there.
"""

from __future__ import annotations

from math import ceil, exp, floor

from shaper.core.model.profile import GpuProfile
from shaper.core.types import ClockEventReasons
from shaper.errors import ConfigError

# An estimate: the cap does not raise the clock for less power than this.
_DEADBAND_RATIO = 0.01
_GAIN = 0.5  # power goes with about the square of the clock there
_THERMAL_HYSTERESIS_CELSIUS = 3.0  # an estimate


def check_power_cap(profile: GpuProfile, watts: float) -> None:
    """Refuse an enforced limit that the driver would refuse.

    Raises:
        ConfigError: it is below the profile's smallest or above its default.
    """
    power = profile.power
    if not power.min_limit_watts <= watts <= power.limit_watts:
        raise ConfigError(
            f"power cap {watts:g} W is outside {profile.name}'s range of "
            f"{power.min_limit_watts:g} to {power.limit_watts:g} W"
        )


class ClockController:
    """Holds the clock; `observe` feeds it power, `tick` lets it decide."""

    __slots__ = (
        "_average_watts",
        "_braked_hot",
        "_capped",
        "_injected_hertz",
        "_injected_reasons",
        "_profile",
        "_thermal_hertz",
        "_waking_hertz",
        "brake",
        "clock_hertz",
        "limit_watts",
        "next_tick_seconds",
    )

    def __init__(
        self, profile: GpuProfile, start_seconds: float, limit_watts: float, watts: float
    ) -> None:
        """Starts at the highest clock, with `watts` as the average so far."""
        self._profile = profile
        self._average_watts = watts
        self._capped = False
        self._braked_hot = False
        self._injected_hertz: float | None = None
        self._injected_reasons = ClockEventReasons.NONE
        self._thermal_hertz = profile.clocks.sm_max_hertz
        self._waking_hertz = profile.clocks.sm_max_hertz
        self.brake = False
        self.clock_hertz = profile.clocks.sm_max_hertz
        self.limit_watts = limit_watts
        self.next_tick_seconds = start_seconds + profile.cap.period_seconds
        self.rest()

    def inject_ceiling(self, hertz: float | None, reasons: ClockEventReasons) -> None:
        """Holds the clock at or below `hertz` until called with None."""
        self._injected_hertz = hertz
        self._injected_reasons = reasons if hertz is not None else ClockEventReasons.NONE
        self._apply()

    def rest(self) -> None:
        """Nothing has run for a while: the clock falls, if the profile says so."""
        rest_hertz = self._profile.clocks.rest_hertz
        if rest_hertz:
            self._waking_hertz = rest_hertz
            self._apply()

    def set_brake(self, on: bool) -> None:
        """The power brake's pin."""
        self.brake = on
        self._apply()

    @property
    def reasons(self) -> ClockEventReasons:
        """Why the clock is below the highest, but for idleness."""
        found = self._injected_reasons
        if self._capped:
            found |= ClockEventReasons.SW_POWER_CAP
        if self._thermal_hertz < self._profile.clocks.sm_max_hertz:
            found |= ClockEventReasons.SW_THERMAL_SLOWDOWN
        if self._braked_hot:
            found |= ClockEventReasons.HW_SLOWDOWN | ClockEventReasons.HW_THERMAL_SLOWDOWN
        if self.brake:
            found |= ClockEventReasons.HW_SLOWDOWN | ClockEventReasons.HW_POWER_BRAKE_SLOWDOWN
        return found

    def observe(self, seconds: float, watts: float) -> None:
        """`watts` of one GPU acted for `seconds`."""
        window = self._profile.cap.window_seconds
        left = exp(-seconds / window) if window > 0 else 0.0
        self._average_watts = watts + (self._average_watts - watts) * left

    def tick(self, die_celsius: float) -> None:
        """One decision; moves `next_tick_seconds` on by a period."""
        self.next_tick_seconds += self._profile.cap.period_seconds
        self._wake(1)
        self._decide_power(1)
        self._decide_heat(die_celsius, 1)
        self._apply()

    def ticks_until(self, end_seconds: float, die_celsius: float) -> None:
        """All the decisions up to a time through which power stayed below the limit."""
        period = self._profile.cap.period_seconds
        count = floor((end_seconds - self.next_tick_seconds) / period) + 1
        if count <= 0:
            return
        self.next_tick_seconds += count * period
        self._wake(count)
        self._decide_power(count)
        self._decide_heat(die_celsius, count)
        self._apply()

    def _wake(self, periods: int) -> None:
        """The ceiling of a rest rises, and the clock with it where nothing else holds it."""
        clocks = self._profile.clocks
        top, before = clocks.sm_max_hertz, self._waking_hertz
        if before >= top:
            return
        share = 1.0
        if clocks.climb_seconds > 0.0:
            share = periods * self._profile.cap.period_seconds / clocks.climb_seconds
        self._waking_hertz = min(top, before + share * (top - clocks.rest_hertz))
        if self.clock_hertz >= before:
            self.clock_hertz = self._waking_hertz

    def _decide_power(self, periods: int) -> None:
        clocks, cap = self._profile.clocks, self._profile.cap
        target = self.limit_watts * (1.0 - cap.margin_ratio)
        step = clocks.step_hertz
        ratio = self._average_watts / target
        if ratio > 1.0:
            wanted = max(1, ceil(self.clock_hertz * (ratio - 1.0) * _GAIN / step)) * step
            self.clock_hertz -= min(wanted, cap.slew_down_hertz)
        elif ratio < 1.0 - _DEADBAND_RATIO and self.clock_hertz < self._ceiling():
            wanted = max(1, floor(self.clock_hertz * (1.0 - ratio) * _GAIN / step)) * step
            self.clock_hertz += min(wanted, cap.slew_up_hertz) * periods

    def _decide_heat(self, die_celsius: float, periods: int) -> None:
        clocks, heat = self._profile.clocks, self._profile.heat
        change = clocks.step_hertz * periods
        if die_celsius > heat.slowdown_celsius:
            self._thermal_hertz = max(clocks.sm_min_hertz, self._thermal_hertz - change)
        elif die_celsius < heat.slowdown_celsius - _THERMAL_HYSTERESIS_CELSIUS:
            self._thermal_hertz = min(clocks.sm_max_hertz, self._thermal_hertz + change)
        self._braked_hot = die_celsius >= heat.hardware_slowdown_celsius

    def _ceiling(self) -> float:
        ceiling = min(self._waking_hertz, self._thermal_hertz)
        return ceiling if self._injected_hertz is None else min(ceiling, self._injected_hertz)

    def _apply(self) -> None:
        clocks = self._profile.clocks
        ceiling = self._ceiling()
        if self.brake or self._braked_hot:
            ceiling = min(ceiling, clocks.sm_max_hertz * self._profile.cap.brake_clock_ratio)
        self._capped = self.clock_hertz < ceiling
        lowest = min(clocks.sm_min_hertz, self._waking_hertz)
        self.clock_hertz = max(lowest, min(ceiling, self.clock_hertz))
