"""The small form of a comparison's recordings, to be committed and replayed in tests.

    meta.json            source, settings, the GPU at rest, and each run's figures
    RUN.parquet          steps and readings, as a recording that `shaper fit` and
                         `read_recording` take: columns without values left out, readings that
                         repeat the one before left out
    requests.parquet     of all runs: arrival, lengths, TTFT and end-to-end latency

Where they would be larger than asked for, every run is cut to its first seconds.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_serving.figures import RunFigures, as_data
from bench.gpu_serving.store import write_json
from bench.harness.tables import without_nan
from shaper.core.types import GpuSample
from shaper.errors import ConfigError
from shaper.recording.format import RecordedStep, Recording
from shaper.recording.rows import SAMPLE_FIELDS, STEP_FIELDS

MOST_BYTES = 2_000_000
_FEWEST_SECONDS = 2.0
# Times to 10 µs: a step takes milliseconds, and shorter numbers compress better.
_TIME_DIGITS = 5
_TIMES = frozenset({"start_seconds", "end_seconds", "read_seconds"})


def pack(
    folder: Path, about: Mapping[str, Any], runs: Sequence[RunFigures], most_bytes: int = MOST_BYTES
) -> int:
    """Writes the small form.

    Args:
        folder: made if missing; what a pack has left there is replaced.
        about: goes into `meta.json`; names the source.
        runs: to pack.
        most_bytes: of all files together.

    Returns:
        Bytes written.

    Raises:
        ConfigError: nothing to pack, or it does not fit.
    """
    if not runs:
        raise ConfigError("there is no finished run to pack")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--pack {folder}: {error.strerror}") from error
    longest = max(run.stored.replay.duration_seconds for run in runs)
    seconds = longest
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        while True:
            _write(scratch, dict(about) | {"packed_seconds": seconds}, runs, seconds)
            size = sum(path.stat().st_size for path in scratch.iterdir())
            if size <= most_bytes:
                break
            seconds *= min(0.8, 0.9 * most_bytes / size)
            if seconds < _FEWEST_SECONDS:
                raise ConfigError(f"the runs don't fit {most_bytes} bytes: pack fewer")
        for stale in [*folder.glob("*.parquet"), *folder.glob("meta.json")]:
            stale.unlink()
        for path in scratch.iterdir():
            shutil.copyfile(path, folder / path.name)
    return size


def _write(
    folder: Path, about: Mapping[str, Any], runs: Sequence[RunFigures], seconds: float
) -> None:
    data = {**about, "runs": {run.name: as_data(run) for run in runs}}
    write_json(folder / "meta.json", without_nan(json.loads(json.dumps(data, default=str))))
    requests: list[dict[str, Any]] = []
    for run in runs:
        start = run.meta.started_seconds
        until = start + seconds
        recording = run.stored.recording
        steps = [s for s in recording.steps if start <= s.start_seconds and s.end_seconds <= until]
        kept = [s for s in recording.samples if start <= s.read_seconds <= until]
        thin = Recording(
            {**recording.meta, "source": run.meta.source, "run": run.name},
            tuple(_moved_step(step, start) for step in steps),
            tuple(_moved_sample(sample, start) for sample in _fresh(kept)),
        )
        _write_recording(folder / f"{run.name}.parquet", thin)
        requests += [_request(run.name, record, start) for record in run.stored.replay.records]
    _write_table(folder / "requests.parquet", requests)


def _fresh(samples: Sequence[GpuSample]) -> list[GpuSample]:
    """The readings that differ from the one before, and that one: a change is dated half
    way between the two."""
    found: list[GpuSample] = []
    for index, sample in enumerate(samples):
        same = [
            index + offset >= 0
            and index + offset < len(samples)
            and dataclasses.replace(samples[index + offset], read_seconds=sample.read_seconds)
            == sample
            for offset in (-1, 1)
        ]
        if not all(same):
            found.append(sample)
    return found


def _moved_step(step: RecordedStep, start: float) -> RecordedStep:
    return RecordedStep(step.start_seconds - start, step.end_seconds - start, step.batch)


def _moved_sample(sample: GpuSample, start: float) -> GpuSample:
    return dataclasses.replace(sample, read_seconds=sample.read_seconds - start)


def _request(run: str, record: Any, start: float) -> dict[str, Any]:
    times = record.token_seconds
    return {
        "run": run,
        "due_seconds": round(record.due_seconds - start, _TIME_DIGITS),
        "prompt_tokens": record.request.prompt_tokens,
        "output_tokens": record.output_tokens,
        "ttft_seconds": _short(times[0] - record.sent_seconds) if len(times) else None,
        "e2el_seconds": _short(times[-1] - record.sent_seconds) if len(times) else None,
        "error": record.error,
    }


def _short(value: float) -> float:
    return round(float(value), _TIME_DIGITS)


def _write_recording(path: Path, recording: Recording) -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "meta", "meta": json.dumps(dict(recording.meta), default=str)}
    ]
    for step in recording.steps:
        row = {name: getattr(step.batch, name) for name in STEP_FIELDS}
        times = {"start_seconds": step.start_seconds, "end_seconds": step.end_seconds}
        rows.append({"kind": "step", **times, **{k: v for k, v in row.items() if v}})
    for sample in recording.samples:
        values = {name: getattr(sample, name) for name in SAMPLE_FIELDS}
        values["clock_event_reasons"] = int(sample.clock_event_reasons)
        known = {k: v for k, v in values.items() if v is not None and _plain(v)}
        rows.append({"kind": "sample", **known})
    _write_table(path, rows)


def _plain(value: object) -> bool:
    return isinstance(value, str | int | float)


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for row in rows for name in row)
    columns = {
        name: [_rounded(name, row.get(name)) for row in rows]
        for name in names
        if any(row.get(name) is not None for row in rows)
    }
    table = pa.table(columns)
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=19,
        use_dictionary=[name for name in table.column_names if name not in _TIMES],
        use_byte_stream_split=[name for name in floats if name in _TIMES],
    )


def _rounded(name: str, value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _TIME_DIGITS if name in _TIMES else 3)
    return value
