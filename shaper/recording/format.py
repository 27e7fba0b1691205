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

import contextlib
import csv
import errno
import glob
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shaper.core.types import ClockEventReasons, GpuSample, StepBatch
from shaper.errors import TraceError
from shaper.files.outputs import check_package
from shaper.recording.rows import (
    COLUMNS,
    SAMPLE_FIELDS,
    STEP_FIELDS,
    WHOLE_FIELDS,
    recorded_rows,
)

PARTIAL = ".partial.csv"
"""Ends the name of the rows of a Parquet recording that is not finished."""
_BLOCK_BYTES = 1 << 20


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
        path: ends with `.csv` or `.parquet`.
        meta: what the `meta` row says.
        replace: what is there is replaced; else it stops this with an error. Either way
            the file is a new one: who still writes the old one does not write into it.

    Raises:
        TraceError: another ending, or the file can't be made.
        MissingPackageError: it ends with `.parquet`, and pyarrow is not there.
    """

    def __init__(self, path: str | Path, meta: Mapping[str, Any], *, replace: bool = True) -> None:
        self.path = Path(path)
        if self.path.suffix not in (".csv", ".parquet"):
            raise TraceError(f"recording {str(path)!r} must end with .csv or .parquet")
        if self.path.suffix == ".parquet":
            check_package("pyarrow", f"recording {str(path)!r} (a .csv needs nothing):")
        self.rows_path = rows_path(self.path)
        self.rows = 0
        """Steps and samples written."""
        self.bytes = 0
        """Length of the file of rows."""
        try:
            for taken in {self.path, self.rows_path}:
                if replace:
                    taken.unlink(missing_ok=True)
                elif os.path.lexists(taken):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(taken))
            # Not through a link that somebody laid in between.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._descriptor: int | None = os.open(self.rows_path, flags, 0o666)
        except OSError as error:
            raise TraceError(f"recording {str(path)!r} can't be written: {error}") from error
        first = {"kind": "meta", "meta": json.dumps(dict(meta), default=str)}
        try:
            self._append([dict(zip(COLUMNS, COLUMNS, strict=True)), first])
        except OSError as error:
            self._let_go()
            self.rows_path.unlink()
            raise TraceError(f"recording {str(path)!r} can't be written: {error}") from error

    def write(self, steps: Sequence[RecordedStep] = (), samples: Sequence[GpuSample] = ()) -> None:
        """Append rows, and hand them to the operating system. Nothing after `close`.

        Raises:
            OSError: none of these rows is in the file; those before them are.
        """
        if self._descriptor is None:
            return
        rows: list[dict[str, Any]] = []
        for step in steps:
            batch = {name: getattr(step.batch, name) for name in STEP_FIELDS}
            times = {"start_seconds": step.start_seconds, "end_seconds": step.end_seconds}
            rows.append({"kind": "step", **times, **batch})
        for sample in samples:
            values = {name: getattr(sample, name) for name in SAMPLE_FIELDS}
            values["clock_event_reasons"] = int(sample.clock_event_reasons)
            known = {name: value for name, value in values.items() if value is not None}
            rows.append({"kind": "sample", **known})
        self._append(rows)
        self.rows += len(rows)

    def close(self) -> None:
        """Finish the file. May be called twice.

        Raises:
            TraceError: it can't be turned into Parquet; the rows stay as they are.
        """
        if self._descriptor is None:
            return
        self._let_go()
        if self.rows_path != self.path:
            finish_rows(self.rows_path)

    def release(self) -> None:
        """Let go of the rows as they are; `finish_rows` may follow, in any process."""
        if self._descriptor is not None:
            self._let_go()

    def _let_go(self) -> None:
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        assert self._descriptor is not None
        text = io.StringIO()
        csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n").writerows(rows)
        whole = text.getvalue().encode()
        left = memoryview(whole)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            # Half a row could be read as a wrong one.
            os.ftruncate(self._descriptor, self.bytes)
            raise
        self.bytes += len(whole)


def rows_path(path: Path) -> Path:
    """Where the rows of a recording stand while it is written."""
    return path if path.suffix == ".csv" else path.with_suffix(PARTIAL)


def path_of_rank(path: str | Path, rank: int) -> Path:
    """A file of each data-parallel rank's own: `run.csv`, `run.rank1.csv`, ..."""
    whole = Path(path)
    return whole.with_name(f"{whole.stem}.rank{rank}{whole.suffix}") if rank else whole


def finish_recordings(path: str | Path) -> None:
    """Finish what engines of this host that were killed have left of a `.parquet` recording.

    Args:
        path: the recording's; those of further data-parallel ranks stand beside it.

    Raises:
        TraceError: one can't be finished; its rows stay as they are.
    """
    path = Path(path)
    if path.suffix != ".parquet":
        return
    for left in path.parent.glob(f"{glob.escape(path.stem)}*{PARTIAL}"):
        finish_rows(left)


def finish_rows(rows: Path) -> None:
    """Turn `FILE.partial.csv` into `FILE.parquet`; nothing where it is gone.

    pyarrow does it piece by piece, so that a day takes no more memory than a minute.

    Raises:
        TraceError: there is a `FILE.parquet`, pyarrow is missing, or the disk is full; the
            rows stay as they are, and can be read.
    """
    path = rows.with_name(rows.name.removesuffix(PARTIAL) + ".parquet")
    made = False
    try:
        # Only a user of Parquet needs pyarrow; it comes with the `bench` extra.
        import pyarrow as pa
        import pyarrow.csv as pa_csv
        import pyarrow.parquet as pq

        text = {"kind": pa.string(), "meta": pa.string()}
        types = {c: text.get(c, pa.int64() if c in WHOLE_FIELDS else pa.float64()) for c in COLUMNS}
        with _complete_lines(rows) as source:
            made = _created(path)
            pieces = pa_csv.open_csv(
                source,
                # The longest row is the meta row, with the model's whole configuration.
                read_options=pa_csv.ReadOptions(block_size=_BLOCK_BYTES),
                convert_options=pa_csv.ConvertOptions(
                    column_types=types, null_values=[""], strings_can_be_null=True
                ),
            )
            with pieces, pq.ParquetWriter(path, pieces.schema) as writer:
                for piece in pieces:
                    writer.write_batch(piece)
        rows.unlink()
    except FileNotFoundError:
        # Whoever finished it was quicker.
        return
    except (ImportError, OSError, ValueError) as error:
        if made:
            path.unlink(missing_ok=True)
        raise TraceError(
            f"{path} can't be made: {error}; the rows are in {rows}, which can be read as it is"
        ) from error


def _created(path: Path) -> bool:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return True


@contextlib.contextmanager
def _complete_lines(rows: Path) -> Iterator[Any]:
    """The file up to its last line end: a kill may have left half a row."""
    with rows.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        start = max(0, end - _BLOCK_BYTES)
        file.seek(start)
        last = file.read(end - start).rfind(b"\n")
        file.truncate(start + last + 1)
        file.seek(0)
        yield file


def read_recording(path: str | Path) -> Recording:
    """Reads a recording, CSV or Parquet.

    Raises:
        TraceError: the file is missing or no recording, or a row is broken; the message
            names the row.
        MissingPackageError: it is Parquet, and pyarrow is not there.
    """
    meta: dict[str, Any] = {}
    steps: list[RecordedStep] = []
    samples: list[GpuSample] = []
    for _, event in recorded_events(Path(path), "kind"):
        if isinstance(event, RecordedStep):
            steps.append(event)
        elif isinstance(event, GpuSample):
            samples.append(event)
        else:
            meta.update(event)
    return Recording(meta, tuple(steps), tuple(samples))


def recorded_meta(path: Path) -> dict[str, Any]:
    """What the first row of a recording says of it; nothing for a table of samples alone.

    Raises:
        TraceError: that row is broken.
        MissingPackageError: see `read_recording`.
    """
    _, first = next(recorded_events(path), ("", {}))
    return first if isinstance(first, dict) else {}


def recorded_events(
    path: Path, *needed: str
) -> Iterator[tuple[str, RecordedStep | GpuSample | dict[str, Any]]]:
    """What each row says, in order, with the row's place in the file; a `meta` row is a dict.

    Args:
        path: of a recording, or of a table of samples alone, without a column `kind`.
        needed: columns that it must have.

    Raises:
        TraceError, MissingPackageError: see `read_recording`.
    """
    for place, cells in recorded_rows(path, needed):
        try:
            event = _event(cells)
        except ValueError as error:
            raise TraceError(f"{path}, {place}: {error}") from error
        yield place, event


def _event(cells: Mapping[str, Any]) -> RecordedStep | GpuSample | dict[str, Any]:
    kind = cells.get("kind", "sample")
    if kind == "meta":
        try:
            found = json.loads(cells.get("meta", ""))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the meta row's cell meta is no JSON ({error})") from error
        if not isinstance(found, dict):
            raise ValueError("the meta row's cell meta is no JSON object")
        return found
    if kind not in _NEEDED:
        raise ValueError(f"kind is {kind!r}, not meta, step or sample")
    for name in _NEEDED[kind]:
        if name not in cells:
            raise ValueError(f"{name} is empty")
    if kind == "sample":
        values = {name: cells[name] for name in SAMPLE_FIELDS if name in cells}
        values["clock_event_reasons"] = ClockEventReasons(values.get("clock_event_reasons", 0))
        return GpuSample(**values)
    start, end = cells["start_seconds"], cells["end_seconds"]
    if not end > start:
        raise ValueError(f"a step ends at {end}, not after its start at {start}")
    return RecordedStep(start, end, StepBatch(**{name: cells.get(name, 0) for name in STEP_FIELDS}))


_NEEDED = {"step": ("start_seconds", "end_seconds"), "sample": ("read_seconds", "gpu_index")}
