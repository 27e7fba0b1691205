"""What a GPU's meter does, found out from what is read: how often it refreshes, over which window.

Laws.

    refresh   the usual time between two readings that differ: the mean of the intervals
              within half of their median, so that a refresh to the same value does not count.
              A difference below the meter's grain is none (`screen.py`)
    window    the W for which the mean power of the last W seconds is closest to the average
              reading; mean power is the slope of the energy counter, else of the sum of the
              instant readings. It is told only where it is clearly closer than other windows.

A refresh is seen at the next read: one that is near `read_interval_seconds` may be quicker.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, median_low, quantiles

from shaper.core.types import GpuSample
from shaper.gpu.energy_history import EnergyHistory
from shaper.gpu.reader import GpuReader
from shaper.gpu.validation import SampleValidator, same_reading

_FIELDS = ("instant_watts", "average_watts", "energy_joules")
# Some seconds of the slowest meter, and no more than that is kept.
_KEPT_INTERVALS, _LEAST_INTERVALS = 64, 8
# Costs of the last ten seconds at the sampler's pace; p99 is then the fifth longest.
_KEPT_COSTS, _LEAST_COSTS = 512, 20
# A hole in the reads is no interval of the meter.
_HOLE_SECONDS = 0.25
# Windows from 105 ms to 3.4 s, each a fifth longer than the one before: finer is not told.
_WINDOWS_SECONDS = tuple(math.pow(2.0, step / 4.0) for step in range(-13, 8))
_HISTORY_SECONDS = 4.0
# The average follows the power by its window; so many readings hold some of its swings.
_LEAST_MATCHES, _MOST_MATCHES = 20, 400
# The mean error of the window that is told, beside that of those far from it, and in watts.
_CLEARLY, _FAR_STEPS = 0.5, 4
# Power that moves less is steady: it has the same mean over every window.
_SWING_WATTS = 5.0


@dataclass(frozen=True, slots=True)
class MeterFacts:
    """What is known of one GPU's meter. None: not seen often enough, or it can't be told."""

    gpu_index: int
    instant_refresh_seconds: float | None = None
    average_refresh_seconds: float | None = None
    energy_refresh_seconds: float | None = None
    average_window_seconds: float | None = None
    read_interval_seconds: float | None = None
    """Between two reads: a refresh near it may be quicker still."""
    read_p50_seconds: float | None = None
    """What a read of all GPUs takes."""
    read_p99_seconds: float | None = None
    readings: int = 0


class MeterWatch:
    """Watches the samples of one engine's GPUs. Its memory is bounded.

    Stateful fields: one `_Gpu` each, and the costs of the last reads.
    """

    def __init__(self) -> None:
        self._gpus: dict[int, _Gpu] = {}
        self._costs: deque[float] = deque(maxlen=_KEPT_COSTS)

    def observe(self, samples: Sequence[GpuSample], cost_seconds: float) -> None:
        """Take one reading of all GPUs, as it passed the screen, and what it took."""
        self._costs.append(cost_seconds)
        for sample in samples:
            gpu = self._gpus.get(sample.gpu_index)
            if gpu is None:
                gpu = self._gpus[sample.gpu_index] = _Gpu()
            gpu.observe(sample)

    def facts(self) -> tuple[MeterFacts, ...]:
        """What is known by now, in the order in which the GPUs were first seen."""
        p50 = p99 = None
        costs = list(self._costs)
        if len(costs) >= _LEAST_COSTS:
            p50, p99 = median(costs), quantiles(costs, n=100)[98]
        return tuple(
            MeterFacts(
                gpu_index=index,
                instant_refresh_seconds=gpu.fields["instant_watts"].refresh_seconds(),
                average_refresh_seconds=gpu.fields["average_watts"].refresh_seconds(),
                energy_refresh_seconds=gpu.fields["energy_joules"].refresh_seconds(),
                average_window_seconds=gpu.window.seconds(),
                read_interval_seconds=median(gpu.reads) if gpu.reads else None,
                read_p50_seconds=p50,
                read_p99_seconds=p99,
                readings=gpu.readings,
            )
            for index, gpu in self._gpus.items()
        )


class _Gpu:
    def __init__(self) -> None:
        self.fields = {name: _Changes() for name in _FIELDS}
        self.reads: deque[float] = deque(maxlen=_KEPT_INTERVALS)
        self.window = _Window()
        self.readings = 0
        self._read_seconds: float | None = None

    def observe(self, sample: GpuSample) -> None:
        now, before = sample.read_seconds, self._read_seconds
        if before is not None and now <= before:
            return
        self._read_seconds = now
        self.readings += 1
        hole = before is not None and now - before > _HOLE_SECONDS
        if before is not None and not hole:
            self.reads.append(now - before)
        changed = {
            name: changes.observe(now, getattr(sample, name), hole)
            for name, changes in self.fields.items()
        }
        if hole:
            self.window = _Window(self.window)
        self.window.observe(sample, changed["energy_joules"], changed["average_watts"])


class _Changes:
    """When one reading last changed, and the times between changes."""

    def __init__(self) -> None:
        self._value: float | None = None
        self._changed_seconds: float | None = None
        self._intervals: deque[float] = deque(maxlen=_KEPT_INTERVALS)

    def observe(self, now: float, value: float | None, hole: bool) -> bool:
        if value is None or hole:
            self._value, self._changed_seconds = value, None
            return False
        before = self._value
        if before is not None and same_reading(before, value):
            return False
        self._value = value
        if before is None:
            return False
        if self._changed_seconds is not None:
            self._intervals.append(now - self._changed_seconds)
        self._changed_seconds = now
        return True

    def refresh_seconds(self) -> float | None:
        if len(self._intervals) < _LEAST_INTERVALS:
            return None
        # One of them, so that itself is near it: between two clusters there would be none.
        middle = median_low(self._intervals)
        return fmean(one for one in self._intervals if 0.5 * middle <= one <= 1.5 * middle)


class _Window:
    """Compares the average with the mean power of many windows, until enough is known.

    Args:
        before: whose errors are kept; its history is of another time.
    """

    def __init__(self, before: _Window | None = None) -> None:
        self._history = EnergyHistory()
        self._counted = False
        self._last: tuple[float, float] | None = None
        self._summed = 0.0
        self._errors: list[float] = [0.0] * len(_WINDOWS_SECONDS)
        self._matches: int = 0
        if before is not None:
            self._errors, self._matches = before._errors, before._matches

    def observe(self, sample: GpuSample, energy_moved: bool, average_moved: bool) -> None:
        if self._matches >= _MOST_MATCHES:
            return
        now = sample.read_seconds
        self._extend(now, sample, energy_moved)
        if average_moved and sample.average_watts is not None and self._history:
            self._match(self._history.last[0], sample.average_watts)
        self._history.trim(now - _HISTORY_SECONDS)

    def _extend(self, now: float, sample: GpuSample, energy_moved: bool) -> None:
        if sample.energy_joules is not None:
            if not self._counted:
                # From here on the counter is the measure, also where one reading is missing.
                self._counted = True
                self._history.clear()
            risen = not self._history or sample.energy_joules > self._history.last[1]
            if energy_moved and risen:
                self._history.add(now, sample.energy_joules)
        elif sample.instant_watts is not None and not self._counted:
            last, self._last = self._last, (now, sample.instant_watts)
            if last is not None:
                self._summed += 0.5 * (last[1] + sample.instant_watts) * (now - last[0])
            self._history.add(now, self._summed)

    def _match(self, now: float, average_watts: float) -> None:
        if now - self._history.first_seconds < _WINDOWS_SECONDS[-1]:
            return
        means = [self._history.joules_between(now - w, now) / w for w in _WINDOWS_SECONDS]
        # Steady power has the same mean over every window.
        if max(means) - min(means) < _SWING_WATTS:
            return
        self._matches += 1
        for step, mean in enumerate(means):
            self._errors[step] += (mean - average_watts) ** 2

    def seconds(self) -> float | None:
        if self._matches < _LEAST_MATCHES:
            return None
        best = min(range(len(self._errors)), key=self._errors.__getitem__)
        far = [error for step, error in enumerate(self._errors) if abs(step - best) >= _FAR_STEPS]
        if self._errors[best] > _CLEARLY**2 * min(far):
            return None
        return _WINDOWS_SECONDS[best]


def measure_meter(
    reader: GpuReader,
    seconds: float = 3.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    interval_seconds: float = 0.005,
    screen: SampleValidator | None = None,
) -> tuple[MeterFacts, ...]:
    """Reads for some seconds in the caller's thread, and says what was found.

    Args:
        reader: of the GPUs.
        seconds: how long; the window takes five and a load that moves.
        clock, sleep: of the same time.
        interval_seconds: between reads; what it takes to tell a refresh of 20 ms.
        screen: that the readings pass through, for a caller who asks it afterwards.

    Raises:
        GpuError: as `reader.read` does.
    """
    watch, screen = MeterWatch(), screen or SampleValidator()
    begin = clock()
    while clock() - begin < seconds:
        before = clock()
        samples = reader.read()
        watch.observe(screen.pass_on(samples), clock() - before)
        sleep(interval_seconds)
    return watch.facts()
