"""What the driver's meter says of a GPU whose true power is known.

Laws (Yang et al., "Part-time Power Measurements", SC 2024, and NVML's reference):

    instant(t)  mean true power of the `instant` window that ends at the last refresh
    average(t)  the same over the `average` window (1 s on Ampere and newer)
    energy(t)   the true integral at the last refresh of the counter
    reading     gain * true + offset, one gain and offset per GPU, fixed

The refreshes of each GPU start at a phase of their own, as on a real board.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable
from math import floor
from typing import TYPE_CHECKING

from shaper.core.model.profile import MeterSpec
from shaper.core.types import GpuIdentity, GpuSample

if TYPE_CHECKING:
    from shaper.emulator.silicon import EmulatedGpus

_TRIM_AT = 4096


class PowerHistory:
    """The recent true power as a piecewise-constant function of time.

    Segments are contiguous; what lies more than `keep_seconds` behind the last one
    is dropped now and then. Before its start the power is `before_watts`.
    """

    __slots__ = ("_before_watts", "_dropped", "_joules", "_keep_seconds", "_times", "_watts")

    def __init__(self, start_seconds: float, before_watts: float, keep_seconds: float) -> None:
        self._before_watts = before_watts
        self._keep_seconds = keep_seconds
        self._times = [start_seconds]
        self._joules = [0.0]
        self._watts: list[float] = []
        self._dropped = False

    @property
    def end_seconds(self) -> float:
        """Where the last segment ends."""
        return self._times[-1]

    def append(self, end_seconds: float, watts: float) -> None:
        """Adds a segment from the last one's end; one of no length changes nothing."""
        begin = self._times[-1]
        if end_seconds <= begin:
            return
        if self._watts and self._watts[-1] == watts:
            self._joules[-1] += (end_seconds - begin) * watts
            self._times[-1] = end_seconds
        else:
            self._times.append(end_seconds)
            self._joules.append(self._joules[-1] + (end_seconds - begin) * watts)
            self._watts.append(watts)
        if len(self._times) > _TRIM_AT:
            self._trim()

    def energy_joules(self, at_seconds: float) -> float:
        """True energy since the start, at a time that is kept. Beyond the last
        segment its power is taken to go on."""
        times = self._times
        if at_seconds <= times[0]:
            level = self._watts[0] if self._dropped else self._before_watts
            return self._joules[0] + (at_seconds - times[0]) * level
        index = bisect_right(times, at_seconds) - 1
        if index >= len(self._watts):
            last = self._watts[-1] if self._watts else self._before_watts
            return self._joules[-1] + (at_seconds - times[-1]) * last
        return self._joules[index] + (at_seconds - times[index]) * self._watts[index]

    def mean_watts(self, from_seconds: float, to_seconds: float) -> float:
        """Mean true power between two times."""
        span = to_seconds - from_seconds
        return (self.energy_joules(to_seconds) - self.energy_joules(from_seconds)) / span

    def _trim(self) -> None:
        first = bisect_right(self._times, self._times[-1] - self._keep_seconds) - 1
        if first > 0:
            del self._times[:first], self._joules[:first], self._watts[:first]
            self._dropped = True


class Meter:
    """One GPU's meter. Reads a `PowerHistory`; keeps nothing but gain and phase."""

    __slots__ = ("_phase_seconds", "_spec", "gain", "offset_watts")

    def __init__(self, spec: MeterSpec, seed: int = 0, *, exact: bool = False) -> None:
        """A meter whose gain, offset and phase are drawn from `seed`.

        Args:
            spec: windows, refresh periods and error bounds.
            seed: of the draws.
            exact: no gain and offset error (the windows remain).
        """
        draw = random.Random(f"meter {seed}")
        self._spec = spec
        self._phase_seconds = draw.random()
        gain = draw.uniform(-spec.gain_error_ratio, spec.gain_error_ratio)
        offset = draw.uniform(-spec.offset_error_watts, spec.offset_error_watts)
        self.gain = 1.0 if exact else 1.0 + gain
        self.offset_watts = 0.0 if exact else offset

    @property
    def keep_seconds(self) -> float:
        """How much history a reading may look back on."""
        spec = self._spec
        return spec.average_window_seconds + spec.average_refresh_seconds + 1.0

    def instant_watts(self, history: PowerHistory, now_seconds: float) -> float:
        """What `nvmlDeviceGetFieldValues(POWER_INSTANT)` would say now."""
        spec = self._spec
        tick = self._last_refresh(now_seconds, spec.instant_refresh_seconds)
        true = history.mean_watts(tick - spec.instant_window_seconds, tick)
        return max(0.0, true * self.gain + self.offset_watts)

    def average_watts(self, history: PowerHistory, now_seconds: float) -> float:
        """What `nvmlDeviceGetFieldValues(POWER_AVERAGE)` would say now."""
        spec = self._spec
        tick = self._last_refresh(now_seconds, spec.average_refresh_seconds)
        true = history.mean_watts(tick - spec.average_window_seconds, tick)
        return max(0.0, true * self.gain + self.offset_watts)

    def energy_joules(
        self, history: PowerHistory, now_seconds: float, start_seconds: float
    ) -> float:
        """The energy counter since `start_seconds`; it steps at each refresh."""
        tick = self._last_refresh(now_seconds, self._spec.energy_refresh_seconds)
        tick = max(tick, start_seconds)
        true = history.energy_joules(tick)
        return max(0.0, true * self.gain + self.offset_watts * (tick - start_seconds))

    def _last_refresh(self, now_seconds: float, period_seconds: float) -> float:
        if period_seconds <= 0:
            return now_seconds
        phase = self._phase_seconds * period_seconds
        return phase + floor((now_seconds - phase) / period_seconds) * period_seconds


class EmulatedReader:
    """A `GpuReader` over emulated GPUs: what NVML would return at the clock's now."""

    def __init__(self, gpus: EmulatedGpus, clock: Callable[[], float]) -> None:
        """Reads `gpus` at the times that `clock` returns, in seconds."""
        self._gpus = gpus
        self._clock = clock

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        """The GPUs, in the order in which `read` returns them."""
        return self._gpus.identities

    def read(self) -> tuple[GpuSample, ...]:
        """One sample per GPU, taken now."""
        return self._gpus.sample(self._clock())

    def close(self) -> None:
        """Nothing to let go of."""
