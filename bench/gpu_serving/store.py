"""What a comparison keeps in its folder, so that each stage finds what others left.

settings.json           what all runs share, with the traffic itself; written once
gpu.json                the GPU before the first server: readings, limits, driver
RUN/run.json            written last: a run without it is not done
RUN/recording.parquet   the engine's own recording of steps and readings
RUN/decisions.jsonl     the engine's own log of decisions
RUN/requests.parquet    what the client saw of each request
RUN/true.rank0          true power, of an emulated GPU only
RUN/server.log
virtual-PROFILE/RUN/    the same of a run in virtual time
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu_serving.plan import Run
from bench.harness.client import Replay, RequestRecord
from shaper.core.types import PowerLimit
from shaper.errors import ConfigError, TraceError
from shaper.recording.format import Recording, read_recording
from shaper.traffic.workload import TimedRequest, Workload

RECORDING, DECISIONS, REQUESTS = "recording.parquet", "decisions.jsonl", "requests.parquet"
TRUE_POWER = "true"


@dataclass(frozen=True, slots=True)
class Settings:
    """What all runs of a folder share."""

    emulate: str | None
    """The emulated GPU; None: a real one."""
    model: str
    workload: Workload
    runs: tuple[Run, ...]
    warm_up_seconds: float

    @property
    def source(self) -> str:
        """What the measurements are of; goes wherever they go."""
        return "a real GPU" if self.emulate is None else f"emulated {self.emulate}"

    def run(self, name: str) -> Run:
        """The run of that name.

        Raises:
            ConfigError: there is none.
        """
        for run in self.runs:
            if run.name == name:
                return run
        known = ", ".join(run.name for run in self.runs)
        raise ConfigError(f"there is no stage {name!r} here; the runs are {known}")


@dataclass(frozen=True, slots=True)
class RunMeta:
    """What is known of a run beside its files."""

    run: Run
    limit: PowerLimit | None
    source: str
    arguments: tuple[str, ...]
    started_seconds: float
    """Of the replay; monotonic, as all times of the run's files."""
    finished_seconds: float
    start_up_seconds: float
    about: Mapping[str, Any]
    """Versions, the client's cost, how busy the machine was."""


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run as it was read back."""

    meta: RunMeta
    recording: Recording
    replay: Replay
    folder: Path


def write_json(path: Path, value: object) -> None:
    """Write it whole or not at all: a half-written file is never read."""
    scratch = path.with_name(f"{path.name}.partial")
    scratch.write_text(json.dumps(value, indent=1) + "\n")
    scratch.replace(path)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        TraceError: it can't be read.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TraceError(f"{path} can't be read: {error}") from error


def write_settings(folder: Path, settings: Settings) -> None:
    """Keep what all runs share."""
    write_json(folder / "settings.json", dataclasses.asdict(settings))


def read_settings(folder: Path) -> Settings | None:
    """What an earlier call has kept, or None.

    Raises:
        TraceError: the file is there and can't be read.
    """
    path = folder / "settings.json"
    if not path.exists():
        return None
    data = read_json(path)
    try:
        load = data["workload"]
        requests = tuple(
            TimedRequest(**each | {"block_ids": tuple(each["block_ids"])})
            for each in load["requests"]
        )
        return Settings(
            **data
            | {
                "workload": Workload(load["name"], requests, load["seed"]),
                "runs": tuple(Run(**each) for each in data["runs"]),
            }
        )
    except (KeyError, TypeError) as error:
        raise TraceError(f"{path} is of another version: {error!r}") from error


def write_run(folder: Path, meta: RunMeta, replay: Replay) -> None:
    """Keep a run whose recording is there already; `run.json` goes last."""
    write_requests(folder / REQUESTS, replay.records)
    write_json(folder / "run.json", dataclasses.asdict(meta))


def is_done(folder: Path) -> bool:
    """Whether a run was finished there."""
    return (folder / "run.json").exists()


def read_meta(folder: Path) -> RunMeta:
    """What is known of a finished run.

    Raises:
        TraceError: it is not finished, or of another version.
    """
    data = read_json(folder / "run.json")
    try:
        limit = data["limit"]
        return RunMeta(
            **data
            | {
                "run": Run(**data["run"]),
                "limit": None if limit is None else PowerLimit(**limit),
                "arguments": tuple(data["arguments"]),
            }
        )
    except (KeyError, TypeError) as error:
        raise TraceError(f"{folder / 'run.json'} is of another version: {error!r}") from error


def read_run(folder: Path) -> StoredRun:
    """A finished run with its files.

    Raises:
        TraceError: it is not finished, or a file is missing or broken.
    """
    meta = read_meta(folder)
    records = read_requests(folder / REQUESTS)
    replay = Replay(
        records,
        meta.started_seconds,
        meta.finished_seconds,
        float(meta.about.get("client_cpu_seconds", 0.0)),
        float(meta.about.get("client_lag_seconds", 0.0)),
    )
    return StoredRun(meta, read_recording(folder / RECORDING), replay, folder)


def write_requests(path: Path, records: tuple[RequestRecord, ...]) -> None:
    """One row a request; `token_seconds` has the time of each chunk."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "due_seconds": record.due_seconds,
            "sent_seconds": record.sent_seconds,
            "prompt_tokens": record.request.prompt_tokens,
            "asked_tokens": record.request.output_tokens,
            "output_tokens": record.output_tokens,
            "token_seconds": record.token_seconds.tolist(),
            "error": record.error,
        }
        for record in records
    ]
    kinds = {"token_seconds": pa.list_(pa.float64()), "error": pa.string()}
    whole = ("prompt_tokens", "asked_tokens", "output_tokens")
    names = ("due_seconds", "sent_seconds", *whole, *kinds)
    schema = pa.schema(
        (name, kinds.get(name, pa.int64() if name in whole else pa.float64())) for name in names
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")


def read_requests(path: Path) -> tuple[RequestRecord, ...]:
    """What `write_requests` wrote.

    Raises:
        TraceError: the file is missing or no such file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
        return tuple(
            RequestRecord(
                TimedRequest(row["due_seconds"], row["prompt_tokens"], row["asked_tokens"]),
                row["due_seconds"],
                row["sent_seconds"],
                np.array(row["token_seconds"], dtype=np.float64),
                row["output_tokens"],
                row["error"],
            )
            for row in rows
        )
    except (OSError, KeyError, TypeError, pa.ArrowInvalid) as error:
        raise TraceError(f"{path}: cannot be read as requests: {error}") from error
