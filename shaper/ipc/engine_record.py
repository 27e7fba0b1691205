"""What one engine says of itself, from its own process to all others: one record.

The sampler's thread writes it whole at each tick into the engine's status block; whoever asks
reads it back as the same types. `metric_table.py` has what `/metrics` shows of it.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter

from shaper.core.supervise.status import EngineStatus, Usage
from shaper.core.types import Decision, PowerState, Reason
from shaper.gpu.parts import Part
from shaper.gpu.sampler import SensorReport
from shaper.ipc.control_file import EngineControl
from shaper.ipc.flex import FlexQueue
from shaper.ipc.group_status import GroupStatus
from shaper.ipc.recording_state import RecordingState
from shaper.ipc.status_block import read_blocks

CHUNK_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(slots=True)
class SchedulerCounters:
    """What the scheduler's thread counts; another may read it meanwhile. NaN: not known."""

    steps: int = 0
    held: int = 0
    errors: int = 0
    forced: int = 0
    predicted_watts: float = math.nan
    predicted_seconds: float = math.nan
    predicted_joules: float = 0.0
    measured_watts: float = math.nan
    measured_seconds: float = math.nan
    seconds_gain: float = 1.0
    joules_gain: float = 1.0
    decisions: dict[Reason, int] = field(default_factory=lambda: dict.fromkeys(Reason, 0))
    chunks: list[int] = field(default_factory=lambda: [0] * (len(CHUNK_BUCKETS) + 1))
    """Steps with prompt tokens by `CHUNK_BUCKETS`, larger ones last."""
    chunk_tokens: int = 0

    def count(self, decision: Decision) -> None:
        """Enter one decision."""
        self.decisions[decision.reason] += 1
        self.held += decision.limits.binding
        self.forced += decision.reason is Reason.FORCED_OVER_BUDGET
        tokens = decision.prefill_tokens
        # Under the fallback cap a step runs without a prediction.
        if tokens or decision.decode_requests:
            self.steps += 1
        predicted = decision.predicted
        if predicted.seconds:
            self.predicted_watts = predicted.watts
            self.predicted_seconds = predicted.seconds
            self.predicted_joules += predicted.joules
        if tokens:
            self.chunks[bisect_left(CHUNK_BUCKETS, tokens)] += 1
            self.chunk_tokens += tokens


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """One engine at one tick. None: it has said nothing of it."""

    __pydantic_config__: ClassVar = ConfigDict(ser_json_inf_nan="constants")

    at_seconds: float | None = None
    """When it was written, of the host's monotonic clock."""
    power: PowerState | None = None
    """The GPUs together; without the single ones' samples once it is read."""
    sensor: SensorReport | None = None
    usage: Usage | None = None
    standing: EngineStatus | None = None
    control: EngineControl | None = None
    group: GroupStatus | None = None
    flex: FlexQueue | None = None
    recording: RecordingState = field(default_factory=RecordingState)
    counters: SchedulerCounters | None = None
    failures: Mapping[Part, int] = field(default_factory=dict)
    """Of each part of the tick, since the start."""


_ADAPTER = TypeAdapter(EngineRecord)


def packed(record: EngineRecord) -> bytes:
    """The record as a status block holds it."""
    return _ADAPTER.dump_json(record, exclude={"power": {"gpus"}, "standing": {"announcements"}})


@dataclass(frozen=True, slots=True)
class Status:
    """One engine as another process sees it."""

    info: Mapping[str, object]
    """What was said of it once, at its start."""
    record: EngineRecord = EngineRecord()
    read_seconds: float = field(default_factory=time.monotonic)
    """When its block was read."""


def read_statuses(run: str) -> list[Status]:
    """Of a run's engines, in their order. One whose record makes no sense, such as that of
    another version, is left out."""
    found = []
    for info, record in read_blocks(run):
        try:
            read = _ADAPTER.validate_json(record) if record else EngineRecord()
        except ValueError:
            continue
        found.append(Status(info, read))
    return found
