"""Which readings are believed. What is not plausible is taken as missing.

    watts        finite, at least 1, at most 4 times the enforced limit; not frozen
    energy       advances by what those watts allow, and does advance
    clock, heat  finite and inside what silicon does
    held back    seconds since the driver was loaded: finite, and no more than a century

An energy counter that jumps is not believed at once. If the next reading goes on
from where it jumped to, the counter was reset, and counting goes on from there; if
not, it was a bad reading. A counter that has moved and then stands still for a second is
stuck, and the watts, which come from the same meter, are then not believed either. Watts
that have not changed at all for a second are frozen if the counter says otherwise; where
there is no counter, if they don't change for longer while the GPU works.

A reading that differs from the last by less than the meter's grain is the last one: what
somebody has scaled or summed up in between has rounding in its last digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shaper.core.types import ClockEventReasons, GpuSample

# The draw of a step may pass the limit for some milliseconds; four times is no GPU.
_LIMIT_MULTIPLE = 4.0
# Used where the limit is not known: twice the largest board limit sold today (1,400 W).
_UNKNOWN_LIMIT_WATTS = 2800.0
# A powered GPU draws watts. A reading in kilowatts by mistake, or a dead sensor, is below this.
_MIN_WATTS = 1.0
_MAX_CLOCK_HERTZ = 10e9
_MIN_CELSIUS, _MAX_CELSIUS = -40.0, 150.0
# Counters of nanoseconds in 64 bits run over after six centuries: beyond one is no reading.
_MAX_HELD_SECONDS = 100 * 365 * 86_400.0
# Counters refresh every 20 to 100 ms; a jump may hold this much more than the time between reads.
_COUNTER_SLACK_SECONDS = 0.5
# Ten refreshes of the slowest meter. A GPU that rests draws power too, so its counter moves.
_STUCK_SECONDS = 1.0
# Power that is steady to the milliwatt is not known of a GPU at work; one that rests may be.
_FROZEN_SECONDS, _FROZEN_READINGS = 2.0, 10
# What refreshes of the counter and of the watts may be apart over most of a second, and how
# long the counter may lag behind a change of the watts.
_FROZEN_RATIO, _FROZEN_WATTS = 0.2, 10.0
_SETTLE_SECONDS = 0.25
# Drivers count whole milliwatts and millijoules; a sum over months is a float with 15 digits.
_GRAIN, _GRAIN_RATIO = 5e-4, 2e-10
_POWER = ("instant_watts", "average_watts")


def same_reading(before: float, after: float) -> bool:
    """Whether two readings of watts or joules differ by no more than rounding."""
    return abs(after - before) <= max(_GRAIN, _GRAIN_RATIO * abs(before)) < math.inf


def _within(value: float | None, lowest: float, highest: float) -> bool:
    return value is None or (math.isfinite(value) and lowest <= value <= highest)


@dataclass(slots=True)
class _Counter:
    """One GPU's energy counter: the last reading believed, and one that waits to be."""

    raw_joules: float
    read_seconds: float
    moved_seconds: float | None = None
    """When it last rose; None until it first does, as where it is not really supported."""
    total_joules: float = 0.0
    suspect: tuple[float, float] | None = None
    """Seconds and raw joules of a reading that was not believed."""


@dataclass(slots=True)
class _Steady:
    """Watts that have stayed exactly the same, since when, and how often they were read."""

    watts: tuple[float | None, float | None]
    since_seconds: float
    base: tuple[float, float | None]
    """Seconds and joules from where the counter is compared: its lag behind them is over."""
    readings: int = 1


class SampleValidator:
    """Screens the samples of one engine's GPUs. Stateful fields: the last watts, one counter
    and one steady reading of each, and the count."""

    def __init__(self) -> None:
        self._watts: dict[tuple[int, str], float] = {}
        self._counters: dict[int, _Counter] = {}
        self._steady: dict[int, _Steady] = {}
        self.rejected_readings = 0
        """Single values that were taken as missing, since the start."""

    def pass_on(self, samples: Sequence[GpuSample]) -> tuple[GpuSample, ...]:
        """The samples with what is not plausible set to None, and with
        `energy_joules` counted from the first reading, never going backwards."""
        return tuple(self._pass_one(sample) for sample in samples)

    def _pass_one(self, sample: GpuSample) -> GpuSample:
        sample = self._rounded(sample)
        limit = sample.enforced_limit_watts
        if not _within(limit, _MIN_WATTS, _LIMIT_MULTIPLE * _UNKNOWN_LIMIT_WATTS):
            limit = None
            self.rejected_readings += 1
        highest = _UNKNOWN_LIMIT_WATTS if limit is None else _LIMIT_MULTIPLE * limit
        ranges = {
            "instant_watts": (_MIN_WATTS, highest),
            "average_watts": (_MIN_WATTS, highest),
            "sm_clock_hertz": (0.0, _MAX_CLOCK_HERTZ),
            "memory_clock_hertz": (0.0, _MAX_CLOCK_HERTZ),
            "temperature_celsius": (_MIN_CELSIUS, _MAX_CELSIUS),
            "memory_temperature_celsius": (_MIN_CELSIUS, _MAX_CELSIUS),
            # Negative beyond the slowdown.
            "slowdown_margin_celsius": (-_MAX_CELSIUS, _MAX_CELSIUS),
            "thermal_throttle_seconds": (0.0, _MAX_HELD_SECONDS),
            "brake_throttle_seconds": (0.0, _MAX_HELD_SECONDS),
            "power_cap_throttle_seconds": (0.0, _MAX_HELD_SECONDS),
        }
        missing: dict[str, Any] = {}
        for name, span in ranges.items():
            if not _within(getattr(sample, name), *span):
                missing[name] = None
                self.rejected_readings += 1
        energy = self._energy(sample, highest)
        if self._stuck(sample):
            self.rejected_readings += 1
            energy = missing["instant_watts"] = missing["average_watts"] = None
        elif self._frozen(sample, energy):
            self.rejected_readings += 1
            missing["instant_watts"] = missing["average_watts"] = None
        return replace(sample, enforced_limit_watts=limit, energy_joules=energy, **missing)

    def _rounded(self, sample: GpuSample) -> GpuSample:
        """The sample with the watts of the one before where only their last digits differ."""
        last: dict[str, Any] = {}
        for name in _POWER:
            watts, key = getattr(sample, name), (sample.gpu_index, name)
            before = self._watts.get(key)
            if watts is None or watts == before:
                continue
            if before is not None and same_reading(before, watts):
                last[name] = before
            else:
                self._watts[key] = watts
        return replace(sample, **last) if last else sample

    def _stuck(self, sample: GpuSample) -> bool:
        counter = self._counters.get(sample.gpu_index)
        if counter is None or counter.moved_seconds is None:
            return False
        # Readings that are missing or not believed are lost, not stuck.
        if counter.read_seconds != sample.read_seconds:
            return False
        return sample.read_seconds - counter.moved_seconds > _STUCK_SECONDS

    def _frozen(self, sample: GpuSample, energy_joules: float | None) -> bool:
        now, watts = sample.read_seconds, (sample.instant_watts, sample.average_watts)
        steady = self._steady.get(sample.gpu_index)
        if steady is None or steady.watts != watts:
            self._steady[sample.gpu_index] = _Steady(watts, now, (now, energy_joules))
            return False
        steady.readings += 1
        seconds = now - steady.since_seconds
        if seconds < _SETTLE_SECONDS:
            steady.base = (now, energy_joules)
        level = watts[0] if watts[1] is None else watts[1]
        if level is None or seconds < _STUCK_SECONDS or steady.readings < _FROZEN_READINGS:
            return False
        since_seconds, since_joules = steady.base
        counter = self._counters.get(sample.gpu_index)
        counts = counter is not None and counter.moved_seconds is not None
        if not counts or energy_joules is None or since_joules is None:
            idle = ClockEventReasons.GPU_IDLE in sample.clock_event_reasons
            return not idle and seconds >= _FROZEN_SECONDS
        counted = (energy_joules - since_joules) / (now - since_seconds)
        return abs(counted - level) > _FROZEN_WATTS + _FROZEN_RATIO * level

    def _energy(self, sample: GpuSample, highest_watts: float) -> float | None:
        raw, now = sample.energy_joules, sample.read_seconds
        if raw is None:
            return None
        if not math.isfinite(raw) or raw < 0:
            self.rejected_readings += 1
            return None
        counter = self._counters.get(sample.gpu_index)
        if counter is None:
            self._counters[sample.gpu_index] = _Counter(raw, now)
            return 0.0
        if same_reading(counter.raw_joules, raw):
            raw = counter.raw_joules
        # A counter that stood still holds what was spent since it last moved.
        last = (counter.moved_seconds or counter.read_seconds, counter.raw_joules)
        if not _follows(last, (now, raw), highest_watts):
            if counter.suspect is None or not _follows(counter.suspect, (now, raw), highest_watts):
                counter.suspect = (now, raw)
                self.rejected_readings += 1
                return None
            # Reset: what was spent between the two readings around it is lost.
            counter.raw_joules = counter.suspect[1]
        if raw > counter.raw_joules:
            counter.moved_seconds = now
        counter.total_joules += raw - counter.raw_joules
        counter.raw_joules, counter.read_seconds, counter.suspect = raw, now, None
        return counter.total_joules


def _follows(before: tuple[float, float], after: tuple[float, float], highest_watts: float) -> bool:
    """Whether a counter can go from one (seconds, joules) to the other."""
    span_seconds = max(0.0, after[0] - before[0]) + _COUNTER_SLACK_SECONDS
    return 0.0 <= after[1] - before[1] <= highest_watts * span_seconds
