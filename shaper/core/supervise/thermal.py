"""Keeps the hottest GPU below the temperature at which it slows itself down.

Law: with the heat path that `HeatFilter` has learned, and a load of mean `P` whose power
over the die's own time (a third of a second) peaks at `F(P)`,

    peak(P)  = die in `_HORIZON_SECONDS`, at its hottest
    bearable = the P whose peak(P) is slowdown - margin - deviation of the prediction
    F(P)     = P * the peak over the mean that was seen lately, at most what a limit of P
               over `LIMIT_WINDOW_SECONDS` lets through

A limit of `bearable` watts is set when the present load would pass that temperature, follows
it, and is let go when the load's peaks have stayed well below it for ten seconds. As the
sink warms, `bearable` falls towards what can be borne for good, so the limit comes in
gently and ends there: it has no on and off of its own that could cycle.

The slowdown temperature is the driver's where it tells, else the profile's; a slowdown
that is seen to start earlier lowers it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from shaper.core.learn.heat_filter import HeatFilter
from shaper.core.model.profile import GpuProfile
from shaper.core.supervise.status import ThermalOutlook
from shaper.core.types import ClockEventReasons, GpuIdentity, GpuSample, PowerLimit

# About one sink time: earlier costs tokens that the sink's heat capacity would have
# carried, later leaves the estimate no time to be corrected.
_HORIZON_SECONDS = 30.0
# A die follows a burst within a third of a second: over a longer window the limit would let
# through what heats it, over a shorter one it would cut chunks that don't.
LIMIT_WINDOW_SECONDS = 0.2
# Below this share of the hardware's limit the driver's slowdown costs less than a queue.
_FLOOR_RATIO = 0.35
# Half the driver's rounding, and half for a reading that is late.
_MARGIN_CELSIUS = 1.0
# What is not known yet is kept free too, up to this.
_MAX_DEVIATION_CELSIUS = 4.0
_LOAD_SECONDS = 10.0
# Of the limit: let go when the load's peaks stay below.
_RELEASE_RATIO = 0.8
# Halvings of the search for `bearable`: a thousandth of the range.
_HALVINGS = 10
# The controller need not hear of less.
_CHANGE_RATIO = 0.01
# The counter moves every 100 ms; a step of the filter wants several moves.
_STEP_SECONDS = 0.5
# Before it, a start under load can't be told from a hot room.
_LEARN_SECONDS = 3.0
# A slowdown that starts this far below the profile's temperature has another cause.
_MAX_LOWERED_CELSIUS = 15.0
# What lowered it may pass, such as hot memory: tried again after some ten minutes a degree.
_RAISE_CELSIUS_PER_SECOND = 1.0 / 600.0
_SLOWDOWN = ClockEventReasons.SW_THERMAL_SLOWDOWN


class _GpuHeat:
    """One GPU: its filter, its load of the last seconds, its slowdown temperature."""

    def __init__(self, profile: GpuProfile, slowdown_celsius: float | None) -> None:
        self._spec = profile.heat
        self._told_celsius = slowdown_celsius or profile.heat.slowdown_celsius
        self.slowdown_celsius = self._told_celsius
        self.filter: HeatFilter | None = None
        self._hardware_watts = profile.power.limit_watts
        self._die_seconds = max(
            self._spec.die_kelvin_per_watt * self._spec.die_joules_per_kelvin, 0.01
        )
        self._loads: deque[tuple[float, float, float]] = deque()
        """Seconds, mean watts, and the highest of the watts averaged over the die's time."""
        self._from: GpuSample | None = None
        self._smooth: tuple[float, float] | None = None
        self._peak_watts = 0.0
        self._slowed = True
        self.learned_seconds = 0.0

    def observe(self, sample: GpuSample) -> bool:
        """Take a sample; one that was seen before changes nothing. True: the filter moved."""
        self._hardware_watts = sample.enforced_limit_watts or self._hardware_watts
        self._note_peak(sample)
        self._note_slowdown(sample)
        start = self._from
        if start is None:
            self._from = sample
            return False
        seconds = sample.read_seconds - start.read_seconds
        if seconds < _STEP_SECONDS:
            return False
        self._from = sample
        watts = _mean_watts(start, sample)
        if watts is None:
            return False
        celsius = sample.temperature_celsius
        if self.filter is None:
            if celsius is not None:
                self.filter = HeatFilter(self._spec, watts, celsius)
            return False
        self.filter.step(seconds, watts, celsius)
        if celsius is not None:
            self.learned_seconds += seconds
        self._loads.append((sample.read_seconds, watts, max(watts, self._peak_watts)))
        self._peak_watts = 0.0
        while sample.read_seconds - self._loads[0][0] > _LOAD_SECONDS:
            self._loads.popleft()
        raised = self.slowdown_celsius + seconds * _RAISE_CELSIUS_PER_SECOND
        self.slowdown_celsius = min(raised, self._told_celsius)
        return True

    def _note_peak(self, sample: GpuSample) -> None:
        watts, now = sample.instant_watts, sample.read_seconds
        if watts is None:
            return
        if self._smooth is not None:
            before, smooth = self._smooth
            share = 1.0 - math.exp(-max(0.0, now - before) / self._die_seconds)
            watts = smooth + share * (watts - smooth)
        self._smooth = (now, watts)
        self._peak_watts = max(self._peak_watts, watts)

    def _note_slowdown(self, sample: GpuSample) -> None:
        slowed, before = bool(sample.clock_event_reasons & _SLOWDOWN), self._slowed
        self._slowed = slowed
        celsius = sample.temperature_celsius
        if slowed and not before and celsius is not None and celsius < self.slowdown_celsius:
            lowest = self._told_celsius - _MAX_LOWERED_CELSIUS
            self.slowdown_celsius = max(celsius, lowest)

    @property
    def mean_watts(self) -> float:
        """Of the last ten seconds."""
        return sum(watts for _, watts, _ in self._loads) / max(1, len(self._loads))

    @property
    def peak_watts(self) -> float:
        """The highest of the last ten seconds, averaged over the die's time."""
        return max((peak for _, _, peak in self._loads), default=0.0)

    def target_celsius(self, heat: HeatFilter, seconds: float) -> float:
        """What the die may reach: the slowdown, less the margins."""
        unknown = min(_MAX_DEVIATION_CELSIUS, heat.deviation_celsius(seconds, self.mean_watts))
        return self.slowdown_celsius - _MARGIN_CELSIUS - unknown

    def peak_of(self, watts: float) -> float:
        """The peak, over the die's time, of a load that a limit of `watts` holds."""
        hardware, mean = self._hardware_watts, self.mean_watts
        if watts >= hardware:
            return watts
        # At worst all of a window's energy comes at once, at full power, and so on.
        burst_seconds = LIMIT_WINDOW_SECONDS * watts / hardware
        rise = -math.expm1(-burst_seconds / self._die_seconds)
        worst = hardware * rise / -math.expm1(-LIMIT_WINDOW_SECONDS / self._die_seconds)
        seen = watts * self.peak_watts / mean if mean > 0.0 else worst
        return max(watts, min(seen, worst))

    def bearable_watts(self, heat: HeatFilter, seconds: float) -> float:
        """The mean power that the GPU bears for `seconds` (infinity: for good)."""
        target = self.target_celsius(heat, seconds)
        # Beyond the hardware's limit it only says by how much there is headroom.
        low, high = _FLOOR_RATIO * self._hardware_watts, 2.0 * self._hardware_watts
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            if heat.peak_celsius(seconds, middle, self.peak_of(middle)) > target:
                high = middle
            else:
                low = middle
        return low


class Thermal:
    """The heat of one engine's GPUs.

    Args:
        profile: of the GPUs.
        gpus: what the reader says of them.

    Stateful fields: one `_GpuHeat` each, the limit, when it was last needed, what was said.
    """

    def __init__(
        self,
        profile: GpuProfile,
        gpus: Sequence[GpuIdentity] = (),
    ) -> None:
        self._profile = profile
        self._slowdowns = {gpu.index: gpu.slowdown_celsius for gpu in gpus}
        self._gpus: dict[int, _GpuHeat] = {}
        self._limit: PowerLimit | None = None
        self._needed_seconds = -math.inf
        self._outlook = ThermalOutlook()

    def observe(
        self, now_seconds: float, samples: Sequence[GpuSample], shapes: bool = True
    ) -> ThermalOutlook:
        """Take the newest samples; returns where the hottest GPU is going.

        Args:
            now_seconds: of this tick.
            samples: of each GPU.
            shapes: whether a limit may be set now; it is predicted all the same.
        """
        moved = False
        for sample in samples:
            index = sample.gpu_index
            if index not in self._gpus:
                self._gpus[index] = _GpuHeat(self._profile, self._slowdowns.get(index))
            moved = self._gpus[index].observe(sample) or moved
        if moved:
            self._outlook = self._look(now_seconds, shapes)
        return self._outlook

    def _look(self, now: float, shapes: bool) -> ThermalOutlook:
        known = [
            (gpu.bearable_watts(gpu.filter, _HORIZON_SECONDS), gpu)
            for gpu in self._gpus.values()
            if gpu.filter is not None and gpu.learned_seconds >= _LEARN_SECONDS
        ]
        if not known:
            return ThermalOutlook()
        # The GPUs of an engine do the same work: the one that can bear least sets it.
        bearable, gpu = min(known, key=lambda each: each[0])
        heat, load, count = gpu.filter, gpu.mean_watts, len(self._gpus)
        assert heat is not None
        self._move_limit(now, bearable, gpu, heat, shapes)
        die = heat.die_celsius(load)
        return ThermalOutlook(
            die_celsius=die,
            margin_celsius=gpu.slowdown_celsius - die,
            steady_celsius=heat.steady_celsius(load),
            slowdown_seconds=heat.seconds_until(gpu.slowdown_celsius, load),
            sustained_watts=count * gpu.bearable_watts(heat, math.inf),
            limit=self._limit,
            recovery_seconds=self._recovery_seconds(gpu, heat),
        )

    def _move_limit(
        self, now: float, bearable: float, gpu: _GpuHeat, heat: HeatFilter, shapes: bool
    ) -> None:
        if self._limit is None:
            peak = heat.peak_celsius(_HORIZON_SECONDS, gpu.mean_watts, gpu.peak_watts)
            needed = peak > gpu.target_celsius(heat, _HORIZON_SECONDS)
        else:
            # A load that is held keeps the limit that holds it.
            needed = gpu.peak_watts > _RELEASE_RATIO * bearable
        if needed:
            self._needed_seconds = now
        if not shapes or now - self._needed_seconds > _LOAD_SECONDS:
            self._limit = None
            return
        watts = len(self._gpus) * bearable
        if self._limit is None or abs(watts - self._limit.watts) > _CHANGE_RATIO * watts:
            self._limit = PowerLimit(watts, LIMIT_WINDOW_SECONDS)

    def _recovery_seconds(self, gpu: _GpuHeat, heat: HeatFilter) -> float | None:
        """Until the present load no longer needs the limit."""
        if self._limit is None:
            return None
        wanted = gpu.peak_watts / _RELEASE_RATIO
        peak = heat.peak_celsius(_HORIZON_SECONDS, wanted, gpu.peak_of(wanted))
        over = peak - gpu.target_celsius(heat, _HORIZON_SECONDS)
        seconds = heat.seconds_to_cool(over / heat.left_ratio(_HORIZON_SECONDS), gpu.mean_watts)
        return None if seconds is None else seconds + _LOAD_SECONDS


def _mean_watts(start: GpuSample, end: GpuSample) -> float | None:
    """Mean power between two samples, from the energy counter where there is one."""
    if start.energy_joules is not None and end.energy_joules is not None:
        joules = end.energy_joules - start.energy_joules
        if joules > 0:
            return joules / (end.read_seconds - start.read_seconds)
    return end.average_watts or end.instant_watts
