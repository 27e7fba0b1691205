"""What a study keeps in its folder, so that a later call goes on where one was stopped.

settings.json           what all stages share; written once
gpu.json                the GPU before anything ran: readings, limits, driver
STAGE/stage.json        written last: points and findings, or what is known of a server's run
STAGE/recording.parquet every step and every reading
STAGE/decisions.jsonl   a server's own log of decisions
STAGE/requests.json     what the client saw of each request
STAGE/true.rank0        true power, of an emulated GPU only
STAGE/server.log
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness.client import Replay, RequestRecord
from bench.harness.tables import without_nan
from bench.studies.gpu.plan import Run
from shaper.core.types import PowerLimit
from shaper.errors import TraceError
from shaper.traffic.synthetic import synthesise
from shaper.traffic.workload import TimedRequest, Workload

RECORDING, DECISIONS, REQUESTS = "recording.parquet", "decisions.jsonl", "requests.json"
DONE = "stage.json"
TRUE_POWER = "true"


@dataclass(frozen=True, slots=True)
class Settings:
    """What all stages of a folder share. The traffic is synthetic, and follows from these."""

    emulate: str | None
    """The emulated GPU; None: a real one."""
    model: str
    duration_seconds: float
    rate_hertz: float
    warm_up_seconds: float

    @property
    def source(self) -> str:
        """What the measurements are of; goes wherever they go."""
        return "a real GPU" if self.emulate is None else f"emulated {self.emulate}"

    @property
    def workload(self) -> Workload:
        """The conversation traffic of every server."""
        return synthesise(self.duration_seconds, self.rate_hertz, seed=0)


@dataclass(frozen=True, slots=True)
class RunMeta:
    """What is known of a server's run beside its files. Times are monotonic, as theirs."""

    run: Run
    limit: PowerLimit | None
    source: str
    arguments: tuple[str, ...]
    started_seconds: float
    finished_seconds: float
    start_up_seconds: float
    about: Mapping[str, Any]
    """Versions, the client's cost, how busy the machine was."""


def write_json(path: Path, value: object) -> None:
    """Write it whole or not at all: a half-written file is never read. NaN becomes null."""
    scratch = path.with_name(f"{path.name}.partial")
    scratch.write_text(json.dumps(without_nan(value), indent=1, default=str) + "\n")
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


def read_settings(folder: Path) -> Settings | None:
    """What an earlier call has kept, or None.

    Raises:
        TraceError: the file is there and can't be read.
    """
    path = folder / "settings.json"
    if not path.exists():
        return None
    try:
        return Settings(**read_json(path))
    except TypeError as error:
        raise TraceError(f"{path} is of another version: {error!r}") from error


def fresh_folder(folder: Path) -> Path:
    """The folder of a stage, without what an earlier try has left; the mark of a done one first."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (DONE, RECORDING, DECISIONS, REQUESTS, f"{TRUE_POWER}.rank0"):
        (folder / stale).unlink(missing_ok=True)
    return folder


def is_done(folder: Path) -> bool:
    """Whether a stage was finished there."""
    return (folder / DONE).exists() and bool(read_json(folder / DONE).get("done"))


def write_run(folder: Path, meta: RunMeta, replay: Replay) -> None:
    """Keep a server's run, whose recording is there already."""
    rows = [
        dataclasses.asdict(record) | {"token_seconds": record.token_seconds.tolist()}
        for record in replay.records
    ]
    write_json(folder / REQUESTS, rows)
    write_json(folder / DONE, {"done": True, **dataclasses.asdict(meta)})


def read_run(folder: Path) -> tuple[RunMeta, Replay]:
    """A finished server's run.

    Raises:
        TraceError: it is not finished, of another version, or a file is broken.
    """
    data, rows = read_json(folder / DONE), read_json(folder / REQUESTS)
    try:
        known = {"run": Run(**data["run"]), "arguments": tuple(data["arguments"])}
        limit = {"limit": PowerLimit(**data["limit"]) if data["limit"] else None}
        meta = RunMeta(**{k: v for k, v in data.items() if k != "done"} | known | limit)
        records = tuple(
            RequestRecord(
                **row
                | {"request": TimedRequest(**row["request"])}
                | {"token_seconds": np.array(row["token_seconds"], dtype=np.float64)}
            )
            for row in rows
        )
    except (KeyError, TypeError) as error:
        raise TraceError(f"{folder / DONE} is of another version: {error!r}") from error
    cost = [float(meta.about.get(f"client_{name}_seconds", 0.0)) for name in ("cpu", "lag")]
    return meta, Replay(records, meta.started_seconds, meta.finished_seconds, *cost)
