"""What `GET /v1/shaper/state` says: what was asked for, what holds, how each engine fares."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from pydantic import BaseModel

from shaper.config.budget import loose_limits
from shaper.config.calendar_spans import iso
from shaper.config.model import ShaperConfig, loose_settings
from shaper.core.budget import BudgetTerms
from shaper.core.types import PowerBudget, PowerLimit
from shaper.ipc.control_file import ControlRecord, Mode, Origin, Terms
from shaper.ipc.enforcement import enforcement_of
from shaper.ipc.engine_record import Status
from shaper.ipc.group_status import MemberStatus
from shaper.ipc.recording_state import RecordingState
from shaper.recording.format import path_of_rank
from shaper.server.metrics import StatusCollector


class AskedBudget(BaseModel):
    """The change of the budget that was asked for; its ends only where it has some."""

    terms: Terms
    fallback: Terms | None = None
    origin: Origin
    ends_at: str | None = None
    seconds_left: float | None = None


class AskedMode(BaseModel):
    """The mode that was asked for."""

    mode: Mode
    origin: Origin


class AskedRecording(BaseModel):
    """The recording that was asked for."""

    file: str
    seconds_left: float
    origin: Origin


class Asked(BaseModel):
    """The control file; a part that was not asked for is left out."""

    sequence: int | None = None
    budget: AskedBudget | None = None
    mode: AskedMode | None = None
    cleared: Origin | None = None
    """Who cleared the last change of the budget, while there is no newer one."""
    record: AskedRecording | None = None
    error: str | None = None
    """Why the control file is not believed; it is then left out."""


class GroupState(BaseModel):
    """The power group of an engine, as that engine sees it."""

    name: str | None
    limits: tuple[PowerLimit, ...]
    engines: tuple[MemberStatus, ...]


class LastRecording(BaseModel):
    """How the engine's last recording goes; the file's name while it is asked for."""

    sequence: int
    phase: str
    rows: int
    bytes: int
    dropped: int
    error: str | None = None
    file: str | None = None


class EngineState(BaseModel):
    """One engine. What it has not said yet is left out."""

    engine: int
    gpu: str | None
    gpu_count: int | None
    model: str | None
    policy: str | None
    idle_watts: float | None
    passes_through: str | None
    """Why this engine is vLLM's alone, whatever mode is asked for."""
    limit_unkept: str | None
    mode: Mode | None = None
    budget: PowerBudget | None = None
    source: str | None = None
    acknowledged_sequence: int | None = None
    followed_sequence: int | None = None
    next_change_in_seconds: float | None = None
    group: GroupState | None = None
    metrics: dict[str, int | float | dict[str, int | float]]
    recording: LastRecording | None = None


class State(BaseModel):
    """What was asked for, what holds, and how each engine fares."""

    sequence: int | None = None
    """Of the change that this answers; only in the answer to one."""
    asked: Asked
    warnings: list[str]
    """Of limits that can never bind."""
    configured: dict[str, Any] | None
    """The settings; null where this API server can't read them."""
    engines: list[EngineState]


def describe_state(
    record: ControlRecord | None,
    problem: str,
    statuses: Sequence[Status],
    config: ShaperConfig | None,
    wall_seconds: float,
    now_seconds: float,
) -> State:
    """The whole state. Fields that are not set are left out of the answer.

    Args:
        record: the control file; None where it is not believed.
        problem: why it is not.
        statuses: of the engines of this host.
        config: what is configured; None where this API server can't know it.
        wall_seconds: since 1970.
        now_seconds: of the monotonic clock.
    """
    asked = Asked(error=problem)
    if record is not None:
        asked = _asked(record, wall_seconds, now_seconds)
    return State(
        asked=asked,
        warnings=_warnings(record, config, statuses, wall_seconds, now_seconds),
        configured=None if config is None else _configured(config),
        engines=[_engine(status, asked, config, now_seconds) for status in statuses],
    )


def _warnings(
    record: ControlRecord | None,
    config: ShaperConfig | None,
    statuses: Sequence[Status],
    wall_seconds: float,
    now_seconds: float,
) -> list[str]:
    """The limits that can never bind on the engines' GPUs, as their enforced limits are now."""
    change = None if record is None else record.budget
    if change is not None and change.expired(wall_seconds, now_seconds):
        change = replace(change, terms=BudgetTerms())
    found: list[str] = []
    for status in statuses:
        power = status.record.power
        enforced_watts = None if power is None else power.enforced_limit_watts
        if enforced_watts is None:
            continue
        gpu_count = int(str(status.info["gpu_count"]))
        if change is not None:
            for terms, where in ((change.terms, "budget"), (change.fallback, "fallback")):
                if terms is not None:
                    found += loose_limits(terms, gpu_count, enforced_watts, where)
        if config is not None:
            found += [f"configured {x}" for x in loose_settings(config, enforced_watts, gpu_count)]
    return list(dict.fromkeys(found))


def _asked(record: ControlRecord, wall_seconds: float, now_seconds: float) -> Asked:
    """The control file, with its ends as people read them."""
    found: dict[str, Any] = {"sequence": record.sequence}
    budget, origins = record.budget, record.origins
    if budget is not None:
        ends: dict[str, Any] = {}
        left = math.inf
        if budget.end_wall_seconds is not None:
            left = budget.end_wall_seconds - wall_seconds
        if budget.end_seconds is not None:
            left = budget.end_seconds - now_seconds
        if math.isfinite(left):
            ends = {"ends_at": iso(wall_seconds + left), "seconds_left": _left(left)}
        if budget.fallback is not None:
            ends["fallback"] = budget.fallback
        found["budget"] = AskedBudget(terms=budget.terms, origin=origins["budget"], **ends)
    elif "budget" in origins:
        found["cleared"] = origins["budget"]
    if record.mode is not None:
        found["mode"] = AskedMode(mode=record.mode, origin=origins["mode"])
    if record.record is not None:
        left = _left(record.record.until_monotonic_seconds - now_seconds)
        found["record"] = AskedRecording(
            file=record.record.file, seconds_left=left, origin=origins["record"]
        )
    return Asked(**found)


def _left(seconds: float) -> float:
    return round(max(0.0, seconds), 3)


def _configured(config: ShaperConfig) -> dict[str, Any]:
    said = {"limits", "gpu_limits", "ramp_watts_per_second", "shadow", "policy", "schedule"}
    said |= {"power_group", "group_limits", "host_overhead_watts", "psu_efficiency_ratio"}
    return config.model_dump(mode="json", include=said, exclude_none=True)


def _engine(
    status: Status, asked: Asked, config: ShaperConfig | None, now_seconds: float
) -> EngineState:
    info = ("engine", "gpu", "gpu_count", "model", "policy", "idle_watts", "passes_through")
    found: dict[str, Any] = {key: status.info.get(key) for key in info}
    enforcement = enforcement_of(status)
    control = enforcement.control
    if control is not None:
        left = control.next_change_seconds - now_seconds
        found |= {
            "mode": control.mode,
            "budget": control.budget,
            "source": control.source.value,
            "acknowledged_sequence": control.seen_sequence,
            "followed_sequence": control.taken_sequence,
            "next_change_in_seconds": _left(left) if math.isfinite(left) else None,
        }
    group = status.record.group
    if group is not None:
        name = status.info.get("group")
        found["group"] = {"name": name, "limits": group.limits, "engines": group.members}
    recording = status.record.recording
    if recording.sequence:
        found["recording"] = _recording(recording, int(str(status.info["engine"])), asked, config)
    return EngineState(limit_unkept=enforcement.unkept, metrics=_metrics(status), **found)


def _recording(
    state: RecordingState, rank: int, asked: Asked, config: ShaperConfig | None
) -> LastRecording:
    found = asdict(state) | {"phase": state.phase.name.lower()}
    number = found.pop("error_number")
    if number:
        found["error"] = os.strerror(number)
    if asked.record is not None:
        path = path_of_rank(asked.record.file, rank)
        found["file"] = str(path if config is None else config.recording_directory / path)
    return LastRecording(**found)


def _metrics(status: Status) -> dict[str, Any]:
    """What `/metrics` shows of this engine, without the prefix and without buckets."""
    found: dict[str, Any] = {}
    for family in StatusCollector(lambda: [status]).collect():
        for sample in family.samples:
            labels = [value for name, value in sample.labels.items() if name != "engine"]
            if sample.name.endswith("_bucket") or len(labels) > 1:
                continue
            if not math.isfinite(sample.value):
                continue  # JSON has no word for it
            name = sample.name.removeprefix("shaper_")
            if labels:
                found.setdefault(name, {})[labels[0]] = sample.value
            else:
                found[name] = sample.value
    return found
