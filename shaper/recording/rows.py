"""The rows of a recording, as CSV or Parquet; `shaper/recording/format.py` has the format.

A table of samples alone, with the columns of `GpuSample` and no `kind`, is one, too. An
empty cell of any column is a value that was not given; `nan` in a float column is one that the
GPU reported so, and in a column of whole numbers it is an empty cell, as pandas writes it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shaper.core.types import GpuSample, StepBatch
from shaper.errors import MissingPackageError, TraceError
from shaper.files.tables import Header, float_number, key, read_header, read_rows, whole_number
from shaper.files.text import open_lines, open_regular, shown

STEP_FIELDS = StepBatch._fields
SAMPLE_FIELDS = tuple(field.name for field in dataclasses.fields(GpuSample))
COLUMNS = ("kind", "start_seconds", "end_seconds", *STEP_FIELDS, *SAMPLE_FIELDS, "meta")
WHOLE_FIELDS = frozenset({*STEP_FIELDS, "gpu_index", "clock_event_reasons"})
_TEXTS = frozenset({"kind", "meta"})
_TIMES = frozenset({"start_seconds", "end_seconds", "read_seconds"})
_NAMES = {key(name): name for name in COLUMNS}
_PARQUET = b"PAR1"


Row = tuple[str, Mapping[str, Any]]
"""Where a row stands in the file, and its known columns that are not empty, as numbers or text."""


def recorded_rows(path: Path, needed: Sequence[str]) -> Iterator[Row]:
    """The file's rows, in order.

    Args:
        path: of a file of either kind; what it is, its content says, not its name.
        needed: columns that it must have.

    Raises:
        TraceError: it can't be read, lacks a column, or a cell is wrong; the message names
            the file and the row.
        MissingPackageError: it is Parquet, and pyarrow is not there.
    """
    with open_regular(path) as file:
        start = file.read(len(_PARQUET))
    if start == _PARQUET:
        yield from _parquet(path, needed)
    elif path.suffix == ".parquet":
        raise TraceError(f"{path}: cannot be read as a recording: it is no Parquet file")
    else:
        yield from _csv(path, needed)


def _csv(path: Path, needed: Sequence[str]) -> Iterator[Row]:
    with open_lines(path) as lines:
        header = read_header(lines)
        if header is None:
            header = Header((), ",")
        _check(path, header.names, needed)
        names = [_NAMES.get(name) for name in header.names]
        for cells, whole in read_rows(lines, header):
            if not whole:
                return  # the row in which a kill has hit the writer
            place = f"row {lines.number}"
            pairs = zip(names, cells, strict=False)
            yield place, _typed(path, place, ((n, c) for n, c in pairs if n is not None))


def _parquet(path: Path, needed: Sequence[str]) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingPackageError(f"{path} is Parquet: reading it", "pyarrow") from error
    try:
        with pq.ParquetFile(path) as table:
            columns = [key(name) for name in table.schema_arrow.names]
            _check(path, columns, needed)
            number = 0
            for batch in table.iter_batches():
                for cells in batch.to_pylist():
                    number += 1
                    place = f"row {number}"
                    pairs = ((_NAMES.get(key(name)), cell) for name, cell in cells.items())
                    known = ((n, c) for n, c in pairs if n is not None)
                    yield place, _typed(path, place, known)
    except (pa.ArrowException, OSError) as error:
        raise TraceError(f"{path}: cannot be read as a recording: {error}") from error


def _check(path: Path, names: Sequence[str], needed: Sequence[str]) -> None:
    missing = [name for name in needed if key(name) not in names]
    if missing:
        raise TraceError(
            f"{path}: has no column {' and no column '.join(missing)}; is it a recording "
            "(shaper record, or --record of a server)?"
        )


def _typed(path: Path, place: str, pairs: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, cell in pairs:
        if cell is None or cell == "":
            continue
        try:
            if name in _TEXTS:
                found[name] = str(cell)
            elif not _is_nan(cell):
                number = whole_number(cell) if name in WHOLE_FIELDS else float_number(cell)
                if number < 0 and name in WHOLE_FIELDS:
                    raise ValueError(f"{shown(cell)}, below 0")
                found[name] = number
            elif name in _TIMES:
                raise ValueError(f"{shown(cell)}, no time")
            elif name not in WHOLE_FIELDS:
                found[name] = math.nan
        except ValueError as error:
            raise TraceError(f"{path}, {place}: {name} is {error}") from None
    return found


def _is_nan(cell: object) -> bool:
    if isinstance(cell, str):
        return cell.lower() in ("nan", "+nan", "-nan")
    return isinstance(cell, float) and math.isnan(cell)
