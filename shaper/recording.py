"""A recording: what each step computed and took, and what the meter said meanwhile.

One table, as CSV or Parquet, with a row per event; `kind` says which columns count:

| kind | columns |
|---|---|
| `meta` | `meta`: a JSON object with `version`, `gpu` (the profile), `tensor_parallel`,
  `model_config` (Hugging Face's) |
| `step` | `start_seconds`, `end_seconds`, and the fields of `StepBatch` |
| `sample` | the fields of `GpuSample`, one row per GPU and reading |

Times are of the host's monotonic clock. Steps are in the order of their ends; a step
starts when it was launched or when its predecessor ended, whichever is later. A live
engine writes one with `record = FILE` (`--record FILE`); `shaper fit` makes a profile of it.
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from shaper.core.types import ClockEventReasons, GpuSample, StepBatch
from shaper.errors import TraceError

STEP_FIELDS = tuple(field.name for field in dataclasses.fields(StepBatch))
SAMPLE_FIELDS = tuple(field.name for field in dataclasses.fields(GpuSample))
COLUMNS = ("kind", "start_seconds", "end_seconds", *STEP_FIELDS, *SAMPLE_FIELDS, "meta")
_WHOLE = frozenset({*STEP_FIELDS, "gpu_index", "clock_event_reasons"})


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One step: its work, and the time from its start to its output."""

    start_seconds: float
    end_seconds: float
    batch: StepBatch


@dataclass(frozen=True, slots=True)
class Recording:
    """A recording as it was read."""

    meta: Mapping[str, Any]
    steps: tuple[RecordedStep, ...]
    samples: tuple[GpuSample, ...]


class RecordingWriter:
    """Writes a recording, row by row. A full disk or a kill costs the last rows at most.

    A `.parquet` can't be appended to: it is written as `FILE.partial.csv`, which is as
    readable, and turned into Parquet by `close`.

    Args:
        path: ends with `.csv` or `.parquet`; what is there is replaced.
        meta: what the `meta` row says.

    Raises:
        TraceError: another ending, or the file can't be written.
    """

    def __init__(self, path: str | Path, meta: Mapping[str, Any]) -> None:
        self.path = Path(path)
        if self.path.suffix not in (".csv", ".parquet"):
            raise TraceError(f"recording {str(path)!r} must end with .csv or .parquet")
        self._rows_path = (
            self.path if self.path.suffix == ".csv" else self.path.with_suffix(".partial.csv")
        )
        try:
            self._file: TextIO | None = self._rows_path.open("w", newline="")
        except OSError as error:
            raise TraceError(f"recording {str(path)!r} can't be written: {error}") from error
        self._writer = csv.DictWriter(self._file, COLUMNS, restval="", lineterminator="\n")
        self._writer.writeheader()
        self._writer.writerow({"kind": "meta", "meta": json.dumps(dict(meta), default=str)})
        self._file.flush()

    def write(self, steps: Sequence[RecordedStep] = (), samples: Sequence[GpuSample] = ()) -> None:
        """Append rows, and hand them to the operating system. Nothing after `close`."""
        if self._file is None:
            return
        for step in steps:
            batch = {name: getattr(step.batch, name) for name in STEP_FIELDS}
            times = {"start_seconds": step.start_seconds, "end_seconds": step.end_seconds}
            self._writer.writerow({"kind": "step", **times, **batch})
        for sample in samples:
            values = {name: getattr(sample, name) for name in SAMPLE_FIELDS}
            values["clock_event_reasons"] = int(sample.clock_event_reasons)
            known = {name: value for name, value in values.items() if value is not None}
            self._writer.writerow({"kind": "sample", **known})
        self._file.flush()

    def close(self) -> None:
        """Finish the file. May be called twice."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        # It is gone where `finish_recordings` was quicker.
        if self._rows_path != self.path and self._rows_path.exists():
            _to_parquet(self._rows_path, self.path)
            self._rows_path.unlink()


def finish_recordings(path: str | Path) -> None:
    """Finish what engines of this host that were killed have left of a `.parquet` recording.

    Args:
        path: the recording's; those of further data-parallel ranks stand beside it.
    """
    path = Path(path)
    if path.suffix != ".parquet":
        return
    for rows_path in path.parent.glob(f"{glob.escape(path.stem)}*.partial.csv"):
        finished = rows_path.with_name(rows_path.name.removesuffix(".partial.csv") + ".parquet")
        _to_parquet(rows_path, finished)
        rows_path.unlink()


def _to_parquet(rows_path: Path, path: Path) -> None:
    # Only a user of Parquet needs pyarrow; it comes with the `bench` extra.
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [_typed(rows_path, number, row) for number, row in _csv_rows(rows_path)]
    types = {"kind": pa.string(), "meta": pa.string()}
    schema = pa.schema(
        (name, types.get(name, pa.int64() if name in _WHOLE else pa.float64())) for name in COLUMNS
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def read_recording(path: str | Path) -> Recording:
    """Reads a `.csv` or `.parquet` recording.

    Raises:
        TraceError: the file is missing or no recording, or a row is broken; the message
            names the row.
    """
    path = Path(path)
    meta: dict[str, Any] = {}
    steps: list[RecordedStep] = []
    samples: list[GpuSample] = []
    try:
        for number, cells in _rows(path):
            row = _typed(path, number, cells)
            kind = row.get("kind")
            try:
                if kind == "meta":
                    meta.update(json.loads(row["meta"]))
                elif kind == "step":
                    steps.append(_step(row))
                elif kind == "sample":
                    samples.append(_sample(row))
                else:
                    raise ValueError(f"kind is {kind!r}, not meta, step or sample")
            except (KeyError, TypeError, ValueError) as error:
                raise TraceError(f"{path}, row {number}: {error}") from error
    except (OSError, csv.Error) as error:
        raise TraceError(f"{path}: cannot be read as a recording: {error}") from error
    return Recording(meta, tuple(steps), tuple(samples))


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            yield from enumerate(pq.read_table(path).to_pylist(), start=1)
        except pa.ArrowInvalid as error:
            raise TraceError(f"{path}: cannot be read as a recording: {error}") from error
    else:
        yield from _csv_rows(path)


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if "kind" not in (reader.fieldnames or ()):
            raise TraceError(f"{path}: has no column 'kind'; is it a recording?")
        yield from enumerate(reader, start=2)


def _typed(path: Path, number: int, cells: Mapping[str, Any]) -> dict[str, Any]:
    """The row's cells that are not empty, as numbers where they are."""
    row: dict[str, Any] = {}
    for name, cell in cells.items():
        if cell is None or cell == "" or name is None:
            continue
        if name in ("kind", "meta"):
            row[name] = cell
            continue
        try:
            row[name] = int(cell) if name in _WHOLE else float(cell)
        except ValueError:
            raise TraceError(f"{path}, row {number}: {name} is {cell!r}, not a number") from None
    return row


def _step(row: Mapping[str, Any]) -> RecordedStep:
    start, end = row["start_seconds"], row["end_seconds"]
    if not end > start:
        raise ValueError(f"a step ends at {end}, not after its start at {start}")
    return RecordedStep(start, end, StepBatch(**{name: row.get(name, 0) for name in STEP_FIELDS}))


def _sample(row: Mapping[str, Any]) -> GpuSample:
    values = {name: row[name] for name in SAMPLE_FIELDS if name in row}
    values["clock_event_reasons"] = ClockEventReasons(int(values.get("clock_event_reasons", 0)))
    return GpuSample(**values)
