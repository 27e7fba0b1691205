"""A recorded run as a GPU: samples come back as they were read.

A recording is a CSV or Parquet file whose columns are the fields of `GpuSample`:
`read_seconds` and `gpu_index` are required, the others optional. Each reading is
one row per GPU, in the same order every time. In a CSV an empty cell is a value
that the GPU did not report; `nan` is one that it reported so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from shaper.core.types import GpuIdentity, GpuSample
from shaper.errors import GpuLostError, GpuUnavailableError, TraceError
from shaper.recording.format import recorded_events


class ReplayReader:
    """A `GpuReader` over a recording.

    Args:
        path: a `.csv` or `.parquet` file.
        clock: None returns one reading per `read` call, stamped as recorded. A clock
            (seconds) returns the latest reading that is due, counted from the first
            call, stamped with the clock's time; the last one is due for as long as the
            one before it was.

    Raises:
        TraceError: the file is missing, empty, or has a broken row.
    """

    def __init__(self, path: Path, clock: Callable[[], float] | None = None) -> None:
        self._path = path
        self._clock = clock
        events = recorded_events(path, "read_seconds", "gpu_index")
        self._readings = _group(path, [(at, x) for at, x in events if isinstance(x, GpuSample)])
        self._gpus = replayed_gpus(path, self._readings[0])
        last, before = self._readings[-1][0], self._readings[max(0, len(self._readings) - 2)][0]
        self._end_seconds = 2 * last.read_seconds - before.read_seconds
        self._next = 0
        self._offset_seconds: float | None = None
        self._open = True

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        """The GPUs of the first reading, in its order."""
        return self._gpus

    def read(self) -> tuple[GpuSample, ...]:
        """The next reading, or the one that is due.

        Raises:
            GpuLostError: the recording has ended.
            GpuUnavailableError: the reader is closed.
        """
        if not self._open:
            raise GpuUnavailableError("this reader is closed")
        if self._clock is not None:
            return self._due(self._clock())
        if self._next >= len(self._readings):
            raise GpuLostError(f"the recording {self._path} has ended")
        self._next += 1
        return self._readings[self._next - 1]

    def close(self) -> None:
        """Nothing is held open; later reads raise. May be called twice."""
        self._open = False

    def _due(self, now_seconds: float) -> tuple[GpuSample, ...]:
        if self._offset_seconds is None:
            self._offset_seconds = now_seconds - self._readings[0][0].read_seconds
        recorded_seconds = now_seconds - self._offset_seconds
        if recorded_seconds > self._end_seconds:
            raise GpuLostError(f"the recording {self._path} has ended")
        while (
            self._next + 1 < len(self._readings)
            and self._readings[self._next + 1][0].read_seconds <= recorded_seconds
        ):
            self._next += 1
        return tuple(replace(s, read_seconds=now_seconds) for s in self._readings[self._next])


def replayed_gpus(path: Path, reading: Iterable[GpuSample]) -> tuple[GpuIdentity, ...]:
    """The GPUs of one reading of a recording, in its order."""
    return tuple(
        GpuIdentity(
            index=sample.gpu_index,
            name=f"replay of {path.name}",
            uuid=f"REPLAY-{sample.gpu_index}",
            enforced_limit_watts=sample.enforced_limit_watts,
        )
        for sample in reading
    )


def _group(path: Path, samples: list[tuple[str, GpuSample]]) -> list[tuple[GpuSample, ...]]:
    if not samples:
        raise TraceError(f"{path}: has no rows with readings of a GPU")
    order: list[int] = []
    for _, sample in samples:
        if sample.gpu_index in order:
            break
        order.append(sample.gpu_index)
    readings: list[tuple[GpuSample, ...]] = []
    for start in range(0, len(samples), len(order)):
        place = samples[start][0]
        reading = tuple(sample for _, sample in samples[start : start + len(order)])
        if [sample.gpu_index for sample in reading] != order:
            raise TraceError(
                f"{path}, from {place} on, reading {len(readings) + 1}: expected one row for each "
                f"of the GPUs {order}, in this order"
            )
        if readings and reading[0].read_seconds < readings[-1][0].read_seconds:
            raise TraceError(
                f"{path}, {place}, reading {len(readings) + 1}: its time goes backwards; sort the "
                "file by read_seconds"
            )
        readings.append(reading)
    return readings
