"""A recorded run as a GPU: samples come back as they were read.

A recording is a CSV or Parquet file whose columns are the fields of `GpuSample`:
`read_seconds` and `gpu_index` are required, the others optional. Each reading is
one row per GPU, in the same order every time. In a CSV an empty cell is a value
that the GPU did not report; `nan` is one that it reported so.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path

from shaper.core.types import ClockEventReasons, GpuIdentity, GpuSample
from shaper.errors import GpuLostError, GpuUnavailableError, TraceError

_COLUMNS = tuple(field.name for field in fields(GpuSample))
_REQUIRED = ("read_seconds", "gpu_index")
_WHOLE = ("gpu_index", "clock_event_reasons")


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
        self._readings = _group(path, [_sample(path, *row) for row in _rows(path)])
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
        return tuple(_restamp(sample, now_seconds) for sample in self._readings[self._next])


def _restamp(sample: GpuSample, read_seconds: float) -> GpuSample:
    values = {name: getattr(sample, name) for name in _COLUMNS}
    return GpuSample(**{**values, "read_seconds": read_seconds})


def _rows(path: Path) -> Iterable[tuple[int, Mapping[str, object]]]:
    """Pairs of (row number in the file, row), the header being row 1 of a CSV."""
    try:
        if path.suffix == ".parquet":
            # Only a user of Parquet recordings needs pyarrow; it comes with the `bench` extra.
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path)
            header, rows = table.column_names, table.to_pylist()
            first = 1
        else:
            with path.open(newline="") as file:
                reader = csv.DictReader(file, restval="")
                rows = list(reader)
                header = list(reader.fieldnames or ())
            first = 2
    except (OSError, ValueError, csv.Error) as error:
        raise TraceError(f"{path}: cannot be read as a recording: {error}") from error
    missing = [name for name in _REQUIRED if name not in header]
    if missing:
        raise TraceError(f"{path}: has no column {' and no column '.join(missing)}")
    # A whole recording (shaper/recording.py) holds steps, too; `kind` tells them apart.
    numbered = enumerate(rows, start=first)
    return (pair for pair in numbered if pair[1].get("kind") in (None, "", "sample"))


def _sample(path: Path, number: int, row: Mapping[str, object]) -> GpuSample:
    values: dict[str, float | int | None] = {}
    for name in _COLUMNS:
        cell = row.get(name)
        if cell is None or cell == "":
            if name in _REQUIRED:
                raise TraceError(f"{path}, row {number}: {name} is empty")
            continue
        try:
            values[name] = int(str(cell)) if name in _WHOLE else float(str(cell))
        except ValueError:
            raise TraceError(f"{path}, row {number}: {name} is {cell!r}, not a number") from None
    reasons = ClockEventReasons(int(values.pop("clock_event_reasons", None) or 0))
    return GpuSample(**values, clock_event_reasons=reasons)  # type: ignore[arg-type]


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


def _group(path: Path, samples: list[GpuSample]) -> list[tuple[GpuSample, ...]]:
    if not samples:
        raise TraceError(f"{path}: has no rows")
    order: list[int] = []
    for sample in samples:
        if sample.gpu_index in order:
            break
        order.append(sample.gpu_index)
    readings: list[tuple[GpuSample, ...]] = []
    for start in range(0, len(samples), len(order)):
        reading = tuple(samples[start : start + len(order)])
        if [sample.gpu_index for sample in reading] != order:
            raise TraceError(
                f"{path}, reading {len(readings) + 1}: expected one row for each of the GPUs "
                f"{order}, in this order"
            )
        if readings and reading[0].read_seconds < readings[-1][0].read_seconds:
            raise TraceError(f"{path}, reading {len(readings) + 1}: its time goes backwards")
        readings.append(reading)
    return readings
