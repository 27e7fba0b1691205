"""Energy that goes on when the counter does not: the integral of the power readings.

Law. Of each GPU, energy is what its screened counter says. Where the counter has said
nothing for a second, or has never moved in its first, energy grows by the trapezoid over the
power readings instead (the instant one, else the average). When the counter is back, what it
counted meanwhile counts, less what was integrated. Energy never falls.

Where the power reading shows for sure more than the counter (`meter_check.py`), what is counted
is multiplied by the ratio of the two: limits hold by the higher one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from shaper.core.types import GpuSample
from shaper.gpu.meter_check import APART_RATIO, EnergyCheck

# A counter moves every 20 to 100 ms; a reading or ten that fail are no lost counter.
_SILENT_SECONDS = 1.0
# Over a longer hole in the readings nobody knows what was drawn.
_HOLE_SECONDS = 1.0


@dataclass(slots=True)
class _Gpu:
    heard_seconds: float
    """When the counter last said something of use: from its first move on, anything."""
    counter_joules: float | None = None
    """What the counter said last, as the screen counts it."""
    moved: bool = False
    offset_joules: float = 0.0
    """Integrated and never counted."""
    ahead_joules: float = 0.0
    """Integrated since the counter was heard."""
    last: tuple[float, float] | None = None
    """Seconds and watts of the last power reading."""
    check: EnergyCheck = field(default_factory=EnergyCheck)
    uncounted_joules: float = 0.0
    """Shown by the power reading and not by the counter."""


class EnergyMeter:
    """Fills in the energy of samples whose counter is missing. One `_Gpu` of each."""

    def __init__(self) -> None:
        self._gpus: dict[int, _Gpu] = {}
        self.integrated = False
        """Whether energy of any GPU of the last samples came from its power."""

    def fill(self, samples: Sequence[GpuSample]) -> tuple[GpuSample, ...]:
        """The samples, which the screen has passed, with energy that never falls.

        Args:
            samples: of all GPUs, in the order of time.
        """
        self.integrated = False
        return tuple(self._fill_one(sample) for sample in samples)

    @property
    def read_over_counted_ratio(self) -> float:
        """The power reading over the counter, of the GPU where they are furthest apart."""
        ratios = [gpu.check.ratio for gpu in self._gpus.values()]
        return max(ratios, key=lambda ratio: abs(ratio - 1.0), default=1.0)

    @property
    def raised_ratio(self) -> float:
        """What a counter is multiplied by at the most."""
        return max((gpu.check.ratio for gpu in self._gpus.values()), default=1.0)

    @property
    def apart(self) -> bool:
        """Whether the two are further apart than is believed of one meter, on any GPU."""
        return abs(self.read_over_counted_ratio - 1.0) > APART_RATIO

    def _fill_one(self, sample: GpuSample) -> GpuSample:
        now, joules = sample.read_seconds, sample.energy_joules
        gpu = self._gpus.get(sample.gpu_index)
        if gpu is None:
            gpu = self._gpus[sample.gpu_index] = _Gpu(now)
        gpu.check.observe(sample)
        watts = sample.average_watts if sample.instant_watts is None else sample.instant_watts
        last, gpu.last = gpu.last, None if watts is None else (now, watts)
        if joules is not None:
            before = joules if gpu.counter_joules is None else gpu.counter_joules
            gpu.counter_joules = joules
            gpu.moved = gpu.moved or joules > before
            if gpu.moved:
                gpu.heard_seconds = now
                # What it counted while it was not heard, it says now, all at once.
                gpu.offset_joules += max(0.0, gpu.ahead_joules - (joules - before))
                gpu.uncounted_joules += max(0.0, gpu.check.ratio - 1.0) * (joules - before)
                gpu.ahead_joules = 0.0
        if now - gpu.heard_seconds >= _SILENT_SECONDS:
            self.integrated = True
            if last is not None and watts is not None and now - last[0] <= _HOLE_SECONDS:
                gpu.ahead_joules += 0.5 * (last[1] + watts) * max(0.0, now - last[0])
            joules = None if watts is None else gpu.counter_joules or 0.0
        if joules is None:
            return sample if sample.energy_joules is None else replace(sample, energy_joules=None)
        joules += gpu.offset_joules + gpu.ahead_joules + gpu.uncounted_joules
        return sample if joules == sample.energy_joules else replace(sample, energy_joules=joules)
