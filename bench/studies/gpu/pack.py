"""The small form of a study's recordings, to be committed and replayed in tests.

    meta.json       source, settings, the GPU at rest, and each server run's figures
    STAGE.parquet   a recording that `shaper fit` and `read_recording` take: times from the
                    stage's start and to 10 µs, without readings that repeat the one before

Where they would be larger than asked for, every stage is cut to its first seconds.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.studies.gpu.store import write_json
from shaper.core.types import GpuSample
from shaper.errors import ConfigError
from shaper.recording.format import RecordedStep, Recording, RecordingWriter

MOST_BYTES = 2_000_000
_FEWEST_SECONDS = 2.0
_TIME_DIGITS = 5
_ROUNDED = ("instant_watts", "average_watts", "energy_joules", "enforced_limit_watts")


def pack(
    folder: Path,
    about: Mapping[str, Any],
    recordings: Mapping[str, tuple[Recording, float]],
    most_bytes: int = MOST_BYTES,
) -> int:
    """Writes the small form.

    Args:
        folder: made if missing; what a pack has left there is replaced.
        about: goes into `meta.json`; names the source.
        recordings: by stage, each with the time at which its measurement began.
        most_bytes: of all files together.

    Returns:
        Bytes written.

    Raises:
        ConfigError: nothing to pack, or it does not fit.
    """
    if not recordings:
        raise ConfigError("there is no finished stage to pack")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--pack {folder}: {error.strerror}") from error
    seconds = max(r.steps[-1].end_seconds - start for r, start in recordings.values() if r.steps)
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        while True:
            write_json(scratch / "meta.json", {**about, "packed_seconds": seconds})
            for name, (recording, start) in recordings.items():
                _write(scratch / f"{name}.parquet", recording, start, seconds)
            size = sum(path.stat().st_size for path in scratch.iterdir())
            if size <= most_bytes:
                break
            seconds *= min(0.8, 0.9 * most_bytes / size)
            if seconds < _FEWEST_SECONDS:
                raise ConfigError(f"the stages don't fit {most_bytes} bytes: pack fewer")
        for stale in [*folder.glob("*.parquet"), *folder.glob("meta.json")]:
            stale.unlink()
        for path in scratch.iterdir():
            shutil.copyfile(path, folder / path.name)
    return size


def _write(path: Path, recording: Recording, start: float, seconds: float) -> None:
    import pyarrow.parquet as pq

    writer = RecordingWriter(path, recording.meta)
    steps = [
        RecordedStep(
            round(step.start_seconds - start, _TIME_DIGITS),
            round(step.end_seconds - start, _TIME_DIGITS),
            step.batch,
        )
        for step in recording.steps
        if start <= step.start_seconds and step.end_seconds <= start + seconds
    ]
    inside = [s for s in recording.samples if start <= s.read_seconds <= start + seconds]
    writer.write(steps, [_moved(sample, start) for sample in _fresh(inside)])
    writer.close()
    table = pq.read_table(path)
    times = ("start_seconds", "end_seconds", "read_seconds")
    pq.write_table(
        table.select([n for n in table.column_names if table[n].null_count < len(table)]),
        path,
        compression="zstd",
        compression_level=19,
        use_dictionary=[name for name in table.column_names if name not in times],
    )


def _fresh(samples: Sequence[GpuSample]) -> list[GpuSample]:
    """The readings that differ from the one before or behind: a change is dated half way
    between the two."""
    still = [dataclasses.replace(sample, read_seconds=0.0) for sample in samples]
    last = len(samples) - 1
    return [
        sample
        for index, sample in enumerate(samples)
        if not 0 < index < last or not still[index - 1] == still[index] == still[index + 1]
    ]


def _moved(sample: GpuSample, start: float) -> GpuSample:
    rounded = {
        name: round(value, 3) for name in _ROUNDED if (value := getattr(sample, name)) is not None
    }
    at = round(sample.read_seconds - start, _TIME_DIGITS)
    return dataclasses.replace(sample, read_seconds=at, **rounded)


def first_seconds(recording: Recording) -> float:
    """When its first sample was read."""
    return min((sample.read_seconds for sample in recording.samples), default=0.0)


def join(path: Path, recordings: dict[str, Recording]) -> None:
    """One recording of the engine's stages, for `shaper fit`; what was recorded before the
    machine was started anew has another clock, and is left out."""
    stages = sorted((each for each in recordings.values() if each.samples), key=first_seconds)
    if not stages:
        return
    writer = RecordingWriter(path, stages[-1].meta)
    for each in stages:
        if each.meta.get("boot") == stages[-1].meta.get("boot"):
            writer.write(each.steps, each.samples)
    writer.close()
