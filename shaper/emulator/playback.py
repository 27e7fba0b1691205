"""Recorded readings as the meter of an emulated GPU: over and over, whatever the load is.

A reading comes back at its recorded distance from the first, stamped with the clock's
time. When the last one is over, the first follows; times and the energy counter go on from
there, so the seam is no fault that the recorded machine never had. Where the recording has a
gap, a read had failed, and it fails here as well.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from shaper.core.types import GpuIdentity, GpuSample
from shaper.errors import GpuLostError, TraceError
from shaper.gpu.replay import ReplayReader, replayed_gpus

logger = logging.getLogger(__name__)

# A reader that is late by some ticks is a busy host; a meter's refresh is 100 ms at most.
_GAP_INTERVALS = 5.0
_LEAST_GAP_SECONDS = 0.25

Reading = tuple[GpuSample, ...]


def recorded_readings(path: Path) -> tuple[Reading, ...]:
    """All readings of a file of samples, or of a recording with samples in it.

    Raises:
        TraceError: it can't be read, is broken, or has fewer than two readings.
    """
    reader = ReplayReader(path)
    readings: list[Reading] = []
    try:
        while True:
            readings.append(reader.read())
    except GpuLostError:  # its end
        pass
    times = [reading[0].read_seconds for reading in readings]
    if len(readings) < 2 or times[-1] <= times[0]:
        raise TraceError(f"{path}: holds {len(readings)} readings over no time; two are needed")
    return tuple(readings)


class PlaybackReader:
    """A `GpuReader` over recorded readings, in a loop.

    Args:
        path: as `recorded_readings` takes it.
        clock: monotonic seconds; the loop starts at the first read.
        first: position of the first GPU of this engine in each recorded reading.
        count: GPUs of this engine.

    Raises:
        TraceError: see `recorded_readings`; or it has too few GPUs.
    """

    def __init__(
        self, path: Path, clock: Callable[[], float], *, first: int = 0, count: int = 1
    ) -> None:
        whole = recorded_readings(path)
        if len(whole[0]) < first + count:
            raise TraceError(
                f"{path}: has {len(whole[0])} GPUs, and those at positions {first} to "
                f"{first + count - 1} are asked for"
            )
        self._clock = clock
        self._readings = [reading[first : first + count] for reading in whole]
        start = whole[0][0].read_seconds
        self._times = [reading[0].read_seconds - start for reading in whole]
        intervals = [b - a for a, b in zip(self._times, self._times[1:], strict=False) if b > a]
        interval = median(intervals)
        self._gap_seconds = max(_LEAST_GAP_SECONDS, _GAP_INTERVALS * interval)
        self._loop_seconds = self._times[-1] + interval
        self._loop_joules = [
            _loop_joules([reading[gpu] for reading in self._readings], self._loop_seconds)
            for gpu in range(count)
        ]
        self._start_seconds: float | None = None
        self._gpus = replayed_gpus(path, self._readings[0])
        logger.warning(
            "readings of the GPU are played from %s, %.1f s in a loop: they do not depend on the "
            "load, so the budget is kept by prediction and not by what they say",
            path,
            self._loop_seconds,
        )

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        """The engine's part of the recorded GPUs."""
        return self._gpus

    def read(self) -> Reading:
        """The reading that is due.

        Raises:
            GpuLostError: the recording has a gap here.
        """
        now = self._clock()
        if self._start_seconds is None:
            self._start_seconds = now
        loops, at = divmod(now - self._start_seconds, self._loop_seconds)
        due = bisect_right(self._times, at) - 1
        if at - self._times[due] > self._gap_seconds:
            raise GpuLostError("the recording that is played has no reading here")
        return tuple(
            replace(
                sample,
                read_seconds=now,
                energy_joules=None
                if sample.energy_joules is None
                else sample.energy_joules + loops * joules,
            )
            for sample, joules in zip(self._readings[due], self._loop_joules, strict=True)
        )

    def close(self) -> None:
        """Nothing is held open."""


def _loop_joules(samples: Sequence[GpuSample], loop_seconds: float) -> float:
    """What a loop adds to the energy counter: what was counted, and as much for the seam."""
    known = [(s.read_seconds, s.energy_joules) for s in samples if s.energy_joules is not None]
    if len(known) < 2 or known[-1][0] <= known[0][0]:
        return 0.0
    (start, first), (end, last) = known[0], known[-1]
    return max(0.0, (last - first) * loop_seconds / (end - start))
