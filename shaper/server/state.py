"""What `GET /v1/shaper/state` says: what was asked for, what holds, how each engine fares."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shaper.config.budget import loose_limits
from shaper.config.calendar_spans import iso
from shaper.config.model import ShaperConfig, loose_settings
from shaper.core.budget import BudgetChange, BudgetTerms
from shaper.core.types import PowerBudget
from shaper.errors import ControlError
from shaper.ipc.control_file import ControlRecord, EngineControl
from shaper.ipc.enforcement import unkept
from shaper.ipc.group_status import GroupStatus, group_object
from shaper.ipc.metric_table import SAMPLER_METRICS
from shaper.ipc.recording_state import RecordingState
from shaper.ipc.status_block import Status
from shaper.recording.format import path_of_rank
from shaper.server.control_service import Clocks, ControlService
from shaper.server.metrics import StatusCollector

_ENFORCED_INDEX = [name for name, _ in SAMPLER_METRICS].index("shaper_gpu_enforced_limit_watts")


def describe_state(desk: ControlService, config: ShaperConfig | None) -> dict[str, Any]:
    """The whole state as JSON values.

    Args:
        desk: of this API server.
        config: what is configured; None where this API server can't know it.
    """
    change: BudgetChange | None = None
    try:
        record = desk.file.read()
        change = None if record.budget is None else record.budget.change()
        asked: dict[str, Any] = _asked(record, desk.clocks)
    except ControlError as error:
        asked = {"error": str(error)}
    statuses = desk.statuses()
    if change is not None and change.expired(desk.clocks.wall(), desk.clocks.monotonic()):
        change = replace(change, terms=BudgetTerms())
    return {
        "asked": asked,
        "warnings": _warnings(change, config, statuses),
        "configured": None if config is None else _configured(config),
        "engines": [
            _engine(status, statuses, desk.clocks) | _recording(status, asked, config)
            for status in statuses
        ],
    }


def _warnings(
    change: BudgetChange | None, config: ShaperConfig | None, statuses: Sequence[Status]
) -> list[str]:
    """The limits that can never bind on the engines' GPUs, as their enforced limits are now."""
    found: list[str] = []
    for status in statuses:
        sampled = status.values.get("sampler", ())
        enforced_watts = sampled[_ENFORCED_INDEX] if sampled else math.nan
        if math.isnan(enforced_watts):
            continue
        gpu_count = int(str(status.info["gpu_count"]))
        if change is not None:
            for terms, where in ((change.terms, "budget"), (change.fallback, "fallback")):
                if terms is not None:
                    found += loose_limits(terms, gpu_count, enforced_watts, where)
        if config is not None:
            found += [f"configured {x}" for x in loose_settings(config, enforced_watts, gpu_count)]
    return list(dict.fromkeys(found))


def _asked(record: ControlRecord, clocks: Clocks) -> dict[str, Any]:
    """The control file, with its ends as people read them."""
    found = record.model_dump(mode="json", exclude_none=True, exclude={"run"})
    change = record.budget
    if change is not None:
        budget = found["budget"]
        wall, now = clocks.wall(), clocks.monotonic()
        left = math.inf
        if change.until_wall_seconds is not None:
            left = change.until_wall_seconds - wall
        if change.until_monotonic_seconds is not None:
            left = change.until_monotonic_seconds - now
        for key in ("until_wall_seconds", "until_monotonic_seconds"):
            budget.pop(key, None)
        if math.isfinite(left):
            budget |= {"ends_at": iso(wall + left), "seconds_left": round(max(0.0, left), 3)}
    if record.record is not None:
        until = found["record"].pop("until_monotonic_seconds")
        found["record"]["seconds_left"] = round(max(0.0, until - clocks.monotonic()), 3)
    return found


def _recording(
    status: Status, asked: dict[str, Any], config: ShaperConfig | None
) -> dict[str, Any]:
    """How the engine's last recording goes; the file's name while it is asked for."""
    state = RecordingState.from_values(status.values.get("recording", ()))
    if not state.sequence:
        return {}
    found = {
        "sequence": state.sequence,
        "phase": state.phase.name.lower(),
        "rows": state.rows,
        "bytes": state.bytes,
        "dropped": state.dropped,
    }
    if state.error_number:
        found["error"] = os.strerror(state.error_number)
    if "record" in asked:
        path = path_of_rank(asked["record"]["file"], int(str(status.info["engine"])))
        found["file"] = str(path if config is None else config.recording_directory / path)
    return {"recording": found}


def _configured(config: ShaperConfig) -> dict[str, Any]:
    said = {"limits", "gpu_limits", "ramp_watts_per_second", "shadow", "policy", "schedule"}
    said |= {"power_group", "group_limits", "host_overhead_watts", "psu_efficiency_ratio"}
    return config.model_dump(mode="json", include=said, exclude_none=True)


def budget_object(budget: PowerBudget) -> dict[str, Any]:
    """A budget in force, as JSON values."""
    return {
        "limits": [
            {"watts": limit.watts, "window_seconds": limit.window_seconds}
            for limit in budget.limits
        ],
        "ramp_watts_per_second": budget.ramp_watts_per_second,
    }


def _engine(status: Status, statuses: Sequence[Status], clocks: Clocks) -> dict[str, Any]:
    found: dict[str, Any] = {key: status.info.get(key) for key in ("engine", "gpu", "gpu_count")}
    found |= {key: status.info.get(key) for key in ("model", "policy", "idle_watts")}
    # Why this engine is vLLM's alone, whatever mode is asked for.
    found["passes_through"] = status.info.get("passes_through")
    found["limit_unkept"] = unkept(status)
    control = EngineControl.from_values(status.values.get("control", ()))
    if control is not None:
        left = control.next_change_seconds - clocks.monotonic()
        found |= {
            "mode": control.mode,
            "budget": budget_object(control.budget),
            "source": control.source.value,
            "acknowledged_sequence": control.seen_sequence,
            "followed_sequence": control.taken_sequence,
            "next_change_in_seconds": round(max(0.0, left), 3) if math.isfinite(left) else None,
        }
    group = GroupStatus.from_values(status.values.get("group", ()))
    if group is not None:
        found["group"] = group_object(status.info.get("group"), group)
    return found | {"metrics": _metrics(status)}


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
